"""Random parameter lists, layouts, gradients and options: every backend equals the reference run in float64."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor, nn
from trajectory import RULES, Hand, gradient, near_threshold

from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
EXAMPLES = 60
GRADIENTS = ["layer", "channel", "free", "layer", "channel", "random", "zero", None]


class Layout(NamedTuple):
    """The order of dims in memory, the gap factor of each, and the offset: strides of every kind."""

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    offset: int

    def hold(self, x: Tensor) -> Tensor:
        """A copy of ``x`` in this layout."""
        strides, stride = [0] * x.ndim, 1
        for dim in reversed(self.order):
            stride *= self.gaps[dim]
            strides[dim] = stride
            stride *= max(x.shape[dim], 1)
        buffer = torch.full((self.offset + stride + 1,), math.nan, dtype=x.dtype)
        return buffer.as_strided(x.shape, strides, self.offset).copy_(x)


class Param(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    grad_layouts: list[Layout]
    kinds: list[str | None]  # one of GRADIENTS per step, None for no gradient


class Case(NamedTuple):
    seed: int
    groups: list[list[Param]]
    options: list[dict[str, Any]]


def layouts(ndim: int) -> SearchStrategy[Layout]:
    plain = st.just(Layout(tuple(range(ndim)), (1,) * ndim, 0))
    gaps = st.tuples(*[st.sampled_from([1, 1, 2])] * ndim)
    return plain | st.builds(Layout, st.permutations(range(ndim)).map(tuple), gaps, st.integers(0, 3))


@st.composite
def params(draw: DrawFn) -> Param:
    ndim = draw(st.sampled_from([2, 3, 4, 2, 3, 2, 1, 0]))
    dims = st.sampled_from([2, 3, 4, 5, 7, 16, 33, 1, 0])
    shape = tuple(draw(st.lists(dims, min_size=ndim, max_size=ndim).filter(lambda s: math.prod(s) <= 4096)))
    grad_layouts = draw(st.lists(layouts(len(shape)), min_size=STEPS, max_size=STEPS))
    kinds = draw(st.lists(st.sampled_from(GRADIENTS), min_size=STEPS, max_size=STEPS))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return Param(shape, dtype, draw(layouts(len(shape))), grad_layouts, kinds)


def options(rule: str) -> SearchStrategy[dict[str, Any]]:
    own = {
        "AdamP": {"betas": st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.5, 0.999]))},
        "SGDP": {
            "momentum": st.sampled_from([0, 0.5, 0.9]),
            "dampening": st.sampled_from([0, 0.3, 1]),
            "project_buffer": st.booleans(),
        },
    }[rule]
    return st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.0, 1e-3, 0.05]),
            "eps": st.sampled_from([1e-8, 1e-2]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "delta": st.sampled_from([0.1, 0.6, 0.1, 0.6, 5.0, 0.0]),
            "wd_ratio": st.sampled_from([0.0, 0.1, 1.0]),
            "nesterov": st.booleans(),
            "maximize": st.booleans(),
            **own,
        }
    )


def cases(rule: str) -> SearchStrategy[Case]:
    groups = st.lists(st.lists(params(), min_size=1, max_size=5), min_size=1, max_size=2)
    return st.builds(Case, st.integers(0, 1 << 30), groups, st.lists(options(rule), min_size=2, max_size=2))


def make_gradient(p: Tensor, kind: str) -> Tensor:
    if kind == "zero":
        return torch.zeros_like(p)
    return torch.randn_like(p) if kind == "random" else gradient(p, kind)


@pytest.mark.parametrize("rule", list(RULES))
def test_equals_the_reference_in_float64(rule: str, backend: str) -> None:
    cls, _ = RULES[rule]
    count: Counter[str | Decision] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(cases(rule))
    def compare(case: Case) -> None:
        torch.manual_seed(case.seed)
        count["cases"] += 1
        groups = [
            {"params": [nn.Parameter(x.layout.hold(torch.randn(x.shape, dtype=x.dtype))) for x in group], **chosen}
            for group, chosen in zip(case.groups, case.options, strict=False)
        ]
        optimizer = cls(groups, backend=backend)
        hands = {p: Hand(rule, p.detach().double()) for group in groups for p in group["params"]}
        for t in range(STEPS):
            for drawn, group in zip(case.groups, optimizer.param_groups, strict=True):
                for x, p in zip(drawn, group["params"], strict=True):
                    kind = x.kinds[t]
                    p.grad = None if kind is None else x.grad_layouts[t].hold(make_gradient(p, kind))
                    if p.grad is not None:
                        hand = hands[p]
                        if near_threshold(p.grad.double(), hand.p, group["delta"], group["eps"], p.dtype):
                            count["near"] += 1
                            assume(False)
                        hand.step(p.grad, group)
                        count[hand.decision] += 1
            optimizer.step()
            for p, hand in hands.items():
                if not hand.steps:
                    assert not optimizer.state.get(p)
                    continue
                assert optimizer.decisions()[p] is hand.decision
                assert_close(p, hand.p, "weight")
                state = optimizer.state[p]
                assert set(state) - {"step"} == set(hand.moments)
                for name, moment in hand.moments.items():
                    assert state[name].dtype == p.dtype
                    assert_close(state[name], moment, name)
                if rule == "AdamP":
                    assert state["step"].item() == hand.steps

    compare()
    # The cases reach every branch often, and hardly any is given up.
    assert count["cases"] >= EXAMPLES
    assert all(count[decision] >= EXAMPLES / 2 for decision in Decision), count
    assert count["near"] <= count["cases"] / 20, count
