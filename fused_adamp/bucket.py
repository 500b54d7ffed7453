"""Parameters with the same properties as one flat range of tiles: the table that backends walk, and new state.

A bucket holds the parameters of one backend, device and dtype, whatever their parameter group. A backend walks it tile
by tile through the table, which is built once. The tensors themselves are looked up in every step, so a parameter or
state that was swapped, loaded or moved is used where it lies, and :func:`first_stale` tells when it no longer fits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_adamp.batch import (
    ABSENT,
    COLUMNS,
    FLOATING,
    RESULTS,
    ROW_SHARES,
    SHARES,
    UNDECIDED,
    Members,
    Shared,
    Sharing,
)
from fused_adamp.fake import has_numbers
from fused_adamp.reference import rows_first
from fused_adamp.sharded.dtensor import is_distributed, like, local
from fused_adamp.sharded.layout import Rows
from fused_adamp.sharded.placement import placement_of
from fused_adamp.tensors import has_storage, overlaps, rows_cols

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from fused_adamp.batch import Backend, Batch, BucketKey

__all__ = ["Bucket", "first_stale", "fits", "new_state", "place_of"]


class Bucket(Members):
    """Parameters with equal :class:`~fused_adamp.batch.BucketKey`. It holds none of their state.

    Attributes:
        names: the keys of the members' state, those of :attr:`BucketKey.storage` first.
        layouts: how the members lie on the ranks.
        has_pieces: whether a parameter is several members.
        piece_counters: per key of :attr:`BucketKey.counters`, ``(P,)``: the count of each member that is not its
            parameter's first.
    """

    def __init__(self, key: BucketKey, params: Sequence[Tensor]) -> None:
        """Builds the table. Raises what the allocator raises when memory runs out; changes nothing else."""
        self.key = key
        self.names = (*key.storage, *key.counters)
        self._placements = [placement_of(p) for p in params]
        members = [
            (p, layout)
            for p, placement in zip(params, self._placements, strict=True)
            for layout in placement.layouts(p, key.channel_dim)
        ]
        self.params = [p for p, _ in members]
        self.layouts = [layout for _, layout in members]
        self.distributed = any(map(is_distributed, self.params))
        self.index: dict[Tensor, int] = {}
        for i, p in enumerate(self.params):
            self.index.setdefault(p, i)
        self.has_pieces = len(self.index) < len(self.params)
        self.groups = [0] * len(self.params)
        counts, device = len(self.params) if self.has_pieces else 0, key.backend.counters_device(key.device)
        self.piece_counters = {n: torch.zeros(counts, dtype=d, device=device) for n, d in key.counters.items()}
        rows, first_tile, first_row = [], 0, 0
        for p, layout in members:
            part, numbers = layout.part.of(local(p)), layout.numbers or (0, 0)
            # Random bits depend on an element's number: rows that are not consecutive in the whole are separate tiles.
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
        self.has_own_tensors = all(layout.part == Rows() for layout in self.layouts)
        self.marks = {}
        self.scratch = key.backend.scratch(self)

    @property
    def fits_placements(self) -> bool:
        """Whether every parameter has the placement that it had when the bucket was built."""
        return [placement_of(p) for p in self.index] == self._placements

    @property
    def places(self) -> list[tuple[int, ...] | None]:
        """:func:`place_of` of each member; None if no other parameter may replace it."""
        if any(placement.is_shared for placement in self._placements):
            return [None] * len(self.params)
        first = COLUMNS.index("projected")
        return list(map(tuple, self.table[:, first : first + 3].tolist()))

    def replace(self, index: int, p: Tensor) -> None:
        """Replaces member ``index`` by a parameter with the bucket's key and the same place: :attr:`places`."""
        self.params[index] = p
        self.index = {member: i for i, member in enumerate(self.params)}
        self.decisions[index] = UNDECIDED
        self.results[index] = math.nan

    def set_groups(self, groups: Sequence[int]) -> None:
        """Says which parameter group each member belongs to, by index."""
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

    def parts(self, tensors: list[Tensor], *, copy: bool = False) -> list[Tensor]:
        """For each member, its part of its tensor, with rows first; ABSENT stays.

        Each tensor has its parameter's local shape. The parts are views, or with ``copy`` copies if there is no view.
        """
        return [t if t is ABSENT else x.part.of(t, copy=copy) for x, t in zip(self.layouts, tensors, strict=True)]

    def counts(self, name: str, given: list[Tensor], uncounted: Container[Tensor]) -> list[Tensor]:
        """The counters ``name`` of each member, 0-dim; ``given`` has its parameter's for each member.

        The first member of a parameter has the parameter's counter, further ones have their own. These are set to the
        parameter's count, if it is ``uncounted``: this step may have counted the others already.
        """
        counts, further = list(given), []
        for i, (p, t) in enumerate(zip(self.params, given, strict=True)):
            if t is not ABSENT and self.index[p] < i:
                counts[i] = self.piece_counters[name][i]
                further += [i] if p in uncounted else []
        if further:
            torch._foreach_copy_([counts[i] for i in further], [given[i] for i in further])
        return counts


def new_state(key: BucketKey, name: str, p: Tensor) -> Tensor:
    """Zeros as the state ``name`` of a parameter that has none.

    A moment has the parameter's shape, and its strides if they are dense. It is a tensor with a storage of its own,
    which offloading tools may free and restore. A counter is 0-dim. The moments of a DTensor are DTensors with its mesh
    and placements.
    """
    if name in key.counters:
        device = key.backend.counters_device(key.device)
        return torch.zeros((), dtype=key.counters[name], device=device)
    return like(key.backend.zeros_like(local(p).detach(), key.storage[name]), p)


def fits(key: BucketKey, name: str, t: Any, p: Tensor) -> bool:
    """Whether a backend can use ``t``, the state of ``p`` under the key ``name``, without a copy."""
    if not isinstance(t, Tensor) or not has_numbers(t):
        return False
    if name in key.counters:
        device = key.backend.counters_device(key.device)
        return t.dtype == key.counters[name] and t.device == device and t.numel() == 1
    if is_distributed(t) != is_distributed(p):
        return False
    t, p, dtype = local(t), local(p), key.storage[name]
    known = t.dtype in FLOATING if name in key.moments and key.backend.mixes_moments else t.dtype == dtype
    return known and t.shape == p.shape and t.device == p.device and t.layout is torch.strided and not overlaps(t)


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
            and all(fits(key, name, t, p) for name, t in own.items())
            and all(map(has_storage, (p, g, *own.values())))
        ):
            return i
    return -1


def place_of(p: Tensor, key: BucketKey) -> tuple[int, ...] | None:
    """The table's columns from ``projected`` to ``cols`` of a parameter that lies on this rank alone, else None."""
    if placement_of(p).is_shared:
        return None
    return (int(p.ndim >= 2), *rows_cols(rows_first(p, key.channel_dim)))


def _geometry(p: Tensor, backend: Backend, *, apart: bool) -> tuple[tuple[int, int, int, int, int], int]:
    """The table's columns from ``projected`` to ``tile_cols``, and the number of tiles. If ``apart``, a tile is one row
    at most.
    """
    rows, cols = rows_cols(p)
    tile_rows, tile_cols = backend.geometry(max(rows, 1), max(cols, 1))
    tile_rows = 1 if apart else tile_rows
    tiles = -(-rows // tile_rows) * -(-cols // tile_cols)
    return (int(p.ndim >= 2), rows, cols, tile_rows, tile_cols), tiles
