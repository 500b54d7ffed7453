"""An optimizer's run beside the same trajectory computed by calling adamp_ref or sgdp_ref by hand."""

from __future__ import annotations

import copy
import inspect
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tolerances import TOLERANCE, assert_close, assert_identical
from torch import Tensor, nn

from fused_adamp import SGDP, AdamP, adamp_ref, sgdp_ref
from fused_adamp.reference import Decision, cosine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

RULES: dict[str, tuple[type[AdamP | SGDP], dict[str, Any]]] = {
    "AdamP": (AdamP, {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1, "wd_ratio": 0.3}),
    "SGDP": (SGDP, {"lr": 0.05, "momentum": 0.8, "dampening": 0.25, "weight_decay": 0.1, "wd_ratio": 0.3}),
}
"""Class and test hyperparameters by name: large enough that a factor that is missing anywhere shows."""

MOMENTS = {"AdamP": ("exp_avg", "exp_avg_sq"), "SGDP": ("momentum_buffer",)}

KINDS = ("channel", "layer", "free")
"""Gradients built for a decision: rows orthogonal to the weight's; only the whole orthogonal; neither."""


def gradient(p: Tensor, kind: str) -> Tensor:
    """A random gradient that is far from the threshold of the cosine test, on the side that ``kind`` is named after.

    Where the shape allows it: a single row has no layer decision, and vectors are never projected.
    """
    p = p.detach().contiguous()
    z = torch.randn_like(p)
    if p.ndim < 2 or p.numel() == 0:
        return z
    rows, weight = z.flatten(1), p.flatten(1)
    size = rows.norm(dim=1, keepdim=True) / weight.norm(dim=1, keepdim=True).clamp(min=1e-30)
    rows = rows - weight * (rows * weight).sum(dim=1, keepdim=True) / weight.square().sum(dim=1, keepdim=True)
    if kind == "layer" and len(rows) > 1:  # add radial parts to pairs of rows so that they cancel in the layer's sum
        sign = torch.ones(len(rows), 1, dtype=p.dtype)
        sign[1::2] = -1
        sign[len(rows) // 2 * 2 :] = 0
        radial = sign / weight.square().sum(dim=1, keepdim=True)
        rows = rows + weight * radial * size.mean() / radial.abs().mean()
    elif kind == "free":
        rows = rows + weight * size / 2
    return rows.reshape(p.shape)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


SHAPES = ((4, 3, 3, 3), (6, 10), (5, 7), (9,), ())


def near_threshold(g: Tensor, p: Tensor, delta: float, eps: float, dtype: torch.dtype) -> bool:
    """Whether rounding in ``dtype`` may turn the decision: a cosine that it hangs on is that close to its threshold.

    At delta=0 nothing can: no cosine is below zero.
    """
    if p.ndim < 2 or p.numel() == 0 or not delta:
        return False
    for x, y in ((g.flatten(1), p.flatten(1)), (g.reshape(1, -1), p.reshape(1, -1))):
        distance = cosine(x, y, eps).max() - delta / math.sqrt(x.size(1))
        # The weight is off by up to its tolerance, the sums by a few eps more.
        if distance.abs() <= 2 * TOLERANCE[dtype]:
            return True
        if distance < 0:
            return False
    return False


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype is another for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Hand:
    """One parameter's weight and state, stepped by calling the reference by hand."""

    def __init__(self, rule: str, p: Tensor) -> None:
        self.rule = rule
        self.p = p.detach().clone(memory_format=torch.contiguous_format)
        self.steps = 0
        self.moments: dict[str, Tensor] = {}
        self.stored: dict[str, torch.dtype] = {}
        self.decision = Decision.NONE

    def step(self, g: Tensor, group: dict[str, Any]) -> None:
        """Advance by one step with the hyperparameters of ``group``, in the weight's precision."""
        reference = adamp_ref if self.rule == "AdamP" else sgdp_ref
        names = [n for n, a in inspect.signature(reference).parameters.items() if a.kind is a.KEYWORD_ONLY]
        options = {name: plain(group[name]) for name in names}
        stateless = self.rule == "SGDP" and not options["momentum"]
        if not self.moments and not stateless:
            self.moments = {name: torch.zeros_like(self.p) for name in MOMENTS[self.rule]}
        self.steps += 1
        moments = [None] if stateless else list(self.moments.values())
        count = [self.steps] if self.rule == "AdamP" else []
        self.decision = reference(self.p, g.detach().to(self.p.dtype), *moments, *count, **options)
        for name, dtype in self.stored.items():
            self.moments[name] = self.moments[name].to(dtype).to(self.p.dtype)

    def adopt(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Go on from the optimizer's values, say after a change of the weight's dtype: the state keeps its own."""
        self.p = p.detach().clone(memory_format=torch.contiguous_format)
        self.stored = {name: state[name].dtype for name in self.moments}
        self.moments = {name: state[name].to(p.dtype, copy=True) for name in self.moments}


class Run:
    """An optimizer and its :class:`Hand` copies; every step of it compares weights, state, counts and decisions."""

    def __init__(self, rule: str, params: Iterable[Any], backend: str, **options: Any) -> None:
        cls, defaults = RULES[rule]
        self.rule = rule
        self.optimizer = cls(params, **{**defaults, **options}, backend=backend)
        self.hands: dict[Tensor, Hand] = {}
        self.count = 0
        self.seen: set[Decision] = set()
        self.meet()

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def meet(self) -> None:
        for p in self.params:
            if p not in self.hands:
                self.hands[p] = Hand(self.rule, p)

    def gradients(self) -> list[Tensor]:
        """Random gradients; every parameter of two or more dimensions takes all three decisions in turn."""
        return [gradient(p, KINDS[(i + self.count) % 3]) for i, p in enumerate(self.params)]

    def step(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """Hand these gradients to the parameters (random ones by default) and take the step."""
        for p, g in zip(self.params, self.gradients() if grads is None else grads, strict=True):
            p.grad = g
        self.advance()

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.step()

    def advance(self) -> None:
        """Take one step on the gradients that are there, in both ways, and compare everything."""
        self.meet()
        grads = [p.grad for p in self.params]
        before = [None if g is None else g.detach().clone() for g in grads]
        self.optimizer.step()
        self.count += 1
        for p, g, old in zip(self.params, grads, before, strict=True):
            assert p.grad is g, "the step replaced a gradient"
            if g is not None and old is not None:
                assert_identical(g, old, "gradient")
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.hands[p].step(p.grad, group)
        self.check()

    def check(self) -> None:
        """The optimizer's weights, state, step counts and decisions are those computed by hand."""
        decisions = self.optimizer.decisions()
        for i, p in enumerate(self.params):
            hand, state = self.hands[p], self.optimizer.state.get(p, {})
            assert_close(p, hand.p, f"weight {i}", dtype=hand.p.dtype)
            assert p.dtype == hand.p.dtype
            expected = {*hand.moments, "step"} if hand.moments and self.rule == "AdamP" else {*hand.moments}
            assert set(state) == expected, f"state keys of parameter {i}"
            for name, moment in hand.moments.items():
                assert state[name].dtype == hand.stored.get(name, moment.dtype)
                assert_close(state[name], moment, f"{name} of parameter {i}", dtype=moment.dtype)
            if "step" in state:
                assert state["step"].item() == hand.steps, f"step count of parameter {i}"
                assert state["step"].shape == ()
                assert state["step"].dtype == torch.float32
            if hand.steps:
                assert decisions[p] is hand.decision, f"decision on parameter {i}"
                self.seen.add(hand.decision)

    def check_all_seen(self) -> None:
        """A run that never took one of the branches would prove nothing about it."""
        assert self.seen == set(Decision)


def plain(value: Any) -> Any:
    """A hyperparameter as numbers: tensors of one element read out."""
    if isinstance(value, Tensor):
        return value.item()
    return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else value


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of everything a step may move."""
    return {
        "weights": [p.detach().clone() for group in optimizer.param_groups for p in group["params"]],
        "state": copy.deepcopy(optimizer.state_dict()),
    }


def assert_snapshots_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal weights, state and groups: the same keys, values and bits."""
    for i, (a, b) in enumerate(zip(actual["weights"], expected["weights"], strict=True)):
        assert_identical(a, b, f"weight {i}")
    a, b = actual["state"], expected["state"]
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for i, entries in a["state"].items():
        assert entries.keys() == b["state"][i].keys()
        for name, value in entries.items():
            assert_identical(value, b["state"][i][name], f"{name} of parameter {i}")


def assert_same_outcome(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Bit for bit the same weights, state and groups."""
    assert_snapshots_equal(snapshot(a), snapshot(b))
