"""Every AdamP and SGDP under test takes the decision that the case names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fused_adamp
from bench.contestants import CONTESTANTS
from bench.cpu import Run, side_of
from bench.harness import SGD

if TYPE_CHECKING:
    from bench.harness import Side
    from fused_adamp.reference import Decision

LR = 0.1
"""So large that a projection or a decay left out would show."""

PROJECTED = [
    (name, case)
    for name, contestant in CONTESTANTS.items()
    if contestant.optimizer.endswith(("AdamP", "SGDP"))
    for case in contestant.cases
]


@pytest.mark.parametrize(("name", "case"), PROJECTED)
def test_steps_as_the_reference(name: str, case: Decision) -> None:
    """Whose decision in this case is tested in test_workloads.py."""
    contestant = CONTESTANTS[name]
    ours = CONTESTANTS["sgdp" if contestant.family is SGD else "adamp"]
    theirs, expected = (side_of(each, Run("tiny", case, False, name)) for each in (contestant, ours))
    for before, after, reference in zip(expected.params, stepped(theirs), stepped(expected), strict=True):
        torch.testing.assert_close(after, reference)


def stepped(side: Side) -> list[torch.Tensor]:
    ...
