"""The reference backend: reference.py, tensor by tensor, on any device that torch computes on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fused_adamp.batch import ABSENT, COLUMNS, ROW_SHARES, SHARES, Need, Sharing
from fused_adamp.bucket import first_stale
from fused_adamp.precision import join, noise, round_stochastically, split
from fused_adamp.reference import Decision, cosine_ratio, project
from fused_adamp.tensors import rows_cols

if TYPE_CHECKING:
    from torch import Tensor

    from fused_adamp.batch import Batch, Members, Shared
    from fused_adamp.reference import Projection

__all__ = ["ReferenceBackend"]


class ReferenceBackend:
    name = "reference"
    fused = False
    mixes_moments = True

    def unavailable(self, device: torch.device) -> str | None:
        return "parameters on the meta device hold no data" if device.type == "meta" else None

    def zeros_like(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(p, dtype=dtype)

    def geometry(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols  # one tile per parameter

    def counters_device(self, device: torch.device) -> torch.device:
        return torch.device("cpu")  # read with item() in every step

    def scratch(self, bucket: Members) -> None:
        return None

    def first_stale(self, batch: Batch) -> int:
        return first_stale(batch)

    def square_norm(self, batch: Batch) -> Tensor | None:
        if first_stale(batch) >= 0:
            return None
        squares = [g.double().square().sum() for g in batch.grads if g is not ABSENT]
        return torch.stack(squares).sum()

    def measure(self, batch: Batch) -> None:
        shared = batch.bucket.shared
        assert shared is not None, "nobody shares the bucket"
        for i, (g, need) in enumerate(zip(batch.grads, shared.needs.tolist(), strict=True)):
            if g is not ABSENT and need:
                _measure(batch, i, Need(need), shared)

    def step(self, batch: Batch) -> int:
        stale = first_stale(batch)
        if stale >= 0:
            return stale
        if batch.found_inf is None or not batch.found_inf.item():
            for i, g in enumerate(batch.grads):
                if g is not ABSENT:
                    _step(batch, i)
        return -1


def _operands(batch: Batch, i: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weight, scaled gradient and moments of member i for the reference: its tensors, or copies in float32 or wider."""
    p, g, moments = batch.params[i], batch.grads[i], [moment[i] for moment in batch.moments]
    if batch.remainders:
        p = join(p, batch.remainders[i])
    elif batch.seeds:
        p, *moments = (t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in (p, *moments))
    if batch.scale is not None:
        wide = torch.promote_types(p.dtype, torch.float32)
        g = g.to(wide) * batch.scale.to(wide).reshape(())
    return p, g, moments


def _measure(batch: Batch, i: int, need: Need, shared: Shared) -> None:
    p, g, moments = _operands(batch, i)
    group = batch.groups[batch.bucket.groups[i]]
    y, x = p.double(), g.double()
    sums: dict[str, Tensor] = {}
    if Need.TEST in need:
        sums |= {"pg": y * x, "gg": x * x, "pp": y * y}
        pg, gg, pp = (t.reshape(rows_cols(t)).sum(dim=1) for t in sums.values())
        delta, eps = float(group["delta"]), float(group["eps"])
        limits, cosines = _compare(pg, gg, pp, delta / math.sqrt(max(rows_cols(p)[1], 1)), eps)
        shared.shares[i, SHARES.index("limit")] = limits.min() if len(limits) else math.inf
        shared.shares[i, SHARES.index("cosine")] = cosines.max() if len(cosines) else 0.0
    if Need.DOT in need:
        u = _update(batch, i, p, g, moments).double()
        sums |= {"pp": y * y, "pu": y * u}
    if Need.SQUARE in need:
        sums |= {"gg": x * x}
    for name, products in sums.items():
        shared.shares[i, SHARES.index(name)] = products.sum()
        if _sharing(batch.bucket, i) == Sharing.SPLIT:
            by_row = products.reshape(rows_cols(products)).sum(dim=1)
            _rows_of(batch.bucket, i, shared.rows)[:, ROW_SHARES.index(name)] = by_row


def _compare(pg: Tensor, gg: Tensor, pp: Tensor, threshold: float, eps: float) -> tuple[Tensor, Tensor]:
    """For sums ``(R,)``, the limit of each row and its cosine over the threshold, ``(R,)`` each.

    See docs/architecture.md, "The limit of a view".
    """
    a, pg = threshold * pp.sqrt().clamp(min=eps), pg.abs()
    limit = torch.where(pg < a * gg.sqrt(), math.inf, a * eps / pg).nan_to_num(0.0, posinf=math.inf)
    return limit, (pg / (a * gg.sqrt().clamp(min=eps))).nan_to_num(math.inf, posinf=math.inf)


def _update(batch: Batch, i: int, p: Tensor, g: Tensor, moments: list[Tensor]) -> Tensor:
    """The update u of member i in this step, in the shape of p. Weight and moments are not written."""
    updates: list[Tensor] = []

    def note(grad: Tensor, w: Tensor, u: Tensor) -> tuple[Decision, Tensor]:
        updates.append(u)
        return Decision.NONE, u

    group = batch.groups[batch.bucket.groups[i]] | {"projection": note}
    step = batch.steps[i] + 1 if batch.steps else None
    batch.rule.reference_step(p.clone(), g, [moment.clone() for moment in moments], step, group)
    return updates[0]


def _sharing(bucket: Members, i: int) -> int:
    return int(bucket.table[i, COLUMNS.index("sharing")])


def _rows_of(bucket: Members, i: int, rows: Tensor) -> Tensor:
    first, count = (int(bucket.table[i, COLUMNS.index(name)]) for name in ("first_row", "rows"))
    return rows[first : first + count]


def _by_verdict(bucket: Members, i: int, shared: Shared, eps: float) -> Projection:
    """A function that decides on member i and projects its update by the verdict of all ranks."""
    decision = Decision(int(shared.verdicts[i, 0]))
    if _sharing(bucket, i) == Sharing.SPLIT:
        c = _rows_of(bucket, i, shared.row_projections)
        return lambda grad, w, u: (decision, u - c.reshape(-1, *[1] * (w.ndim - 1)).to(w.dtype) * w)
    if decision is Decision.LAYER:
        return lambda grad, w, u: (decision, u - shared.verdicts[i, 1].to(w.dtype) * w)
    return lambda grad, w, u: (decision, project(u, w, decision, eps))  # each row here knows its own


def _step(batch: Batch, i: int) -> None:
    bucket, shared = batch.bucket, batch.bucket.shared
    stored = [batch.params[i], *(moment[i] for moment in batch.moments)]
    group = batch.groups[bucket.groups[i]]
    p, g, moments = _operands(batch, i)
    step = batch.steps[i].add_(1) if batch.steps else None
    if shared is not None and _sharing(bucket, i):
        by_verdict = _by_verdict(bucket, i, shared, float(group["eps"]))
        bucket.decisions[i] = batch.rule.reference_step(p, g, moments, step, group | {"projection": by_verdict})
    else:
        results: list[Any] = [math.nan, math.nan]
        if p.ndim >= 2 and p.numel() and group["projection"] == "auto" and group["delta"] > 0:
            x, y = (t.to(torch.promote_types(p.dtype, torch.float32)) for t in (g, p))
            results = [cosine_ratio(x, y, float(group["delta"]), float(group["eps"])), p.double().norm()]
        bucket.decisions[i] = batch.rule.reference_step(p, g, moments, step, group)
        bucket.results[i] = torch.tensor(results, dtype=torch.float64, device=bucket.key.device)
    if batch.remainders:
        high, low = split(p)
        stored[0].copy_(high)
        batch.remainders[i].copy_(low)
    elif batch.seeds:
        seed, numbers = int(batch.seeds[i].item()), _numbers(bucket, i, p)
        for stream, (target, value) in enumerate(zip(stored, [p, *moments], strict=True)):
            rounds = target.dtype == torch.bfloat16
            random = noise(seed, numbers, stream) if rounds else None
            target.copy_(value if random is None else round_stochastically(value, random))
        batch.seeds[i].add_(1)


def _numbers(bucket: Members, i: int, p: Tensor) -> Tensor:
    """The numbers of member i's elements in the whole tensor: int64, in the shape of p, the part on this rank."""
    first, step = (int(bucket.table[i, COLUMNS.index(name)]) for name in ("first_number", "row_numbers"))
    rows, cols = rows_cols(p)
    row, col = (torch.arange(n, device=p.device) for n in (rows, cols))
    return (first + row[:, None] * step + col).reshape(p.shape)
