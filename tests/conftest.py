from __future__ import annotations

import os
from typing import TYPE_CHECKING

import no_default_device
import pytest
import torch
from covering import leave_to_exhaustive
from hypothesis import settings

from fused_adamp.backends import BACKENDS, available

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")
pytest_plugins = ["pytester"]  # test_covering.py runs tests of its own

settings.register_profile("long", max_examples=2000, print_blob=True)
"""A search of test_state_machine.py that is twenty times as long, and a new one each time."""
if os.environ.get(no_default_device.ENVIRONMENT) == "none":
    no_default_device.install()


@pytest.fixture(params=[backend.name for backend in available(CPU)])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of every backend that runs on the CPU here."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of small tensors, where torch's threads only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_to_exhaustive(items)


def pytest_report_header() -> list[str]:
    """A backend that no test reaches is named, with the reason."""
    lines = []
    for candidate in BACKENDS:
        reason = candidate.unavailable(CPU)
        lines.append(f"fused_adamp backend {candidate.name}: {'tested' if reason is None else f'NOT TESTED: {reason}'}")
    return lines
