"""What the projection did: a table for people, plain records for loggers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from fused_adamp.bucket import UNDECIDED
from fused_adamp.precision import join
from fused_adamp.reference import Decision, project, rows_first

if TYPE_CHECKING:
    from torch import Tensor

    from fused_adamp.bucket import Bucket
    from fused_adamp.projected import ProjectedOptimizer

__all__ = ["ProjectionRecord", "ProjectionReport", "projection_report"]


class ProjectionRecord(NamedTuple):
    """One parameter in the last step. NaN stands for what a parameter does not have.

    Attributes:
        name: as ``model.named_parameters()`` has it, else the optimizer's name for the parameter.
        shape: of the parameter.
        decision: "channel", "layer" or "none".
        cosine: the largest cosine between a row of the gradient and of the weight, over the threshold that it is
            compared with: below 1 the channels are projected. Infinite after a NaN. NaN where nothing was tested.
        norm: of the weight, after the step.
        growth: of the norm in the step, relative to what it was before; NaN where nothing was tested.
        effective_step: what one more step with these moments would turn the weight by: the size of the update,
            projected by the last decision, times the step size, over the weight's norm. In radians while it is small.
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


def projection_report(optimizer: ProjectedOptimizer, names: dict[Tensor, str]) -> ProjectionReport:
    """Reads the buckets' results. The rest is computed on each device, which is waited for once."""
    tables: dict[torch.device, list[Tensor]] = {}
    for bucket in optimizer.buckets:
        sizes = torch.stack([_sizes(optimizer, bucket, p, i) for i, p in enumerate(bucket.params)])
        table = torch.cat([bucket.decisions.double()[:, None], bucket.results, sizes], dim=1)
        tables.setdefault(bucket.key.device, []).append(table)
    rows = {device: iter(torch.cat(parts).tolist()) for device, parts in tables.items()}
    records = {p: _record(names[p], p, next(rows[p.device])) for b in optimizer.buckets for p in b.params}
    ordered = (records.get(p) for group in optimizer.param_groups for p in group["params"])
    return ProjectionReport(record for record in ordered if record is not None)


def _record(name: str, p: Tensor, row: list[float]) -> ProjectionRecord | None:
    decision, cosine, before, norm, *turns = row
    if decision == UNDECIDED:
        return None
    growth = norm / before - 1 if before else math.nan
    turn = turns[int(decision)]
    return ProjectionRecord(name, tuple(p.shape), Decision(int(decision)).name.lower(), cosine, norm, growth, turn)


def _sizes(optimizer: ProjectedOptimizer, bucket: Bucket, param: Tensor, index: int) -> Tensor:
    """The weight's norm, and by decision how far a step turns it: ``(4,)`` float64 on the weight's device."""
    state, group = optimizer.state.get(param, {}), optimizer.param_groups[bucket.groups[index]]
    moments = [state.get(name) for name in bucket.key.moments] or [param.grad]
    weight = join(param.detach(), state["remainder"]) if "remainder" in state else param.detach()
    if param.numel() == 0 or any(moment is None for moment in moments):
        return torch.full((1 + len(Decision),), math.nan, dtype=torch.float64, device=param.device)
    p, *moments = (rows_first(t, bucket.key.channel_dim).double() for t in (weight, *moments))
    u, step_size = optimizer.direction(moments, state.get("step"), group)
    sizes = [p.norm()]
    for decision in Decision:
        rows = p.size(0) if decision is Decision.CHANNEL and p.ndim >= 2 else 1
        sizes.append(step_size * project(u.reshape(rows, -1), p.reshape(rows, -1), decision, 0.0).norm() / sizes[0])
    return torch.stack(sizes)
