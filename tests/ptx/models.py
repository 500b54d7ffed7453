"""Models for the emulator, and how their steps are compared with the reference's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import BACKEND
from torch import Tensor
from torch.nn import Parameter

from fused_adamp.backends import jobs, triton
from fused_adamp.batch import RESULTS
from fused_adamp.reference import Decision
from fused_adamp.verify import make_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.optimizer import ProjectedOptimizer

PLAN = os.environ.get(jobs.PLAN) or "one_pass"
TILE = 1 << triton._LOG_TILE
ADAMP: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
SGDP_: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}

Shapes = tuple[tuple[tuple[int, ...], Decision], ...]
"""Shapes of parameters, each with the decision that its gradient leads to."""

MODEL: Shapes = (
    ((), Decision.NONE),
    ((TILE + 3,), Decision.NONE),
    ((0, 3), Decision.NONE),
    ((33, 72), Decision.CHANNEL),
    ((40, 136), Decision.LAYER),
    ((4, 3, 4, 4), Decision.LAYER),
    ((5, 24), Decision.NONE),
    ((2, TILE + 8), Decision.CHANNEL),
    ((1, 3 * TILE), Decision.CHANNEL),
)
"""Every way through the kernels: of several tiles and of one, in rows, in a wide row, in a row of many tiles. All lie
so that one kernel a stage has to be compiled.
"""
FLAT = {(33, 72): (33, 65), (40, 136): (40, 129), (4, 3, 4, 4): (4, 3, 3, 3)}
"""Shapes of rows that do not fill whole vectors, in the place of those that do."""


def flat(shapes: Shapes) -> Shapes:
    """The same ways, but that two kernels a stage are needed."""
    return tuple((FLAT.get(shape, shape), decision) for shape, decision in shapes)


exhaustive = pytest.mark.exhaustive
every_alignment = pytest.mark.parametrize(
    "whole", [pytest.param(MODEL, id="aligned"), pytest.param(flat(MODEL), id="some flat", marks=exhaustive)]
)


def usual_under(plan: str, *values: Any, id: str | None = None) -> Any:  # noqa: A002
    """Parameters of a test that, unless exhaustive ones are asked for, run under one plan: compiling takes its time."""
    return pytest.param(*values, id=id, marks=() if plan == PLAN else exhaustive)


def model(shapes: Shapes = MODEL, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape, decision in shapes:
        p = Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        p.grad = make_gradient(p.detach().double(), decision, generator).to(dtype)
        params.append(p)
    return params


def pair(make: type[ProjectedOptimizer], params: Sequence[Parameter], **options: Any) -> tuple[Any, Any]:
    """Ours and the reference's optimizer of the same weights."""
    torch.manual_seed(0)
    theirs = [Parameter(p.detach().clone()) for p in params]
    for p, other in zip(params, theirs, strict=True):
        other.grad = None if p.grad is None else p.grad.clone()
    return make(params, **options, backend=BACKEND), make(theirs, **options, backend="reference")  # type: ignore[call-arg]


def params_of(optimizer: ProjectedOptimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def grad_of(p: Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


def tensors(optimizer: ProjectedOptimizer) -> list[Tensor]:
    """Weights and state, in a fixed order."""
    states = [(p, optimizer.state.get(p, {})) for p in params_of(optimizer)]
    return [t for p, state in states for t in (p.detach(), *(state[name] for name in sorted(state)))]


def results(optimizer: ProjectedOptimizer) -> dict[str, list[float]]:
    (bucket,) = optimizer.buckets
    return dict(zip(RESULTS, bucket.results.T.tolist(), strict=True))


def assert_same(ours: ProjectedOptimizer, theirs: ProjectedOptimizer) -> None:
    """Decisions, weights and state, to float32's rounding, and what the report says."""
    assert list(ours.decisions().values()) == list(theirs.decisions().values())
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, check_dtype=False)
    for name, values in results(ours).items():
        expected = torch.tensor(results(theirs)[name])
        # The cosine of an orthogonal pair is what rounding leaves of it.
        torch.testing.assert_close(torch.tensor(values), expected, rtol=2e-5, atol=1e-4, equal_nan=True)
