"""Parameters beside the same trajectories in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tolerances import assert_close, assert_identical
from torch import Tensor, nn
from trajectory import MOMENTS, RULES, gradient

from fused_adamp import SGDP, AdamP, adamp_ref, sgdp_ref

if TYPE_CHECKING:
    from collections.abc import Callable

    from fused_adamp.reference import Decision


class Double:
    """A parameter's trajectory in float64."""

    def __init__(self, rule: str, w: Tensor, **options: Any) -> None:
        self.rule, self.options = rule, RULES[rule][1] | {"delta": 0.1, "eps": 1e-8} | options
        self.w = w.detach().double().clone()
        self.moments = [torch.zeros_like(self.w) for _ in MOMENTS[rule]]
        self.steps = 0

    def step(self, g: Tensor) -> Decision:
        self.steps += 1
        if self.rule == "AdamP":
            m, v = self.moments
            return adamp_ref(self.w, g.double(), m, v, self.steps, **self.options)
        return sgdp_ref(self.w, g.double(), *self.moments, **self.options)


def build(rule: str, params: list[nn.Parameter], backend: str, **options: Any) -> AdamP | SGDP:
    cls, defaults = RULES[rule]
    return cls(params, **(defaults | options), backend=backend)


def steps_are_those_of_double(
    rule: str, weights: list[Tensor], gradient_of: Callable[[Tensor, int], Tensor], backend: str, **options: Any
) -> set[Decision]:
    """Three steps of the weights, where they lie, from the same gradients; the decisions that were seen."""
    doubles = [Double(rule, w, **options) for w in weights]
    params = list(map(nn.Parameter, weights))
    optimizer = build(rule, params, backend, **options)
    seen = set()
    for t in range(3):
        wanted = []
        for p, double in zip(params, doubles, strict=True):
            p.grad = gradient_of(double.w, t).to(p.dtype)
            wanted.append(double.step(p.grad))
        optimizer.step()
        seen |= set(wanted)
        for p, double, decision in zip(params, doubles, wanted, strict=True):
            assert optimizer.decisions()[p] == decision, tuple(p.shape)
            assert_close(p, double.w, f"{tuple(p.shape)}, step {t}")
            names = MOMENTS[rule] if options.get("momentum", 1) else ()
            assert set(names) <= set(optimizer.state[p])
            for name, moment in zip(names, double.moments, strict=False):
                assert_close(optimizer.state[p][name], moment, f"{name} of {tuple(p.shape)}")
    return seen


def row_of_another_size_is_that_of_double(
    rule: str,
    shape: tuple[int, int],
    p_size: float,
    g_size: float,
    backend: str,
    *,
    eps: float,
    kind: str = "free",
    layout: Callable[[Tensor], Tensor] = torch.clone,
) -> None:
    """One step, in which one row's weights and gradients are larger or smaller than those of the others."""
    w = torch.randn(shape)
    g = gradient(w.double(), kind).float()
    row = shape[0] // 2
    w[row] *= p_size
    g[row] *= g_size
    double = Double(rule, w, eps=eps)
    wanted = double.step(g)
    p = nn.Parameter(layout(w))
    p.grad = layout(g)
    optimizer = build(rule, [p], backend, eps=eps)
    optimizer.step()
    assert optimizer.decisions()[p] == wanted, shape
    others = torch.arange(shape[0]) != row
    for part in (others, ~others):
        size = max(1.0, double.w[part].abs().max().item())
        assert_close(p[part] / size, double.w[part] / size, f"{shape}")


def bits_are_those_of_one_thread(rule: str, weights: list[Tensor], kind: str, backend: str, **options: Any) -> None:
    """One step on one thread and on three."""
    grads = [gradient(w, kind) for w in weights]
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        params = [nn.Parameter(w.clone()) for w in weights]
        optimizer = build(rule, params, backend, **options)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        assert_identical(a, b)
