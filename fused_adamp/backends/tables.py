"""The tables that kernels read besides the parameters' tensors: their columns, and the tables on the device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_adamp.batch import ABSENT, COLUMNS, Scalars, Sharing
from fused_adamp.host import WIDEST_LOAD, marks_of
from fused_adamp.tensors import rows_cols

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.batch import Batch, Members
    from fused_adamp.host import Marks

__all__ = ["Kind", "Launch", "Tables", "collapse", "marks_by_role", "parts_of", "place", "tiles_of"]

LAYOUTS = ("aligned", "flat", "strided")
"""How a parameter's tensors lie in memory. Aligned: rows follow each other, the first starts at a multiple of
WIDEST_LOAD bytes, and their length is a multiple of VECTOR (that of a vector need not be). Flat: rows follow each
other. Strided: anything else."""

ADDRESSES = ("p", "g", "m", "v", "r", "step", "seed")
"""The columns of the address table: weight, gradient, moments, remainder, step count, seed."""

INNER = 2
"""Dimensions beyond dim 0 that a strided parameter may have after merging. A row of the stride table has the size of
the last, then for p, g, m, v and r the strides of dim 0 and of these."""

COEFFICIENTS = ("inverse_bias2", "step_size")
"""The numbers of a parameter that depend on its step count."""

FINDINGS = ("channel_limit", "layer_limit", "found_cosine", "found_norm", "layer_projection")
"""The findings on a parameter: limits of both views, cosine and norm, from measure; c of the layer, from dot."""

COUNTERS = ("measured", "dotted", "concluded", "projection_known", "key", "measure_left", "dot_left", "tiles_left")
"""The counters of a parameter: numbers of tiles that have been measured and dotted; the epochs in which all had been;
the keys of this step's noise; and marks: the last epochs in which sums of measure, dot or update left float32."""

PARTS = ("need", "shares", "row_shares", "verdict", "given", "given_step")
"""A parameter's addresses in :class:`~fused_adamp.batch.Shared`. At ``given`` are c of its rows if they are split, else
the one c of its layer. ``given_step`` is the distance from row to row in numbers: 1 or 0."""

VECTOR = 8
"""Elements of one load of a thread, at most."""

STRIDES = 1 + 5 * (1 + INNER)


Kind = tuple[torch.dtype, torch.dtype, torch.dtype | None, str]
"""The properties that choose a kernel: dtypes of weight, gradient and state (None: none yet), and one of LAYOUTS."""


class Launch(NamedTuple):
    """The parameters of a bucket that one compiled kernel steps."""

    spec: Any
    plan: str
    indices: list[int]
    active: Tensor
    tickets: Tensor
    jobs: tuple[Tensor, ...]
    """Job lists, ``(n, 3)`` int32. One pass: of the one kernel. Split: of measure, dot and update."""
    blocks: int
    """The number of jobs that prepare. They come first."""
    ahead: list[Tensor]
    """The one job list of what comes ahead of a step, once it has been asked for: ``DeviceBackend.jobs_ahead``."""


class Tables:
    """The tables that kernels read besides the tensors, as last uploaded, and the launches.

    A captured step has tables of its own, since only replays execute its uploads.
    """

    def __init__(self, bucket: Members, *, captured: bool) -> None:
        device, count = bucket.key.device, len(bucket.params)
        self.device = device
        self.table = torch.empty(count, len(COLUMNS) + 2, dtype=torch.int64, device=device)
        self.addresses = torch.empty(count, len(ADDRESSES), dtype=torch.int64, device=device)
        self.strides = torch.empty(count, STRIDES, dtype=torch.int64, device=device)
        self.scalars = torch.empty(0, len(Scalars._fields), dtype=torch.float64, device=device)
        self.cells: list[Tensor] = []
        """The scalars that come from tensors on the device."""
        self.seen: dict[str, Marks] = {}
        """The marks of the tensors that the tables were made from, by role; empty if there are no tables yet."""
        self.places = torch.empty(0, dtype=torch.int64, device="cpu")
        """The addresses as they were uploaded."""
        self.seen_scalars: tuple[list[list[float]], list[tuple[int, int]]] = [], []
        self.seen_groups: list[int] = []
        self.seen_members: dict[Kind, list[int]] = {}
        self.launches: list[Launch] = []
        self._kept: list[Tensor] | None = [] if captured else None

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copies ``source``, on the CPU, to ``target`` on the device, on the current stream without a sync."""
        if self.device.type == "cuda":
            source = source.pin_memory()  # returns to its pool only after the stream has read it
        if self._kept is not None:  # a graph reads it in every replay
            self._kept.append(source)
        target.copy_(source, non_blocking=True)

    def uploaded(self, source: Tensor) -> Tensor:
        """A copy of ``source``, on the CPU, on the device."""
        target = torch.empty_like(source, device=self.device)
        self.upload(target, source)
        return target

    def moved(self, batch: Batch, *, state: bool) -> dict[str, Marks] | None:
        """The new marks, by role, of tensors that have only moved since the tables were made.

        None if anything else has changed, so that the tables have to be made anew. State is compared if ``state``.
        """
        found, seen = marks_by_role(batch, state=state), self.seen
        if found.keys() - seen.keys() or (state and len(found) < len(seen)):
            return None
        moved = {role: marks for role, marks in found.items() if marks is not seen[role]}
        return moved if all(marks.layout is seen[role].layout for role, marks in moved.items()) else None

    def move(self, moved: dict[str, Marks]) -> None:
        """Uploads new addresses."""
        for role, marks in moved.items():
            column = torch.frombuffer(marks.addresses, dtype=torch.int64)  # that of ABSENT is 0
            self.places[:, ADDRESSES.index(role)] = column
        self.upload(self.addresses, self.places)
        self.seen = self.seen | moved

    def set_scalars(self, rows: list[Scalars]) -> None:
        """Uploads hyperparameters, a row per group, if a number has changed; always copies those that are tensors."""
        tensors, numbers = dict[tuple[int, int], Tensor](), list(map(list[Any], rows))
        for i, row in enumerate(rows):
            for j, number in enumerate(row):
                if type(number) is not float and isinstance(number, Tensor):  # most are floats
                    tensors[i, j], numbers[i][j] = number, 0.0
        if (numbers, [*tensors]) != self.seen_scalars:
            if len(numbers) != len(self.scalars):
                self.scalars = self.scalars.new_empty(len(numbers), self.scalars.size(1))
            self.upload(self.scalars, torch.tensor(numbers, dtype=torch.float64, device="cpu"))
            self.cells = [self.scalars[i, j] for i, j in tensors]
            self.seen_scalars = numbers, [*tensors]
        if tensors:
            torch._foreach_copy_(self.cells, [*tensors.values()])


def marks_by_role(batch: Batch, *, state: bool) -> dict[str, Marks]:
    """The marks of the batch's tensors; of weights and gradients alone unless ``state``."""
    found = {"p": marks_of(batch, "p", batch.params), "g": marks_of(batch, "g", batch.grads)}
    if state:
        kinds = {"r": batch.remainders, "step": batch.steps, "seed": batch.seeds}
        kinds |= dict(zip(("m", "v"), batch.moments, strict=False))
        found |= {role: marks_of(batch, role, of, settled=True) for role, of in kinds.items() if of}
    return found


def table_of(bucket: Members) -> Tensor:
    """A bucket's table with two more columns: the number of tiles of a member, and of each of its rows."""
    return torch.cat([bucket.table, tiles_of(bucket.table)[:, None], _segments(bucket.table)[:, None]], dim=1)


def _segments(table: Tensor) -> Tensor:
    """The number of tiles of a row of each parameter of a bucket's table."""
    cols, tile_cols = (table[:, COLUMNS.index(name)] for name in ("cols", "tile_cols"))
    return (cols + tile_cols - 1) // tile_cols


def tiles_of(table: Tensor) -> Tensor:
    """The number of tiles of each parameter of a bucket's table."""
    rows, tile_rows = (table[:, COLUMNS.index(name)] for name in ("rows", "tile_rows"))
    return (rows + tile_rows - 1) // tile_rows * _segments(table)


def parts_of(bucket: Members) -> Tensor:
    """Addresses of every member's entries in ``bucket.shared``: ``(P, len(PARTS))`` int64; no rows if it is None."""
    shared, table = bucket.shared, bucket.table
    parts = torch.empty(0 if shared is None else len(table), len(PARTS), dtype=torch.int64, device="cpu")
    if shared is not None:
        index = torch.arange(len(table), device="cpu")
        first_row, sharing = (table[:, COLUMNS.index(name)] for name in ("first_row", "sharing"))
        roles = (
            ("need", shared.needs, index),
            ("shares", shared.shares, index),
            ("row_shares", shared.rows, first_row),
            ("verdict", shared.verdicts, index),
            ("given", shared.row_projections, first_row),
        )
        for role, tensor, row in roles:
            parts[:, PARTS.index(role)] = tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize
        split = sharing == Sharing.SPLIT
        parts[:, PARTS.index("given_step")] = split
        parts[~split, PARTS.index("given")] = parts[~split, PARTS.index("verdict")] + shared.verdicts.itemsize
    return parts


def collapse(roles: Sequence[Tensor], *, any_order: bool = True) -> tuple[list[int], list[list[int]]]:
    """The sizes of the dimensions after dim 0, and each tensor's strides in them, merged where all tensors allow it.

    A vector is one row. The algorithm allows any order of the elements of a row that is the same for all tensors. With
    ``any_order``, the dimensions are sorted by the first tensor's strides, largest first.
    """
    p = roles[0]
    dims = [d for d in range(min(p.ndim, 2) // 2, p.ndim) if p.size(d) != 1]
    if any_order:
        dims.sort(key=lambda d: -p.stride()[d])
    sizes: list[int] = []
    inner: list[list[int]] = [[] for _ in roles]
    for d in dims:
        if sizes and all(s[-1] == p.size(d) * t.stride(d) for s, t in zip(inner, roles, strict=True)):
            sizes[-1] *= p.size(d)
            for s, t in zip(inner, roles, strict=True):
                s[-1] = t.stride(d)
        else:
            sizes.append(p.size(d))
            for s, t in zip(inner, roles, strict=True):
                s.append(t.stride(d))
    return (sizes, inner) if sizes else ([1], [[1] for _ in roles])


def _layout(roles: Sequence[Tensor], inner: list[list[int]]) -> str:
    p = roles[0]
    rows, cols = rows_cols(p)
    if p.numel() == 0:
        return "aligned"
    if any(s != [1] or (rows > 1 and t.stride(0) != cols) for s, t in zip(inner, roles, strict=True)):
        return "strided"
    at_vectors = all(t.data_ptr() % WIDEST_LOAD == 0 for t in roles)
    aligned = at_vectors and (p.ndim < 2 or cols % VECTOR == 0)
    return "aligned" if aligned else "flat"


def place(batch: Batch, tables: Tables) -> dict[Kind, list[int]]:
    """Uploads addresses and strides. Returns the members that have a gradient by the kernel that they need.

    Raises:
        ValueError: rows that the kernels cannot follow.
    """
    addresses, strides = ([[0] * table.size(1) for _ in batch.params] for table in (tables.addresses, tables.strides))
    members: dict[Kind, list[int]] = {}
    for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True)):
        if g is ABSENT:
            continue
        moments = [moment[i] for moment in batch.moments]
        roles = dict(zip(("p", "g", "m", "v"), (p, g, *moments), strict=False))
        if batch.remainders:
            roles["r"] = batch.remainders[i]
        counters = (("step", batch.steps), ("seed", batch.seeds))
        for role, tensor in (*roles.items(), *((role, counts[i]) for role, counts in counters if counts)):
            addresses[i][ADDRESSES.index(role)] = tensor.data_ptr()
        # Noise depends on the element's number in the tensor, not on its address.
        sizes, inner = collapse([*roles.values()], any_order=not batch.seeds)
        layout = _layout([*roles.values()], inner)
        if layout == "strided":
            if len(sizes) > INNER or math.prod(sizes) >= 1 << 31:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} and strides {p.stride()}, with a gradient of strides "
                    f"{g.stride()}, lies in memory in a way that the kernels cannot follow: rows of fewer than 2^31 "
                    f"elements in at most {INNER} dimensions after merging; pass p.contiguous()"
                )
            strides[i][0] = sizes[-1]
            for (role, tensor), steps in zip(roles.items(), inner, strict=True):
                outer = tensor.stride(0) if tensor.ndim >= 2 else 0
                first = 1 + (1 + INNER) * ADDRESSES.index(role)
                strides[i][first : first + 1 + INNER] = [outer, *([0] * (INNER - len(steps))), *steps]
        state = (moments[0].dtype if moments else p.dtype) if batch.has_state else None
        members.setdefault((p.dtype, g.dtype, state, layout), []).append(i)
    tables.places = torch.tensor(addresses, device="cpu")
    tables.upload(tables.addresses, tables.places)
    if any(map(any, strides)):
        tables.upload(tables.strides, torch.tensor(strides, device="cpu"))
    return members
