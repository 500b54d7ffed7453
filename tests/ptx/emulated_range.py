"""Squares that leave float32, in compiled kernels: decision and step are the float64 reference's.

Here redo kernels have something to do. See emulated_steps.py.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import test_range
import torch
from harness import BACKEND
from models import MODEL, SGDP_, TILE, Shapes, exhaustive, flat, grad_of, model, params_of, tensors, usual_under
from torch import Tensor

from fused_adamp import SGDP
from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from torch.nn import Parameter

pytestmark = pytest.mark.usefixtures("emulated")

RANGES = {
    "gradient": (1e20, 1.0, 1e-8),
    "weight": (1e-30, 1e20, 1e-8),
    "both": (1e20, 1e20, 1e-8),
    "tiny": (1e-30, 1e-20, 0.0),
    "apart": (1e30, 1e-20, 0.0),
}
"""Sizes of gradients and weights, and eps: small enough that it does not hide what is lost below."""

RANGE_MODEL: Shapes = (
    ((TILE + 3,), Decision.NONE),
    ((3, 72), Decision.NONE),
    ((3, 72), Decision.CHANNEL),
    ((2, 600), Decision.LAYER),
    ((4, 520), Decision.NONE),
    ((4, 520), Decision.CHANNEL),
    ((4, 520), Decision.LAYER),
    ((2, TILE + 8), Decision.CHANNEL),
)
"""A vector, rows in two widths of blocks, a wide row, and layer views of one tile and of several."""


FLAT_RANGE_MODEL: Shapes = tuple(
    ({72: (3, 70), 520: (4, 513)}.get(shape[-1], shape), decision) for shape, decision in RANGE_MODEL
)
every_alignment = pytest.mark.parametrize(
    "shapes",
    [pytest.param(RANGE_MODEL, id="aligned"), pytest.param(FLAT_RANGE_MODEL, id="some flat", marks=exhaustive)],
)


def range_model(g_size: float, p_size: float, shapes: Shapes) -> list[Parameter]:
    """All of these leave float32; of one more tensor only the last of many rows."""
    params = model(shapes)
    for p in params:
        p.detach().mul_(p_size)
        grad_of(p).mul_(g_size)
    (late,) = model((((40, 72 if shapes[-2][0][-1] % 8 == 0 else 65), Decision.CHANNEL),))
    late.detach()[39] *= p_size
    grad_of(late)[39] *= g_size
    return [*params, late]


@pytest.mark.parametrize("sizes", RANGES)
@pytest.mark.parametrize("rule", [usual_under("one_pass", "AdamP"), usual_under("split", "SGDP")])
@every_alignment
def test_squares_that_leave_float32(rule: str, sizes: str, shapes: Shapes) -> None:
    """Decision and step are the float64 reference's."""
    g_size, p_size, eps = RANGES[sizes]
    make, options = test_range.OPTIONS[rule]
    params = range_model(g_size, p_size, shapes)
    before = [p.detach().clone() for p in params]
    optimizer = make(params, **options, eps=eps, backend=BACKEND)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        projection = "auto" if p.ndim > 1 else "none"
        want, moved, state = test_range.reference(rule, old, grad_of(p), eps, projection)
        assert optimizer.decisions()[p] == want, p.shape
        # The second moment is kept in float32, where it has to fit; and so has c.
        large, small = (state.abs() < test_range.LARGEST).all(), (state > test_range.LEAST).all()
        if large and (rule == "SGDP" or eps > 0 or small) and sizes != "apart":
            off = test_range.off(rule, p, old, moved, want) if p.ndim > 1 else vector_off(p, moved)
            assert off < 64, p.shape


def vector_off(p: Tensor, moved: Tensor) -> float:
    error = (p.detach().double() - moved).abs().max() / moved.abs().max()
    return float(error) / torch.finfo(torch.float32).eps


@pytest.mark.parametrize("projection", ["channel", "layer"])
@every_alignment
def test_a_fixed_projection_of_squares_that_leave_float32(projection: str, shapes: Shapes) -> None:
    """Nothing is measured: dot or update finds out, when other tiles may have moved."""
    make, options = test_range.OPTIONS["SGDP"]
    params = range_model(1e20, 1e20, tuple(case for case in shapes[1:] if case[1] is not Decision.NONE))
    before = [p.detach().clone() for p in params]
    optimizer = make(params, **options, projection=projection, backend=BACKEND)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        want, moved, _ = test_range.reference("SGDP", old, grad_of(p), 1e-8, projection)
        assert optimizer.decisions()[p] == want
        assert test_range.off("SGDP", p, old, moved, want) < 64, p.shape


@pytest.mark.parametrize("projection", ["channel", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_spreads_as_far_as_the_reference_lets_it(dtype: torch.dtype, projection: str) -> None:
    """Also where float64, or the float64 of a redone step, has nothing more to do again."""
    make, options = test_range.OPTIONS["SGDP"]
    steps: list[list[Tensor]] = []
    for backend in (BACKEND, "reference"):
        params = model(tuple(case for case in RANGE_MODEL if case[1] is not Decision.NONE), dtype=dtype)
        for p in params:
            grad_of(p)[1, 5] = torch.nan
        make(params, **options, projection=projection, backend=backend).step()
        steps.append([p.detach().isnan() for p in params])
    for ours, expected in zip(*steps, strict=True):
        assert expected.any()
        assert torch.equal(ours, expected), expected.shape


@every_alignment
def test_what_has_left_float32_is_done_again_in_that_step_alone(shapes: Shapes) -> None:
    params = range_model(1e20, 1e20, shapes[2:4])
    optimizer: Any = SGDP(params, **SGDP_, backend=BACKEND)
    optimizer.step()
    before = copy.deepcopy(tensors(optimizer))
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert all(map(torch.equal, tensors(optimizer), before))
    del optimizer.found_inf
    ordinary = [*model(shapes[2:4]), *model(((tuple(params[-1].shape), Decision.CHANNEL),))]
    for p, other in zip(params, ordinary, strict=True):
        p.data.copy_(other.data)
        grad_of(p).copy_(grad_of(other))
        optimizer.state[p]["momentum_buffer"].zero_()
    fresh = SGDP(ordinary, **SGDP_, backend=BACKEND)
    fresh.step()
    optimizer.step()
    assert [*optimizer.decisions().values()] == [*fresh.decisions().values()]
    assert all(map(torch.equal, tensors(optimizer), tensors(fresh)))


@pytest.mark.parametrize("whole", [MODEL, pytest.param(flat(MODEL), marks=exhaustive)], ids=["aligned", "some flat"])
def test_the_norm_of_gradients_whose_squares_leave_float32(whole: Shapes) -> None:
    optimizer = SGDP(model((*whole[1:2], *whole[3:5])), **SGDP_, backend=BACKEND)
    optimizer.step()
    for p in params_of(optimizer):
        grad_of(p).mul_(1e20)
    expected = math.sqrt(sum(float(grad_of(p).double().square().sum()) for p in params_of(optimizer)))
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(expected, rel=1e-5)
    optimizer.step()
    assert all(p.isfinite().all() for p in params_of(optimizer))
