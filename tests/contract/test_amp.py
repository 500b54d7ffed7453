"""torch.amp.GradScaler: the step unscales as it reads, and on an infinite gradient nothing moves.

A loop with a scaler is held against the same loop without one, step by step. Scales are powers of two wherever the two
are compared bit for bit.
"""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_clipping import LARGE, aligned, clip
from tolerances import assert_close, assert_identical
from torch import Tensor, nn
from torch.amp import GradScaler
from trajectory import KINDS, RULES, SHAPES, Hand, assert_snapshots_equal, gradient, parameters, snapshot

from fused_adamp.reference import Decision, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

STORAGE: dict[str, tuple[tuple[torch.dtype, ...], dict[str, Any]]] = {
    "float64": ((F64,), {}),
    "float32": ((F32,), {}),
    "bfloat16": ((BF16,), {}),
    "bfloat16, stochastic": ((BF16,), {"rounding": "stochastic"}),
    "bfloat16, remainder": ((BF16,), {"rounding": "remainder"}),
    "float32 and float64": ((F32, F64), {}),
}
"""Dtypes of the parameters, in turn, and options. Two dtypes are two buckets."""
EVERY_STORAGE = pytest.mark.parametrize("storage", list(STORAGE))


class Loop:
    """A training loop on a loss with known gradients: every parameter takes all three decisions in turn."""

    def __init__(
        self,
        rule: str,
        backend: str | None,
        dtypes: Sequence[torch.dtype] = (F64,),
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        cls, defaults = RULES[rule]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            weights = [torch.randn(shape, dtype=F64) for shape in shapes]
        self.params = [nn.Parameter(w.to(device, dtypes[i % len(dtypes)])) for i, w in enumerate(weights)]
        self.optimizer = cls(self.params, **{"amp_scaling": True, **defaults, **options}, backend=backend)
        self.seen: set[Decision] = set()

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Where state may be made: stochastic rounding's seeds are the same in every loop."""
        with torch.random.fork_rng():
            torch.manual_seed(2)
            yield

    def gradients(self, t: int) -> list[Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(t)
            made = [gradient(p.detach().cpu().double(), KINDS[(i + t) % 3]) for i, p in enumerate(self.params)]
        return [g.to(p) for p, g in zip(self.params, made, strict=True)]

    def loss(self, t: int) -> Tensor:
        """Its gradients are those above."""
        terms = [(p * g).sum().double() for p, g in zip(self.params, self.gradients(t), strict=True)]
        return torch.stack(terms).sum()

    def plain(self, t: int, max_norm: float | None = None) -> None:
        self.optimizer.zero_grad()
        self.loss(t).backward()
        with self.seeded():
            if max_norm is not None:
                self.optimizer.clip_grad_norm_(max_norm)
            self.optimizer.step()
        self.seen.update(self.optimizer.decisions().values())

    def backward(self, t: int, scaler: GradScaler, bad: float | None = None) -> None:
        self.optimizer.zero_grad()
        scaler.scale(self.loss(t)).backward()
        if bad is not None:
            grad = self.params[1].grad
            assert grad is not None
            grad.view(-1)[3] = bad

    def finish(self, scaler: GradScaler) -> None:
        with self.seeded():
            scaler.step(self.optimizer)
        scaler.update()
        assert not hasattr(self.optimizer, "grad_scale")
        assert not hasattr(self.optimizer, "found_inf")

    def scaled(self, t: int, scaler: GradScaler, max_norm: float | None = None, bad: float | None = None) -> None:
        """With clipping in torch's order: unscale, clip, step."""
        self.backward(t, scaler, bad)
        if max_norm is not None:
            scaler.unscale_(self.optimizer)
            with self.seeded():
                self.optimizer.clip_grad_norm_(max_norm)
        self.finish(scaler)

    def moved(self) -> dict[str, Any]:
        """Copies of all that a step may move, for :func:`assert_snapshots_equal`."""
        return snapshot(self.optimizer)

    def assert_equals(self, other: Loop) -> None:
        """Bit for bit."""
        a, b = self.moved(), other.moved()
        a["state"]["param_groups"] = b["state"]["param_groups"] = []
        assert_snapshots_equal(a, b)
        assert list(self.optimizer.decisions().values()) == list(other.optimizer.decisions().values())


@pytest.fixture(params=[True, False], ids=["native", "amp_scaling=False"])
def native(request: pytest.FixtureRequest) -> bool:
    """Whether the optimizer unscales or GradScaler does."""
    return bool(request.param)


# A scaled loop is the loop.


@EVERY_RULE
@EVERY_STORAGE
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_scaled_loop_is_the_loop(rule: str, storage: str, max_norm: float | None, native: bool, backend: str) -> None:
    """While the scale grows. Bit for bit: powers of two round nothing."""
    dtypes, options = STORAGE[storage]
    ours = Loop(rule, backend, dtypes, **options, amp_scaling=native)
    theirs = Loop(rule, backend, dtypes, **options)
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    for t in range(6):
        ours.scaled(t, scaler, max_norm)
        theirs.plain(t, max_norm)
        ours.assert_equals(theirs)
    assert scaler.get_scale() == 2.0**19
    assert ours.seen | theirs.seen == set(Decision)


@EVERY_RULE
@pytest.mark.parametrize("scale", [1000.0, 3e-5, 1.0])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_scales_that_are_no_powers_of_two(rule: str, scale: float, max_norm: float | None, backend: str) -> None:
    """The reference's trajectory to float64's rounding: the reciprocal of the scale is not rounded to float32.

    Clipped without unscale_, gradients are clipped as they are, and then unscaled; so does torch.
    """
    loop = Loop(rule, backend)
    hands = [Hand(rule, p) for p in loop.params]
    scaler = GradScaler("cpu", init_scale=scale, growth_factor=1.7, growth_interval=2)
    for t in range(6):
        grads = loop.gradients(t)
        loop.backward(t, scaler)
        if max_norm is not None:
            now = scaler.get_scale()
            grads = [g / now for g in clip([g * now for g in grads], max_norm)[1] if g is not None]
            loop.optimizer.clip_grad_norm_(max_norm)
        loop.finish(scaler)
        for p, hand, g in zip(loop.params, hands, grads, strict=True):
            hand.step(g, loop.optimizer.param_groups[0])
            assert loop.optimizer.decisions()[p] is hand.decision
            assert_close(p, hand.p, "weight")
            for name, moment in hand.moments.items():
                assert_close(loop.optimizer.state[p][name], moment, name)


@EVERY_RULE
@pytest.mark.parametrize("native", [True, False])
def test_torchs_own_clipping(rule: str, native: bool, backend: str) -> None:
    """unscale_, torch.nn.utils.clip_grad_norm_, step: what code of today does."""
    ours, theirs = Loop(rule, backend, amp_scaling=native), Loop(rule, backend)
    scaler = GradScaler("cpu")
    for t in range(4):
        ours.backward(t, scaler)
        scaler.unscale_(ours.optimizer)
        torch.nn.utils.clip_grad_norm_(ours.params, 0.5)
        ours.finish(scaler)
        theirs.backward(t, GradScaler("cpu", enabled=False))
        torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
        theirs.optimizer.step()
        ours.assert_equals(theirs)


@EVERY_RULE
def test_large_tensors(rule: str, backend: str) -> None:
    """In every plan that measures, decisions are those of unscaled gradients."""
    ours, theirs = (Loop(rule, backend, (F32,), LARGE) for _ in range(2))
    scaler = GradScaler("cpu", init_scale=2.0**20)
    for t in range(3):
        ours.scaled(t, scaler)
        theirs.plain(t)
        ours.assert_equals(theirs)
    assert ours.seen | theirs.seen == set(Decision)


@EVERY_RULE
@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_real_model(rule: str, dtype: torch.dtype, autocast: torch.dtype | None, native: bool, backend: str) -> None:
    """Convolution, normalization, a step that finds an infinity and scales that grow."""
    if autocast and dtype == F64:
        pytest.skip("autocast leaves float64 alone")
    cls, options = RULES[rule]
    x, y = torch.randn(5, 8, 2, 6, 6), torch.randint(3, (5, 8))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to(dtype)
    models = [model, copy.deepcopy(model)]
    optimizers = [cls(m.parameters(), **options, amp_scaling=native, backend=backend) for m in models]
    scalers = [GradScaler("cpu", init_scale=2.0**10, growth_interval=2), GradScaler("cpu", enabled=False)]
    for t in range(5):
        for m, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None):
                loss = nn.functional.cross_entropy(m(x[t].to(dtype)), y[t])
            scaler.scale(loss).backward()
            if t == 2:
                if not scaler.is_enabled():
                    continue
                m[0].weight.grad[0, 0, 0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == 2.0**11
    for p, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_identical(p, other)
    assert len(optimizers[0].decisions()) == 6


@EVERY_RULE
def test_the_native_step_leaves_gradients_scaled(rule: str, backend: str) -> None:
    loop, scaler = Loop(rule, backend), GradScaler("cpu", init_scale=2.0**16)
    loop.backward(0, scaler)
    before = [p.grad.clone() for p in loop.params if p.grad is not None]
    loop.finish(scaler)
    for p, g, unscaled in zip(loop.params, before, Loop(rule, backend).gradients(0), strict=True):
        assert p.grad is not None
        assert_identical(p.grad, g)
        assert_identical(g, 2.0**16 * unscaled)


@EVERY_RULE
@pytest.mark.parametrize("max_norm", [None, 10.0])
def test_float16_gradients(rule: str, max_norm: float | None, backend: str) -> None:
    """GradScaler refuses to unscale them by itself. The step does, to float32's precision."""
    loop = Loop(rule, backend, (F16,), state_dtype=F32)
    hands = [Hand(rule, p.detach().double()) for p in loop.params]
    scaler = GradScaler("cpu", init_scale=1024 / 3)
    loop.backward(0, scaler)
    assert all(p.grad is not None and p.grad.dtype == F16 for p in loop.params)
    grads = [p.grad.double() for p in loop.params if p.grad is not None]
    if max_norm is not None:
        loop.optimizer.clip_grad_norm_(max_norm)
        grads = [g for g in clip(grads, max_norm)[1] if g is not None]
    scale = scaler.get_scale()
    loop.finish(scaler)
    for p, hand, g in zip(loop.params, hands, grads, strict=True):
        hand.step(g / scale, loop.optimizer.param_groups[0])
        assert_close(p, hand.p, "weight")
        for name, moment in hand.moments.items():
            assert_close(loop.optimizer.state[p][name], moment, name)
    other = Loop(rule, backend, (F16,), amp_scaling=False)
    other.backward(0, scaler)
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.step(other.optimizer)


# Scales and the decision.


@EVERY_RULE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 10), *LARGE], ids=str)
@pytest.mark.parametrize("exponent", [-60, 80])
def test_scaled_gradients_whose_squares_float32_cannot_hold(
    rule: str, exponent: int, shape: tuple[int, ...], kind: str, backend: str
) -> None:
    """Scales grow for as long as nothing is infinite. The step is that of the gradients before scaling."""
    cls, options = RULES[rule]
    weight = torch.randn(shape)
    g = gradient(weight, kind)
    outcomes = []
    for scale in (1.0, 2.0**exponent):
        p = nn.Parameter(weight.clone())
        optimizer = cls([p], **options, backend=backend)
        p.grad = g * scale
        assert p.grad.isfinite().all()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
        outcomes.append((optimizer.decisions()[p], p.detach()))
    assert outcomes[0][0] is outcomes[1][0]
    assert_close(outcomes[1][1], outcomes[0][1], "weight")


@EVERY_RULE
@pytest.mark.parametrize("shape", [(6, 10), (300, 128), (5000, 10), (2, 40000)], ids=str)
@pytest.mark.parametrize("part", [1e-4, 0.5])
def test_eps_clamps_the_norm_of_unscaled_gradients(
    rule: str, shape: tuple[int, ...], part: float, backend: str
) -> None:
    """Gradients along the weight, cosine 1, but for rows so short that eps stands in for their norms."""
    cls, options = RULES[rule]
    eps, scale = 1e-2, 2.0**16
    p = nn.Parameter(torch.randn(shape, dtype=F64))
    threshold = 0.1 / math.sqrt(p.numel() // shape[0])
    g = aligned(p, torch.ones(shape[0], dtype=F64), eps / 2 if part == 0.5 else part * threshold * eps)
    hand = Hand(rule, p)
    optimizer = cls([p], **options, eps=eps, backend=backend)
    p.grad = g * scale
    assert decide(p.grad, p.detach(), 0.1, eps) is Decision.NONE
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.step()
    hand.step(g, optimizer.param_groups[0])
    assert hand.decision is (Decision.NONE if part == 0.5 else Decision.CHANNEL)
    assert optimizer.decisions()[p] is hand.decision
    assert_close(p, hand.p, "weight")


# An infinite gradient.


@EVERY_RULE
@EVERY_STORAGE
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_on_an_infinite_gradient_nothing_moves(
    rule: str, storage: str, max_norm: float | None, native: bool, backend: str
) -> None:
    """Nor on a NaN: weights, moments, step counts, decisions and seeds stay. The scale is halved; the loop goes on as
    if the step had never been. At the first step there is no state that could move: what is made is zero.
    """
    dtypes, options = STORAGE[storage]
    ours = Loop(rule, backend, dtypes, **options, amp_scaling=native)
    theirs = Loop(rule, backend, dtypes, **options)
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    bad = {0: math.inf, 3: math.nan, 4: -math.inf}
    for t in range(6):
        if t not in bad:
            ours.scaled(t, scaler, max_norm)
            theirs.plain(t, max_norm)
            ours.assert_equals(theirs)
            continue
        before, decisions, scale = ours.moved(), ours.optimizer.decisions(), scaler.get_scale()
        ours.scaled(t, scaler, max_norm, bad[t])
        assert scaler.get_scale() == scale / 2
        assert ours.optimizer.decisions() == decisions
        if t:
            assert_snapshots_equal(ours.moved(), before)
            continue
        for p, w in zip(ours.params, before["weights"], strict=True):
            assert_identical(p, w)
            state = {name: value for name, value in ours.optimizer.state[p].items() if name != "rounding_seed"}
            assert not any(value.any() for value in state.values())


@EVERY_RULE
def test_the_clipping_of_a_step_that_found_an_infinity_is_spent(rule: str, backend: str) -> None:
    """As in torch, whose clipping went with the gradients."""
    ours, theirs = Loop(rule, backend), Loop(rule, backend)
    scaler = GradScaler("cpu")
    ours.scaled(0, scaler)
    theirs.plain(0)
    ours.scaled(1, scaler, 0.5, bad=math.inf)
    ours.scaled(2, scaler)
    theirs.plain(2)
    ours.assert_equals(theirs)


@EVERY_RULE
def test_one_infinity_spares_the_other_optimizer(rule: str, native: bool, backend: str) -> None:
    """A scaler for two: each optimizer has its own finding."""
    loops = [Loop(rule, backend, amp_scaling=native) for _ in range(2)]
    theirs = Loop(rule, backend)
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    before = loops[0].moved()
    for loop, bad in zip(loops, (math.inf, None), strict=True):
        loop.backward(0, scaler, bad)
        scaler.step(loop.optimizer)
    scaler.update()
    theirs.plain(0)
    for p, w in zip(loops[0].params, before["weights"], strict=True):
        assert_identical(p, w)
    loops[1].assert_equals(theirs)
    assert scaler.get_scale() == 2.0**15


@EVERY_RULE
@pytest.mark.parametrize(("dtype", "shape"), [(F32, ()), (F64, (1,))])
@EVERY_STORAGE
def test_found_inf_alone(rule: str, storage: str, dtype: torch.dtype, shape: tuple[int, ...], backend: str) -> None:
    """Without a scale it skips the step all the same, and at 0 it does nothing."""
    dtypes, options = STORAGE[storage]
    ours, theirs = Loop(rule, backend, dtypes, **options), Loop(rule, backend, dtypes, **options)
    for t, found in enumerate((0.0, 1.0, 2.0, math.inf, 0.0)):
        ours.optimizer.found_inf = torch.full(shape, found, dtype=dtype)  # type: ignore[union-attr]
        before, decisions = ours.moved(), ours.optimizer.decisions()
        ours.plain(t)
        if found:
            assert_snapshots_equal(ours.moved(), before)
            assert ours.optimizer.decisions() == decisions
        else:
            theirs.plain(t)
            ours.assert_equals(theirs)


# grad_scale, set by hand.


@EVERY_RULE
@pytest.mark.parametrize(("dtype", "shape"), [(F32, ()), (F64, (1,))])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_grad_scale_alone(
    rule: str, max_norm: float | None, dtype: torch.dtype, shape: tuple[int, ...], backend: str
) -> None:
    """It divides the gradients of every step until it is deleted."""
    ours, theirs = Loop(rule, backend, (F32, F64)), Loop(rule, backend, (F32, F64))
    ours.optimizer.grad_scale = torch.full(shape, 8.0, dtype=dtype)  # type: ignore[union-attr]
    for t in range(4):
        if t == 3:
            del ours.optimizer.grad_scale  # type: ignore[union-attr]
        ours.optimizer.zero_grad()
        (ours.loss(t) * (1 if t == 3 else 8)).backward()
        if max_norm is not None:  # of what is there: 1e-6 is added to eight times the norm
            norm = ours.optimizer.clip_grad_norm_(math.inf)
            ours.optimizer.clip_grad_norm_(norm / 2 + 5e-7)
        ours.optimizer.step()
        theirs.optimizer.zero_grad()
        (theirs.loss(t) / (1 if max_norm is None else 2)).backward()
        theirs.optimizer.step()
        for p, other in zip(ours.params, theirs.params, strict=True):
            assert_close(p, other, "weight")
    assert list(ours.optimizer.decisions().values()) == list(theirs.optimizer.decisions().values())


@EVERY_RULE
@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scale_beside_the_scalers(rule: str, unscaled: bool, backend: str) -> None:
    """The scaler multiplies it by its own, if it has not unscaled, and deletes it after the step."""
    ours, theirs = Loop(rule, backend), Loop(rule, backend)
    scaler = GradScaler("cpu")
    for t in range(3):
        ours.optimizer.zero_grad()
        scaler.scale(4 * ours.loss(t)).backward()
        ours.optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[union-attr]
        if unscaled:
            scaler.unscale_(ours.optimizer)
        ours.finish(scaler)
        theirs.plain(t)
        ours.assert_equals(theirs)


# The switch.


def lightning_refuses(optimizer: torch.optim.Optimizer) -> bool:
    """The question that Lightning's mixed precision asks before it clips, and accelerate before it unscales."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def lightning_step(loop: Loop, t: int, scaler: GradScaler, max_norm: float) -> None:
    """Lightning's order: it unscales only for an optimizer that does not do it, and clips only then."""
    loop.backward(t, scaler)
    if not lightning_refuses(loop.optimizer):
        scaler.unscale_(loop.optimizer)
    if lightning_refuses(loop.optimizer):
        raise RuntimeError("The current optimizer does not allow for gradient clipping")
    torch.nn.utils.clip_grad_norm_(loop.params, max_norm)
    loop.finish(scaler)


@EVERY_RULE
def test_frameworks_that_refuse_to_clip_with_the_flag(rule: str, backend: str) -> None:
    scaler = GradScaler("cpu")
    with pytest.raises(RuntimeError, match="does not allow"):
        lightning_step(Loop(rule, backend), 0, scaler, 0.5)
    scaler = GradScaler("cpu")
    ours, theirs = Loop(rule, backend, amp_scaling=False), Loop(rule, backend)
    for t in range(3):
        lightning_step(ours, t, scaler, 0.5)
        theirs.backward(t, GradScaler("cpu", enabled=False))
        torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
        theirs.optimizer.step()
        ours.assert_equals(theirs)


def load(optimizer: Any, saved: dict[str, Any]) -> Any:
    optimizer.load_state_dict(saved)
    return optimizer


@EVERY_RULE
@pytest.mark.parametrize("other", [True, False])
def test_copies_keep_the_switch(rule: str, native: bool, other: bool, backend: str) -> None:
    """Loading a state_dict keeps ``amp_scaling``, as it keeps the backend. ``repr`` shows the value in use."""
    loop = Loop(rule, backend, amp_scaling=native)
    loop.plain(0)
    donor = Loop(rule, backend, amp_scaling=other)
    donor.plain(0)
    copies: dict[str, Callable[[], Any]] = {
        "itself": lambda: loop.optimizer,
        "deepcopy": lambda: copy.deepcopy(loop.optimizer),
        "copy": lambda: copy.copy(loop.optimizer),
        "pickle": lambda: pickle.loads(pickle.dumps(loop.optimizer)),
        "loaded": partial(load, loop.optimizer, donor.optimizer.state_dict()),
        "pickled after loading": lambda: pickle.loads(pickle.dumps(loop.optimizer)),
    }
    for name, make in copies.items():
        optimizer = make()
        assert optimizer._step_supports_amp_scaling is native, name
        assert lightning_refuses(optimizer) is native, name
        assert f"amp_scaling: {native}" in repr(optimizer), name


@EVERY_RULE
def test_a_copy_made_between_steps_goes_on(rule: str, native: bool, backend: str) -> None:
    ours, theirs = Loop(rule, backend, amp_scaling=native), Loop(rule, backend)
    scaler = GradScaler("cpu")
    for t in range(4):
        ours.scaled(t, scaler, 0.5)
        theirs.plain(t, 0.5)
        ours.assert_equals(theirs)
        ours.optimizer = pickle.loads(pickle.dumps(ours.optimizer))
        ours.params = ours.optimizer.param_groups[0]["params"]
        scaler.load_state_dict(scaler.state_dict())


@EVERY_RULE
@pytest.mark.parametrize("amp_scaling", [None, True, False])
@pytest.mark.parametrize("fused", [None, True, False])
def test_the_flag_is_set_where_torch_sets_it_or_on_request(
    rule: str, fused: bool | None, amp_scaling: bool | None
) -> None:
    cls, _ = RULES[rule]
    supports = cls(parameters((2, 3)), fused=fused, amp_scaling=amp_scaling)._step_supports_amp_scaling
    assert supports is (amp_scaling if amp_scaling is not None else fused is True)


# Other situations of a scaler.


@EVERY_RULE
def test_a_disabled_scaler_changes_nothing(rule: str, native: bool, backend: str) -> None:
    ours, theirs = Loop(rule, backend, amp_scaling=native), Loop(rule, backend)
    scaler = GradScaler("cpu", enabled=False)
    for t in range(3):
        ours.scaled(t, scaler, 0.5)
        theirs.plain(t, 0.5)
        ours.assert_equals(theirs)


@EVERY_RULE
def test_no_gradients(rule: str, backend: str) -> None:
    """As with torch's fused optimizer: the step does nothing, and there is nothing to update the scale by."""
    loop, scaler = Loop(rule, backend), GradScaler("cpu")
    other = torch.optim.AdamW(parameters((2, 3)), fused=True)
    loop.plain(0)
    before = loop.moved()
    scaler.scale(torch.ones(()))
    for optimizer in (loop.optimizer, other):
        optimizer.zero_grad()
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
    assert_snapshots_equal(loop.moved(), before)
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.update()


@EVERY_RULE
def test_gradients_that_are_missing(rule: str, native: bool, backend: str) -> None:
    ours, theirs = Loop(rule, backend, amp_scaling=native), Loop(rule, backend)
    scaler = GradScaler("cpu")
    for t in range(3):
        ours.backward(t, scaler)
        theirs.backward(t, GradScaler("cpu", enabled=False))
        for loop in (ours, theirs):
            loop.params[t].grad = None
        ours.finish(scaler)
        theirs.optimizer.step()
        ours.assert_equals(theirs)


@EVERY_RULE
def test_a_closure_is_refused_by_the_scaler(rule: str, backend: str) -> None:
    loop, scaler = Loop(rule, backend), GradScaler("cpu")
    loop.backward(0, scaler)
    with pytest.raises(RuntimeError, match="Closure use"):
        scaler.step(loop.optimizer, closure=lambda: None)
    loop.finish(scaler)


@EVERY_RULE
def test_a_bad_gradient_moves_nothing(rule: str, native: bool, backend: str) -> None:
    """A gradient of another shape, in a second bucket, raises the same error as a step without a scaler."""
    loop, scaler = Loop(rule, backend, (F32, F64), amp_scaling=native), GradScaler("cpu")
    loop.scaled(0, scaler)
    for max_norm in (None, 0.5):
        loop.backward(1, scaler)
        grad = loop.params[1].grad
        assert grad is not None
        grad.data = torch.ones(7, dtype=F64)
        before, decisions = loop.moved(), loop.optimizer.decisions()
        act = partial(scaler.step, loop.optimizer) if max_norm is None else partial(loop.optimizer.clip_grad_norm_, 0.5)
        with pytest.raises(ValueError, match="gradient of parameter 1 of group 0 has shape"):
            act()
        assert_snapshots_equal(loop.moved(), before)
        assert loop.optimizer.decisions() == decisions


@EVERY_RULE
def test_hooks_see_the_scale(rule: str, backend: str) -> None:
    """As with torch's fused optimizers, it is there from before the step's hooks until after them."""
    loop, scaler = Loop(rule, backend), GradScaler("cpu", init_scale=64.0)
    seen: list[float] = []
    see = lambda optimizer, *_: seen.append(optimizer.grad_scale.item())  # noqa: E731
    loop.optimizer.register_step_pre_hook(see)
    loop.optimizer.register_step_post_hook(see)
    loop.scaled(0, scaler)
    assert seen == [64.0, 64.0]


# With a GPU.


@CUDA
@EVERY_RULE
@EVERY_STORAGE
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_on_the_gpu(rule: str, storage: str, max_norm: float | None, native: bool) -> None:
    """The scaled loop is the loop, an infinity moves nothing, and nothing waits for the device."""
    dtypes, options = STORAGE[storage]
    ours = Loop(rule, None, dtypes, device="cuda", **options, amp_scaling=native)
    theirs = Loop(rule, None, dtypes, device="cuda", **options)
    scaler = GradScaler("cuda", init_scale=2.0**16, growth_interval=1000)
    for t in range(5):
        if t == 2:
            before, decisions = ours.moved(), ours.optimizer.decisions()
            ours.scaled(t, scaler, max_norm, math.inf)
            assert_snapshots_equal(ours.moved(), before)
            assert ours.optimizer.decisions() == decisions
            assert scaler.get_scale() == 2.0**15
            continue
        ours.scaled(t, scaler, max_norm)
        theirs.plain(t, max_norm)
        ours.assert_equals(theirs)


@CUDA
@EVERY_RULE
def test_a_scaler_of_another_device(rule: str) -> None:
    """Parameters on the CPU and on the GPU under one scaler: an infinity on one stops both."""
    cls, options = RULES[rule]
    params = [nn.Parameter(torch.randn(6, 10, dtype=F64, device=device)) for device in ("cpu", "cuda")]
    hands = [Hand(rule, p.detach().cpu()) for p in params]
    optimizer = cls(params, **options)
    scaler = GradScaler("cuda", init_scale=2.0**16)
    for t in range(4):
        grads = [gradient(hand.p, KINDS[t % 3]) for hand in hands]
        optimizer.zero_grad()
        loss = torch.stack([(p * g.to(p.device)).sum().cuda() for p, g in zip(params, grads, strict=True)]).sum()
        scaler.scale(loss).backward()
        if t == 1:
            bad = params[0].grad
            assert bad is not None
            bad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        for p, hand, g in zip(params, hands, grads, strict=True):
            if t != 1:
                hand.step(g, optimizer.param_groups[0])
            assert_close(p.cpu(), hand.p, "weight")


def test_the_order_0_counts_whatever_the_scale(backend: str) -> None:
    """It counts what is not zero, as torch does: no scale changes that."""
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    p.grad[0] = 0
    optimizer: Any = RULES["AdamP"][0]([p], backend=backend)
    optimizer.grad_scale = torch.tensor(4.0)
    assert optimizer.clip_grad_norm_(1.0, norm_type=0.0) == torch.nn.utils.get_total_norm([p.grad], 0.0)
    assert optimizer.clip_grad_norm_(1.0, norm_type=1.0) == 2
