from __future__ import annotations

import pytest
import torch

from fused_adamp.backends import available

FUSED = [backend.name for backend in available(torch.device("cpu")) if backend.name != "reference"]


@pytest.fixture(params=[*FUSED, pytest.param("reference", marks=pytest.mark.exhaustive)])
def backend(request: pytest.FixtureRequest) -> str:
    """The fused backends. These tests compare with the reference, which would test little but itself."""
    return str(request.param)
