"""The order of a step's work: jobs, each a stage on a run of one parameter's tiles, and how many launches they take."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch

from fused_adamp.backends.tables import tiles_of
from fused_adamp.batch import COLUMNS, Sharing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fused_adamp.batch import Members

__all__ = ["PLAN", "STAGES", "TICKETS", "Order", "blocks_of", "one_pass", "plan_for", "split"]

PLAN = "FUSED_ADAMP_PLAN"
"""Environment variable that forces a plan: ``one_pass`` or ``split``."""

STAGES = ("prepare", "measure", "dot", "update", "square", "share", "share_nothing")
"""The first column of a job: ``(stage, first tile, number of tiles)``. In place of the first tile, share_nothing has a
parameter, and prepare a block of parameters."""

TICKETS = ("ticket", "preparing", "prepared")
"""The counters of a launch."""

PREPARE_BLOCK = 128
"""Parameters that one job prepares."""

_WINDOW = 1 << 20
"""Elements, 8 MB of float32 weights and gradients, that the one-pass plan measures ahead of updating them."""

_RUN = 1 << 13
"""Elements of a job, in whole tiles. Later tiles find the tables in cache that the first tile has loaded."""

_DOT_RUN = 1 << 16
"""Elements of a job of dot, which most often has nothing to do."""


class Order(NamedTuple):
    """The jobs of one parameter in one stage: ``(n, 3)`` int32, rows of stage, first tile and number of tiles.

    Attributes:
        counts, first: the tiles of each parameter, and the first of them.
        sizes: the elements of a tile.
        elements: the elements of each parameter.
        projected: whether it has two or more dimensions.
        measured: whether it has jobs that measure it.
    """

    counts: list[int]
    first: list[int]
    sizes: list[int]
    elements: list[int]
    projected: list[bool]
    measured: list[bool]

    @classmethod
    def of(cls, bucket: Members, block: int, *, measures_alone: bool) -> Order:
        """``block``: the elements that a program holds at once. A tile with fewer takes as long.

        ``measures_alone``: update measures a parameter of one tile by itself.
        """
        names = "first_tile", "tile_rows", "tile_cols", "rows", "cols", "projected", "sharing"
        columns = (bucket.table[:, COLUMNS.index(name)] for name in names)
        first, tile_rows, tile_cols, rows, cols, projected, sharing = columns
        counts, sizes = tiles_of(bucket.table), (tile_rows * tile_cols).clamp(min=block)
        measured = (projected != 0) & (sharing == Sharing.LOCAL) & (counts > int(measures_alone))
        numbers = (counts, first, sizes, rows * cols, projected != 0, measured)
        return cls(*(column.tolist() for column in numbers))

    def measure(self, i: int) -> Tensor:
        return self.jobs("measure", i, _RUN if self.measured[i] else None)

    def dot(self, i: int) -> Tensor:
        return self.jobs("dot", i, _DOT_RUN if self.projected[i] and self.counts[i] > 1 else None)

    def update(self, i: int) -> Tensor:
        """In reverse order: the tiles that were measured last are still in cache."""
        return self.jobs("update", i, _RUN).flip(0)

    def square(self, i: int) -> Tensor:
        return self.jobs("square", i, _RUN)

    def share(self, i: int) -> Tensor:
        if self.counts[i] == 0:
            return torch.tensor([[STAGES.index("share_nothing"), i, 1]], dtype=torch.int32, device="cpu")
        return self.jobs("share", i, _RUN)

    def jobs(self, stage: str, i: int, run: int | None) -> Tensor:
        """``run``: the elements of a job. None makes no jobs."""
        if run is None:
            return torch.empty(0, 3, dtype=torch.int32, device="cpu")
        width = max(run // self.sizes[i], 1)
        begin, end = self.first[i], self.first[i] + self.counts[i]
        tile = torch.arange(begin, end, width, dtype=torch.int32, device="cpu")
        return torch.stack([torch.full_like(tile, STAGES.index(stage)), tile, (end - tile).clamp(max=width)], dim=1)


def plan_for(bucket: Members, indices: Sequence[int]) -> str:
    """``one_pass`` where the largest parameter fits the cache that measure fills for update; else ``split``.

    Raises:
        ValueError: the environment variable names no plan.
    """
    forced = os.environ.get(PLAN)
    if forced not in (None, "", "one_pass", "split"):
        raise ValueError(f"{PLAN}={forced!r} is not a plan: choose 'one_pass' or 'split', or leave it unset")
    elements = bucket.table[:, COLUMNS.index("rows")] * bucket.table[:, COLUMNS.index("cols")]
    # A shared parameter is not measured in the step, so one pass would find nothing in cache.
    fits = bucket.shared is None and int(elements[indices].max()) <= 4 * _WINDOW
    return forced or ("one_pass" if fits else "split")


def split(order: Order, indices: Sequence[int]) -> list[Tensor]:
    """The jobs of the launches of measure, dot and update. Those of the first prepare before they measure."""
    parts = [_prepare(indices), *map(order.measure, indices)], map(order.dot, indices), map(order.update, indices)
    return [torch.cat([*part]) for part in parts]


def one_pass(order: Order, indices: Sequence[int]) -> list[Tensor]:
    """The jobs of the one launch. Parameters are measured a window of elements before they are updated."""
    windows: list[list[int]] = [[]]
    filled = 0
    for i in indices:
        if windows[-1] and filled + order.elements[i] > _WINDOW:
            windows.append([])
            filled = 0
        windows[-1].append(i)
        filled += order.elements[i]
    pieces = [_prepare(indices)]
    for ahead, now in zip([*windows, []], [[], *windows], strict=True):
        pieces += [*map(order.measure, ahead), *map(order.dot, now), *map(order.update, reversed(now))]
    return [torch.cat(pieces)]


def blocks_of(indices: Sequence[int]) -> int:
    """The number of jobs that prepare."""
    return -(-len(indices) // PREPARE_BLOCK)


def _prepare(indices: Sequence[int]) -> Tensor:
    jobs = [(STAGES.index("prepare"), block, 1) for block in range(blocks_of(indices))]
    return torch.tensor(jobs, dtype=torch.int32, device="cpu")
