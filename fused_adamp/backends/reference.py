"""The reference backend: reference.py, tensor by tensor, on any device that torch computes on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fused_adamp.bucket import ABSENT, first_stale
from fused_adamp.precision import join, noise, round_stochastically, split
from fused_adamp.reference import cosine_ratio

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

    def counters_device(self, device: torch.device) -> torch.device:
        return torch.device("cpu")  # read with item() in every step

    def scratch(self, bucket: Bucket) -> None:
        return None

    def first_stale(self, batch: Batch) -> int:
        return first_stale(batch)

    def square_norm(self, batch: Batch) -> Tensor:
        squares = [g.double().square().sum() for g in batch.grads if g is not ABSENT]
        return torch.stack(squares).sum()

    def step(self, batch: Batch) -> int:
        stale = first_stale(batch)
        if stale >= 0:
            return stale
        if batch.found_inf is None or not batch.found_inf.item():
            for i, g in enumerate(batch.grads):
                if g is not ABSENT:
                    _step(batch, i)
        return -1


def _step(batch: Batch, i: int) -> None:
    bucket = batch.bucket
    p, g, moments = batch.params[i], batch.grads[i], [moment[i] for moment in batch.moments]
    stored = [p, *moments]
    group = batch.groups[bucket.groups[i]]
    if batch.remainders:
        p = join(p, batch.remainders[i])
    elif batch.seeds:
        p, *moments = (t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in stored)
    if batch.scale is not None:
        wide = torch.promote_types(p.dtype, torch.float32)
        g = g.to(wide) * batch.scale.to(wide).reshape(())
    results: list[Any] = [math.nan, math.nan]
    if p.ndim >= 2 and p.numel() and group["projection"] == "auto" and group["delta"] > 0:
        x, y = (t.to(torch.promote_types(p.dtype, torch.float32)) for t in (g, p))
        results = [cosine_ratio(x, y, float(group["delta"]), float(group["eps"])), p.double().norm()]
    step = batch.steps[i].add_(1) if batch.steps else None
    bucket.decisions[i] = batch.rule.reference_step(p, g, moments, step, group)
    bucket.results[i] = torch.tensor(results, dtype=torch.float64)
    if batch.remainders:
        high, low = split(p)
        stored[0].copy_(high)
        batch.remainders[i].copy_(low)
    elif batch.seeds:
        seed = int(batch.seeds[i].item())
        for stream, (target, value) in enumerate(zip(stored, [p, *moments], strict=True)):
            rounds = target.dtype == torch.bfloat16
            random = noise(seed, value.shape, stream, value.device) if rounds else None
            target.copy_(value if random is None else round_stochastically(value, random))
        batch.seeds[i].add_(1)
