"""Runs the files emulated_*.py under each plan, side by side."""

from __future__ import annotations

from pathlib import Path

import emulator
import pytest
from each_plan import PLANS, under_each_plan

from fused_adamp.backends import triton

REASON = emulator.unavailable() or triton.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"{REASON}; no compiled kernel was run")

FILES = sorted(map(str, Path(__file__).parent.glob("emulated_*.py")))


@pytest.fixture(scope="module")
def sessions() -> dict[str, tuple[int, str]]:
    """Per plan, pytest's exit status and output."""
    return under_each_plan("-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, interpreted=False)


@pytest.mark.parametrize("plan", PLANS)
def test_compiled_kernels_in_the_emulator(plan: str, sessions: dict[str, tuple[int, str]]) -> None:
    status, output = sessions[plan]
    print(output)
    assert status == 0, output
    assert " passed" in output, output
    assert " skipped" not in output, output
    assert "emulated: " in output, output
