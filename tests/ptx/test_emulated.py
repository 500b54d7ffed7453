"""Runs the files emulated_*.py under each plan, side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest

from fused_adamp.backends import triton

REASON = emulator.unavailable() or triton.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"{REASON}; no compiled kernel was run")

FILES = sorted(map(str, Path(__file__).parent.glob("emulated_*.py")))
PLANS = ["one_pass", "split"]


@pytest.fixture(scope="module")
def sessions() -> dict[str, tuple[int, str]]:
    """Per plan, pytest's exit status and output. Another process, since this one may interpret the kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    runs = {
        plan: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES],
            env=environment | {triton.PLAN: plan},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for plan in PLANS
    }
    outputs = {plan: run.communicate()[0] for plan, run in runs.items()}
    return {plan: (run.returncode, outputs[plan]) for plan, run in runs.items()}


@pytest.mark.parametrize("plan", PLANS)
def test_compiled_kernels_in_the_emulator(plan: str, sessions: dict[str, tuple[int, str]]) -> None:
    status, output = sessions[plan]
    print(output)
    assert status == 0, output
    assert " passed" in output, output
    assert " skipped" not in output, output
    assert "emulated: " in output, output
