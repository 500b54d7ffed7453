"""Tests of compiled kernels that need no GPU. What cannot run here is skipped, with the reason in pytest's summary."""

from __future__ import annotations

import pytest
from emulator import unavailable


@pytest.fixture(autouse=True)
def _machine() -> None:
    if reason := unavailable():
        pytest.skip(f"{reason}; no compiled kernel was run")
