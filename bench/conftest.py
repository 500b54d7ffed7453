"""Command-line options of bench/cpu.py, and the machine it ran on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.harness import environment
from bench.workloads import WORKLOADS

if TYPE_CHECKING:
    import pytest

_SMOKE_ROUNDS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--workload",
        action="append",
        choices=list(WORKLOADS),
        help="model whose parameters to step; give it again for more (default: resnet50, vit_b16, gpt2 and small)",
    )
    group.addoption("--rounds", type=int, help="timed rounds per test, 2 or more (default: as many as fit its time)")
    group.addoption("--smoke", action="store_true", help=f"workload tiny, {_SMOKE_ROUNDS} rounds: does it all run?")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.smoke:
        option.workload, option.rounds = option.workload or ["tiny"], option.rounds or _SMOKE_ROUNDS
    option.workload = option.workload or ["resnet50", "vit_b16", "gpt2", "small"]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["environment"] = environment(machine_info["cpu"])
