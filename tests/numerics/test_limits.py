"""Settings and inputs at which the numbers are known without an oracle, and the paper's norm lemmas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import TOLERANCE, assert_close, assert_identical
from torch import Tensor, nn
from torch.nn.functional import normalize
from trajectory import KINDS, MOMENTS, RULES, SHAPES, Run, gradient, parameters

from fused_adamp import SGDP, AdamP
from fused_adamp.reference import Decision

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))


def clones(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


# Without projection: torch's optimizers.

UNPROJECTED = [
    pytest.param(AdamP, torch.optim.AdamW, {"betas": (0.9, 0.98), "weight_decay": 0.1, **options}, id=f"AdamW-{name}")
    for name, options in (("descent", {}), ("maximize", {"maximize": True}), ("large-eps", {"eps": 0.1}))
] + [
    pytest.param(SGDP, torch.optim.SGD, {"momentum": 0.9, **options}, id=f"SGD-{name}")
    for name, options in (
        ("momentum", {}),
        ("nesterov", {"nesterov": True}),
        ("maximize", {"maximize": True}),
        ("no-momentum", {"momentum": 0}),
    )
]


@DTYPES
@pytest.mark.parametrize(("cls", "known", "options"), UNPROJECTED)
@pytest.mark.parametrize(
    ("shapes", "delta"), [(SHAPES, 0), (((9,), (1,), (257,), ()), 5.0)], ids=["delta=0", "vectors-whatever-delta"]
)
def test_without_projection_equals_torch(
    cls: Any, known: Any, options: dict[str, Any], shapes: Any, delta: float, dtype: torch.dtype, backend: str
) -> None:
    params = parameters(*shapes, dtype=dtype)
    copies = clones(params)
    ours, theirs = cls(params, lr=0.03, **options, delta=delta, backend=backend), known(copies, lr=0.03, **options)
    for t in range(12):
        grads = [gradient(p, KINDS[t % 3]) for p in params]
        step(ours, params, grads)
        step(theirs, copies, grads)
        assert set(ours.decisions().values()) == {Decision.NONE}
        for p, q in zip(params, copies, strict=True):
            assert_close(p, q)
            assert set(ours.state[p]) == set(theirs.state[q])
            for name, value in theirs.state[q].items():
                assert_close(ours.state[p][name], value, name)


# The projection.


@DTYPES
@EVERY_RULE
@pytest.mark.parametrize("nesterov", [False, True])
def test_projected_update_is_orthogonal_to_the_weight(
    rule: str, nesterov: bool, dtype: torch.dtype, backend: str
) -> None:
    """Without decay the change of the weight is the update: orthogonal to each row, or to the whole."""
    cls, options = RULES[rule]
    # At eps=0 the direction n has unit length. Short rows: the test is about the projection, not about long sums.
    params = parameters((4, 3, 3, 3), (6, 10), (5, 7), dtype=dtype)
    optimizer = cls(params, **{**options, "weight_decay": 0, "eps": 0}, nesterov=nesterov, backend=backend)
    seen = set()
    for t in range(9):
        before = [p.detach().clone() for p in params]
        step(optimizer, params, [gradient(p, KINDS[(i + t) % 3]) for i, p in enumerate(params)])
        for p, decision in optimizer.decisions().items():
            old = next(b for q, b in zip(params, before, strict=True) if q is p).double()
            change = p.detach().double() - old
            assert change.isfinite().all()
            assert change.norm() > 0.01
            shape = (len(old), -1) if decision is not Decision.LAYER else (1, -1)
            x, y = change.reshape(shape), old.reshape(shape)
            radial = ((x * y).sum(dim=1) / y.norm(dim=1)).abs().max()
            # The stored weight is rounded: eps/2 of |p| in every element.
            orthogonal = radial <= TOLERANCE[dtype] * old.abs().max()
            # Momentum has a radial part of its own, so that without projection the change is far from orthogonal.
            assert orthogonal == (decision is not Decision.NONE)
            seen.add(decision)
    assert seen == set(Decision)


@EVERY_RULE
@DTYPES
@pytest.mark.parametrize("shape", [(4, 9), (2, 33), (6, 4, 3), (3, 2, 5, 5), (1, 50)], ids=str)
@pytest.mark.parametrize("delta", [0.1, 0.4])
@pytest.mark.parametrize(("factor", "below"), [(0.99, True), (1.01, False)])
def test_thresholds(
    rule: str, dtype: torch.dtype, shape: tuple[int, ...], delta: float, factor: float, below: bool, backend: str
) -> None:
    """The worst row against delta / sqrt(K), the whole against delta / sqrt(R K), just below and just above."""
    cls, options = RULES[rule]
    R, K = shape[0], math.prod(shape[1:])
    p = normalize(torch.randn(R, K, dtype=torch.float64))
    tangent = torch.randn_like(p)
    tangent = normalize(tangent - (tangent * p).sum(dim=1, keepdim=True) * p)

    def decision(cosines: Tensor) -> Decision:
        """Rows of one length for which these are the cosines of the rows, and their mean that of the whole."""
        g = cosines * p + (1 - cosines**2).sqrt() * tangent
        weight = nn.Parameter(p.reshape(shape).to(dtype, copy=True))
        optimizer = cls([weight], **options, delta=delta, backend=backend)
        step(optimizer, [weight], [3 * g.reshape(shape).to(dtype)])
        return optimizer.decisions()[weight]

    worst = torch.zeros(R, 1, dtype=torch.float64)
    worst[-1] = -factor * delta / math.sqrt(K)  # the sign of a cosine does not matter
    if R > 1:
        assert decision(worst) is (Decision.CHANNEL if below else Decision.LAYER)
    assert decision(worst.abs().max() * torch.ones_like(worst)) is (Decision.CHANNEL if below else Decision.NONE)
    if R > 1:
        sign = torch.ones(R, 1, dtype=torch.float64)
        sign[1::2] = -1
        rows = 0.5 * (sign - sign.mean()) + factor * delta / math.sqrt(R * K)
        assert decision(rows) is (Decision.LAYER if below else Decision.NONE)
        assert decision(-rows) is (Decision.LAYER if below else Decision.NONE)


@EVERY_RULE
@DTYPES
@pytest.mark.parametrize(
    ("weight_scale", "gradient_scale"),
    [(1, 1), (2.0**20, 1), (1, 2.0**-16), (2.0**-12, 2.0**16), (317.0, 0.00321), (0.0123, 7321.0), (0.0123, 0.00321)],
)
def test_decision_does_not_depend_on_scale(
    rule: str, dtype: torch.dtype, weight_scale: float, gradient_scale: float, backend: str
) -> None:
    cls, options = RULES[rule]
    params = parameters((4, 3, 3, 3), (6, 10), (5, 7), (16, 8), dtype=dtype)
    grads = [*map(gradient, params, KINDS), torch.randn_like(params[-1])]
    expected = [Decision.CHANNEL, Decision.LAYER, Decision.NONE, Decision.NONE]
    with torch.no_grad():
        for p in params:
            p.mul_(weight_scale)
    optimizer = cls(params, **options, backend=backend)
    step(optimizer, params, [g * gradient_scale for g in grads])
    assert [optimizer.decisions()[p] for p in params] == expected


@EVERY_RULE
def test_wd_ratio_acts_on_projected_parameters_only(rule: str, backend: str) -> None:
    """At a gradient of zero momentum, what moves the weight is the decay alone."""
    cls, options = RULES[rule]
    moved: dict[Decision, list[Tensor]] = {}
    for wd_ratio in (0.0, 0.25, 1.0):
        torch.manual_seed(1)
        params = parameters((4, 6), (4, 6), (4, 6), (7,))
        old = [p.detach().clone() for p in params]
        optimizer = cls(params, **{**options, "wd_ratio": wd_ratio}, backend=backend)
        undecayed_params = clones(params)
        undecayed = cls(undecayed_params, **{**options, "weight_decay": 0}, backend=backend)
        grads = [gradient(p, kind) for p, kind in zip(params, (*KINDS, "free"), strict=True)]
        step(optimizer, params, grads)
        step(undecayed, undecayed_params, grads)
        decay = options["lr"] * options["weight_decay"] / (1 - options.get("momentum", 0))
        for p, q, w in zip(params, undecayed_params, old, strict=True):
            decision = optimizer.decisions()[p]
            factor = wd_ratio if decision else 1
            assert_close(p - q, -decay * factor * w, f"decay at {decision!r}")
            moved.setdefault(decision, []).append(p.detach())
    assert set(moved) == set(Decision)


@EVERY_RULE
@DTYPES
def test_maximize_is_the_negated_gradient(rule: str, dtype: torch.dtype, backend: str) -> None:
    cls, options = RULES[rule]
    params = parameters(*SHAPES, dtype=dtype)
    copies = clones(params)
    up, down = cls(params, **options, maximize=True, backend=backend), cls(copies, **options, backend=backend)
    for t in range(6):
        grads = [gradient(p, KINDS[t % 3]) for p in params]
        step(up, params, grads)
        step(down, copies, [-g for g in grads])
        for p, q in zip(params, copies, strict=True):
            assert_identical(p, q)
            for name, value in down.state[q].items():
                assert_identical(up.state[p][name], value, name)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0, 0.5])
def test_momentum_0_keeps_no_state(nesterov: bool, dampening: float, backend: str) -> None:
    run = Run("SGDP", parameters(*SHAPES), backend, momentum=0, nesterov=nesterov, dampening=dampening)
    run.steps(6)
    run.check_all_seen()
    assert not any(run.optimizer.state.values())
    assert set(run.optimizer.decisions()) == set(run.params)


def test_project_buffer_does_nothing_with_nesterov(backend: str) -> None:
    params = parameters(*SHAPES)
    copies = clones(params)
    options = {**RULES["SGDP"][1], "nesterov": True, "backend": backend}
    optimizers = [SGDP(params, **options, project_buffer=True), SGDP(copies, **options)]
    for t in range(3):
        grads = [gradient(p, KINDS[t]) for p in params]
        for optimizer, members in zip(optimizers, (params, copies), strict=True):
            step(optimizer, members, grads)
        for p, q in zip(params, copies, strict=True):
            assert_identical(p, q)
            assert_identical(*(o.state[x]["momentum_buffer"] for o, x in zip(optimizers, (p, q), strict=True)))


# Broken and degenerate numbers.


@EVERY_RULE
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("delta", [0.1, 1e9])
def test_broken_gradient_is_not_projected_and_stays_alone(rule: str, bad: float, delta: float, backend: str) -> None:
    """The result is that of the same step without projection; other parameters step as if nothing was wrong."""
    cls, options = RULES[rule]
    params = parameters((4, 6), (4, 6), (7, 3, 2), (5,))
    copies, alone = clones(params), clones(params)
    grads = [gradient(p, "channel") for p in params]
    grads[1][2, 3] = bad
    optimizer = cls(params, **options, delta=delta, backend=backend)
    step(optimizer, params, grads)

    unprojected = cls(copies, **options, delta=0, backend=backend)
    step(unprojected, copies, grads)
    broken, copy = params[1], copies[1]
    assert optimizer.decisions()[broken] is Decision.NONE
    finite = torch.ones(4, 6, dtype=torch.bool)
    finite[2, 3] = False
    states = [(optimizer.state[broken][name], unprojected.state[copy][name]) for name in MOMENTS[rule]]
    for actual, expected in [(broken, copy), *states]:
        assert not actual[2, 3].isfinite()
        assert torch.equal(actual.isnan(), expected.isnan())
        assert_close(actual[finite], expected[finite])

    for i in (0, 2, 3):
        single = cls([alone[i]], **options, delta=delta, backend=backend)
        step(single, [alone[i]], [grads[i]])
        assert optimizer.decisions()[params[i]] is single.decisions()[alone[i]]
        assert_close(params[i], alone[i])
        for name in MOMENTS[rule]:
            assert_close(optimizer.state[params[i]][name], single.state[alone[i]][name], name)


@EVERY_RULE
@DTYPES
@pytest.mark.parametrize("nesterov", [False, True])
def test_zeros_are_finite(rule: str, dtype: torch.dtype, nesterov: bool, backend: str) -> None:
    """Zero rows, zero gradients and zero weights, one after the other and together."""
    run = Run(rule, parameters((4, 6), (4, 6), (4, 6), (4, 6), (5,), dtype=dtype), backend, nesterov=nesterov)
    with torch.no_grad():
        run.params[0][1] = 0
        run.params[1].zero_()
        run.params[2].zero_()
        run.params[3][:, 2] = 0
    run.hands.clear()
    for _ in range(4):
        grads = [torch.randn_like(p) for p in run.params]
        grads[0][2] = 0
        grads[2].zero_()
        grads[3].zero_()
        grads[4].zero_()
        run.step(grads)  # compares with the reference and rejects NaN and infinity
        decisions = [run.hands[p].decision for p in run.params]
        assert decisions[2:] == [Decision.CHANNEL, Decision.CHANNEL, Decision.NONE]  # a zero vector's cosine is 0


# The paper's lemmas on the growth of the norm. The loss <c, w/|w|> is scale-invariant: autograd's gradient is
# orthogonal to w up to rounding.

ETA, BETA = 0.1, 0.9


def scale_invariant_gradient(w: Tensor, c: Tensor) -> Tensor:
    w = w.detach().requires_grad_()
    (c * w / w.norm()).sum().backward()
    assert w.grad is not None
    return w.grad


def square(x: Tensor) -> Tensor:
    return x.detach().double().square().sum()


@pytest.mark.parametrize("implementation", ["torch.optim.SGD", "delta=0", "projected"])
def test_norm_growth_of_momentum_sgd(implementation: str, backend: str) -> None:
    """Lemma 2.2: momentum adds 2 eta^2 sum_{k<t} beta^(t-k) |p_k|^2 to the growth eta^2 |p_t|^2. SGDP adds nothing.

    With p_t = beta p_{t-1} + g_t, p_{-1} = 0 and w_{t+1} = w_t - eta p_t:
    |w_{t+1}|^2 = |w_t|^2 - 2 eta w_t.p_t + eta^2 |p_t|^2, and from w_t.g_t = 0
    w_t.p_t = beta w_t.p_{t-1} = beta (w_{t-1} - eta p_{t-1}).p_{t-1}, so w_t.p_t = -eta sum_{k<t} beta^(t-k) |p_k|^2.
    """
    w = nn.Parameter(normalize(torch.randn(1, 50, dtype=torch.float64)))  # one row: the channel is the layer
    optimizer = (
        torch.optim.SGD([w], lr=ETA, momentum=BETA)
        if implementation == "torch.optim.SGD"
        else SGDP([w], lr=ETA, momentum=BETA, eps=0, delta=0 if implementation == "delta=0" else 0.1, backend=backend)
    )
    p = torch.zeros_like(w)
    history = 0.0  # sum_{k<t} beta^(t-k) |p_k|^2
    for t in range(40):
        before = w.detach().clone()
        g = scale_invariant_gradient(before, normalize(torch.randn_like(w)))
        p = BETA * p + g
        step(optimizer, [w], [g])
        assert_close(optimizer.state[w]["momentum_buffer"], p, "p_t")
        growth = square(w) - square(before)
        if implementation == "projected":
            assert optimizer.decisions()[w] is Decision.CHANNEL
            n = before / before.norm()
            expected = ETA**2 * square(p - n * (n * p).sum())
            # The projection took something away, or the test would not tell it from the lemma without momentum.
            assert t < 5 or expected < 0.97 * ETA**2 * square(p)
        else:
            expected = ETA**2 * (square(p) + 2 * history)
            assert t == 0 or history > 0.1 * square(p)
        history = BETA * (history + square(p))
        # A difference of two squares of size |w|^2, each a sum of 50 rounded products.
        assert abs(growth - expected) <= TOLERANCE[torch.float64] * square(w)
        assert growth > 1e-6


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_momentum_multiplies_the_growth_of_the_norm(beta: float, backend: str) -> None:
    """Corollary 2.3: for updates of equal length, the squared norm grows 1 + 2 beta/(1 - beta) times as fast as SGD's.

    The gradient a d, with unit d, is as long in every step as gives the update length 1:
    a^2 + 2 a (beta p.d) + beta^2 |p|^2 = 1. Growth is what the optimizers do to the weights, not a sum of the formula.
    """
    steps, last = 300, 20  # beta^280 < 1e-12: the sum over the past has converged

    def growth(momentum: float, delta: float) -> Tensor:
        torch.manual_seed(3)
        w = nn.Parameter(torch.randn(1, 50, dtype=torch.float64))
        optimizer = SGDP([w], lr=ETA, momentum=momentum, eps=0, delta=delta, backend=backend)
        p = torch.zeros_like(w)
        for t in range(steps):
            if t == steps - last:
                start = square(w)
            d = scale_invariant_gradient(w, torch.randn_like(w))
            d = d / d.norm()
            past = momentum * (p * d).sum()
            a = -past + (past**2 + 1 - momentum**2 * square(p)).sqrt()
            p = momentum * p + a * d
            assert abs(p.norm() - 1) < 1e-12
            step(optimizer, [w], [a * d])
        return (square(w) - start) / last

    plain, heavy, projected = growth(0, 0), growth(beta, 0), growth(beta, 0.1)
    assert abs(plain / ETA**2 - 1) < 1e-10
    assert abs(heavy / plain - (1 + 2 * beta / (1 - beta))) < 1e-9
    assert projected < plain  # SGDP takes the radial part out of an update of length 1
