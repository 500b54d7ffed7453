"""The inputs of the benchmarks are what they are said to be."""

from __future__ import annotations

import math

import pytest

from bench.workloads import WORKLOADS, expected_decision, tensors
from fused_adamp.reference import Decision, decide


@pytest.mark.parametrize("name", WORKLOADS)
def test_shapes_add_up_to_the_published_size(name: str) -> None:
    shapes = list(WORKLOADS[name].shapes())
    assert (len(shapes), sum(map(math.prod, shapes))) == (WORKLOADS[name].tensors, WORKLOADS[name].params)


@pytest.mark.parametrize("case", Decision)
def test_cases_are_decided_as_asked(case: Decision) -> None:
    """On the awkward shapes; cpu.py checks the models after it timed them."""
    for p, g in zip(*tensors("tiny", case), strict=True):
        assert decide(g, p, delta=0.1, eps=1e-8) is expected_decision(p, case), tuple(p.shape)
