"""Runs the files emulated_*.py for each GPU backend under each plan, two processes side by side."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import compiler
import emulator
import pytest
from each_plan import PLANS, under_each_plan
from harness import EMULATED

from fused_adamp.backends import triton

FILES = sorted(map(str, Path(__file__).parent.glob("emulated_*.py")))
COMPILERS = {"triton": triton.load, "cuda": compiler.unavailable}
"""By backend, the function that says why its compiler is not here."""


@cache
def sessions(backend: str) -> dict[str, tuple[int, str]]:
    """Per plan, pytest's exit status and output."""
    arguments = "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES
    return under_each_plan(*arguments, interpreted=False, environment={EMULATED: backend})


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_kernels_in_the_emulator(backend: str, plan: str) -> None:
    if reason := emulator.unavailable() or COMPILERS[backend]():
        pytest.skip(f"{reason}; no compiled kernel was run")
    status, output = sessions(backend)[plan]
    print(output)
    assert status == 0, output
    assert " passed" in output, output
    assert " skipped" not in output, output
    assert "emulated: " in output, output
