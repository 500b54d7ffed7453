"""Every AdamP and SGDP in float32, ours and others', takes the decision that the case names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fused_adamp
from bench.contestants import CONTESTANTS
from bench.cpu import Run, side_of
from bench.harness import ADAM, SGD, Contestant, Dtypes, making

if TYPE_CHECKING:
    from fused_adamp.reference import Decision

REFERENCES = {
    ADAM: Contestant("AdamP", "reference", ADAM, making(fused_adamp.AdamP, backend="reference")),
    SGD: Contestant("SGDP", "reference", SGD, making(fused_adamp.SGDP, momentum=0.9, backend="reference")),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.name.lower()}")
        for name, contestant in CONTESTANTS.items()
        if contestant.optimizer.endswith(("AdamP", "SGDP")) and contestant.dtypes == Dtypes()
        for case in contestant.cases
    ],
)
def test_steps_as_the_reference(name: str, case: Decision) -> None:
    """A missing projection or a decay that is not scaled down would show: SGDP's first step has only the latter."""
    contestant, run = CONTESTANTS[name], Run("tiny", case, False, name)
    theirs, reference = side_of(contestant, run), side_of(REFERENCES[contestant.family], run)
    for side in (theirs, reference):
        for group in side.optimizer.param_groups:
            group.update(lr=0.1, eps=1e-16)  # pytorch_optimizer's bias correction divides eps too
        side.step(clip=False)
    reference.check_decisions(case)
    for p, expected in zip(theirs.params, reference.params, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
