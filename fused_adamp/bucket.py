"""Parameters to buckets: flat state storage, the row and tile table, and one step's tensors gathered from them.

A bucket holds the parameters of one backend, device and dtype, whatever their parameter group. Its state lives in one
flat tensor per state key, of which ``optimizer.state`` holds views; a backend walks the bucket tile by tile through the
table below. The storage and the table are built once. The tensors themselves are looked up afresh in every step, so a
parameter or state that was swapped, loaded or moved is seen as it is, and :func:`first_stale` tells when it no longer
fits the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.backends import Backend
    from fused_adamp.reference import Decision

__all__ = [
    "ABSENT",
    "COLUMNS",
    "FLOATING",
    "Batch",
    "Bucket",
    "BucketKey",
    "Rule",
    "Scalars",
    "first_stale",
    "overlaps",
    "rows_cols",
]

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of parameters, gradients and state."""

COLUMNS = ("group", "projected", "rows", "cols", "tile_rows", "tile_cols", "first_tile")
"""The columns of :attr:`Bucket.table`. csrc/bucket.h reads them by the same names in the same order."""

_ALIGN = 64  # bytes: a cache line, and the widest vector register


class BucketKey(NamedTuple):
    """What the members of one bucket have in common."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    moments: tuple[str, ...]


class Bucket:
    """Parameters with equal :class:`BucketKey`, addressed as one flat range of tiles.

    Attributes:
        params: the members.
        groups: the members' parameter groups, by index.
        storage: per moment, the flat tensor that the members' state is a view of.
        steps: ``(P,)``, the members' step counts, of which ``state["step"]`` are views.
        table: ``(P, len(COLUMNS))`` int64 on the CPU: group index; 1 where the parameter has two or more dimensions;
            R rows of K columns; rows and columns of a tile; index of the first tile. A tile never spans parameters. It
            holds whole rows, or one piece of a row that is wider than a tile.
        tiles: the number of tiles.
        decisions: ``(P,)`` uint8 on the device, the last :class:`~fused_adamp.reference.Decision` of each member.
        scratch: whatever the backend keeps between steps.
    """

    def __init__(self, key: BucketKey, params: Sequence[Tensor]) -> None:
        """Allocate storage and table. Raises what the allocator raises when memory runs out; changes nothing else."""
        self.key = key
        self.params = list(params)
        self.groups = [0] * len(self.params)
        self._given: set[int] = set()
        line = _ALIGN // key.dtype.itemsize
        self._offsets: list[int] = []
        end = 0
        for p in self.params:
            self._offsets.append(end)
            end += (p.numel() + line - 1) // line * line
        self.storage = {name: key.backend.zeros(end, key.dtype, key.device) for name in key.moments}
        # Counted in float32 like torch.optim: exact up to 16,777,216 steps.
        steps_device = key.backend.steps_device(key.device)
        self.steps = torch.zeros(len(self.params), dtype=torch.float32, device=steps_device)
        rows, first_tile = [], 0
        for p in self.params:
            row, tiles = _geometry(p, key.backend)
            rows.append((0, *row, first_tile))
            first_tile += tiles
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(-1, len(COLUMNS))
        self.tiles = first_tile
        self.decisions = torch.zeros(len(self.params), dtype=torch.uint8, device=key.device)
        self.scratch = key.backend.scratch(self)

    def set_groups(self, groups: Sequence[int]) -> None:
        """Say which parameter group each member belongs to, by index."""
        self.groups = list(groups)
        self.table[:, COLUMNS.index("group")] = torch.tensor(self.groups, dtype=torch.int64)

    def state(self, index: int, count_steps: bool) -> dict[str, Tensor]:
        """Zeros for member ``index``, with its shape, and its strides where they are dense.

        The first time they are its part of the storage. Whoever got that may still hold it, so a member whose state
        was taken away gets tensors of its own.
        """
        p, offset = self.params[index], self._offsets[index]
        if index in self._given:
            state = {"step": torch.zeros_like(self.steps[index])} if count_steps else {}
            return state | {name: torch.zeros_like(p, requires_grad=False) for name in self.storage}
        self._given.add(index)
        strides = torch.empty_like(p, device="meta").stride()
        state = {"step": self.steps[index]} if count_steps else {}
        return state | {name: flat.as_strided(p.shape, strides, offset) for name, flat in self.storage.items()}


class Rule(Protocol):
    """What a backend asks of the optimizer: which momentum rule, and its numbers for a parameter group."""

    adaptive: ClassVar[bool]

    def scalars(self, group: dict[str, Any]) -> Scalars:
        """The group's hyperparameters, ready for a kernel."""

    def reference_step(
        self, p: Tensor, g: Tensor, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> Decision:
        """One step of the reference on one tensor."""


class Scalars(NamedTuple):
    """A row of the hyperparameter table, computed in double. csrc/algorithm.h reads it in the same order.

    ``m = momentum m + gain g``; with nesterov ``u = momentum m + nesterov_gain g`` in place of ``m``; the adaptive rule
    (AdamP) divides u by its denominator and corrects both biases. ``decay`` is w of a parameter that is not projected.
    """

    lr: float
    momentum: float
    gain: float
    nesterov_gain: float
    beta2: float
    gain2: float
    eps: float
    decay: float
    delta: float
    wd_ratio: float
    sign: float
    nesterov: float
    project_buffer: float


class Batch(NamedTuple):
    """One bucket's tensors in one step. A member without gradient has :data:`ABSENT` in place of all its tensors.

    ``moments[k][i]`` is member i's state under ``bucket.key.moments[k]``; ``steps`` is empty if the rule counts none.
    """

    bucket: Bucket
    grads: list[Tensor]
    moments: list[list[Tensor]]
    steps: list[Tensor]
    groups: list[dict[str, Any]]
    rule: Rule


ABSENT = torch.empty(0, dtype=torch.bool)
"""Stands for the gradient and the state of a parameter that has no gradient in this step. No gradient is bool."""


def first_stale(batch: Batch) -> int:
    """Index of the first member whose tensors do not fit the bucket's table, -1 if all do. Moves nothing."""
    bucket = batch.bucket
    shapes = bucket.table[:, COLUMNS.index("rows") : COLUMNS.index("cols") + 1].tolist()
    for i, (p, g) in enumerate(zip(bucket.params, batch.grads, strict=True)):
        if g is ABSENT:
            continue
        same = all(
            t.layout is torch.strided and t.shape == p.shape and t.device == p.device and t.dtype in FLOATING
            for t in (g, *(moment[i] for moment in batch.moments))
        )
        fits = p.device == bucket.key.device and p.dtype == bucket.key.dtype and [*rows_cols(p)] == shapes[i]
        if not (same and fits) or any(overlaps(t) for t in (p, *(moment[i] for moment in batch.moments))):
            return i
    return -1


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


def _geometry(p: Tensor, backend: Backend) -> tuple[tuple[int, int, int, int, int], int]:
    """The table's columns from ``projected`` to ``tile_cols``, and the number of tiles."""
    rows, cols = rows_cols(p)
    tile_rows, tile_cols = backend.geometry(max(rows, 1), max(cols, 1))
    tiles = -(-rows // tile_rows) * -(-cols // tile_cols)
    return (int(p.ndim >= 2), rows, cols, tile_rows, tile_cols), tiles
