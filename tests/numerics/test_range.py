"""Gradients and weights whose squares leave float32: decision and step are the float64 reference's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory import gradient

from fused_adamp import SGDP, AdamP, adamp_ref, sgdp_ref
from fused_adamp.reference import Decision

pytestmark = pytest.mark.usefixtures("one_thread")

GRADIENTS = (1e-30, 1e-25, 1e-12, 1.0, 1e20, 1e30)
WEIGHTS = (1e-20, 1.0, 1e20)
SHAPES = {"one tile": (4, 300), "short rows": (40, 5), "wide rows": (3, 40000), "speculative": (200, 700)}
KINDS = ("channel", "layer", "free")
OPTIONS: dict[str, tuple[type[AdamP | SGDP], dict[str, Any]]] = {
    "AdamP": (AdamP, {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.5}),
    "SGDP": (SGDP, {"lr": 0.01, "momentum": 0.9, "dampening": 0, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.5}),
}
LARGEST, LEAST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def reference(rule: str, p: Tensor, g: Tensor, eps: float, projection: str = "auto") -> tuple[Decision, Tensor, Tensor]:
    """The first step in float64: the decision, the weight and the last moment."""
    options = OPTIONS[rule][1] | {"eps": eps, "projection": projection}
    w, g = p.detach().double().clone(), g.double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    if rule == "AdamP":
        return adamp_ref(w, g, m, v, 1, **options), w, v
    return sgdp_ref(w, g, m, **options), w, m


def off(rule: str, p: Tensor, before: Tensor, want: Tensor, decision: Decision) -> float:
    """The largest error of a row, in float32's eps of its terms: weight, step, and what a projection rounds at."""
    assert p.grad is not None
    assert p.isfinite().all()
    assert want.isfinite().all()
    w = before.double()
    _, plain, _ = reference(rule, before, p.grad, 1e-8, projection="none")
    view = (1, -1) if decision is Decision.LAYER else (w.size(0), -1)
    step, length = ((x.reshape(view).norm(dim=1, keepdim=True)) for x in (plain - w, w))
    removed = step / length * w.abs().amax(dim=1, keepdim=True) if decision else torch.zeros(1, 1).double()
    size = removed + w.abs().amax(dim=1, keepdim=True) + (want - w).abs().amax(dim=1, keepdim=True)
    return float(((p.detach().double() - want).abs() / size).max()) / torch.finfo(torch.float32).eps


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", list(OPTIONS))
def test_step_is_the_float64_reference_s(rule: str, shape: str, kind: str, eps: float, backend: str) -> None:
    cls, options = OPTIONS[rule]
    weight = torch.randn(SHAPES[shape], dtype=torch.float64)
    direction = gradient(nn.Parameter(weight.float().double()), kind)
    stepped = 0
    for g_size, p_size in itertools.product(GRADIENTS, WEIGHTS):
        p = nn.Parameter((weight.float().double() * p_size).float())
        g = (direction * g_size).float()
        want, moved, state = reference(rule, p, g, eps)
        before = p.detach().clone()
        p.grad = g
        optimizer = cls([p], **options, eps=eps, backend=backend)
        optimizer.step()
        at = f"gradient {g_size:g}, weight {p_size:g}"
        assert optimizer.decisions()[p] == want, at
        # The second moment is kept in float32, where it has to fit; so has c = p.u / |p|^2.
        fits = bool((state.abs() < LARGEST).all()) and (rule == "SGDP" or eps > 0 or bool((state > LEAST).all()))
        if not fits or (eps == 0 and g_size / p_size > 1e38):
            continue
        stepped += 1
        assert off(rule, p, before, moved, want) < 64, at
    assert stepped >= 3


LATE = {"gradient": (1e25, 1.0), "weight": (1.0, 1e20), "both": (1e20, 1e20), "almost": (1e18, 1.0)}


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["ordinary rows pass", "ordinary rows fail"])
@pytest.mark.parametrize("shape", ["speculative", "wide rows"])
@pytest.mark.parametrize("rule", list(OPTIONS))
def test_one_row_out_of_range(rule: str, shape: str, first: str, kind: str, late: str, backend: str) -> None:
    """Only a late row leaves the range: no first look at the parameter tells."""
    cls, options = OPTIONS[rule]
    weight = torch.randn(SHAPES[shape])
    g = gradient(nn.Parameter(weight.double()), "channel" if first == "ordinary rows pass" else "free").float()
    row = len(weight) * 4 // 5
    g_size, p_size = LATE[late]
    g_size = min(g_size, 2e19) if rule == "AdamP" else g_size  # the second moment has to fit
    part = slice(row, row + 2) if shape == "speculative" else slice(1, 3)
    rows = nn.Parameter(weight[part].double())
    g[part] = (gradient(rows, kind) * g_size).float()
    weight[part] *= p_size
    p = nn.Parameter(weight.clone())
    p.grad = g
    want, moved, _ = reference(rule, p, g, 1e-8)
    optimizer = cls([p], **options, eps=1e-8, backend=backend)
    optimizer.step()
    assert optimizer.decisions()[p] == want
    assert off(rule, p, weight, moved, want) < 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("g_size", "p_size"), [(1e100, 1e100), (1e100, 1.0), (1e-100, 1e-100), (1e-90, 1e100)])
@pytest.mark.parametrize("shape", ["one tile", "speculative"])
def test_products_of_squares_in_float64(shape: str, g_size: float, p_size: float, kind: str, backend: str) -> None:
    p = nn.Parameter(torch.randn(SHAPES[shape], dtype=torch.float64))
    g = gradient(p, kind) * g_size
    p.data.mul_(p_size)
    p.grad = g
    want, _, _ = reference("SGDP", p, g, 0.0)
    assert want == {"channel": Decision.CHANNEL, "layer": Decision.LAYER, "free": Decision.NONE}[kind]
    optimizer = SGDP([p], **OPTIONS["SGDP"][1], eps=0.0, backend=backend)
    optimizer.step()
    assert optimizer.decisions()[p] == want
