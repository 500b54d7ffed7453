"""Roundings of compiled kernels, bit for bit. See emulated_steps.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import BACKEND
from models import ADAMP, MODEL, SGDP_, TILE, Shapes, exhaustive, flat, model, pair, params_of, tensors, usual_under
from torch.nn import Parameter

from fused_adamp import SGDP, AdamP
from fused_adamp.precision import join, split
from fused_adamp.reference import Decision
from fused_adamp.verify import lay_out

pytestmark = pytest.mark.usefixtures("emulated")

STRIDED: Shapes = (((17, 65), Decision.CHANNEL), ((9, 129), Decision.LAYER))


@pytest.mark.parametrize(
    ("make", "options"),
    [(AdamP, ADAMP), pytest.param(SGDP, SGDP_ | {"project_buffer": True}, marks=exhaustive)],
    ids=["AdamP", "SGDP"],
)
@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        usual_under("one_pass", "contiguous", MODEL, id="aligned"),
        pytest.param("contiguous", flat(MODEL), marks=exhaustive, id="some flat"),
        pytest.param("transposed", STRIDED, marks=exhaustive, id="transposed"),
    ],
)
def test_a_weight_with_a_remainder_is_the_float32_weight_bit_for_bit(
    make: Any, options: Any, layout: str, shapes: Shapes
) -> None:
    whole = [Parameter(lay_out(p.detach(), layout)) for p in model(shapes)]
    halves = [Parameter(lay_out(split(p.detach().contiguous())[0], layout)) for p in whole]
    generator = torch.Generator().manual_seed(1)
    ours = make(halves, **options, rounding="remainder", backend=BACKEND)
    expected = make(whole, **options, backend=BACKEND)
    for number in range(2):
        for p, half in zip(whole, halves, strict=True):
            g = torch.randn(p.shape, generator=generator).bfloat16()
            if number == 1 and p.ndim == 2 and p.numel():
                g[0, 0] = math.nan
            half.grad, p.grad = lay_out(g, layout), lay_out(g.float(), layout)
        if number == 0:  # makes the state
            before = [p.detach().clone() for p in whole]
            ours.step()
            for weight, half in zip(before, halves, strict=True):
                high, low = split(weight.contiguous())
                half.detach().copy_(high)
                ours.state[half]["remainder"].copy_(low)
                for name, tensor in ours.state[half].items():
                    if name != "remainder":
                        tensor.zero_()
        ours.step()
        expected.step()
        for p, half in zip(whole, halves, strict=True):
            state = ours.state[half]
            high, low = split(p.detach().contiguous())
            assert torch.equal(half.detach().view(torch.int16), high.view(torch.int16))
            assert torch.equal(state["remainder"], low)
            assert half.isnan().any() or torch.equal(
                join(half.detach().contiguous(), state["remainder"].contiguous()), p
            )
            for name, moment in expected.state[p].items():
                assert torch.equal(state[name].nan_to_num(7), moment.nan_to_num(7)), name


@pytest.mark.parametrize("shape", [usual_under("one_pass", (3, 72))])
def test_a_zero_has_no_negative_remainder(shape: tuple[int, int]) -> None:
    """Somebody has set the weight to 0, and what was left of the old one does not count."""
    params = [Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(2)]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = AdamP(params, **ADAMP, rounding="remainder", backend=BACKEND)
    optimizer.step()
    stale, fresh = (optimizer.state[p]["remainder"] for p in params)
    stale.fill_(-5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(*params)
    assert torch.equal(stale, fresh)
    assert params[0].all()


STOCHASTIC: tuple[tuple[tuple[int, ...], str, int], ...] = (
    ((TILE + 3,), "contiguous", 0),
    ((17, 136), "contiguous", 0),
    ((2, 2 * TILE), "contiguous", 0),
    ((1, 3 * TILE), "contiguous", 0),
)
"""Shape, layout and channel dimension."""
STOCHASTIC_ELSEWHERE: tuple[tuple[tuple[int, ...], str, int], ...] = (
    ((17, 129), "contiguous", 0),
    ((17, 128), "transposed", 0),
    ((6, 5, 4), "contiguous", 1),
    ((6, 5, 4, 3), "channels_last", 0),
)


@pytest.mark.parametrize("make", [AdamP, pytest.param(SGDP, marks=exhaustive)])
@pytest.mark.parametrize(
    "dtypes",
    [
        usual_under("split", (torch.bfloat16, torch.bfloat16)),
        pytest.param((torch.float32, torch.bfloat16), marks=exhaustive),
    ],
)
@pytest.mark.parametrize(
    "places",
    [pytest.param(STOCHASTIC, id="aligned"), pytest.param(STOCHASTIC_ELSEWHERE, id="elsewhere", marks=exhaustive)],
)
def test_stochastic_rounding_is_the_reference_s_bit_for_bit(
    make: Any, dtypes: tuple[torch.dtype, torch.dtype], places: tuple[tuple[tuple[int, ...], str, int], ...]
) -> None:
    """On numbers of so few digits that float32 is exact, in any order. AdamP's quotient is not: its weights stay."""
    options: dict[str, Any] = {"delta": 0.0, "rounding": "stochastic", "state_dtype": dtypes[1]}
    options |= {"lr": 0.0, "betas": (0.5, 0.5)} if make is AdamP else {"lr": 0.5, "momentum": 0.5, "dampening": 0.5}
    for shape, layout, channel_dim in places:
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(-128, 128, shape, generator=generator) / 16
        params = [Parameter(lay_out(x.to(dtypes[0]), layout))]
        params[0].grad = lay_out((torch.randint(-128, 128, shape, generator=generator) / 8).to(dtypes[0]), layout)
        ours, theirs = pair(make, params, **options, channel_dim=channel_dim)
        _, others = pair(make, params, **options, channel_dim=channel_dim)
        for _ in range(2):
            for optimizer, seed in ((ours, 7), (theirs, 7), (others, 8)):
                torch.manual_seed(seed)
                optimizer.step()
            for a, b in zip(tensors(ours), tensors(theirs), strict=True):
                assert torch.equal(a, b), (shape, layout)
        # Chance did round: with another seed, each moment is another.
        for name in ours.moments(ours.param_groups[0]):
            state, other = (o.state[params_of(o)[0]][name] for o in (ours, others))
            assert not torch.equal(state, other), name
