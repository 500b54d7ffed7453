"""The commands, where the emulator stands in for a GPU. See emulated_steps.py."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from harness import BACKEND

from fused_adamp import __main__
from fused_adamp.backends import BACKENDS
from fused_adamp.commands import verify

if TYPE_CHECKING:
    from harness import Harness


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fused_adamp", *arguments])
    return int(__main__.main())


@pytest.mark.parametrize("emulated", [0], indirect=True)
def test_doctor_lists_the_backend(
    emulated: Harness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor", "--json") == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["backends"][BACKEND] == {"unavailable": None}
    assert run(monkeypatch, "doctor") == 0
    assert f"  {BACKEND:<10} runs with backend={BACKEND!r}" in capsys.readouterr().out


@pytest.mark.parametrize("emulated", [0], indirect=True)
def test_verify_checks_the_backend(
    emulated: Harness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (backend,) = (b for b in BACKENDS if b.name == BACKEND)
    monkeypatch.setattr(verify, "available", lambda device: [backend])
    monkeypatch.setattr(verify, "_QUICK", 0.5)
    assert run(monkeypatch, "verify") == 0
    output = capsys.readouterr().out
    assert BACKEND in output
    assert "FAILED" not in output
    assert emulated.launches > 3
