"""A report on the last step's projection: a table for people, plain records for loggers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from fused_adamp.batch import RESULTS, UNDECIDED
from fused_adamp.precision import join
from fused_adamp.reference import Decision
from fused_adamp.sharded.dtensor import local, local_gradient
from fused_adamp.sharded.placement import placement_of
from fused_adamp.tensors import rows_cols

if TYPE_CHECKING:
    from torch import Tensor

    from fused_adamp.bucket import Bucket
    from fused_adamp.memory import Owner

__all__ = ["ProjectionRecord", "ProjectionReport", "projection_report"]


class ProjectionRecord(NamedTuple):
    """One parameter in the last step. NaN is a missing value.

    Attributes:
        name: the name in ``model.named_parameters()``, else the optimizer's name for the parameter.
        shape: the shape of the whole parameter.
        decision: "channel", "layer" or "none".
        cosine: the largest cosine between a row of the gradient and of the weight, divided by the test's threshold:
            below 1 the channels are projected. Infinite after a NaN. NaN if the parameter was not tested.
        norm: the weight's norm after the step.
        growth: the relative growth of the norm in the step; NaN if the parameter was not tested.
        effective_step: the norm of one more step with these moments, projected by the last decision, divided by the
            weight's norm. If it is small, it is the angle in radians by which the step turns the weight.
    """

    name: str
    shape: tuple[int, ...]
    decision: str
    cosine: float
    norm: float
    growth: float
    effective_step: float


class ProjectionReport(list[ProjectionRecord]):
    """The records of all stepped parameters, in the order of the parameter groups. ``print`` shows a table."""

    def __str__(self) -> str:
        header = ("parameter", "shape", "decision", "cosine", "norm", "growth", "effective step")
        lines = [header, *(_line(record) for record in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
        return "\n".join("  ".join(line).rstrip() for line in aligned)


def _line(record: ProjectionRecord) -> tuple[str, ...]:
    def number(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    return (
        record.name,
        "x".join(map(str, record.shape)) or "scalar",
        record.decision,
        number(record.cosine, ".3g"),
        number(record.norm, ".4g"),
        number(record.growth, "+.2e"),
        number(record.effective_step, ".2e"),
    )


def projection_report(optimizer: Owner, names: dict[Tensor, str]) -> ProjectionReport:
    """The report of the last step; ``names`` has a name for every parameter. Waits for each device once.

    All ranks must call this, since it adds up the parts of parameters that lie on several ranks.
    """
    sharded = _over_ranks(optimizer)
    tables: dict[torch.device, list[Tensor]] = {}
    for bucket in optimizer._memory.buckets:
        rows = []
        for i, p in enumerate(bucket.params):
            cosine, squares = sharded.get(p) or (bucket.results[i, 0], _squares(optimizer, bucket, i))
            sizes = squares.to(bucket.key.device).sqrt()
            rows.append(torch.stack([cosine.to(bucket.key.device), sizes[0], *(sizes[1:] / sizes[0])]))
        decided = [bucket.decisions.double()[:, None], bucket.results[:, 1:]]
        tables.setdefault(bucket.key.device, []).append(torch.cat([*decided, torch.stack(rows)], dim=1))
    read = {device: iter(torch.cat(parts).tolist()) for device, parts in tables.items()}
    records = {p: _record(names[p], p, next(read[p.device])) for b in optimizer._memory.buckets for p in b.params}
    ordered = (records.get(p) for group in optimizer.param_groups for p in group["params"])
    return ProjectionReport(record for record in ordered if record is not None)


def _record(name: str, p: Tensor, row: list[float]) -> ProjectionRecord | None:
    decision, before, cosine, norm, *turns = row
    if decision == UNDECIDED:
        return None
    growth = norm / before - 1 if before else math.nan
    view = Decision(int(decision))
    return ProjectionRecord(name, placement_of(p).shape(p), view.name.lower(), cosine, norm, growth, turns[view])


def _over_ranks(optimizer: Owner) -> dict[Tensor, tuple[Tensor, Tensor]]:
    """For each parameter that lies on several ranks, its cosine (0-dim) and :func:`_squares` of the whole of it."""
    exchange = optimizer._memory.exchange
    if exchange is None:
        return {}
    bucket_of = {p: bucket for bucket in optimizer._memory.buckets for p in bucket.index}
    pieces = [(bucket_of[p], i) for p, i in exchange.pieces]
    results = [bucket_of[p].results[bucket_of[p].index[p]].to(exchange.device) for p in exchange.members]
    cosines = torch.stack(results)[:, RESULTS.index("cosine")]
    # The largest cosine of all rows. Nothing is larger than a NaN, so a NaN on one rank is one on all ranks.
    largest = exchange.over_ranks(cosines.nan_to_num(-1.0, posinf=math.inf), dist.ReduceOp.MAX)
    factors = exchange.projections([_dots(optimizer, bucket, i) for bucket, i in pieces])
    parts = [_squares(optimizer, *at, factor) for at, factor in zip(pieces, factors, strict=True)]
    squares = exchange.over_pieces(torch.stack([part.to(exchange.device) for part in parts]))
    found = zip(torch.where(largest < 0, math.nan, largest), squares, strict=True)
    return dict(zip(exchange.members, found, strict=True))


def _weight_and_step(optimizer: Owner, bucket: Bucket, index: int) -> tuple[Tensor, Tensor]:
    """A member's local weight, and the step that its moments would take next, without projection: ``(R, K)`` float64.

    The step is NaN if the rule keeps no moments and the gradient is None.
    """
    param, key = bucket.params[index], bucket.key
    state, group = optimizer.state.get(param, {}), optimizer.param_groups[bucket.groups[index]]
    moments = [state.get(name) for name in key.moments] or [param.grad]
    weight = local(param.detach())
    if "remainder" in state:
        weight = join(weight, local(state["remainder"]))
    part = bucket.layouts[index].part
    p = part.of(weight).double()
    p = p.reshape(rows_cols(p))
    if any(moment is None for moment in moments):
        return p, torch.full_like(p, math.nan)
    here = [local(m) for m in moments if m is not None] if key.moments else [local_gradient(param)]
    here = [part.of(m, copy=True).double().reshape(p.shape) for m in here if m is not None]
    u, step_size = optimizer.direction(here, state.get("step"), group)
    return p, step_size * u


def _dots(optimizer: Owner, bucket: Bucket, index: int) -> Tensor:
    """p.u and p.p of each local row of a member: ``(R, 2)`` float64."""
    p, u = _weight_and_step(optimizer, bucket, index)
    return torch.stack([(p * u).sum(dim=1), (p * p).sum(dim=1)], dim=1)


def _squares(optimizer: Owner, bucket: Bucket, index: int, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Sums of squares of a member's local weight, and of its step with each decision: ``(4,)`` float64.

    ``factors`` are c of every row ``(R,)`` and of the layer, for parameters that lie on several ranks.
    """
    p, u = _weight_and_step(optimizer, bucket, index)
    if factors is None:
        dots = torch.stack([(p * u).sum(dim=1), (p * p).sum(dim=1)], dim=1)
        layer = dots.sum(dim=0)
        factors = dots[:, 0] / dots[:, 1], layer[0] / layer[1]
    by_row, layer_factor = (factor.to(p.device) for factor in factors)
    vectors = (p, u, u - by_row[:, None] * p, u - layer_factor * p)
    return torch.stack([vector.square().sum() for vector in vectors])
