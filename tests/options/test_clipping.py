"""clip_grad_norm_ of the optimizer: what torch.nn.utils.clip_grad_norm_ returns, then a step on clipped gradients.

The yardstick is torch's function on clones of the gradients, and then the reference, called by hand.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_refusals import BAD, PLACES, Detached, raises
from tolerances import TOLERANCE, assert_close, assert_identical
from torch import Tensor, nn
from trajectory import (
    RULES,
    SHAPES,
    Hand,
    Run,
    assert_snapshots_equal,
    gradient,
    near_threshold,
    parameters,
    snapshot,
)

from fused_adamp.precision import ROUNDINGS, join
from fused_adamp.reference import Decision, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
NORM_TYPES = (2.0, 1.0, math.inf, 0.5)
EVERY_NORM = pytest.mark.parametrize("norm_type", NORM_TYPES)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LARGE = ((300, 128), (5000, 9), (2, 40000))
"""Several tiles of whole rows, long and short, and rows of several tiles: on the CPU every plan that measures."""


def clip(grads: Sequence[Tensor | None], max_norm: Any, norm_type: float = 2.0) -> tuple[Tensor, list[Tensor | None]]:
    """The norm that torch.nn.utils.clip_grad_norm_ returns, and clones of the gradients, clipped by it."""
    holders = [torch.zeros(0) if g is None else torch.zeros(g.shape, dtype=g.dtype, device=g.device) for g in grads]
    for holder, g in zip(holders, grads, strict=True):
        holder.grad = None if g is None else g.detach().clone(memory_format=torch.contiguous_format)
    norm = torch.nn.utils.clip_grad_norm_(holders, max_norm, norm_type)
    return norm, [holder.grad for holder in holders]


def clip_widely(grads: Sequence[Tensor | None], max_norm: Any, norm_type: float) -> tuple[Tensor, list[Tensor | None]]:
    """The same in float64, in which our norm is computed, but for the orders that are left to torch."""
    exact = [None if g is None else g.double() for g in grads]
    return clip(exact if norm_type == 2 else grads, max_norm, norm_type)


class ClippedRun(Run):
    """A run that may clip: the copies by hand then step on what torch makes of clones of the same gradients."""

    limit: tuple[Any, float] | None = None

    def give(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """Hand these gradients to the parameters, random ones by default."""
        for p, g in zip(self.params, self.gradients() if grads is None else grads, strict=True):
            p.grad = g

    def clip(self, max_norm: Any, norm_type: float = 2.0, **options: Any) -> Tensor:
        """Clip what is there, which moves nothing."""
        grads = [p.grad for p in self.params]
        before, versions = [None if g is None else g.clone() for g in grads], self.versions()
        weights = [p.detach().clone() for p in self.params]
        norm = self.optimizer.clip_grad_norm_(max_norm, norm_type, **options)
        self.limit = max_norm, norm_type
        assert self.versions() == versions, "clipping wrote into something"
        for p, g, old, weight in zip(self.params, grads, before, weights, strict=True):
            assert p.grad is g, "clipping replaced a gradient"
            assert_identical(p, weight, "weight")
            if g is not None and old is not None:
                assert_identical(g, old, "gradient")
        return norm

    def versions(self) -> list[int | None]:
        tensors = [t for p in self.params for t in (p, p.grad) if t is not None]
        return [None if t.is_inference() else t._version for t in tensors]

    def clipped_step(self, max_norm: Any, norm_type: float = 2.0) -> None:
        """New gradients, clip, step."""
        self.give()
        self.clip(max_norm, norm_type)
        self.advance()

    def advance(self) -> None:
        self.move()
        self.check()

    def move(self) -> None:
        """Take one step on the gradients that are there, in both ways."""
        self.meet()
        grads = [p.grad for p in self.params]
        before = [None if g is None else g.clone() for g in grads]
        limit, self.limit = self.limit, None
        expected = grads if limit is None else clip_widely(grads, *limit)[1]
        self.optimizer.step()
        self.count += 1
        for p, g, old in zip(self.params, grads, before, strict=True):
            assert p.grad is g, "the step replaced a gradient"
            if g is not None and old is not None:
                assert_identical(g, old, "gradient")
        groups = [group for group in self.optimizer.param_groups for _ in group["params"]]
        for p, g, group in zip(self.params, expected, groups, strict=True):
            if g is not None:
                self.hands[p].step(g, group)


def assert_relatively_close(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype) -> None:
    """Within the tolerance of ``dtype`` of the largest value, however small that is."""
    size = expected.abs().max().item()
    assert size > 0
    assert_close(actual.double() / size, expected.double() / size, what, dtype=dtype)


def test_signature() -> None:
    """Torch's, without the parameters."""
    theirs = list(inspect.signature(torch.nn.utils.clip_grad_norm_).parameters.values())
    for cls, _ in RULES.values():
        ours = list(inspect.signature(cls.clip_grad_norm_).parameters.values())
        assert [(a.name, a.default) for a in ours[1:]] == [(a.name, a.default) for a in theirs[1:4]]


# The norm.


def of(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor | None]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

GRADIENTS: dict[str, Callable[[], list[list[Tensor | None]]]] = {
    "float64": lambda: [of(F64, (4, 6), (9,))],
    "float32": lambda: [of(F32, (4, 6), (9,))],
    "bfloat16": lambda: [of(BF16, (4, 6), (9,))],
    "float16": lambda: [of(F16, (4, 6), (9,))],
    "float32 and float64": lambda: [of(F32, (4, 6)) + of(F64, (9,)) + of(F32, (3, 3))],
    "bfloat16 and float32": lambda: [of(BF16, (4, 6)) + of(F32, (9,))],
    "float16 and bfloat16": lambda: [of(F16, (4, 6)) + of(BF16, (9,))],
    "several groups": lambda: [of(F64, (4, 6)), of(F64, (5, 7), ()), of(F32, (2, 3))],
    "scalars": lambda: [of(F32, (), (1,), (1, 1))],
    "None among them": lambda: [[None, *of(F32, (4, 6)), None], [None]],
    "None of one dtype": lambda: [[*of(F32, (4, 6)), None]],
    "several tiles": lambda: [of(F32, *LARGE)],
    "zero-size": lambda: [of(F32, (4, 6), (0,), (0, 3), (3, 0), (2, 0, 4))],
    "all zero-size": lambda: [of(F32, (0,), (3, 0))],
    "zeros": lambda: [[torch.zeros(4, 6), torch.zeros(3)]],
    "transposed": lambda: [[torch.randn(6, 4).t(), torch.randn(3, 4, 5).permute(2, 0, 1)]],
    "with gaps": lambda: [[torch.randn(8, 9)[::2, ::3], torch.randn(18)[::2], torch.randn(9, 7)[:, 1]]],
    "misaligned": lambda: [[torch.randn(25)[1:].view(4, 6)]],
    "expanded": lambda: [[torch.randn(1, 6).expand(4, 6), torch.randn(()).expand(9)]],
    "some infinite": lambda: [[torch.tensor([1.0, -math.inf]), torch.randn(4, 6)]],
    "some NaN": lambda: [[torch.tensor([1.0, math.nan]), torch.randn(4, 6)]],
}


def parameters_for(groups: list[list[Tensor | None]]) -> list[dict[str, Any]]:
    """Parameters with these gradients; where there is none, float64 ones, whose dtype must not count."""
    result = []
    for grads in groups:
        params = [nn.Parameter(torch.ones(5, 2, dtype=F64) if g is None else torch.ones_like(g)) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        result.append({"params": params})
    return result


@EVERY_RULE
@EVERY_NORM
@pytest.mark.parametrize("name", list(GRADIENTS))
def test_norm_is_torchs(rule: str, name: str, norm_type: float, backend: str) -> None:
    """Its value, dtype, shape and device; where torch refuses (the largest of no elements), so do we."""
    groups = GRADIENTS[name]()
    run = ClippedRun(rule, parameters_for(groups), backend)
    grads = [g for group in groups for g in group]
    try:
        expected, _ = clip(grads, 1.0, norm_type)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="infinity norm"):
            run.clip(1.0, norm_type)
        return
    norm = run.clip(1.0, norm_type)
    assert (norm.dtype, norm.shape, norm.device) == (expected.dtype, (), expected.device)
    assert not norm.requires_grad
    narrowest = max((g.dtype for g in grads if g is not None), key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = TOLERANCE[narrowest]  # torch rounds each tensor's norm to that tensor's dtype
    torch.testing.assert_close(norm, expected, rtol=tolerance, atol=0, equal_nan=True)
    if norm_type == 2:
        exact, _ = clip([None if g is None else g.double() for g in grads], 1.0)
        rtol = TOLERANCE[norm.dtype]
        torch.testing.assert_close(norm, exact, rtol=rtol, atol=0, equal_nan=True, check_dtype=False)


@EVERY_RULE
@EVERY_NORM
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_norm_of_no_gradients_is_torchs(rule: str, norm_type: float, default: torch.dtype, backend: str) -> None:
    """A zero of the default dtype; the step that follows does nothing, and the clipping is spent."""
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.step()
    run.give([None] * len(SHAPES))
    torch.set_default_dtype(default)
    try:
        norm, expected = run.clip(0.1, norm_type), clip([None], 0.1, norm_type)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert_identical(norm, expected)
    before = snapshot(run.optimizer)
    run.advance()
    assert_snapshots_equal(snapshot(run.optimizer), before)
    run.step()


@pytest.mark.parametrize("norm_type", ["inf", 2, 1, 3, torch.tensor(2.0)], ids=repr)
def test_norm_type_may_be_what_float_takes(norm_type: Any, backend: str) -> None:
    run = ClippedRun("AdamP", parameters(*SHAPES), backend)
    run.give()
    norm = run.clip(0.5, norm_type)
    torch.testing.assert_close(norm, clip([p.grad for p in run.params], 0.5, float(norm_type))[0])
    run.advance()


@pytest.mark.parametrize(
    "limit", [1, 0.5, np.float64(0.5), np.float32(0.5), np.int64(1), Fraction(1, 2), torch.tensor(1)], ids=repr
)
def test_limit_may_be_any_real_number(limit: Any, backend: str) -> None:
    """As in torch."""
    run = ClippedRun("AdamP", parameters(*SHAPES), backend)
    run.give()
    run.clip(limit)
    run.advance()


@EVERY_RULE
def test_threads_change_no_bit(rule: str, backend: str) -> None:
    outcomes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)  # the fixture sets it back
        torch.manual_seed(0)
        run = Run(rule, parameters(*LARGE, dtype=F32), backend)
        for p, g in zip(run.params, run.gradients(), strict=True):
            p.grad = g
        norm = run.optimizer.clip_grad_norm_(0.5)
        run.optimizer.step()
        outcomes.append((norm, snapshot(run.optimizer)))
    assert_identical(outcomes[0][0], outcomes[1][0])
    if backend != "reference":  # torch's sums depend on threads
        assert_snapshots_equal(outcomes[0][1], outcomes[1][1])


def test_norm_spans_dtypes_and_backends(backend: str) -> None:
    """One norm over buckets that share nothing."""
    groups = [
        {"params": parameters((4, 6), (9,))},
        {"params": parameters((4, 6), dtype=F32), "backend": "reference"},
        {"params": parameters((5, 7)), "backend": "reference", "lr": 0.01},
    ]
    run = ClippedRun("AdamP", groups, backend)
    for _ in range(3):
        run.give()
        expected = torch.stack([p.grad.double().norm() for p in run.params if p.grad is not None]).norm()
        torch.testing.assert_close(run.clip(0.3), expected, rtol=1e-12, atol=0)
        run.advance()


def test_the_returned_norm_is_the_callers(backend: str) -> None:
    """Writing into it changes nothing about the step."""
    run = ClippedRun("AdamP", parameters(*SHAPES), backend)
    run.give()
    run.clip(0.1).fill_(1e9)
    run.advance()


# Equal to clip, then step.

LIMITS: tuple[tuple[Any, float] | None, ...] = (
    (0.5, 2.0), (3, 1.0), (0.1, math.inf), (200.0, 0.5), (1e9, 2.0), (0.0, 2.0), (torch.tensor(0.25), 2.0),
    (math.inf, 2.0), (torch.tensor([2], dtype=torch.int32), math.inf), None, (np.float64(1.5), 2.0), (0, 1.0),
    (torch.tensor([[0.75]], dtype=F64, requires_grad=True), 2.0), (1e-6, 2.0), (0.5, 0.5),
)  # fmt: skip
"""max_norm and norm_type of one step each, None for a step without clipping. Gradients are far below or above it."""

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    rule: {
        "test": {},
        "nesterov": {"nesterov": True},
        "maximize": {"maximize": True},
        "no test": {"delta": 0},
        "channel": {"projection": "channel"},
        "layer": {"projection": "layer"},
        "none": {"projection": "none"},
        "large eps": {"eps": 1e-2},
        "other channels": {"channel_dim": -1},
    }
    for rule in RULES
}
OPTIONS["SGDP"] |= {
    "no momentum": {"momentum": 0},
    "no momentum, nesterov": {"momentum": 0, "nesterov": True},
    "buffer": {"project_buffer": True},
}


@pytest.mark.parametrize(("rule", "name"), [(rule, name) for rule in RULES for name in OPTIONS[rule]])
def test_equals_clip_then_step(rule: str, name: str, backend: str) -> None:
    run = ClippedRun(rule, parameters(*SHAPES), backend, **OPTIONS[rule][name])
    for limit in LIMITS:
        run.give()
        if limit is not None:
            run.clip(*limit)
        run.advance()
    if name == "test":
        run.check_all_seen()


@EVERY_RULE
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_clip_then_step_in_every_plan(rule: str, nesterov: bool, dtype: torch.dtype, backend: str) -> None:
    """Tensors of several tiles, in all three decisions."""
    run = ClippedRun(rule, parameters(*LARGE, (9,), dtype=dtype), backend, nesterov=nesterov)
    for max_norm in (2.0, 0.05, 1e9):
        run.clipped_step(max_norm)
    run.check_all_seen()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
    "with gaps": lambda g: g.repeat_interleave(2, -1)[..., ::2],
    "misaligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
    "float32": lambda g: g.float(),
}


@EVERY_RULE
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_gradients_in_any_layout_and_dtype(rule: str, layout: str, backend: str) -> None:
    run = ClippedRun(rule, parameters((4, 6), (5, 7), (4, 3, 3, 3), (9,)), backend)
    for p in run.params:
        p.grad_dtype = None  # type: ignore[attr-defined]
    for _ in range(3):
        run.give([LAYOUTS[layout](g) for g in run.gradients()])
        run.clip(0.5)
        run.advance()


@EVERY_RULE
@pytest.mark.parametrize("name", ["expanded", "None among them", "zero-size", "scalars"])
def test_gradients_of_any_kind_clip(rule: str, name: str, backend: str) -> None:
    run = ClippedRun(rule, parameters_for(GRADIENTS[name]()), backend)
    for _ in range(2):
        run.clip(0.5)
        run.advance()


@EVERY_RULE
def test_gradients_made_in_inference_mode(rule: str, backend: str) -> None:
    """They keep no version: the step measures them again, and sees what was written into them."""
    run = ClippedRun(rule, parameters((4, 6), (5, 7)), backend)
    for factor in (1, 1, 100):
        with torch.inference_mode():
            grads = [g.clone() for g in run.gradients()]
        run.give(grads)
        assert all(p.grad is not None and p.grad.is_inference() for p in run.params)
        run.clip(0.5)
        with torch.inference_mode():
            grads[0].mul_(factor)
        run.advance()


@EVERY_RULE
def test_frozen_parameters(rule: str, backend: str) -> None:
    """Without a gradient they count for nothing; with one they are clipped and stepped like the others, as in torch."""
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.clipped_step(0.5)
    for p in run.params[::2]:
        p.requires_grad_(False)
    run.clipped_step(0.5)
    for _ in range(2):
        run.give([None if i % 2 == 0 else g for i, g in enumerate(run.gradients())])
        run.clip(0.5)
        run.advance()


@EVERY_RULE
@pytest.mark.parametrize("limit", [1e3, math.inf])
def test_gradients_within_the_limit_are_left_alone(rule: str, limit: float, backend: str) -> None:
    """Bit for bit the step without clipping."""
    run = Run(rule, parameters(*SHAPES, (300, 128)), backend)
    run.step()
    other = copy.deepcopy(run.optimizer)
    copies = [p for group in other.param_groups for p in group["params"]]
    for _ in range(3):
        for p, twin, g in zip(run.params, copies, run.gradients(), strict=True):
            p.grad, twin.grad = g, g.clone()
        assert run.optimizer.clip_grad_norm_(limit) < limit
        run.optimizer.step()
        other.step()
    assert_snapshots_equal(snapshot(run.optimizer), snapshot(other))


@EVERY_RULE
@pytest.mark.parametrize("shape", [(9,), (6, 10), (300, 128)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(F64, "nearest"), (F32, "nearest"), (F16, "nearest"), *((BF16, how) for how in ROUNDINGS)]
)
def test_a_coefficient_of_one_half(
    rule: str, dtype: torch.dtype, rounding: str, shape: tuple[int, ...], backend: str
) -> None:
    """Bit for bit the step on halved gradients, in every storage."""
    cls, options = RULES[rule]
    outcomes = []
    p = torch.randn(shape, dtype=F64)
    grads = [gradient(p, kind).to(dtype) for kind in ("channel", "layer", "free")]
    for clips in (True, False):
        weight = nn.Parameter(p.to(dtype, copy=True))
        optimizer = cls([weight], **options, rounding=rounding, backend=backend)
        torch.manual_seed(7)  # of the stochastic rounding
        for g in grads:
            weight.grad = g if clips else g / 2
            if clips:
                norm = optimizer.clip_grad_norm_(math.inf)
                exact = norm if dtype == F64 else g.double().norm()
                optimizer.clip_grad_norm_((exact.double() + 1e-6) / 2)
            optimizer.step()
        outcomes.append(snapshot(optimizer) | {"decision": optimizer.decisions()[weight]})
    assert outcomes[0]["decision"] is outcomes[1]["decision"]
    assert_snapshots_equal(*outcomes)


@EVERY_RULE
@pytest.mark.parametrize("max_norm", [10 / 3, 1e-6])
@pytest.mark.parametrize(("dtype", "rounding"), [(F16, "nearest"), *((BF16, how) for how in ROUNDINGS)])
def test_the_coefficient_is_not_rounded_to_the_weights_dtype(
    rule: str, dtype: torch.dtype, rounding: str, max_norm: float, backend: str
) -> None:
    """16-bit weights and gradients, float32 moments: these show the coefficient to float32's precision."""
    cls, options = RULES[rule]
    params = parameters((6, 10), (5, 7), (9,), dtype=dtype)
    optimizer = cls(params, **options, rounding=rounding, state_dtype=torch.float32, backend=backend)
    for p in params:
        p.grad = gradient(p.detach().double(), "free").to(dtype)
    _, grads = clip([p.grad.double() for p in params if p.grad is not None], max_norm)
    hands = [Hand(rule, p.detach().double()) for p in params]
    optimizer.clip_grad_norm_(max_norm)
    optimizer.step()
    for p, hand, g in zip(params, hands, grads, strict=True):
        assert g is not None
        hand.step(g, optimizer.param_groups[0])
        for name, moment in hand.moments.items():
            assert_relatively_close(optimizer.state[p][name], moment, name, torch.float32)
        weight = join(p.detach(), optimizer.state[p]["remainder"]) if rounding == "remainder" else p
        assert_close(weight, hand.p, "weight")


# Sizes that squares cannot hold, and norms that eps stands in for.


@EVERY_RULE
@pytest.mark.parametrize("kind", ["channel", "layer", "free"])
@pytest.mark.parametrize("shape", [(9,), (6, 10), *LARGE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_gradients(rule: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str, backend: str) -> None:
    """Squares overflow float32, and torch's norm is infinite, so that it clips to zero. Ours is right, and so is the
    step: that of the gradients clipped in float64, with its decision.
    """
    cls, options = RULES[rule]
    w = torch.randn(shape, dtype=F64).to(dtype)
    p = nn.Parameter(w)
    p.grad = (gradient(w.double(), kind) * 1e25).to(dtype)
    hand = Hand(rule, w.double())
    assert torch.nn.utils.get_total_norm([p.grad.float()]).isinf()
    norm, (g,) = clip([p.grad.double()], 1.0)
    optimizer = cls([p], **options, backend=backend)
    assert_relatively_close(optimizer.clip_grad_norm_(1.0), norm, "norm", dtype)
    optimizer.step()
    assert g is not None
    hand.step(g, optimizer.param_groups[0])
    assert optimizer.decisions()[p] is hand.decision
    assert_close(p, hand.p, "weight")
    for name, moment in hand.moments.items():
        assert_close(optimizer.state[p][name], moment, name)


@EVERY_RULE
def test_huge_gradients_in_float64_are_clipped_to_zero(rule: str, backend: str) -> None:
    """Where float64 overflows, the norm is infinite, as in torch."""
    run = ClippedRun(rule, parameters((6, 10), (300, 128), (9,)), backend)
    for kind in ("channel", "free"):
        run.give([gradient(p, kind) * 1e200 for p in run.params])
        assert run.clip(1.0).isinf()
        run.advance()


@EVERY_RULE
def test_a_norm_beyond_float16(rule: str, backend: str) -> None:
    """It is returned as infinite, as by torch, which then clips to zero. The step uses what it was before rounding."""
    cls, options = RULES[rule]
    p = nn.Parameter(torch.randn(6, 10, dtype=F16))
    hand = Hand(rule, p.detach().double())
    p.grad = torch.full((6, 10), 6e4, dtype=F16)
    expected, _ = clip([p.grad], 1.0)
    optimizer = cls([p], **options, state_dtype=torch.float32, backend=backend)
    norm = optimizer.clip_grad_norm_(1.0)
    assert norm.isinf()
    assert_identical(norm, expected)
    optimizer.step()
    (g,) = clip([p.grad.double()], 1.0)[1]
    assert g is not None
    hand.step(g, optimizer.param_groups[0])
    assert_close(p, hand.p, "weight")
    for name, moment in hand.moments.items():
        assert_close(optimizer.state[p][name], moment, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_tiny_gradients(dtype: torch.dtype, backend: str) -> None:
    """Squares vanish in float32, but not in the norm."""
    p = nn.Parameter(torch.randn(6, 10, dtype=dtype))
    p.grad = (torch.randn(6, 10) * 1e-30).to(dtype)
    optimizer = RULES["AdamP"][0]([p], backend=backend)
    assert_relatively_close(optimizer.clip_grad_norm_(1.0), p.grad.double().norm(), "norm", dtype)


def aligned(p: Tensor, signs: Tensor, size: float = 1.0) -> Tensor:
    """A gradient whose rows have this norm and lie along the weight's, each with a sign: every cosine is 1."""
    rows = p.detach().flatten(1)
    return (signs[:, None] * rows / rows.norm(dim=1, keepdim=True) * size).reshape(p.shape)


@EVERY_RULE
@pytest.mark.parametrize("shape", [(6, 10), (300, 128), (5000, 10), (2, 40000)], ids=str)
@pytest.mark.parametrize("size", [1.0, 8e-3], ids=["clipped below eps", "below eps before"])
@pytest.mark.parametrize("row", [1e-4, 0.5, 1e-6])
@pytest.mark.parametrize("alternate", [False, True])
def test_eps_clamps_the_norm_of_clipped_gradients(
    rule: str, shape: tuple[int, ...], size: float, row: float, alternate: bool, backend: str
) -> None:
    """Gradients along the weight, cosine 1, but for norms below eps = 0.01 that eps stands in for: rows of norm
    eps * threshold * 1e-4 pass the test, rows of half of eps do not. Only after clipping: the decision is made on that.
    """
    eps, delta = 1e-2, 0.1
    run = ClippedRun(rule, parameters(shape), backend, eps=eps, delta=delta)
    (p,) = run.params
    signs = torch.ones(shape[0], dtype=F64)
    if alternate:
        rows = p.detach().flatten(1).norm(dim=1)
        signs[1::2] = -rows[0::2].sum() / rows[1::2].sum()  # cancels in the layer's sum
        if size < 1:
            signs /= 2
    g = aligned(p, signs, size)
    threshold = delta / math.sqrt(p.numel() // shape[0])
    target = {1e-4: 1e-4 * threshold * eps, 0.5: eps / 2, 1e-6: 0.0}[row]
    run.give([g])
    run.clip(target / size * g.norm().item())
    (clipped,) = clip([g], *(run.limit or ()))[1]
    assert clipped is not None
    expected = decide(clipped, p.detach(), delta, eps)
    assert expected is (Decision.CHANNEL if row != 0.5 else Decision.LAYER if alternate else Decision.NONE)
    run.advance()
    assert run.seen == {expected}


@pytest.mark.parametrize("eps", [1e-8, 1e-2, 0.0])
@pytest.mark.parametrize("shape", [(6, 10), (300, 128), (2, 40000)], ids=str)
def test_orthogonal_and_zero_rows(eps: float, shape: tuple[int, ...], backend: str) -> None:
    """Products that are exactly zero, of rows that are zero and of others; at eps = 0 the former have no cosine."""
    p = torch.zeros(shape, dtype=F64)
    p[:, ::2] = torch.randn(shape, dtype=F64)[:, ::2]
    orthogonal = torch.zeros_like(p)
    orthogonal[:, 1::2] = torch.randn(shape, dtype=F64)[:, 1::2]
    some_zero, one_along = orthogonal.clone(), orthogonal.clone()
    some_zero[0] = 0
    one_along[-1] = p[-1]
    for g in (orthogonal, some_zero, torch.zeros_like(p), one_along):
        for max_norm in (1e-12, 0.5, math.inf, 0.0):
            run = ClippedRun("SGDP", [nn.Parameter(p.clone())], backend, eps=eps)
            run.give([g.clone()])
            run.clip(max_norm)
            run.advance()


# One step uses it once.


@EVERY_RULE
def test_one_step_uses_it_once(rule: str, backend: str) -> None:
    """The second step is not clipped, though its gradients are the very same tensors."""
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    for _ in range(3):
        run.clipped_step(0.01)
        run.advance()


@EVERY_RULE
@pytest.mark.parametrize("limits", [((0.01, 2.0), (0.5, 2.0)), ((0.5, 2.0), (0.01, 2.0)), ((0.1, 2.0), (0.1, 1.0))])
def test_of_two_the_later_counts(rule: str, limits: tuple[tuple[float, float], ...], backend: str) -> None:
    """And both return the norm of the gradients, which are as they were."""
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    for _ in range(2):
        run.give()
        for limit in limits:
            norm = run.clip(*limit)
            torch.testing.assert_close(norm, clip([p.grad for p in run.params], *limit)[0])
        run.advance()
        run.step()


@EVERY_RULE
def test_a_step_without_gradients_uses_it(rule: str, backend: str) -> None:
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.step()
    run.give()
    run.clip(0.01)
    run.optimizer.zero_grad()
    run.advance()
    run.step()


# Gradients that change between clipping and the step. The step clips what it finds, by its own norm.


def along_the_weight(run: ClippedRun) -> None:
    p = run.params[1]
    p.grad = p.detach() * 3


def another_gradient(run: ClippedRun) -> None:
    run.params[0].grad = gradient(run.params[0], "channel") * 10


def another_object_of_equal_value(run: ClippedRun) -> None:
    p = run.params[0]
    assert p.grad is not None
    p.grad = p.grad.clone()


def backward_accumulates(run: ClippedRun) -> None:
    (run.params[1] ** 2).sum().backward()


def smaller(run: ClippedRun) -> None:
    torch._foreach_mul_([p.grad for p in run.params if p.grad is not None], 1e-3)  # type: ignore[no-untyped-call]


def weight(run: ClippedRun) -> None:
    """Its decision becomes another one."""
    p = run.params[1]
    assert p.grad is not None
    with torch.no_grad():
        p.copy_(p.grad)
    run.hands[p].p.copy_(p.grad)


def weight_data(run: ClippedRun) -> None:
    p = run.params[1]
    assert p.grad is not None
    p.data = p.grad.clone()
    run.hands[p].p.copy_(p.grad)


def gradient_data(run: ClippedRun) -> None:
    g = run.params[0].grad
    assert g is not None
    g.data = 100 * g


def an_added_group(run: ClippedRun) -> None:
    (p,) = parameters((3, 4))
    run.optimizer.add_param_group({"params": [p]})
    p.grad = gradient(p, "free")


def another_parameter(run: ClippedRun) -> None:
    """In the place of one that was there, as FSDP2 does."""
    p = nn.Parameter(run.params[1].detach().clone())
    p.grad = gradient(p, "free")
    run.optimizer.param_groups[0]["params"][1] = p


def torch_clips_too(run: ClippedRun) -> None:
    torch.nn.utils.clip_grad_norm_(run.params, 1e-4)


CHANGES: dict[str, Callable[[ClippedRun], None]] = {
    "nothing": lambda run: None,
    "another gradient": another_gradient,
    "another decision": along_the_weight,
    "another object of equal value": another_object_of_equal_value,
    "multiplied": lambda run: run.params[0].grad.mul_(100),  # type: ignore[union-attr]
    "all smaller": smaller,
    "values clipped": lambda run: torch.nn.utils.clip_grad_value_(run.params, 0.1),
    "clipped by torch": torch_clips_too,
    "zeroed": lambda run: run.optimizer.zero_grad(set_to_none=False),
    "backward accumulates": backward_accumulates,
    "one less": lambda run: setattr(run.params[1], "grad", None),
    "weight": weight,
    "weight data": weight_data,
    "gradient data": gradient_data,
    "an added group": an_added_group,
    "another parameter": another_parameter,
}


@EVERY_RULE
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("change", list(CHANGES))
def test_gradients_changed_after_it_are_measured_again(rule: str, norm_type: float, change: str, backend: str) -> None:
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.step()
    for _ in range(2):
        run.give()
        run.clip(0.05, norm_type)
        CHANGES[change](run)
        run.advance()
    run.step()


@EVERY_RULE
@pytest.mark.parametrize("every", [1, 2])
def test_parameters_that_change_their_dtype(rule: str, every: int, backend: str) -> None:
    """Between clipping and the step: as by model.float(), or of a part of it, for which there is no bucket yet."""
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.steps(2)
    run.give()
    run.clip(0.05)
    for p in run.params[::every]:
        g, p.grad = p.grad, None
        p.data = p.data.float()
        p.grad = None if g is None else g.float()
        run.hands[p].adopt(p, run.optimizer.state[p])
    run.advance()
    run.step()


@EVERY_RULE
def test_a_gradient_that_was_not_there(rule: str, backend: str) -> None:
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.step()
    grads = run.gradients()
    run.give([g if i == 1 else None for i, g in enumerate(grads)])
    run.clip(0.05)
    run.give(grads)
    run.advance()
    run.step()


@EVERY_RULE
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_in_between(rule: str, set_to_none: bool, backend: str) -> None:
    run = ClippedRun(rule, parameters((4, 6), (5, 7)), backend)
    for _ in range(2):
        run.give()
        run.clip(0.05)
        run.optimizer.zero_grad(set_to_none=set_to_none)
        sum((p**3).sum() for p in run.params).backward()  # type: ignore[union-attr]
        run.advance()
    run.step()


@EVERY_RULE
def test_a_limit_that_is_a_tensor_counts_as_it_was(rule: str, backend: str) -> None:
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    limit = torch.tensor(0.25)
    for change in ("nothing", "multiplied"):
        run.give()
        run.clip(limit)
        run.limit = 0.25, 2.0
        limit.fill_(1e9)
        CHANGES[change](run)
        run.advance()
        limit.fill_(0.25)


@EVERY_RULE
@pytest.mark.parametrize("inside", [True, False])
def test_closure(rule: str, inside: bool, backend: str) -> None:
    """Its gradients are those that are clipped, whether it clips itself or clipping came before."""
    run = ClippedRun(rule, parameters((4, 6)), backend)
    (p,), c = run.params, torch.randn(4, 6, dtype=F64)
    run.step()

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = (p * c).square().sum()
        loss.backward()
        if inside:
            run.optimizer.clip_grad_norm_(0.05)
        return loss

    for _ in range(3):
        hand = run.hands[p]
        (g,) = clip([2 * hand.p * c**2], 0.05)[1]
        assert g is not None
        if not inside:
            run.optimizer.clip_grad_norm_(0.05)
        run.optimizer.step(closure)
        hand.step(g, run.optimizer.param_groups[0])
        run.check()
    run.step()


@EVERY_RULE
def test_hook_before_the_step(rule: str, backend: str) -> None:
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    handle = run.optimizer.register_step_pre_hook(lambda *_: run.optimizer.clip_grad_norm_(0.05) and None)
    for _ in range(2):
        run.limit = 0.05, 2.0
        run.step()
    handle.remove()
    run.step()


# Other calls while a clip is pending.


@EVERY_RULE
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_state_dict_does_not_show_it(rule: str, rounding: str, backend: str) -> None:
    cls, options = RULES[rule]
    params = parameters(*SHAPES, dtype=BF16)
    optimizer = cls(params, **options, rounding=rounding, backend=backend)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before, text, groups = snapshot(optimizer), repr(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    decisions = optimizer.decisions()
    optimizer.clip_grad_norm_(0.1)
    assert_snapshots_equal(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    assert repr(optimizer) == text
    assert optimizer.decisions() == decisions


@EVERY_RULE
def test_state_is_made_by_the_step_and_not_by_clipping(rule: str, backend: str) -> None:
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.give()
    run.clip(0.1)
    assert not run.optimizer.state_dict()["state"]
    assert not run.optimizer.decisions()
    run.advance()


@EVERY_RULE
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_no_gradients_and_nothing_to_clip(rule: str, how: str, backend: str) -> None:
    """The copy's first gradients were not clipped; the original still clips."""
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.step()
    run.give()
    run.clip(0.05)
    twin = copy.deepcopy(run.optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(run.optimizer))
    copies = [p for group in twin.param_groups for p in group["params"]]
    if how == "deepcopy":
        assert all(p.grad is None for p in copies)
    hands = [copy.deepcopy(run.hands[p]) for p in run.params]
    for p, other, hand in zip(run.params, copies, hands, strict=True):
        assert p.grad is not None
        other.grad = p.grad.clone()
        hand.step(p.grad, twin.param_groups[0])
    twin.step()
    for other, hand in zip(copies, hands, strict=True):
        assert_close(other, hand.p, "the copy's weight")
    run.advance()


@EVERY_RULE
def test_loading_a_state_leaves_clipped_gradients_clipped(rule: str, backend: str) -> None:
    """Clipping by torch changes the gradients themselves; loading leaves them so."""
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.step()
    saved = run.optimizer.state_dict()
    run.give()
    run.clip(0.05)
    run.optimizer.load_state_dict(saved)
    run.advance()


# Errors with a clipping pending; test_refusals.py has the words.


@EVERY_RULE
@pytest.mark.parametrize("pending", [True, False])
@pytest.mark.parametrize(("max_norm", "error"), [(-1, ValueError), (torch.ones(2), ValueError), (None, TypeError)])
def test_a_bad_limit(rule: str, max_norm: Any, error: type[Exception], pending: bool, backend: str) -> None:
    """Nothing has changed: an earlier clipping counts still, and without one the step is not clipped."""
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.step()
    run.give()
    if pending:
        run.clip(0.05)
    before = snapshot(run.optimizer)
    with pytest.raises(error, match="max_norm"):
        run.optimizer.clip_grad_norm_(max_norm)
    assert_snapshots_equal(snapshot(run.optimizer), before)
    run.advance()
    run.step()


@pytest.mark.parametrize(("norm_type", "error"), [("two", ValueError), (None, TypeError), ([2.0], TypeError)])
def test_a_bad_order(norm_type: Any, error: type[Exception], backend: str) -> None:
    """The error is torch's."""
    run = ClippedRun("AdamP", parameters(*SHAPES), backend)
    run.step()
    run.give()
    run.clip(0.05)
    with pytest.raises(error):
        clip([p.grad for p in run.params], 1.0, norm_type)
    with pytest.raises(error):
        run.optimizer.clip_grad_norm_(1.0, norm_type)
    run.advance()


@EVERY_RULE
@pytest.mark.parametrize("place", ["second bucket", "second group, same bucket"])
@pytest.mark.parametrize("kind", list(BAD))
def test_bad_tensors(rule: str, kind: str, place: str, backend: str) -> None:
    """Neither the step nor another clipping moves anything; with the cause gone the earlier clipping counts.

    A clipping does not look at the state.
    """
    spoil, error, pieces = BAD[kind]
    dtypes, label = PLACES[place]
    groups = [{"params": [Detached(torch.randn(4, 6, dtype=dtype)) for dtype in group]} for group in dtypes]
    run = ClippedRun(rule, groups, backend)
    run.steps(2)
    run.give()
    run.clip(0.0)  # exact in every dtype
    bad, limit = run.params[-1], run.limit
    data, state = bad.data, dict(run.optimizer.state[bad])
    spoil(run, bad)
    before = snapshot(run.optimizer)
    decisions = run.optimizer.decisions()
    attempts = [run.optimizer.step, lambda: run.optimizer.clip_grad_norm_(7.0), run.optimizer.step]
    for attempt in attempts[:1] if "state" in kind else attempts:
        with raises(error, *(piece.format(label) for piece in pieces)):
            attempt()
        assert_snapshots_equal(snapshot(run.optimizer), before)
        assert run.optimizer.decisions() == decisions
    bad.grad = None
    bad.data = data
    run.optimizer.state[bad] = state
    bad.grad = gradient(bad, "free")
    run.limit = limit
    run.advance()
    run.step()


@EVERY_RULE
@EVERY_NORM
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_error_if_nonfinite(rule: str, bad: float, norm_type: float, backend: str) -> None:
    """As in torch; nothing has moved, and an earlier clipping counts still."""
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.step()
    run.give()
    run.clip(0.05, norm_type, error_if_nonfinite=True)
    before = snapshot(run.optimizer)
    grads = [p.grad for p in run.params]
    broken = [g.clone() for g in grads if g is not None]
    broken[2][0, 0] = bad
    run.give(broken)
    with pytest.raises(RuntimeError):
        torch.nn.utils.get_total_norm(broken, norm_type, error_if_nonfinite=True)
    value = "nan" if math.isnan(bad) else "inf"
    with raises(RuntimeError, f"norm of order {norm_type}", f"is {value}", "error_if_nonfinite=False"):
        run.optimizer.clip_grad_norm_(1.0, norm_type, error_if_nonfinite=True)
    assert_snapshots_equal(snapshot(run.optimizer), before)
    run.give(grads)
    run.advance()
    run.step()


@EVERY_RULE
def test_error_if_nonfinite_before_the_first_step(rule: str, backend: str) -> None:
    run = ClippedRun(rule, parameters(*SHAPES), backend)
    run.give([torch.full_like(p, math.nan) for p in run.params])
    before = [p.detach().clone() for p in run.params]
    with raises(RuntimeError, "cannot be clipped"):
        run.optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    for p, w in zip(run.params, before, strict=True):
        assert_identical(p, w, "weight")
    assert not any(value.any() for state in run.optimizer.state.values() for value in state.values())
    assert not run.optimizer.decisions()
    run.steps(2)


@EVERY_RULE
@pytest.mark.parametrize("limit", [None, (0.5, 2.0), (0.5, math.inf), (0.5, 1.0), (math.inf, 2.0), (0.0, 2.0)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_broken_gradients(rule: str, bad: float, limit: tuple[float, float] | None, backend: str) -> None:
    """As in torch. Not clipped, one spreads to its parameter only; clipped, an infinity has the others clipped to zero
    and a NaN spreads to all. Weights that it spreads to are not projected.
    """
    run = ClippedRun(rule, parameters((6, 10), (300, 128), (2, 40000), (9,), (4, 3, 3, 3)), backend)
    run.step()
    grads = run.gradients()
    for broken, g in enumerate(grads[:3]):
        g.view(-1)[broken * 7] = bad
    run.give(grads)
    if limit is not None:
        run.clip(*limit)
    run.move()
    spreads = limit is not None and (math.isnan(bad) or limit[0] == math.inf)
    for i, p in enumerate(run.params):
        hand = run.hands[p]
        assert run.optimizer.decisions()[p] is hand.decision
        if i < 3 or spreads:
            assert hand.decision is Decision.NONE
        assert p.isfinite().all().item() == (i >= 3 and not spreads)
        options: Any = {"rtol": TOLERANCE[F64], "atol": TOLERANCE[F64], "equal_nan": True}
        torch.testing.assert_close(p.detach(), hand.p, **options)
        for name, moment in hand.moments.items():
            torch.testing.assert_close(run.optimizer.state[p][name], moment, **options)


# Anything.

EXAMPLES = 40
KINDS = ["layer", "channel", "free", "random", "layer", "zero", None]


def make_gradient(p: Tensor, kind: str, size: float) -> Tensor:
    if kind == "zero":
        return torch.zeros_like(p)
    return size * (torch.randn_like(p) if kind == "random" else gradient(p, kind))


DIMS = st.sampled_from([2, 3, 5, 16, 33, 1])
SHAPE = st.lists(DIMS, max_size=4).filter(lambda s: math.prod(s) <= 4096).map(tuple)
PARAM = st.tuples(SHAPE, st.sampled_from([F32, F64]), st.sampled_from(KINDS))
CASE = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 30),
        "groups": st.lists(st.lists(PARAM, min_size=1, max_size=4), min_size=1, max_size=2),
        "limits": st.lists(
            st.none()
            | st.tuples(
                st.floats(-4, 4).map(lambda x: 10.0**x) | st.sampled_from([0.0, math.inf, 1e6]),
                st.sampled_from([*NORM_TYPES, 2.0, 3.0]),
            ),
            min_size=3,
            max_size=3,
        ),
        "size": st.sampled_from([1e-3, 1.0, 1e3]),
        "options": st.fixed_dictionaries(
            {
                "eps": st.sampled_from([1e-8, 1e-2]),
                "delta": st.sampled_from([0.1, 0.6]),
                "nesterov": st.booleans(),
                "projection": st.sampled_from(["auto", "auto", "channel", "layer", "none"]),
            }
        ),
    }
)


@EVERY_RULE
def test_any_clipping_equals_clip_then_step_in_float64(rule: str, backend: str) -> None:
    cls, defaults = RULES[rule]
    count: Counter[Any] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(CASE)
    def compare(case: dict[str, Any]) -> None:
        torch.manual_seed(case["seed"])
        count["cases"] += 1
        drawn = [param for group in case["groups"] for param in group]
        groups = [
            {"params": [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, dtype, _ in group]}
            for group in case["groups"]
        ]
        optimizer = cls(groups, **defaults | case["options"], backend=backend)
        (options, *_), params = optimizer.param_groups, [p for group in groups for p in group["params"]]
        hands = [Hand(rule, p.detach().double()) for p in params]
        for limit in case["limits"]:
            for p, (_, _, kind) in zip(params, drawn, strict=True):
                p.grad = None if kind is None else make_gradient(p, kind, case["size"])
            grads = [p.grad for p in params]
            if limit is not None:
                expected, grads = clip_widely(grads, *limit)
                norm = optimizer.clip_grad_norm_(*limit)
                torch.testing.assert_close(norm, expected, rtol=TOLERANCE[F32], atol=0, check_dtype=False)
                count["clipped" if expected > limit[0] else "within"] += 1
            for p, hand, g in zip(params, hands, grads, strict=True):
                if g is not None:
                    tested = options["projection"] == "auto"
                    if tested and near_threshold(g.double(), hand.p, options["delta"], options["eps"], p.dtype):
                        count["near"] += 1
                        assume(False)
                    hand.step(g, options)
                    count[hand.decision] += 1
            optimizer.step()
            for p, hand in zip(params, hands, strict=True):
                if hand.steps:
                    assert optimizer.decisions()[p] is hand.decision
                    assert_close(p, hand.p, "weight")
                    for name, moment in hand.moments.items():
                        assert_close(optimizer.state[p][name], moment, name)

    compare()
    assert count["cases"] >= EXAMPLES
    assert min(count["clipped"], count["within"], *(count[decision] for decision in Decision)) >= EXAMPLES / 4, count
    assert count["near"] <= count["cases"] / 10, count


# With a GPU.


@CUDA
@EVERY_RULE
@EVERY_NORM
def test_on_the_gpu(rule: str, norm_type: float) -> None:
    """Norm and step are those of the CPU, and the norm stays on the device."""
    cls, options = RULES[rule]
    params = parameters(*SHAPES, *LARGE)
    hands = [Hand(rule, p) for p in params]
    moved = [nn.Parameter(p.detach().cuda()) for p in params]
    optimizer = cls(moved, **options)
    for count in range(3):
        grads = [gradient(hand.p, ("channel", "layer", "free")[(count + i) % 3]) for i, hand in enumerate(hands)]
        for p, g in zip(moved, grads, strict=True):
            p.grad = g.cuda()
        norm, clipped = clip(grads, 0.5, norm_type)
        ours = optimizer.clip_grad_norm_(torch.tensor(0.5, device="cuda") if count == 1 else 0.5, norm_type)
        assert ours.device.type == "cuda"
        torch.testing.assert_close(ours.cpu(), norm)
        optimizer.step()
        for p, hand, g in zip(moved, hands, clipped, strict=True):
            assert g is not None
            hand.step(g, optimizer.param_groups[0])
            assert_close(p.cpu(), hand.p, "weight")
            assert optimizer.decisions()[p] is hand.decision


@CUDA
@EVERY_RULE
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_one_norm_over_two_devices(rule: str, first: str) -> None:
    """It lies on the first gradient's device."""
    cls, options = RULES[rule]
    devices = [first, "cpu" if first == "cuda" else "cuda"]
    params = [nn.Parameter(torch.randn(6, 10, dtype=F64, device=device)) for device in devices]
    hands = [Hand(rule, p.detach().cpu()) for p in params]
    optimizer = cls(params, **options)
    for _ in range(3):
        grads = [gradient(hand.p, "channel") for hand in hands]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.device)
        norm, clipped = clip(grads, 0.5)
        ours = optimizer.clip_grad_norm_(0.5)
        assert ours.device.type == first
        torch.testing.assert_close(ours.cpu(), norm)
        optimizer.step()
        for p, hand, g in zip(params, hands, clipped, strict=True):
            assert g is not None
            hand.step(g, optimizer.param_groups[0])
            assert_close(p.cpu(), hand.p, "weight")
