"""What the GPU tests need on a machine where nothing was installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import fused_adamp

if TYPE_CHECKING:
    import pytest

# Only an installation puts kernels/ inside the package (pyproject.toml, package-dir).
if find_spec("fused_adamp.kernels") is None:
    fused_adamp.__path__.append(str(Path(__file__).parents[2]))


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist's own, which bench/gpu.py uses where it is installed; known to pytest without it too.
    config.addinivalue_line("markers", "xdist_group(name): tests that run in one process, one after the other")
