"""The CPU backend: csrc/ over a bucket, in one call of one registered operator."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import lru_cache
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_adamp.bucket import COLUMNS, FLOATING
from fused_adamp.sharding import Sharing

if TYPE_CHECKING:
    from fused_adamp.bucket import Batch, Bucket

__all__ = ["CpuBackend", "load"]

_LAYOUT = 5  # csrc/bucket.h
_SUMS = 8  # doubles per tile: csrc/cpu_kernels.h, TileSums
_SHORTEST_ROW = 64  # csrc/cpu.cpp, keeps_shrink


@lru_cache(maxsize=1)
def load() -> str | None:
    """Loads the extension; returns None, or why there is none and how to get it."""
    try:
        importlib.import_module("fused_adamp._C")
    except ImportError as error:
        return (
            f"the compiled extension is missing ({error}); install a C++17 compiler (g++ or clang++) and run "
            "`pip install --no-build-isolation --force-reinstall --no-deps fused_adamp` beside an installed torch"
        )
    built = torch.ops.fused_adamp.layout()
    if built != _LAYOUT:
        return (
            f"the extension was built from other sources (layout {built}, wanted {_LAYOUT}); install the package again"
        )
    return None


@dataclass
class Scratch:
    """What the steps of one bucket share."""

    sums: Tensor
    rows: list[Any] = field(default_factory=list)
    scalars: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    """The rows as a tensor."""
    kept: list[Tensor] = field(default_factory=list)
    """What `measure` leaves for the step that follows it, if members lie on several ranks: :func:`_kept`."""


class CpuBackend:
    name = "cpu"
    fused = True

    def unavailable(self, device: torch.device) -> str | None:
        return load() if device.type == "cpu" else "it steps parameters on the CPU only"

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Flat zeros, backed by huge pages where the system grants them."""
        storage = torch.empty(numel, dtype=dtype, device=device)
        torch.ops.fused_adamp.advise_huge_pages(storage)
        return storage.zero_()

    def geometry(self, rows: int, cols: int) -> tuple[int, int]:
        """Tiles of 32768 elements: enough for the memory to stream, few enough to be measured and updated in cache."""
        tile_cols = min(cols, 32768)
        return min(rows, 32768 // tile_cols) if cols <= 32768 else 1, tile_cols

    def counters_device(self, device: torch.device) -> torch.device:
        return device

    def scratch(self, bucket: Bucket) -> Scratch:
        sums = torch.empty(bucket.tiles, _SUMS, dtype=torch.float64, device="cpu")
        return Scratch(sums, kept=_kept(bucket) if bucket.shared else [])

    def first_stale(self, batch: Batch) -> int:
        return int(torch.ops.fused_adamp.first_stale.default(*_arguments(batch)))

    def square_norm(self, batch: Batch) -> Tensor:
        square = torch.ops.fused_adamp.square_norm.default(*_arguments(batch))
        return torch.tensor(square, dtype=torch.float64, device="cpu")

    def measure(self, batch: Batch) -> None:
        torch.ops.fused_adamp.measure.default(*_arguments(batch))

    def step(self, batch: Batch) -> int:
        operator = torch.ops.fused_adamp.step
        if batch.found_inf is not None and batch.found_inf.item():
            operator = torch.ops.fused_adamp.first_stale
        return int(operator.default(*_arguments(batch)))


def _kept(bucket: Bucket) -> list[Tensor]:
    """Of every member whether `measure` has moved it, and by which guess: ``(P,)`` uint8, csrc/bucket.h, Swept.

    And of rows that lie here whole, in the dtype that they are computed in, what their projection asks for.
    """
    sharing, rows, cols = (bucket.table[:, COLUMNS.index(name)] for name in ("sharing", "rows", "cols"))
    whole = int(rows[(sharing == Sharing.SHARED) & (cols >= _SHORTEST_ROW)].sum())
    computed = torch.promote_types(bucket.key.dtype, torch.float32)
    return [
        torch.zeros(len(bucket.params), dtype=torch.uint8, device="cpu"),
        torch.empty(whole, dtype=computed, device="cpu"),
    ]


def _arguments(batch: Batch) -> tuple[Any, ...]:
    bucket = batch.bucket
    moments = [_flat(bucket, *named) for named in zip(bucket.key.moments, batch.moments, strict=batch.has_state)]
    first, second = (*moments, [], [])[:2]
    return (
        batch.params,
        batch.grads,
        first,
        second,
        _flat(bucket, "remainder", batch.remainders),
        _flat(bucket, "step", batch.steps),
        batch.seeds,
        bucket.decisions,
        bucket.results,
        bucket.scratch.sums,
        bucket.table,
        bucket.offsets,
        _scalars(batch),
        1.0 if batch.scale is None else batch.scale.item(),
        FLOATING.index(bucket.key.dtype),  # csrc/cpu_kernels.h: StorageType
        batch.rule.adaptive,
        [*(bucket.shared or ()), *bucket.scratch.kept],
        batch.final,
    )


def _scalars(batch: Batch) -> Tensor:
    """The hyperparameters as a table, made anew where one has changed."""
    scratch, rows = batch.bucket.scratch, [batch.rule.scalars(group) for group in batch.groups]
    if rows != scratch.rows:
        scratch.rows, scratch.scalars = rows, torch.tensor(rows, dtype=torch.float64, device="cpu")
    table: Tensor = scratch.scalars
    return table


def _flat(bucket: Bucket, name: str, tensors: list[Tensor]) -> list[Tensor]:
    """The bucket's flat tensor where the members' are the parts of it that they were given: one to hand over, not P."""
    addresses = bucket.addresses.get(name)
    same = addresses and all(map(is_, tensors, bucket.given[name]))
    return [bucket.flat(name)] if same and list(map(Tensor.data_ptr, tensors)) == addresses else tensors
