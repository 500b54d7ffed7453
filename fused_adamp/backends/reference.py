"""The reference backend: reference.py, tensor by tensor, on any device that torch computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fused_adamp.bucket import ABSENT, first_stale

if TYPE_CHECKING:
    from torch import Tensor

    from fused_adamp.bucket import Batch, Bucket

__all__ = ["ReferenceBackend"]


class ReferenceBackend:
    name = "reference"
    fused = False

    def unavailable(self, device: torch.device) -> str | None:
        return "parameters on the meta device hold no data" if device.type == "meta" else None

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def geometry(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols  # one tile per parameter

    def steps_device(self, device: torch.device) -> torch.device:
        return torch.device("cpu")  # read with item() in every step

    def scratch(self, bucket: Bucket) -> None:
        return None

    def first_stale(self, batch: Batch) -> int:
        return first_stale(batch)

    def step(self, batch: Batch) -> int:
        stale = first_stale(batch)
        if stale >= 0:
            return stale
        bucket = batch.bucket
        for i, (p, g) in enumerate(zip(bucket.params, batch.grads, strict=True)):
            if g is not ABSENT:
                moments = [moment[i] for moment in batch.moments]
                step = batch.steps[i].add_(1) if batch.steps else None
                bucket.decisions[i] = batch.rule.reference_step(p, g, moments, step, batch.groups[bucket.groups[i]])
        return -1
