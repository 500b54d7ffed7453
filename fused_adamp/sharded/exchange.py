"""The collectives of a step whose parameters lie on several ranks: one packed all_reduce for each group of ranks.

A step of sharded parameters goes

    measure   every backend writes its shares of the sums: fused_adamp/batch.py, Shared
    exchange  shares become sums, group by group; sums become verdicts: decision and projection of every parameter
    step      every backend steps by the verdicts

The shares of a parameter are a record. Each row that is split has a record of its own. When the sums of rows are
complete, they are folded into the parameter's record. Everything that is sent is summed, including a header with
errors and a hash of the options: sharded/header.py.
"""

from __future__ import annotations

import hashlib
import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_adamp.batch import COLUMNS, PROJECTIONS, SHARES, UNDECIDED, Need, Sharing
from fused_adamp.reference import Decision
from fused_adamp.sharded.header import DIGEST, Header, in_order
from fused_adamp.sharded.layout import schedule
from fused_adamp.sharded.placement import placement_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch.distributed import ProcessGroup

    from fused_adamp.bucket import Bucket
    from fused_adamp.sharded.layout import Layout

__all__ = ["Exchange", "Outcome"]

_RECORD = ("fails", "present", "pg", "gg", "pp", "pu")
"""Columns of a parameter's record: ranks on which a row fails the test, ranks that have a gradient, and sums."""


class Outcome(NamedTuple):
    """The sums of all ranks' shares.

    Attributes:
        header: ``(len(header),)`` float64 on the device.
        records: ``(n, len(_RECORD))`` float64, one for each member.
        rows: ``(rows, len(ROW_SHARES))`` float64, of the members' rows that are split.
    """

    header: Tensor
    records: Tensor
    rows: Tensor


class _Fold(NamedTuple):
    """Members with equally many split rows, which are complete after a collective: ``(m,)`` and ``(m, R)``."""

    members: Tensor
    rows: Tensor


class _Collective(NamedTuple):
    """One all_reduce: the indices of the records and rows that are sent, and the folds that follow it."""

    group: ProcessGroup
    records: Tensor
    rows: Tensor
    folds: list[_Fold]


class _Piece(NamedTuple):
    """A part of a parameter on this rank that is a member of a bucket. Most parameters have one.

    Attributes:
        p, number: the member, and the piece's index in its bucket.
        group, channel_dim: of the member.
        is_matrix: whether the member can be projected.
        layout: where the piece lies.
        place: of its shares among those of all buckets.
        rows: if they are split, the places of its rows among those of all buckets.
    """

    p: Tensor
    number: int
    group: int
    channel_dim: int | tuple[int, ...]
    is_matrix: bool
    layout: Layout
    place: int
    rows: range


def _pieces(buckets: Sequence[Bucket]) -> dict[Tensor, list[_Piece]]:
    """The pieces of every parameter that lies on several ranks."""
    pieces: dict[Tensor, list[_Piece]] = {}
    start = row_start = 0
    for bucket in buckets:
        assert bucket.shared is not None, "nobody shares the bucket"
        columns = (bucket.table[:, COLUMNS.index(name)].tolist() for name in ("projected", "first_row", "rows"))
        members = zip(bucket.params, bucket.layouts, bucket.groups, *columns, strict=True)
        for i, (p, layout, group, projected, first_row, count) in enumerate(members):
            is_matrix = bool(projected) and layout.rows * layout.cols > 0
            first = row_start + first_row
            rows = range(first, first + count * (layout.sharing is Sharing.SPLIT))
            if layout.sharing:
                piece = _Piece(p, i, group, bucket.key.channel_dim, is_matrix, layout, start + i, rows)
                pieces.setdefault(p, []).append(piece)
        start += len(bucket.params)
        row_start += len(bucket.shared.rows)
    return pieces


class Exchange:
    """The collectives of one optimizer's sharded parameters.

    Attributes:
        members: the parameters that lie on several ranks, in the order of the parameter groups.
        pieces: their members of buckets on this rank: parameter, and index in its bucket.
        lines: properties of the parameters that must be the same on all ranks, as text. Hyperparameters are not in it.
        layouts: for each parameter, the layout of its first piece.
        groups: the indices of the parameter groups that they are in.
        device: the device on which sums are computed.
        measured: the last outcome of clipping, as long as its shares are still in the tables. A step that uses it adds
            up these shares again.
    """

    def __init__(self, buckets: Sequence[Bucket], labels: dict[Tensor, str]) -> None:
        """``labels``: all parameters in the order of the parameter groups, with their names."""
        # No bucket is kept, so that one that goes can free its storage while the ranks still agree on this.
        buckets = [bucket for bucket in buckets if bucket.shared is not None]
        self._shared = [bucket.shared for bucket in buckets if bucket.shared is not None]
        self._results = [bucket.results for bucket in buckets]
        self._decisions = [bucket.decisions for bucket in buckets]
        here = _pieces(buckets)
        self.members = [p for p in labels if p in here]
        pieces = [piece for p in self.members for piece in here[p]]
        self.pieces = [(piece.p, piece.number) for piece in pieces]
        firsts = [here[p][0] for p in self.members]
        self.device = buckets[0].key.device
        self.layouts = [first.layout for first in firsts]
        self.lines = [
            f"{labels[p]}: {placement_of(p).in_words(p)}, {p.dtype}, channel_dim {first.channel_dim}"
            for p, first in zip(self.members, firsts, strict=True)
        ]
        self._hashed = hashlib.blake2b("\n".join(self.lines).encode()).hexdigest()
        self._sizes = [len(bucket.params) for bucket in buckets]
        self._row_counts = [len(shared.rows) for shared in self._shared]
        self._groups = [first.group for first in firsts]
        self.groups = sorted(set(self._groups))
        self._is_matrix = self._flags(first.is_matrix for first in firsts)
        numbers = [[layout.cols, layout.rows * layout.cols] for layout in self.layouts]
        self._dims = torch.tensor(numbers, dtype=torch.float64, device=self.device).reshape(-1, 2)
        self._holders = torch.tensor([x.holders for x in self.layouts], dtype=torch.float64, device=self.device)
        self._find_pieces(pieces, [len(here[p]) for p in self.members])
        self._find_rows([here[p] for p in self.members])
        self._collectives = self._plan()
        self._options: list[tuple[float, float, float]] = []
        self._scale: Any = 1.0
        self._unread: list[tuple[Tensor, Any]] = []
        self.measured: Outcome | None = None

    # Once.

    def _indices(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor([*numbers], dtype=torch.int64, device=self.device)

    def _flags(self, flags: Iterable[bool]) -> Tensor:
        return torch.tensor([*flags], dtype=torch.bool, device=self.device)

    def _find_pieces(self, pieces: Sequence[_Piece], counts: Sequence[int]) -> None:
        """``counts``: how many each member has."""
        self._places = self._indices(piece.place for piece in pieces)
        self._is_elsewhere = self._flags(not piece.layout.holds for piece in pieces)
        self._piece_is_split = self._flags(piece.layout.sharing is Sharing.SPLIT for piece in pieces)
        self._owners = self._indices(i for i, count in enumerate(counts) for _ in range(count))
        """The member of each piece, by index."""
        ends = [*accumulate(counts)]
        most = range(max(counts))
        self._pieces_of = self._indices(
            end - count + i if i < count else len(pieces) for end, count in zip(ends, counts, strict=True) for i in most
        ).reshape(-1, len(most))
        """The pieces of each member, by index, padded to the same number with the index after the last piece."""

    def _find_rows(self, members: Sequence[Sequence[_Piece]]) -> None:
        self._is_split = self._flags(bool(layout.col_groups) for layout in self.layouts)
        self._split = [i for i, layout in enumerate(self.layouts) if layout.col_groups]
        """The members of which rows are split."""
        self._rows_of_member: dict[int, range] = {}
        places, slots, end = list[int](), list[int](), 0
        for i in self._split:
            start, end = end, end + self.layouts[i].split_rows
            self._rows_of_member[i] = range(start, end)
            for piece in members[i]:
                places += piece.rows
                slot = start + piece.layout.first_split_row
                slots += range(slot, slot + len(piece.rows))
        self._row_places, self._slots = self._indices(places), self._indices(slots)
        """For each split row here, its place among the buckets' rows and its place among those of all ranks."""
        self._row_owners = self._indices(i for i in self._split for _ in self._rows_of_member[i])

    def _row_numbers(self, members: Iterable[int]) -> Tensor:
        return self._indices(row for i in members for row in self._rows_of_member[i])

    def _plan(self) -> list[_Collective]:
        columns = [list(layout.col_groups) for layout in self.layouts]
        rows = [list(layout.row_groups) for layout in self.layouts]
        collectives = []
        for group in schedule(self.layouts):
            by_rows = [i for i in self._split if group in columns[i]]
            by_record = [*by_rows, *(i for i, of in enumerate(rows) if group in of and not columns[i])]
            for i in by_record:
                (columns if columns[i] else rows)[i].remove(group)
            folded: dict[int, list[int]] = {}
            for i in by_rows:
                if not columns[i]:
                    folded.setdefault(len(self._rows_of_member[i]), []).append(i)
            folds = [_Fold(self._indices(of), self._row_numbers(of).reshape(len(of), -1)) for of in folded.values()]
            collectives.append(_Collective(group, self._indices(by_record), self._row_numbers(by_rows), folds))
        return collectives

    def header(self, lines: Sequence[str], **flags: bool) -> Header:
        """This rank's header, with a hash of its parameters and ``lines``. ``flags`` are failed, moved and stale."""
        return Header.of([self._hashed, *lines], **flags)

    def disagreement(self, lines: Sequence[str], *, replicas: bool = False) -> str:
        """An error message with the first line that differs between ranks, and the ranks. All ranks must call this."""
        everybody = {dist.get_rank(): list(lines)}
        groups = in_order(self.layouts, replicas=replicas)
        for group in groups * len(groups):  # so that news reaches ranks that share no group
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, everybody, group=group)
            everybody = {rank: theirs for part in parts for rank, theirs in part.items()}
        first = min(everybody)
        for rank, theirs in sorted(everybody.items()):
            for i in range(max(len(theirs), len(everybody[first]))):
                a, b = (of[i] if i < len(of) else "nothing more" for of in (everybody[first], theirs))
                if a != b:
                    return (
                        f"the ranks that share parameters have different ones, or other hyperparameters: rank {first} "
                        f"has {a}, rank {rank} has {b}. Give every rank the same"
                    )
        raise AssertionError("the ranks' digests differ, their words do not")

    # In every step.

    def set_options(self, options: list[tuple[float, float, float]]) -> None:
        """Takes eps, delta and the projection, an index of PROJECTIONS, of each parameter group."""
        if options == self._options:
            return
        self._options = options
        rows = torch.tensor([options[group] for group in self._groups], dtype=torch.float64, device=self.device)
        self._eps, self._delta, projection = rows.unbind(dim=1)
        self._forced = projection.remainder(len(Decision)) * self._is_matrix  # "auto" and "none" are 0, no decision
        self._tested = (projection == PROJECTIONS.index("auto")) & (self._delta > 0) & self._is_matrix
        layer, channel = (self._forced == decision for decision in (Decision.LAYER, Decision.CHANNEL))
        self._dotted = self._tested | layer | (channel & self._is_split)

    def ask_afresh(self, what: Need) -> None:
        """Forgets all shares and asks everything anew."""
        self.measured = None
        for shared in self._shared:
            shared.shares.zero_()
            shared.rows.zero_()
        self.ask(what)

    def ask(self, what: Need, only: Tensor | None = None) -> None:
        """Writes the needs of the backends' next measurement: those of ``what`` that each member needs.

        TEST and DOT are asked only of members in the mask ``only``, if it is given. SQUARE is asked of all parameters,
        also of those that are whole on this rank.
        """
        needs = self._tested * (what & Need.TEST) + self._dotted * (what & Need.DOT)
        if only is not None:
            needs = torch.where(only, needs, 0)
        everywhere = torch.full((sum(self._sizes),), float(what & Need.SQUARE), dtype=torch.float64, device=self.device)
        everywhere[self._places] += needs[self._owners]
        for shared, part in zip(self._shared, self._parts(everywhere), strict=True):
            shared.needs.copy_(part)

    def mask(self, params: Sequence[Tensor]) -> Tensor:
        """For each member, whether it is among ``params``: ``(n,)`` bool."""
        wanted = {id(p) for p in params}
        return self._upload([id(p) in wanted for p in self.members]).bool()

    def undecided(self, known: Outcome, scale: Tensor) -> Tensor:
        """A mask of the members whose p.u is needed, from the test's sums and the scale: ``(n,)`` bool.

        A member with whole rows does not need it if all rows pass at any scale, or if the layer does not pass.
        """
        self._scale = scale
        layer = self.layer_passes(known)
        owners = self._row_owners
        fails = ~(self._cosine(known.rows, self._dims[owners, 0], owners) < 1)
        here_fail = torch.zeros_like(layer, dtype=torch.float64).scatter_reduce(0, owners, fails.double(), "amax") > 0
        by_test = torch.where(self._is_split, layer | ~here_fail, layer & (known.records[:, 0] > 0))
        return by_test | ~self._tested | self._missing(known)

    def _parts(self, table: Tensor) -> Sequence[Tensor]:
        """Splits a table with one row for each member of all buckets into one table per bucket."""
        return torch.split(table, self._sizes)

    def _all_shares(self) -> Tensor:
        """The shares of all members, bucket by bucket: ``(P of all buckets, len(SHARES))``."""
        return torch.cat([shared.shares.to(self.device) for shared in self._shared])

    def _upload(self, numbers: Sequence[float]) -> Tensor:
        """Copies numbers to the device as float64, without a sync."""
        here = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return here.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else here

    def reduce(self, header: Header, found_inf: Tensor | None, present: Sequence[bool], scale: Any) -> Outcome:
        """Adds up all ranks' shares, headers and found_inf.

        Args:
            header: this rank's.
            found_inf: GradScaler's, of one element on any device; None is 0.
            present: for each member, whether it has a gradient on this rank.
            scale: a further factor of the gradients, which the shares do not include yet; None if it is not known. Then
                a row counts as failed if it fails at any scale.
        """
        self._scale = 1.0 if scale is None else scale
        shares, owners = self._all_shares()[self._places], self._owners
        limit = shares[:, SHARES.index("limit")]
        passes = limit.isinf() if scale is None else (scale < limit) & ((scale > 0) | (self._eps[owners] > 0))
        fails = (~passes & self._tested[owners]).double()
        first, here = torch.split(self._upload([*header.numbers(), *present]), [len(header.numbers()), len(present)])
        sums = [shares[:, SHARES.index(name)] for name in _RECORD[2:]]
        pieces = torch.stack([fails, torch.zeros_like(fails), *sums], dim=1)
        for name in ("fails", "pg", "pp", "pu"):  # come from complete rows
            pieces[:, _RECORD.index(name)].masked_fill_(self._piece_is_split, 0.0)
        records = self._by_member(pieces)
        records[:, 0].masked_fill_(here == 0, 0.0)
        records[:, 1] = here
        rows = self._in_slots(torch.cat([shared.rows.to(self.device) for shared in self._shared])[self._row_places])
        if found_inf is not None:
            first[Header._fields.index("found_inf")] = found_inf.to(self.device).reshape(())
        return self._reduce(Outcome(first, records, rows), self._fold)

    def _by_member(self, pieces: Tensor) -> Tensor:
        """For each member, the sum of its pieces' rows: ``(pieces, ...)`` to ``(n, ...)``."""
        return torch.cat([pieces, torch.zeros_like(pieces[:1])])[self._pieces_of].sum(dim=1)

    def _in_slots(self, rows: Tensor) -> Tensor:
        """This rank's split rows at their places among all ranks' split rows; 0 for rows of other ranks."""
        return rows.new_zeros(len(self._row_owners), rows.size(1)).index_copy(0, self._slots, rows)

    def _reduce(self, outcome: Outcome, fold: Callable[[Tensor, Tensor], Tensor]) -> Outcome:
        header, records, rows = outcome
        for collective in self._collectives:
            parts = [header, records[collective.records], rows[collective.rows]]
            packed = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(packed, group=collective.group)
            header, some_records, some_rows = torch.split(packed, [part.numel() for part in parts])
            records[collective.records] = some_records.view(parts[1].shape)
            rows[collective.rows] = some_rows.view(parts[2].shape)
            for members, where in collective.folds:
                records[members] += fold(members, rows[where])
        return Outcome(header, records, rows)

    def _fold(self, members: Tensor, rows: Tensor) -> Tensor:
        """The summands for the members' records, from the sums of complete rows ``(m, R, len(ROW_SHARES))``."""
        passes = self._cosine(rows, self._dims[members, 0], members) < 1  # which no NaN is
        fails = (~passes.all(dim=1) & self._tested[members]).double()
        pg, _, pp, pu = rows.sum(dim=1).unbind(dim=1)
        nothing = torch.zeros_like(fails)
        return torch.stack([fails, nothing, pg, nothing, pp, pu], dim=1)

    def _cosine(self, sums: Tensor, dim: Tensor, members: Tensor) -> Tensor:
        """The cosine over its threshold of views of members, from their sums ``(m, ..., len(ROW_SHARES))``."""
        shape = (-1, *[1] * (sums.ndim - 2))
        eps, delta, dim = (t.reshape(shape) for t in (self._eps[members], self._delta[members], dim))
        pg, gg, pp, _ = sums.unbind(dim=-1)
        norms = torch.maximum(pp.sqrt(), eps) * torch.maximum(self._scale * gg.sqrt(), eps)
        cosine: Tensor = self._scale * pg.abs() / norms / (delta / dim.sqrt())
        return cosine

    def layer_passes(self, outcome: Outcome) -> Tensor:
        everyone = torch.arange(len(self.members), device=self.device)
        return self._cosine(outcome.records[:, 2:], self._dims[:, 1], everyone) < 1

    def judge(self, outcome: Outcome) -> None:
        """Writes verdicts, results and decisions of all members. Forgets :attr:`measured`, which the step outdates."""
        self.measured = None
        records, rows = outcome.records, outcome.rows
        passed = torch.where(records[:, 0] == 0, Decision.CHANNEL, self.layer_passes(outcome) * int(Decision.LAYER))
        decisions = torch.where(self._tested, passed, self._forced)
        c = _projection(records[:, 5], records[:, 4], self._eps)
        layer_c = torch.where(decisions == Decision.LAYER, c, 0.0)
        verdicts = torch.full((sum(self._sizes), 2), UNDECIDED, dtype=torch.float64, device=self.device)
        verdicts[self._places] = torch.stack([decisions, layer_c], dim=1)[self._owners]
        owners = self._row_owners
        row_c = _projection(rows[:, 3], rows[:, 2], self._eps[owners])
        by_row = torch.where(decisions[owners] == Decision.CHANNEL, row_c, layer_c[owners])
        all_rows = torch.zeros(sum(self._row_counts), dtype=torch.float64, device=self.device)
        all_rows[self._row_places] = by_row[self._slots]
        by_bucket = torch.split(all_rows, self._row_counts)
        for shared, verdict, row_projections in zip(self._shared, self._parts(verdicts), by_bucket, strict=True):
            shared.verdicts.copy_(verdict)
            shared.row_projections.copy_(row_projections)
        self._report(outcome, decisions)

    def square_norm(self, outcome: Outcome) -> Tensor:
        """The sum of the squares of all gradients, of whole parameters too: 0-dim float64."""
        whole_here = self._all_shares()[:, SHARES.index("gg")].index_fill(0, self._places, 0.0)
        return whole_here.sum() + outcome.records[:, _RECORD.index("gg")].sum()

    def norms(self, grads: dict[Tensor, Tensor], norm_type: float) -> list[Tensor]:
        """The norms of whole gradients, 0-dim float64 each, from their local parts in ``grads``.

        First those of the members, then those of the other parameters in ``grads``.
        """
        op, nothing = dist.ReduceOp.SUM, torch.zeros((), dtype=torch.float64, device=self.device)
        if math.isinf(norm_type):
            op = dist.ReduceOp.MAX if norm_type > 0 else dist.ReduceOp.MIN
            nothing = nothing if norm_type > 0 else nothing + math.inf

        def power(g: Tensor) -> Tensor:
            x = g.abs().double()
            if math.isinf(norm_type):
                return nothing if g.numel() == 0 else x.max() if norm_type > 0 else x.min()
            return (x != 0).sum().double() if norm_type == 0 else x.pow(norm_type).sum()

        powers = {p: power(g).to(self.device) for p, g in grads.items()}
        ours = torch.stack([powers.pop(p, nothing) for p in self.members])
        totals = [*self.over_ranks(ours, op).unbind(), *powers.values()]
        return totals if math.isinf(norm_type) or norm_type == 0 else [total.pow(1 / norm_type) for total in totals]

    def over_ranks(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduces ``(n, ...)`` values, one for each member, over the ranks that share it."""
        values = values.to(self.device, copy=True)
        for group in dict.fromkeys(collective.group for collective in self._collectives):
            sent = self._indices(i for i, x in enumerate(self.layouts) if group in (*x.row_groups, *x.col_groups))
            packed = values[sent]
            dist.all_reduce(packed, op, group=group)
            values[sent] = packed
        return values

    def over_pieces(self, values: Tensor) -> Tensor:
        """The sums of ``(pieces, ...)`` values over the members' pieces and the ranks that share them."""
        return self.over_ranks(self._by_member(values.to(self.device)))

    def projections(self, dots: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each piece, c of each row here and c of the layer, from ``(R, 2)`` p.u and p.p of its rows here."""
        dots = [rows.to(self.device) for rows in dots]
        sums = torch.stack([rows.sum(dim=0) for rows in dots]).masked_fill(self._piece_is_split[:, None], 0.0)
        is_split = self._piece_is_split.tolist()
        split = [rows for rows, of in zip(dots, is_split, strict=True) if of]
        empty = torch.zeros(0, 2, dtype=torch.float64, device=self.device)
        ours = Outcome(empty.flatten(), self._by_member(sums), self._in_slots(torch.cat([empty, *split])))
        outcome = self._reduce(ours, lambda _, rows: rows.sum(dim=1))
        complete = iter(torch.split(outcome.rows[self._slots], [len(rows) for rows in split]))
        by_row = [next(complete) if of else rows for rows, of in zip(dots, is_split, strict=True)]
        layers = outcome.records[self._owners]
        return [(of[:, 0] / of[:, 1], layer[0] / layer[1]) for of, layer in zip(by_row, layers, strict=True)]

    def tell(self, header: Header) -> Header:
        """Takes part in a step's collectives with only a header. Returns the sum of all headers."""
        self.ask_afresh(Need(0))
        return Header.read(self.reduce(header, None, [False] * len(self.members), None).header.tolist())

    # Results of the collectives. On a GPU no rank waits to read them: a step that must not be taken changes nothing on
    # any rank, and the next one raises the error.

    @property
    def asynchronous(self) -> bool:
        return self.device.type == "cuda"

    def check(self, outcome: Outcome, lines: Sequence[str]) -> None:
        """Raises an error, the same on all ranks, if a rank has failed or the ranks differ.

        On a GPU it does not wait for this step's outcome and raises the errors of earlier steps.
        """
        if not self.asynchronous:
            header = Header.read(outcome.header.tolist())
            header.check_failure()
            if not header.agreed:
                raise ValueError(self.disagreement([*self.lines, *lines]))
            return
        read = [told.tolist() for told, event in self._unread if event.query()]
        self._unread = self._unread[len(read) :]  # one after the other
        for *numbers, missing in read:
            header = Header.read(numbers)
            header.check_failure()
            if header.stale or missing or not header.agreed:
                why = "had different ones, or other hyperparameters: give every rank the same"
                if header.stale:
                    why = "had changed gradients after clip_grad_norm_, some of them: change them on all, or before"
                elif missing:
                    why = "had gradients of one, some of them: give the others zeros"
                raise ValueError(f"in an earlier step, which moved nothing, the ranks that share parameters {why}")
        told = torch.cat([outcome.header, self._missing(outcome).any().reshape(1)]).to("cpu", non_blocking=True)
        self._unread.append((told, _event()))

    def is_stale(self, outcome: Outcome) -> bool:
        """Whether a rank's gradients have changed since they were measured for clipping."""
        return not self.asynchronous and bool(outcome.header[Header._fields.index("stale")])

    def missing(self, outcome: Outcome) -> list[Tensor]:
        """The members that have a gradient on some ranks only."""
        if self.asynchronous:
            return []
        return [p for p, some in zip(self.members, self._missing(outcome).tolist(), strict=True) if some]

    def _missing(self, outcome: Outcome) -> Tensor:
        present = outcome.records[:, _RECORD.index("present")]
        return (present > 0) & (present < self._holders)

    def found_inf(self, outcome: Outcome) -> Tensor:
        """GradScaler's found_inf over all ranks, ``(1,)`` float64: if it is not 0, no rank changes anything.

        On a GPU it also counts ranks that have failed or differ.
        """
        header = outcome.header
        found = header[Header._fields.index("found_inf")]
        if self.asynchronous:
            ranks, failed, moved, stale = header[:4].unbind()
            sums, squares = torch.split(header[5:], DIGEST)
            broken = (ranks * squares != sums * sums).any() | self._missing(outcome).any()
            found = found + failed + moved + stale + broken
        return found.reshape(1)

    def _report(self, outcome: Outcome, decisions: Tensor) -> None:
        """Writes :attr:`Bucket.results` of members that were tested; the cosine is the largest of this rank's rows.

        Also writes the decisions on members that have no elements on this rank, which no backend steps.
        """
        records, owners = outcome.records, self._row_owners
        by_piece = self._all_shares()[self._places, SHARES.index("cosine")].masked_fill(self._piece_is_split, 0.0)
        by_row = self._cosine(outcome.rows, self._dims[owners, 0], owners).nan_to_num(math.inf, posinf=math.inf)
        cosines = torch.zeros_like(records[:, 0]).scatter_reduce(0, self._owners, by_piece, "amax")
        cosines = cosines.scatter_reduce(0, owners, by_row, "amax")
        found = torch.stack([cosines, records[:, 4].sqrt()], dim=1)
        found.masked_fill_(~self._tested[:, None], math.nan)
        all_results = torch.cat([results.to(self.device) for results in self._results])
        stepped = (records[:, 1:2] > 0)[self._owners]
        all_results[self._places] = torch.where(stepped, found[self._owners], all_results[self._places])
        all_decisions = torch.cat([of_bucket.to(self.device) for of_bucket in self._decisions])
        before, now = all_decisions[self._places], decisions[self._owners].byte()
        decided = self._is_elsewhere & stepped[:, 0] & (self.found_inf(outcome) == 0)
        all_decisions[self._places] = torch.where(decided, now, before)
        for results, part in zip(self._results, self._parts(all_results), strict=True):
            results.copy_(part)
        for of_bucket, part in zip(self._decisions, self._parts(all_decisions), strict=True):
            of_bucket.copy_(part)


def _event() -> Any:
    """An event that is complete when all work on the current stream so far is done."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _projection(pu: Tensor, pp: Tensor, eps: Tensor) -> Tensor:
    """The projection's factor c of p, from p.u and p.p."""
    return pu / (pp.sqrt() + eps).square()
