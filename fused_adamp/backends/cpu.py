"""The CPU backend: csrc/ over a bucket, in one call of one registered operator."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from fused_adamp.bucket import FLOATING

if TYPE_CHECKING:
    from torch import Tensor

    from fused_adamp.bucket import Batch, Bucket

__all__ = ["CpuBackend", "load"]

_LAYOUT = 1  # csrc/bucket.h
_SUMS = 7  # doubles per tile: csrc/cpu_kernels.h, TileSums


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

    def steps_device(self, device: torch.device) -> torch.device:
        return device

    def scratch(self, bucket: Bucket) -> Tensor:
        return torch.empty(bucket.tiles, _SUMS, dtype=torch.float64)

    def first_stale(self, batch: Batch) -> int:
        return self._call(batch, check_only=True)

    def step(self, batch: Batch) -> int:
        return self._call(batch, check_only=False)

    def _call(self, batch: Batch, *, check_only: bool) -> int:
        bucket = batch.bucket
        scalars = torch.tensor([batch.rule.scalars(group) for group in batch.groups], dtype=torch.float64)
        first, second = (*batch.moments, [], [])[:2]
        index: int = torch.ops.fused_adamp.step.default(
            bucket.params,
            batch.grads,
            first,
            second,
            batch.steps,
            bucket.decisions,
            bucket.scratch,
            bucket.table,
            scalars,
            FLOATING.index(bucket.key.dtype),  # csrc/cpu_kernels.h: StorageType
            batch.rule.adaptive,
            check_only,
        )
        return index
