"""projection and channel_dim: the view that is projected, and which dimension its rows are, where the user decides.

test_backends.py compares single steps with the reference in float64; here are runs, groups, changes and errors.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_refusals import raises
from tolerances import assert_close, assert_identical
from torch import Tensor, nn
from trajectory import (
    KINDS,
    RULES,
    Hand,
    Run,
    assert_same_outcome,
    assert_snapshots_equal,
    gradient,
    near_threshold,
    parameters,
    snapshot,
)

from fused_adamp.batch import PROJECTIONS
from fused_adamp.reference import Decision, rows_first

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hypothesis.strategies import DrawFn

    from fused_adamp import SGDP, AdamP

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
FORCED = ("channel", "layer", "none")
EVERY_FORCED = pytest.mark.parametrize("projection", FORCED)

Dims = int | tuple[int, ...]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def build(rule: str, params: Any, backend: str, **options: Any) -> AdamP | SGDP:
    cls, defaults = RULES[rule]
    return cls(params, **{**defaults, **options}, backend=backend)


def members(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def rows_gradient(p: Tensor, kind: str, channel_dim: Dims = 0) -> Tensor:
    """A gradient built for a decision (trajectory.gradient) on the rows that ``channel_dim`` names."""
    g = torch.empty_like(p, memory_format=torch.contiguous_format)
    rows_first(g, channel_dim).copy_(gradient(rows_first(p.detach(), channel_dim), kind))
    return g


def step_together(optimizers: Sequence[Any], grads: Sequence[Tensor]) -> None:
    for optimizer in optimizers:
        for p, g in zip(members(optimizer), grads, strict=True):
            p.grad = g.clone()
        optimizer.step()


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Weights and state, whatever the options."""
    for p, q in zip(members(ours), members(theirs), strict=True):
        assert_identical(p, q, "weight")
        assert ours.state[p].keys() == theirs.state[q].keys()
        for name, t in ours.state[p].items():
            assert_identical(t, theirs.state[q][name], name)


# A view that is forced.

SMALL = ((4, 3, 3, 3), (6, 10), (5, 7), (1, 9), (9, 1), (9,), (), (0, 5), (3, 0))


def forced(p: Tensor, projection: str) -> Decision:
    return Decision[projection.upper()] if p.ndim > 1 and p.numel() else Decision.NONE


@EVERY_RULE
@EVERY_FORCED
@pytest.mark.parametrize("nesterov", [False, True])
def test_forced_view_is_the_references(rule: str, projection: str, nesterov: bool, backend: str) -> None:
    """Whatever the gradient says; vectors, scalars and empty tensors are left alone; and decisions() tells."""
    run = Run(rule, parameters(*SMALL), backend, projection=projection, nesterov=nesterov)
    for _ in range(6):
        run.step()
        assert run.optimizer.decisions() == {p: forced(p, projection) for p in run.params}


TILE = 32768
LARGE = {
    "many tiles": (70, 500),
    "rows wider than a tile": (3, TILE + 7),
    "one row wider than a tile": (1, 2 * TILE + 5),
    "short rows": (5 * TILE // 8, 2),
    "convolution": (96, 64, 3, 3),
    "wide row in a tile": (2, 9000),
    "vector of many tiles": (TILE + 9,),
}


@EVERY_RULE
@EVERY_FORCED
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_forced_view_of_many_tiles(rule: str, projection: str, dtype: torch.dtype, backend: str) -> None:
    """The plans of the CPU for views within a tile and across tiles; float32 is compared with float64."""
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in LARGE.values()]
    optimizer = build(rule, params, backend, projection=projection)
    hands = [Hand(rule, p.detach().double() if dtype == F32 else p) for p in params]
    for t in range(3):
        for i, (p, hand) in enumerate(zip(params, hands, strict=True)):
            p.grad = gradient(p.detach().float(), KINDS[(i + t) % 3]).to(dtype)
            hand.step(p.grad, optimizer.param_groups[0])
        optimizer.step()
    assert optimizer.decisions() == {p: forced(p, projection) for p in params}
    for p, hand in zip(params, hands, strict=True):
        assert hand.decision is forced(p, projection)
        assert_close(p, hand.p, "weight")
        for name, moment in hand.moments.items():
            assert_close(optimizer.state[p][name], moment, name)


@EVERY_RULE
@pytest.mark.parametrize(
    "options", [{"rounding": "remainder"}, {"rounding": "stochastic"}, {"state_dtype": F32}], ids=str
)
@EVERY_FORCED
def test_forced_view_in_every_precision(rule: str, projection: str, options: dict[str, Any], backend: str) -> None:
    """With a remainder the weight is bit for bit the float32 run's; else a step ends within a place of it."""
    values = [torch.randn(shape).bfloat16() for shape in ((6, 10), (70, 500), (9,))]
    params = [nn.Parameter(v.clone()) for v in values]
    optimizer = build(rule, params, backend, projection=projection, **options)
    full = build(rule, [nn.Parameter(v.float()) for v in values], backend, projection=projection)
    for _ in range(4):
        grads = [torch.randn(v.shape).bfloat16() for v in values]
        step_together([optimizer], grads)
        step_together([full], [g.float() for g in grads])
        for p, q in zip(params, members(full), strict=True):
            assert optimizer.decisions()[p] is full.decisions()[q] is forced(p, projection)
            if options.get("rounding") == "remainder":
                high = q.detach().view(torch.int32).add(0x8000) >> 16
                assert_identical(p.detach().view(torch.int16), high.to(torch.int16))
            else:
                assert_close(p, q, "weight", dtype=BF16)
                with torch.no_grad():
                    q.copy_(p)  # or roundings would add up


@EVERY_RULE
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("wd_ratio", [0.0, 0.25, 1.0])
def test_wd_ratio_applies_where_a_view_is_forced(rule: str, projection: str, wd_ratio: float, backend: str) -> None:
    """A gradient of zero leaves decay alone: scaled by wd_ratio if projected, and for vectors never."""
    lr, decay = 0.5, 0.1
    options = {"momentum": 0.5} if rule == "SGDP" else {}
    params = [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in ((6, 10), (200, 300), (7,))]
    before = [p.detach().clone() for p in params]
    optimizer = build(
        rule, params, backend, lr=lr, weight_decay=decay, wd_ratio=wd_ratio, projection=projection, **options
    )
    step_together([optimizer], [torch.zeros_like(p) for p in params])
    for p, w in zip(params, before, strict=True):
        ratio = (
            1.0 if p.ndim < 2 or projection == "none" else wd_ratio
        )  # zero is orthogonal to everything: "auto" projects
        shrink = lr * decay * ratio / (1 - optimizer.param_groups[0].get("momentum", 0))
        assert_close(p, w * (1 - shrink), "weight")


@EVERY_RULE
@EVERY_FORCED
def test_delta_is_irrelevant_where_a_view_is_forced(rule: str, projection: str, backend: str) -> None:
    """Bit for bit, from 0 to a threshold that everything passes."""
    values = [torch.randn(shape) for shape in ((6, 10), (70, 500), (2, TILE + 1), (9,))]
    runs = [
        build(rule, [nn.Parameter(v.clone()) for v in values], backend, projection=projection, delta=delta)
        for delta in (0, 0.1, 1e3)
    ]
    for t in range(3):
        step_together(runs, [gradient(v, KINDS[(i + t) % 3]) for i, v in enumerate(values)])
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])


@EVERY_RULE
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_none_is_delta_0(rule: str, dtype: torch.dtype, backend: str) -> None:
    """Bit for bit, and so is AdamW."""
    values = [torch.randn(shape).to(dtype) for shape in ((6, 10), (70, 500), (4, 3, 3, 3), (2, TILE + 1), (9,))]
    runs = [
        build(rule, [nn.Parameter(v.clone()) for v in values], backend, **options)
        for options in ({"projection": "none"}, {"delta": 0})
    ]
    for t in range(4):
        step_together(runs, [gradient(v.float(), KINDS[(i + t) % 3]).to(dtype) for i, v in enumerate(values)])
    assert_same_bits(*runs)
    assert set(runs[0].decisions().values()) == {Decision.NONE}


@EVERY_RULE
@pytest.mark.parametrize("projection", ["channel", "layer"])
def test_forced_is_what_auto_does_where_it_decides_so(rule: str, projection: str, backend: str) -> None:
    """On gradients for which the test takes that view, forcing it changes nothing but the order of sums."""
    values = [torch.randn(shape, dtype=F64) for shape in ((6, 10), (4, 3, 3, 3), (90, 400))]
    runs = [
        build(rule, [nn.Parameter(v.clone()) for v in values], backend, projection=option)
        for option in (projection, "auto")
    ]
    for _ in range(3):
        step_together(runs, [gradient(p.detach(), projection) for p in members(runs[1])])
        for p, q in zip(members(runs[0]), members(runs[1]), strict=True):
            assert runs[0].decisions()[p] is runs[1].decisions()[q] is Decision[projection.upper()]
            assert_close(p, q.detach())


@EVERY_RULE
@pytest.mark.parametrize("projection", ["channel", "layer"])
@pytest.mark.parametrize("channel_dim", [0, 1, -1])
def test_forced_update_is_orthogonal_to_the_weight(rule: str, projection: str, channel_dim: int, backend: str) -> None:
    """Per row, or as a whole, for a gradient that is nothing but the weight and noise."""
    p = nn.Parameter(torch.randn(6, 5, 7, dtype=F64))
    optimizer = build(rule, [p], backend, weight_decay=0, projection=projection, channel_dim=channel_dim)
    for _ in range(4):
        before = p.detach().clone()
        p.grad = before + torch.randn_like(before)
        optimizer.step()
        rows, update = (rows_first(t, channel_dim).flatten(1) for t in (before, p.detach() - before))
        dots, sizes = (rows * update).sum(dim=1), rows.norm(dim=1) * update.norm(dim=1)
        if projection == "layer":
            dots, sizes = dots.sum(), before.norm() * (p.detach() - before).norm()
        assert (dots.abs() <= 1e-7 * sizes).all()  # n is p / (|p| + eps): eps is 1e-8
        assert update.norm() > 1e-2


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_project_buffer_is_projected_in_the_forced_view(projection: str, backend: str) -> None:
    run = Run("SGDP", parameters(*SMALL, (90, 400), (2, 33000)), backend, projection=projection, project_buffer=True)
    run.steps(4)


# Rows that are not dim 0.


class Fit(NamedTuple):
    """A parameter's shape, its channel_dim, and how to make a matrix of channels from it by hand."""

    shape: tuple[int, ...]
    channel_dim: Dims
    matrix: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return f"{self.shape}:{self.channel_dim}"


FITS = [
    Fit((6, 10), 1, lambda t: t.t()),
    Fit((6, 10), -1, lambda t: t.t()),
    Fit((6, 10), -2, lambda t: t),
    Fit((6, 10), (0,), lambda t: t),
    Fit((4, 5, 3, 3), 1, lambda t: t.transpose(0, 1).reshape(5, -1)),
    Fit((4, 5, 3, 3), -3, lambda t: t.transpose(0, 1).reshape(5, -1)),
    Fit((4, 5, 3, 2), -1, lambda t: t.permute(3, 0, 1, 2).reshape(2, -1)),
    Fit((3, 4, 5), (0, 1), lambda t: t.reshape(12, 5)),
    Fit((3, 4, 5), (-3, -2), lambda t: t.reshape(12, 5)),
    Fit((3, 4, 5), 1, lambda t: t.transpose(0, 1).reshape(4, 15)),
    Fit((3, 4, 5), (1, 2), lambda t: t.permute(1, 2, 0).reshape(20, 3)),
    Fit((2, 3, 4, 5), (0, 1), lambda t: t.reshape(6, 20)),
    Fit((2, 3, 4, 5), (0, 1, 2), lambda t: t.reshape(24, 5)),
    Fit((90, 400), 1, lambda t: t.t()),
    Fit((4, 100, 100), (0, 1), lambda t: t.reshape(400, 100)),
    Fit((4, 100, 100), 1, lambda t: t.transpose(0, 1).reshape(100, 400)),
    Fit((TILE + 5, 2), 1, lambda t: t.t()),
]
EVERY_FIT = pytest.mark.parametrize("fit", FITS, ids=str)


@EVERY_RULE
@EVERY_FIT
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_channel_dim_is_that_matrix(rule: str, fit: Fit, projection: str, backend: str) -> None:
    """Weights, moments and decisions are those of the matrix of channels, made by hand and stepped with dim 0."""
    value = torch.randn(fit.shape, dtype=F64)
    ours = build(rule, [nn.Parameter(value.clone())], backend, projection=projection, channel_dim=fit.channel_dim)
    plain = build(rule, [nn.Parameter(fit.matrix(value).contiguous())], backend, projection=projection)
    (p,), (q,) = members(ours), members(plain)
    seen = set()
    for t in range(6):
        p.grad = rows_gradient(p, KINDS[t % 3], fit.channel_dim)
        q.grad = fit.matrix(p.grad).contiguous()
        for optimizer in (ours, plain):
            optimizer.step()
        assert ours.decisions()[p] is plain.decisions()[q]
        seen.add(ours.decisions()[p])
        assert_close(fit.matrix(p.detach()), q, "weight")
        for name, moment in ours.state[p].items():
            if moment.ndim:
                assert moment.shape == p.shape
                assert moment.stride() == p.stride()
                assert_close(fit.matrix(moment), plain.state[q][name], name)
    assert seen == (set(Decision) if projection == "auto" else {Decision[projection.upper()]})


@EVERY_RULE
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_channel_dim_of_a_view_is_bitwise(rule: str, projection: str, dtype: torch.dtype, backend: str) -> None:
    """channel_dim=1 is channel_dim=0 of the transposed view, bit for bit; (0, 1) of experts is the flattened view."""
    cases: list[tuple[Tensor, Dims, Callable[[Tensor], Tensor]]] = [
        (torch.randn(20, 30), 1, lambda t: t.t()),
        (torch.randn(130, 300), 1, lambda t: t.t()),
        (torch.randn(6, 5, 3, 3), 1, lambda t: t.transpose(0, 1)),
        (torch.randn(6, 5, 3, 3), -1, lambda t: t.movedim(-1, 0)),
        (torch.randn(5, 60, 130), (0, 1), lambda t: t.flatten(0, 1)),
    ]
    for value, channel_dim, view in cases:
        base = value.to(dtype)
        ours = build(rule, [nn.Parameter(base.clone())], backend, projection=projection, channel_dim=channel_dim)
        plain = build(rule, [nn.Parameter(view(base.clone()))], backend, projection=projection)
        (p,), (q,) = members(ours), members(plain)
        for t in range(4):
            p.grad = rows_gradient(p, KINDS[t % 3], channel_dim)
            q.grad = view(p.grad.clone())
            for optimizer in (ours, plain):
                optimizer.step()
            assert_identical(view(p.detach()), q, "weight")
            for name, moment in ours.state[p].items():
                if moment.ndim:
                    assert_identical(view(moment), plain.state[q][name], name)


@EVERY_RULE
def test_transposed_convolution(rule: str, backend: str) -> None:
    """The output channels of nn.ConvTranspose2d are dim 1: dim 0 of nn.Conv2d's weight; the biases are alike."""
    layer = nn.ConvTranspose2d(6, 4, 3).double()
    conv = nn.Conv2d(6, 4, 3).double()
    with torch.no_grad():
        conv.weight.copy_(layer.weight.transpose(0, 1))
        assert conv.bias is not None
        conv.bias.copy_(layer.bias)
    ours = build(rule, layer.parameters(), backend, channel_dim=1)
    plain = build(rule, conv.parameters(), backend)
    for t in range(6):
        g = rows_gradient(conv.weight, KINDS[t % 3])
        bias = torch.randn(4, dtype=F64)
        step_together([ours], [g.transpose(0, 1).contiguous(), bias])
        step_together([plain], [g, bias])
        assert ours.decisions()[layer.weight] is plain.decisions()[conv.weight]
        assert ours.decisions()[layer.weight].name.lower() == ("none" if KINDS[t % 3] == "free" else KINDS[t % 3])
        assert ours.decisions()[layer.bias] is Decision.NONE
        assert_close(layer.weight.transpose(0, 1), conv.weight)
        assert_close(layer.bias, conv.bias)


@EVERY_RULE
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_stacked_experts(rule: str, projection: str, backend: str) -> None:
    """(experts, out, in) with (0, 1): row by row each expert is stepped as if it were alone. With 1 it is not."""
    experts = torch.randn(4, 6, 10, dtype=F64)
    stacked = build(rule, [nn.Parameter(experts.clone())], backend, projection=projection, channel_dim=(0, 1))
    joined = build(rule, [nn.Parameter(experts.clone())], backend, projection=projection, channel_dim=1)
    single = build(rule, [nn.Parameter(e.clone()) for e in experts], backend, projection=projection)
    for _ in range(3):
        alone = torch.stack([p.detach() for p in members(single)])
        g = rows_gradient(alone, "channel", (0, 1))
        step_together([stacked, joined], [g])
        step_together([single], list(g))
    alone = torch.stack([p.detach() for p in members(single)])
    assert torch.allclose(members(stacked)[0], alone, rtol=0, atol=1e-12) is (projection != "layer")
    same = torch.allclose(members(joined)[0], members(stacked)[0], rtol=0, atol=1e-9)
    assert same is (projection in ("layer", "none"))


@EVERY_RULE
@pytest.mark.parametrize("channel_dim", [1, (0, 1), -2])
def test_vectors_have_no_channel_dim(rule: str, channel_dim: Dims, backend: str) -> None:
    """Biases in the group are stepped as without, bit for bit; a dimension that they lack is no error for them."""
    values = [torch.randn(shape) for shape in ((7,), (), (TILE + 1,), (0,))]
    matrix = torch.randn(3, 4, 5)
    runs = [
        build(rule, [nn.Parameter(v.clone()) for v in (*values, matrix)], backend, channel_dim=c)
        for c in (channel_dim, 0)
    ]
    for _ in range(3):
        step_together(runs, [torch.randn(v.shape) for v in (*values, matrix)])
    for p, q in zip(members(runs[0])[:4], members(runs[1])[:4], strict=True):
        assert_identical(p, q)
        for name, t in runs[0].state[p].items():
            assert_identical(t, runs[1].state[q][name])
    alone = build(rule, [nn.Parameter(torch.randn(7))], backend, channel_dim=5)
    step_together([alone], [torch.randn(7)])


@EVERY_RULE
@pytest.mark.parametrize("layout", ["rows swapped", "columns swapped", "gaps", "expanded"])
@pytest.mark.parametrize("channel_dim", [0, 1, (0, 1)])
def test_gradients_of_any_strides(rule: str, channel_dim: Dims, layout: str, backend: str) -> None:
    """How a gradient lies in memory is autograd's choice: it changes nothing but the order of sums."""
    p = nn.Parameter(torch.randn(3, 4, 5, dtype=F64))
    run = Run(rule, [p], backend, channel_dim=channel_dim)
    for t in range(4):
        g = rows_gradient(p, KINDS[t % 3], channel_dim)
        if layout == "rows swapped":
            g = g.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "columns swapped":
            g = g.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "gaps":
            g = g.new_zeros(3, 8, 10)[:, ::2, ::2].copy_(g)
        else:
            g = g[:, :1].expand(3, 4, 5)  # of a sum over that dimension
        run.step([g])


@EVERY_RULE
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gaps", "offset"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_weights_of_any_strides(rule: str, channel_dim: Dims, layout: str, backend: str) -> None:
    value = torch.randn(4, 5, 3, 2, dtype=F64)
    if layout == "transposed":
        value = value.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "channels_last":
        value = value.contiguous(memory_format=torch.channels_last)
    elif layout == "gaps":
        value = value.new_zeros(4, 5, 3, 4)[..., ::2].copy_(value)
    else:
        value = value.new_zeros(value.numel() + 1)[1:].view(value.shape).copy_(value)
    run = Run(rule, [nn.Parameter(value)], backend, channel_dim=channel_dim)
    for t in range(6):
        run.step([rows_gradient(run.params[0], KINDS[t % 3], channel_dim)])
    run.check_all_seen()


@EVERY_RULE
@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 4), (2, 0, 4), (0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("channel_dim", [0, 1, -1, (0, 1)])
def test_empty_parameters(rule: str, channel_dim: Dims, shape: tuple[int, ...], backend: str) -> None:
    """Nor do they disturb the one that follows them in the bucket."""
    params = [nn.Parameter(torch.ones(shape, dtype=F64)), *parameters((3, 4, 5))]
    run = Run(rule, params, backend, channel_dim=channel_dim)
    for _ in range(2):
        run.step([torch.randn(p.shape, dtype=F64) for p in run.params])
    assert run.optimizer.decisions()[run.params[0]] in Decision


@EVERY_RULE
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_all_dimensions_are_channels(rule: str, projection: str, backend: str) -> None:
    """A matrix in a group of stacked experts, with (0, 1): every element is a channel, as in a matrix of one column."""
    value = torch.randn(6, 10, dtype=F64)
    ours = build(rule, [nn.Parameter(value.clone())], backend, projection=projection, channel_dim=(0, 1))
    plain = build(rule, [nn.Parameter(value.reshape(-1, 1).clone())], backend, projection=projection)
    (p,), (q,) = members(ours), members(plain)
    for kind in ("layer", "free"):
        p.grad = rows_gradient(q, kind).reshape(6, 10)
        q.grad = p.grad.reshape(-1, 1)
        for optimizer in (ours, plain):
            optimizer.step()
        assert ours.decisions()[p] is plain.decisions()[q]
        assert_close(p.reshape(-1, 1), q)


@EVERY_RULE
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_clipping_with_channel_dim(rule: str, projection: str, backend: str) -> None:
    """The norm is the same whatever the rows are, and the clipped step is that on clipped gradients."""
    value = torch.randn(40, 900, dtype=F64)
    runs = [build(rule, [nn.Parameter(value.clone())], backend, projection=projection, channel_dim=1) for _ in range(2)]
    for t in range(3):
        (p,), (q,) = (members(run) for run in runs)
        p.grad = rows_gradient(p, KINDS[t % 3], 1)
        q.grad = p.grad.clone()
        norm = runs[0].clip_grad_norm_(1.5)
        assert_close(norm, nn.utils.clip_grad_norm_([q], 1.5))
        for run in runs:
            run.step()
        assert runs[0].decisions()[p] is runs[1].decisions()[q]
        assert_close(p, q)


@EVERY_RULE
@pytest.mark.parametrize("channel_dim", [1, -1, (0, 1)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder"])
def test_channel_dim_in_bfloat16(rule: str, channel_dim: Dims, rounding: str, backend: str) -> None:
    """Within a place or two of the float32 run from the same weights; with a remainder the same bits."""
    shape = (5, 90, 100)
    p = nn.Parameter(torch.randn(shape).bfloat16())
    half = build(rule, [p], backend, channel_dim=channel_dim, rounding=rounding, state_dtype=F32)
    full = build(rule, [nn.Parameter(p.detach().float())], backend, channel_dim=channel_dim)
    (q,) = members(full)
    for t in range(6):
        g = rows_gradient(q, KINDS[t % 3], channel_dim).bfloat16()
        step_together([half], [g])
        step_together([full], [g.float()])
        assert half.decisions()[p] is full.decisions()[q]
        if rounding == "remainder":
            assert_identical(p.detach().view(torch.int16), (q.detach().view(torch.int32).add(0x8000) >> 16).short())
            assert half.state[p]["remainder"].shape == shape
        else:
            assert_close(p, q, dtype=BF16)
            with torch.no_grad():
                q.copy_(p)


# Groups, and changes between steps.


@EVERY_RULE
def test_every_group_has_its_own(rule: str, backend: str) -> None:
    """Side by side in one step, each as the reference does it with that group's options."""
    groups: list[dict[str, Any]] = [
        *({"params": parameters((6, 10), (4, 3, 3, 3), (9,)), "projection": projection} for projection in PROJECTIONS),
        {"params": parameters((6, 10), (4, 3, 3, 3), (9,)), "channel_dim": 1},
        {"params": parameters((6, 10), (4, 3, 3, 3), (9,)), "channel_dim": -1, "projection": "channel"},
        {"params": parameters((3, 4, 5), (9,)), "channel_dim": (0, 1), "projection": "layer", "lr": 0.01},
    ]
    run = Run(rule, groups, backend)
    for t in range(6):
        grads = [
            rows_gradient(p, KINDS[(i + t) % 3], group["channel_dim"] if p.ndim > 1 else 0)
            for group in run.optimizer.param_groups
            for i, p in enumerate(group["params"])
        ]
        run.step(grads)
        for group in run.optimizer.param_groups:
            if group["projection"] != "auto":
                for p in group["params"]:
                    assert run.optimizer.decisions()[p] is forced(p, group["projection"])
    run.check_all_seen()


@EVERY_RULE
def test_options_may_change_between_steps(rule: str, backend: str) -> None:
    """The next step is taken with what the group says then; the moments go on."""
    run = Run(rule, parameters((6, 10), (4, 6, 3, 3), (9,)), backend)
    changes: list[dict[str, Any]] = [
        {"projection": "channel"},
        {"channel_dim": 1},
        {"projection": "layer"},
        {"projection": "auto", "channel_dim": -1},
        {"channel_dim": (0, 1), "projection": "channel"},
        {"channel_dim": 0, "projection": "none"},
        {"projection": "auto"},
    ]
    # (0, 1) leaves the matrix no columns: see test_all_dimensions_are_channels.
    run.optimizer.param_groups[0]["params"].pop(0)
    run.optimizer.add_param_group({"params": parameters((6, 10))})
    for change in changes:
        for t in range(3):
            (group, other) = run.optimizer.param_groups
            conv, vector = group["params"]
            (matrix,) = other["params"]
            g = rows_gradient(conv, KINDS[t], group["channel_dim"])
            run.step([g, gradient(vector, "free"), rows_gradient(matrix, KINDS[t], other["channel_dim"])])
        group.update(change)
        other.update({name: value for name, value in change.items() if value != (0, 1)})
    run.steps(3)
    run.check_all_seen()


@EVERY_RULE
def test_change_of_channel_dim_keeps_other_groups_bits(rule: str, backend: str) -> None:
    """Buckets are made anew for one group; the rest is not disturbed."""
    values = [torch.randn(20, 30) for _ in range(3)]
    runs = [build(rule, [{"params": [nn.Parameter(v.clone())]} for v in values], backend) for _ in range(2)]
    for t in range(4):
        if t == 2:
            runs[0].param_groups[1]["channel_dim"] = 1
            runs[0].param_groups[1]["projection"] = "channel"
        step_together(runs, [gradient(v, KINDS[t % 3]) for v in values])
    for i, (p, q) in enumerate(zip(members(runs[0]), members(runs[1]), strict=True)):
        assert torch.equal(p, q) is (i != 1)
        for name, moment in runs[0].state[p].items():
            assert_identical(moment, runs[1].state[q][name], name)


@EVERY_RULE
@pytest.mark.parametrize("fit", [f for f in FITS if len(f.shape) == 3], ids=str)
def test_tensors_may_be_replaced(rule: str, fit: Fit, backend: str) -> None:
    """Weights of another dtype or memory, moments that were cleared: seen and used, whatever the rows are."""
    value = torch.randn(fit.shape)
    ours = build(rule, [nn.Parameter(value.clone())], backend, channel_dim=fit.channel_dim)
    plain = build(rule, [nn.Parameter(fit.matrix(value).contiguous())], backend)
    (p,), (q,) = members(ours), members(plain)

    def steps() -> None:
        for t in range(3):
            p.grad = rows_gradient(p, KINDS[t % 3], fit.channel_dim)
            q.grad = fit.matrix(p.grad).contiguous()
            for optimizer in (ours, plain):
                optimizer.step()
            assert ours.decisions()[p] is plain.decisions()[q]
            assert_close(fit.matrix(p.detach()), q, "weight", dtype=F32)

    steps()
    for change in (
        lambda t, state: t.double(),
        lambda t, state: t.clone(),
        lambda t, state: (t, state.clear())[0],
        lambda t, state: t.float(),
    ):
        for optimizer, t in ((ours, p), (plain, q)):
            t.grad = None
            t.data = change(t.data, optimizer.state[t])
        steps()


# Checkpoints.


def through_file(optimizer: Any, rule: str, backend: str) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    groups = [{"params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in optimizer.param_groups]
    new = build(rule, groups, backend)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


TRIPS: dict[str, Callable[[Any, str, str], Any]] = {
    "file": through_file,
    "deepcopy": lambda optimizer, rule, backend: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, rule, backend: pickle.loads(pickle.dumps(optimizer)),
}


@EVERY_RULE
@pytest.mark.parametrize("trip", list(TRIPS))
def test_checkpoints_keep_the_options(rule: str, trip: str, backend: str) -> None:
    """And the run that is loaded goes on bit for bit."""
    options: list[dict[str, Any]] = [
        {"projection": "channel"},
        {"projection": "layer", "channel_dim": 1},
        {"projection": "none"},
        {"channel_dim": (0, 1)},
        {"channel_dim": -1},
    ]
    groups = [{"params": [nn.Parameter(torch.randn(3, 40, 300)), nn.Parameter(torch.randn(9))], **o} for o in options]
    optimizer = build(rule, groups, backend)
    grads = [[torch.randn(p.shape) for p in members(optimizer)] for _ in range(4)]
    for g in grads[:2]:
        step_together([optimizer], g)
    other = TRIPS[trip](optimizer, rule, backend)
    for group, expected in zip(other.param_groups, options, strict=True):
        assert {name: group[name] for name in expected} == expected
        assert type(group["channel_dim"]) is type(expected.get("channel_dim", 0))
    for g in grads[2:]:
        step_together([optimizer, other], g)
    assert_same_outcome(optimizer, other)


@EVERY_RULE
def test_checkpoint_of_a_time_without_these_options(rule: str, backend: str) -> None:
    """The optimizer's own hold."""
    optimizer = build(rule, parameters((6, 10)), backend)
    step_together([optimizer], [torch.randn(6, 10, dtype=F64)])
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("projection", "channel_dim"):
        del saved["param_groups"][0][name]
    other = build(rule, parameters((6, 10)), backend, projection="layer", channel_dim=1)
    other.load_state_dict(saved)
    assert other.param_groups[0]["projection"] == "layer"
    assert other.param_groups[0]["channel_dim"] == 1


# Errors, besides those in test_refusals.py.


@EVERY_RULE
def test_weight_that_no_longer_fits_its_channel_dim(rule: str, backend: str) -> None:
    """Experts that were transposed in memory after the first steps: refused with the remedy, and the remedy helps."""
    p = nn.Parameter(torch.randn(3, 4, 5, dtype=F64))
    q = nn.Parameter(torch.randn(3, 4, 5, dtype=F64))
    optimizer = build(rule, [q, p], backend, channel_dim=(0, 1))
    step_together([optimizer], [torch.randn(3, 4, 5, dtype=F64)] * 2)
    p.data = p.data.transpose(0, 1).contiguous().transpose(0, 1)
    before = snapshot(optimizer)
    with raises(ValueError, "channel_dim=(0, 1)", "parameter 1 of group 0", "strides (5, 15, 1)", "p.contiguous()"):
        step_together([optimizer], [torch.randn(3, 4, 5, dtype=F64)] * 2)
    assert_snapshots_equal(snapshot(optimizer), before)
    p.data = p.data.contiguous()
    step_together([optimizer], [torch.randn(3, 4, 5, dtype=F64)] * 2)


def bad_gradient(make: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], None]:
    """Through .data, which the check in the setter of p.grad does not see."""

    def spoil(optimizer: Any, p: Any) -> None:
        p.grad = torch.zeros_like(p)
        p.grad.data = make(p.grad)

    return spoil


def sparse_gradient(optimizer: Any, p: Any) -> None:
    p.grad = torch.ones_like(p).to_sparse()


def bad_state(optimizer: Any, p: Any) -> None:
    p.grad = torch.ones_like(p)
    name = next(name for name, t in optimizer.state[p].items() if t.ndim)
    optimizer.state[p][name] = torch.ones(5, 4, dtype=p.dtype)


TENSORS: dict[str, tuple[Callable[[Any, Any], None], type[Exception], tuple[str, ...]]] = {
    "sparse gradient": (sparse_gradient, TypeError, ("gradient of {}", "layout torch.sparse_coo")),
    "gradient of another shape": (
        bad_gradient(lambda g: g[:2]),
        ValueError,
        ("gradient of {}", "(2, 4, 5)", "(3, 4, 5)"),
    ),
    "gradient of another rank": (
        bad_gradient(lambda g: g.flatten()),
        ValueError,
        ("gradient of {}", "(60,)", "(3, 4, 5)"),
    ),
    "integer gradient": (bad_gradient(lambda g: g.long()), TypeError, ("gradient of {}", "dtype torch.int64")),
    "state of another shape": (bad_state, ValueError, ("of {}", "shape (5, 4)", "(3, 4, 5)")),
}


@EVERY_RULE
@pytest.mark.parametrize("channel_dim", [0, 1, (0, 1)])
@pytest.mark.parametrize("kind", list(TENSORS))
def test_bad_tensors_are_named(rule: str, kind: str, channel_dim: Dims, backend: str) -> None:
    """In the same words whatever the rows are, and nothing has moved."""
    spoil, error, pieces = TENSORS[kind]
    good, bad = parameters((3, 4, 5), (3, 4, 5))
    optimizer = build(rule, [good, bad], backend, channel_dim=channel_dim)
    step_together([optimizer], [torch.randn_like(p) for p in (good, bad)])
    spoil(optimizer, bad)
    before = snapshot(optimizer)
    with raises(error, *(piece.format("parameter 1 of group 0") for piece in pieces)):
        optimizer.step()
    assert_snapshots_equal(snapshot(optimizer), before)


# Anything.

STEPS = 4
EXAMPLES = 60


class Param(NamedTuple):
    shape: tuple[int, ...]
    order: tuple[int, ...]  # of the dimensions in memory
    dtype: torch.dtype
    kinds: list[str]


class Case(NamedTuple):
    seed: int
    params: list[Param]
    options: list[dict[str, Any]]  # one for each pair of steps


@st.composite
def cases(draw: DrawFn) -> Case:
    """A group whose channel_dim, one dimension or two in a row, fits all its parameters; changed after two steps."""
    dim: Dims = draw(st.sampled_from([0, 1, -1, -2, (0, 1), (-2,)]))
    dims = (dim, draw(st.sampled_from([dim, 0, 1])))
    merges = isinstance(dim, tuple) and len(dim) > 1
    sizes = st.sampled_from([2, 3, 4, 5, 7, 16, 1])
    params = []
    for _ in range(draw(st.integers(1, 4))):
        ndim = draw(st.sampled_from([3, 4] if merges else [2, 3, 4, 2, 1, 0]))
        shape = tuple(draw(st.lists(sizes, min_size=ndim, max_size=ndim)))
        order = tuple(range(ndim)) if isinstance(dim, tuple) else tuple(draw(st.permutations(range(ndim))))
        kinds = draw(st.lists(st.sampled_from(["layer", "channel", "free", "random"]), min_size=STEPS, max_size=STEPS))
        params.append(Param(shape, order, draw(st.sampled_from([F32, F64])), kinds))
    options = [
        {
            "channel_dim": d,
            "projection": draw(st.sampled_from(["auto", *PROJECTIONS])),
            "delta": draw(st.sampled_from([0.1, 0.6, 0.0])),
            "wd_ratio": draw(st.sampled_from([0.0, 0.5])),
            "nesterov": draw(st.booleans()),
        }
        for d in dims
    ]
    return Case(draw(st.integers(0, 1 << 30)), params, options)


@EVERY_RULE
def test_equals_the_reference_in_float64(rule: str, backend: str) -> None:
    count: Counter[Any] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(cases())
    def compare(case: Case) -> None:
        torch.manual_seed(case.seed)
        count["cases"] += 1
        values = [torch.randn([x.shape[d] for d in x.order], dtype=x.dtype) for x in case.params]
        params = [
            nn.Parameter(v.permute([x.order.index(d) for d in range(v.ndim)]))
            for x, v in zip(case.params, values, strict=True)
        ]
        optimizer = build(rule, params, backend)
        (group,) = optimizer.param_groups
        hands = [Hand(rule, p.detach().double()) for p in params]
        for t in range(STEPS):
            group.update(case.options[2 * t // STEPS])
            for x, p, hand in zip(case.params, params, hands, strict=True):
                kind = x.kinds[t]
                dims = group["channel_dim"] if p.ndim > 1 else 0
                p.grad = torch.randn(p.shape, dtype=p.dtype) if kind == "random" else rows_gradient(p, kind, dims)
                g, q = (rows_first(t, group["channel_dim"]) if t.ndim >= 2 else t for t in (p.grad.double(), hand.p))
                tested = group["projection"] == "auto"
                if tested and near_threshold(g, q, group["delta"], group["eps"], p.dtype):
                    count["near"] += 1
                    assume(False)
                hand.step(p.grad, group)
                count[group["projection"], hand.decision] += 1
            optimizer.step()
            for p, hand in zip(params, hands, strict=True):
                assert optimizer.decisions()[p] is hand.decision
                assert_close(p, hand.p, "weight")
                for name, moment in hand.moments.items():
                    assert optimizer.state[p][name].shape == p.shape
                    assert_close(optimizer.state[p][name], moment, name)

    compare()
    assert count["cases"] >= EXAMPLES
    assert all(count["auto", decision] >= EXAMPLES / 4 for decision in Decision), count
    assert all(count[name, Decision[name.upper()]] >= EXAMPLES / 4 for name in FORCED), count
    assert count["near"] <= count["cases"] / 20, count
