"""Tests of compiled kernels without a GPU. Those that cannot run are skipped, with the reason in pytest's summary."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from emulator import unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Harness

MORE_SEEDS = "PTX_SEEDS"
"""Environment variable with the number of seeds of every usual test, 1 by default. Exhaustive ones have three."""
USUAL_SEEDS = range(int(os.environ.get(MORE_SEEDS, "1")))
SEEDS = [*USUAL_SEEDS, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2) if n not in USUAL_SEEDS)]
counts: Counter[str] = Counter()
"""Totals over all tests."""


@pytest.fixture
def machine() -> None:
    if reason := unavailable():
        pytest.skip(f"{reason}; no compiled kernel was run")


@pytest.fixture(params=SEEDS)
def emulated(request: pytest.FixtureRequest, one_thread: None) -> Iterator[Harness]:
    """The emulator in the place of a GPU, under the plan of models.py. Nothing may be found in the test's launches.

    Unless exhaustive tests are asked for, a redo kernel runs only where it has something to do.
    """
    import harness
    from models import PLAN

    from fused_adamp.backends import jobs

    if reason := harness.unavailable():
        pytest.skip(f"{reason}; no compiled kernel was run")
    usual = "not exhaustive" in request.config.getoption("-m")
    seed = zlib.crc32(request.node.nodeid.encode()) + request.param
    machine = harness.Harness(harness.Schedule(seed=seed, idle_redo=not usual))
    with pytest.MonkeyPatch.context() as patch, machine.installed():
        patch.setenv(jobs.PLAN, PLAN)
        yield machine
    counts.update(tests=1, launches=machine.launches, instructions=machine.instructions)
    counts["harmless findings"] += len(machine.harmless)
    assert not (found := machine.take()), "\n".join(found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if counts:
        said = ", ".join(f"{number:,} {what}" for what, number in counts.items())
        terminalreporter.write_line(f"emulated: {said} (of warps)")
