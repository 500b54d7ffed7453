"""Parameters to buckets: the row and tile table, new state, and one step's tensors gathered for a backend.

A bucket holds the parameters of one backend, device and dtype, whatever their parameter group. A backend walks it tile
by tile through the table below, which is built once. The tensors themselves are looked up afresh in every step, so a
parameter or state that was swapped, loaded or moved is used where it lies, and :func:`first_stale` tells when it no
longer fits the table.
"""

from __future__ import annotations

import enum
import math
from operator import is_
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_adamp.fake import has_numbers
from fused_adamp.reference import rows_first
from fused_adamp.sharding import Sharing, is_distributed, layouts_of, like, local, slice_of

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from weakref import ref

    from fused_adamp.backends import Backend
    from fused_adamp.reference import Decision

__all__ = [
    "ABSENT",
    "COLUMNS",
    "FLOATING",
    "PROJECTIONS",
    "RESULTS",
    "ROW_SHARES",
    "SHARES",
    "UNDECIDED",
    "Batch",
    "Bucket",
    "BucketKey",
    "Need",
    "Rule",
    "Scalars",
    "Shared",
    "are_same",
    "first_stale",
    "has_storage",
    "overlaps",
    "place_of",
    "rows_cols",
    "span_of",
]

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of parameters, gradients and state."""

COLUMNS = (
    *("group", "projected", "rows", "cols", "tile_rows", "tile_cols", "first_tile"),
    *("sharing", "first_row", "first_number", "row_numbers"),
)
"""The columns of :attr:`Bucket.table`. csrc/bucket.h reads them by the same names in the same order."""

RESULTS = ("cosine", "norm")
"""The columns of :attr:`Bucket.results`."""

PROJECTIONS = ("auto", "channel", "layer", "none")
"""How a parameter group decides; a row of Scalars has the index."""

UNDECIDED = 255
"""The decision of a parameter that has not been stepped."""

SHARES = ("limit", "cosine", "pg", "gg", "pp", "pu")
"""The columns of :attr:`Shared.shares`."""

ROW_SHARES = ("pg", "gg", "pp", "pu")
"""The columns of :attr:`Shared.rows`."""


class Need(enum.IntFlag):
    """The sums that :meth:`Backend.measure` is asked for, member by member."""

    TEST = 1
    """p.g, g.g and p.p, and whether every row passes the cosine test."""
    DOT = 2
    """p.u and p.p, u being the update that the next step would make."""
    SQUARE = 4
    """g.g."""


class BucketKey(NamedTuple):
    """The properties that all members of one bucket have in common.

    ``moments`` are stored as ``state_dtype``; ``rounding`` is one of :data:`fused_adamp.precision.ROUNDINGS`, "nearest"
    wherever nothing is stored in bfloat16; ``channel_dim`` is the dimension whose indices are rows.
    """

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    moments: tuple[str, ...]
    state_dtype: torch.dtype
    rounding: str = "nearest"
    channel_dim: int | tuple[int, ...] = 0
    adaptive: bool = True

    @property
    def storage(self) -> dict[str, torch.dtype]:
        """The state that has the parameter's shape: key and dtype."""
        remainder = {"remainder": torch.int16} if self.rounding == "remainder" else {}
        return dict.fromkeys(self.moments, self.state_dtype) | remainder

    @property
    def counters(self) -> dict[str, torch.dtype]:
        """The state that is one number, counted up in every step: key and dtype.

        Steps are counted in float32 like in torch.optim: exact up to 16,777,216.
        """
        step = {"step": torch.float32} if self.adaptive else {}
        return step | ({"rounding_seed": torch.int64} if self.rounding == "stochastic" else {})


class Shared(NamedTuple):
    """Tables through which a backend and the front end talk about members that lie on several ranks.

    Attributes:
        needs: ``(P,)`` uint8, of :class:`Need`: what :meth:`Backend.measure` has to find out. 0 of members that do not
            take part.
        shares: ``(P, len(SHARES))`` float64, this rank's share of the sums, of the gradient as the batch scales it. The
            channels here pass the test at a further scale s if ``s < limit``; ``cosine`` is the largest of a row over
            its threshold. Of vectors and of SPLIT members, limit and cosine mean nothing.
        rows: ``(rows, len(ROW_SHARES))`` float64, the same of every row of SPLIT members.
        verdicts: ``(P, 2)`` float64: the decision, :data:`UNDECIDED` of LOCAL members, on which the backend decides
            alone; and the projection c of a SHARED member under the layer view.
        row_projections: ``(rows,)`` float64: c of every row of SPLIT members, 0 where they are not projected.
    """

    needs: Tensor
    shares: Tensor
    rows: Tensor
    verdicts: Tensor
    row_projections: Tensor


class Bucket:
    """Parameters with equal :class:`BucketKey`, addressed as one flat range of tiles. It holds none of their state.

    Attributes:
        params: the members. A slice of a matrix is a member for each of its pieces.
        index: of every parameter the first of its members.
        groups: the members' parameter groups, by index.
        piece_counters: per key of :attr:`BucketKey.counters`, ``(P,)``: counts of a slice's pieces, but for its first.
        layouts: how the members lie on the ranks.
        distributed, sliced: whether any is a DTensor, or a piece of a flat slice.
        shared: None where no member lies on several ranks.
        table: ``(P, len(COLUMNS))`` int64 on the CPU: group index; 1 where the parameter has two or more dimensions;
            R rows of K columns here; rows and columns of a tile; index of the first tile; a value of
            :class:`~fused_adamp.sharding.Sharing`; of SPLIT members the place of their first row in
            :attr:`Shared.rows`; the number of their first element in the whole tensor, and how many lie from row to
            row. A tile never spans parameters. It holds whole rows, or one piece of a row that is wider than a tile.
        tiles: the number of tiles.
        decisions: ``(P,)`` uint8 on the device, the last :class:`~fused_adamp.reference.Decision` of each member, or
            :data:`UNDECIDED`.
        results: ``(P, len(RESULTS))`` float64 on the device, of the last step of each member that was tested: the
            largest cosine of a row over its threshold, and the weight's norm before the step. NaN where nothing was.
        scratch: whatever the backend keeps between steps.
    """

    def __init__(self, key: BucketKey, params: Sequence[Tensor]) -> None:
        """Build the table. Raises what the allocator raises when memory runs out; changes nothing else."""
        self.key = key
        members = [(p, layout) for p in params for layout in layouts_of(p, key.channel_dim)]
        self.params = [p for p, _ in members]
        self.layouts = [layout for _, layout in members]
        self._slices = [slice_of(p) for p in params]
        self.distributed = any(map(is_distributed, self.params))
        self.sliced = any(layout.piece is not None for layout in self.layouts)
        self.index: dict[Tensor, int] = {}
        for i, p in enumerate(self.params):
            self.index.setdefault(p, i)
        self.groups = [0] * len(self.params)
        counts, device = len(self.params) if self.sliced else 0, key.backend.counters_device(key.device)
        self.piece_counters = {n: torch.zeros(counts, dtype=d, device=device) for n, d in key.counters.items()}
        rows, first_tile, first_row = [], 0, 0
        for i, (p, layout) in enumerate(members):
            part, numbers = self.rows(i, local(p)), layout.numbers or (0, 0)
            # Chance goes by an element's number: rows that do not follow each other in the whole are tiles.
            apart = key.rounding == "stochastic" and numbers[1] != rows_cols(part)[1]
            row, tiles = _geometry(part, key.backend, apart=apart)
            rows.append((0, *row, first_tile, layout.sharing, first_row, *numbers))
            first_tile += tiles
            first_row += rows_cols(part)[0] if layout.sharing is Sharing.SPLIT else 0
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, len(COLUMNS))
        self.tiles = first_tile
        self.shared = self._shared(first_row) if any(layout.sharing for layout in self.layouts) else None
        self.decisions = torch.full((len(self.params),), UNDECIDED, dtype=torch.uint8, device=key.device)
        self.results = torch.full((len(self.params), len(RESULTS)), math.nan, dtype=torch.float64, device=key.device)
        self.scratch = key.backend.scratch(self)

    @property
    def fits_marks(self) -> bool:
        """Whether all that :func:`~fused_adamp.sharding.mark_slice` says of the parameters is as it was."""
        return [slice_of(p) for p in self.index] == self._slices

    @property
    def places(self) -> list[tuple[int, ...] | None]:
        """:func:`place_of` of each member; None if no parameter may take its place."""
        if self.distributed or self.sliced or self.shared is not None:
            return [None] * len(self.params)
        first = COLUMNS.index("projected")
        return list(map(tuple, self.table[:, first : first + 3].tolist()))

    def replace(self, index: int, p: Tensor) -> None:
        """Puts a parameter that has the bucket's key in the place of member ``index``, if :attr:`places` says so."""
        self.params[index] = p
        self.index = {member: i for i, member in enumerate(self.params)}
        self.decisions[index] = UNDECIDED
        self.results[index] = math.nan

    def set_groups(self, groups: Sequence[int]) -> None:
        """Say which parameter group each member belongs to, by index."""
        self.groups = list(groups)
        self.table[:, COLUMNS.index("group")] = torch.tensor(self.groups, dtype=torch.int64, device="cpu")

    def _shared(self, rows: int) -> Shared:
        count, device, double = len(self.params), self.key.device, torch.float64
        return Shared(
            needs=torch.zeros(count, dtype=torch.uint8, device=device),
            shares=torch.zeros(count, len(SHARES), dtype=double, device=device),
            rows=torch.zeros(rows, len(ROW_SHARES), dtype=double, device=device),
            verdicts=torch.full((count, 2), UNDECIDED, dtype=double, device=device),
            row_projections=torch.zeros(rows, dtype=double, device=device),
        )

    def rows(self, index: int, t: Tensor, *, copy: bool = False) -> Tensor:
        """Member ``index``'s part of a tensor that lies as its parameter does, with rows first."""
        piece = self.layouts[index].piece
        return rows_first(t, self.key.channel_dim, copy=copy) if piece is None else piece.of(t)

    def all_rows(self, tensors: list[Tensor], *, copy: bool = False) -> list[Tensor]:
        """The same of every member."""
        return [t if t is ABSENT else self.rows(i, t, copy=copy) for i, t in enumerate(tensors)]

    def counts(self, name: str, given: list[Tensor], uncounted: Container[Tensor]) -> list[Tensor]:
        """Step counts per member, expanded from the counts per parameter.

        Every piece counts by itself, from what its parameter has; but for parameters that are not ``uncounted``, which
        this step may have counted already.
        """
        counts, further = list(given), []
        for i, (p, t) in enumerate(zip(self.params, given, strict=True)):
            if t is not ABSENT and self.index[p] < i:
                counts[i] = self.piece_counters[name][i]
                further += [i] if p in uncounted else []
        if further:
            torch._foreach_copy_([counts[i] for i in further], [given[i] for i in further])
        return counts

    def new_state(self, name: str, p: Tensor) -> Tensor:
        """State under that key for a parameter that has none: zeros.

        A moment has the parameter's shape, and its strides where they are dense. It is a tensor with a storage of its
        own, which offloading tools may free and restore. State of a DTensor's shape is a DTensor that lies as it does.
        """
        if name in self.key.counters:
            device = self.key.backend.counters_device(self.key.device)
            return torch.zeros((), dtype=self.key.counters[name], device=device)
        return like(self.key.backend.zeros_like(local(p).detach(), self.key.storage[name]), p)

    def fits(self, name: str, t: Any, p: Tensor) -> bool:
        """Whether a backend can use what the parameter has under that key where it lies."""
        if not isinstance(t, Tensor) or not has_numbers(t):
            return False
        if name in self.key.counters:
            device = self.key.backend.counters_device(self.key.device)
            return t.dtype == self.key.counters[name] and t.device == device and t.numel() == 1
        if is_distributed(t) != is_distributed(p):
            return False
        t, p, dtype = local(t), local(p), self.key.storage[name]
        known = t.dtype in FLOATING if name in self.key.moments and self.key.backend.mixes_moments else t.dtype == dtype
        return known and t.shape == p.shape and t.device == p.device and t.layout is torch.strided and not overlaps(t)


class Rule(Protocol):
    """The optimizer as a backend sees it: its momentum rule, and the rule's numbers for a parameter group."""

    adaptive: ClassVar[bool]

    def scalars(self, group: dict[str, Any]) -> Scalars:
        """The group's hyperparameters, ready for a kernel."""

    def reference_step(
        self, p: Tensor, g: Tensor, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> Decision:
        """One step of the reference on one tensor."""


class Scalars(NamedTuple):
    """A row of the hyperparameter table, computed in double. csrc/algorithm.h reads it in the same order.

    ``m = momentum m + gain g``; with nesterov ``u = momentum m + nesterov_gain g`` in place of ``m``; the adaptive
    rule (AdamP) divides u by its denominator and corrects both biases. ``lr * decay`` is w of a parameter that is not
    projected. ``projection`` is an index of :data:`PROJECTIONS`. Where the hyperparameter is a tensor that is not on
    the CPU, so are the numbers made from it: 0-dim float64.
    """

    lr: float | Tensor
    momentum: float | Tensor
    gain: float | Tensor
    nesterov_gain: float | Tensor
    beta2: float | Tensor
    gain2: float | Tensor
    eps: float | Tensor
    decay: float | Tensor
    delta: float | Tensor
    wd_ratio: float | Tensor
    sign: float
    nesterov: float
    project_buffer: float
    projection: float


class Batch(NamedTuple):
    """One bucket's tensors in one step. A member without gradient has :data:`ABSENT` in place of all its tensors.

    Attributes:
        bucket: where they belong.
        params, grads: the members' weights and gradients, with rows first (dim 0 is the output channel); of DTensors
            what this rank holds, which is so of all their tensors.
        moments: ``moments[k][i]`` is member i's state under ``bucket.key.moments[k]``, with rows first.
        steps, seeds, remainders: the members' other state; empty if they have none of that kind.
        groups: the optimizer's parameter groups.
        rule: the optimizer.
        notes: what a backend has found out of these tensors, for its next call with the same batch.
        scale: what gradients are multiplied with before anything else (AMP's unscaling, clipping), as a float64 tensor
            of one element on the bucket's device; None is 1.
        found_inf: a tensor of one element on the bucket's device: where it is not 0, nothing moves. None is 0.
        final: the scale is the step's, and nothing can keep it from being taken.
    """

    bucket: Bucket
    params: list[Tensor]
    grads: list[Tensor]
    moments: list[list[Tensor]]
    steps: list[Tensor]
    seeds: list[Tensor]
    remainders: list[Tensor]
    groups: list[dict[str, Any]]
    rule: Rule
    notes: dict[str, Any]
    scale: Tensor | None = None
    found_inf: Tensor | None = None
    final: bool = False

    @property
    def has_state(self) -> bool:
        """Whether the members' state is in the batch, all kinds of it."""
        kinds = [*self.moments, self.remainders, self.steps, self.seeds]
        return sum(map(bool, kinds)) == len(self.bucket.key.storage) + len(self.bucket.key.counters)

    def only(self, members: Container[int]) -> Batch:
        """The batch of some members alone, by index: the others have no gradient."""

        def keep(tensors: list[Tensor]) -> list[Tensor]:
            return [t if i in members else ABSENT for i, t in enumerate(tensors)]

        return self._replace(
            grads=keep(self.grads),
            moments=list(map(keep, self.moments)),
            steps=keep(self.steps),
            seeds=keep(self.seeds),
            remainders=keep(self.remainders),
            notes={},
        )

    @property
    def stored(self) -> list[list[Tensor]]:
        """Per kind of tensor that has the parameters' shape, gradients included, the members' tensors."""
        return [self.params, self.grads, *self.moments, *([self.remainders] if self.remainders else [])]


ABSENT = torch.empty(0, dtype=torch.bool, device="cpu")
"""Stands for the gradient and the state of a parameter that has no gradient in this step. No gradient is bool."""


def first_stale(batch: Batch) -> int:
    """Index of the first member whose tensors do not fit the bucket's table, -1 if all do. Moves nothing."""
    bucket, key = batch.bucket, batch.bucket.key
    shapes = bucket.table[:, COLUMNS.index("rows") : COLUMNS.index("cols") + 1].tolist()
    state = {**dict(zip(key.moments, batch.moments, strict=False)), "remainder": batch.remainders}
    state |= {"step": batch.steps, "rounding_seed": batch.seeds}
    for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True)):
        if g is ABSENT:
            continue
        own = {name: of[i] for name, of in state.items() if of}
        if not (
            p.device == key.device
            and p.dtype == key.dtype
            and [*rows_cols(p)] == shapes[i]
            and not overlaps(p)
            and has_numbers(g)
            and g.layout is torch.strided
            and g.shape == p.shape
            and g.device == p.device
            and g.dtype in FLOATING
            and all(bucket.fits(name, t, p) for name, t in own.items())
            and all(map(has_storage, (p, g, *own.values())))
        ):
            return i
    return -1


def has_storage(t: Tensor) -> bool:
    """Whether all elements lie inside the tensor's storage. Offloading tools free a storage under its tensors."""
    if not t.numel():
        return True
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.itemsize <= t.untyped_storage().nbytes()


def are_same(seen: Sequence[ref[Tensor]], tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are those that were seen. An id or an address may be that of another tensor by now."""
    return len(seen) == len(tensors) and all(map(is_, [its() for its in seen], tensors))


def span_of(t: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the byte after its last."""
    begin = t.data_ptr()
    if not t.numel():
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (last + 1) * t.itemsize


def overlaps(t: Tensor) -> bool:
    """Whether elements of ``t`` may share memory: true if a stride does not reach past the dimensions below it."""
    end = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= end:
                return t.numel() > 0
            end += (size - 1) * stride
    return False


def rows_cols(p: Tensor) -> tuple[int, int]:
    """R and K of a parameter; a vector or scalar is one row."""
    if p.ndim < 2:
        return 1, p.numel()
    return p.size(0), p.numel() // max(p.size(0), 1)


def place_of(p: Tensor, key: BucketKey) -> tuple[int, ...] | None:
    """The table's columns from ``projected`` to ``cols`` of a parameter that lies on this rank alone, else None."""
    if is_distributed(p) or slice_of(p) is not None:
        return None
    return (int(p.ndim >= 2), *rows_cols(rows_first(p, key.channel_dim)))


def _geometry(p: Tensor, backend: Backend, *, apart: bool) -> tuple[tuple[int, int, int, int, int], int]:
    """The table's columns from ``projected`` to ``tile_cols``, and the number of tiles; rows may be kept apart."""
    rows, cols = rows_cols(p)
    tile_rows, tile_cols = backend.geometry(max(rows, 1), max(cols, 1))
    tile_rows = 1 if apart else tile_rows
    tiles = -(-rows // tile_rows) * -(-cols // tile_cols)
    return (int(p.ndim >= 2), rows, cols, tile_rows, tile_cols), tiles
