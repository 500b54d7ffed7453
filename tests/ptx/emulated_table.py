"""verify's table of cases, for tiles of the Triton backend's size, by compiled kernels. See emulated_steps.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from covering import covering
from harness import BACKEND
from models import PLAN, TILE, exhaustive
from test_backends import factors

from fused_adamp.reference import Decision
from fused_adamp.verify import Case, cases, check, shapes

USUAL = {
    "one_pass": {"float32 AdamP", "float32 SGDP", "float32 AdamP flat", "bfloat16 AdamP", "bfloat16 AdamP remainder"},
    "split": {"float32 AdamP", "float32 SGDP", "float32 AdamP transposed", "bfloat16 AdamP stochastic"},
}
"""By plan, kinds of cases that run without being asked for: each needs kernels of its own. See :func:`kind`."""


def kind(case: Case) -> str:
    """The properties of the case that decide which kernels it needs, as words."""
    shape = shapes(TILE)[case.shape]
    empty = math.prod(shape) == 0
    whole = len(shape) < 2 or empty or math.prod(shape[1:]) % 8 == 0
    lies = case.layout if case.layout != "contiguous" else "" if whole else "flat"
    parts = [str(case.dtype).removeprefix("torch."), case.optimizer, lies]
    parts += [str(case.options[name]) for name in ("state_dtype", "rounding", "channel_dim") if name in case.options]
    if case.gradient_dtype is not None and case.gradient_dtype != case.dtype:
        parts.append(f"gradient {case.gradient_dtype}")
    if case.optimizer == "SGDP" and not case.options.get("momentum"):
        parts.append("without buffer")
    return " ".join(filter(None, parts))


def usual_cases() -> list[Case]:
    """A covering array of the cases of usual kinds: every pair of properties occurs in one of them."""
    found = [case for case in cases(TILE) if kind(case) in USUAL[PLAN]]
    return [found[i] for i in covering([(kind(case), *factors(case)) for case in found])]


def table() -> list[Any]:
    usual = {*usual_cases()}
    return [pytest.param(case, marks=() if case in usual else exhaustive, id=str(case)) for case in cases(TILE)]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("emulated", [0], indirect=True)  # as many seeds as cases
@pytest.mark.parametrize("case", table())
def test_a_case_equals_the_reference(case: Case) -> None:
    outcome = check(case, BACKEND, steps=2)
    assert outcome.passed(), outcome


def test_the_usual_cases_meet_every_way_through_the_kernels() -> None:
    usual = usual_cases()
    assert {kind(case) for case in usual} == USUAL[PLAN]
    for name in USUAL[PLAN]:
        assert {case.decision for case in usual if kind(case) == name} == set(Decision), name
    whole = {name for name, shape in shapes(TILE).items() if len(shape) < 2 or math.prod(shape[1:]) % 8 == 0}
    assert {case.shape for case in usual if case.dtype == torch.float32} >= whole
    plain = [case.options for case in cases(TILE) if kind(case) == "float32 AdamP"]
    assert {str(case.options) for case in usual} >= set(map(str, plain))
