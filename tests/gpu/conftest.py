"""Set-up of the GPU tests for a machine where the package is not installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uninstalled  # noqa: F401

if TYPE_CHECKING:
    import pytest


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist's own, which bench/gpu.py uses where it is installed; known to pytest without it too.
    config.addinivalue_line("markers", "xdist_group(name): tests that run in one process, one after the other")
