"""``python -m fused_adamp doctor`` and ``verify``, and the example."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_adamp.__main__ as commands
from fused_adamp.backends import BACKENDS, triton
from fused_adamp.verify import Outcome, cases

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_doctor_names_versions_devices_and_every_backend() -> None:
    run = _run("-m", "fused_adamp", "doctor")
    assert run.returncode == 0, run.stderr
    for piece in (torch.__version__, "threads", "\ncpu (", *(f"\n  {backend.name} " for backend in BACKENDS)):
        assert piece in run.stdout
    assert run.stdout.count("runs by default") == 1 + torch.cuda.device_count()


@pytest.mark.skipif(triton.load() is not None, reason=str(triton.load()))
@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        (("3.6.0", "2.3.5"), None),
        (("3.6.0", "2.4.6"), "the interpreter of Triton 3.6.0 fails with numpy 2.4.6; pip install 'numpy<2.4'"),
        (("3.7.0", "2.4.6"), None),
    ],
)
def test_doctor_names_a_numpy_that_the_interpreter_fails_with(
    versions: tuple[str, str],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module, version in zip(("triton", "numpy"), versions, strict=True):
        monkeypatch.setattr(importlib.import_module(module), "__version__", version)
    assert commands.doctor() == 0
    verdict = reason or "runs with backend='triton'"
    assert f"  {'triton':<10} {verdict}\n" in capsys.readouterr().out


@pytest.mark.skipif(triton.load() is not None, reason=str(triton.load()))
def test_doctor_says_that_the_interpreter_needs_numpy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert commands.doctor() == 0
    assert "needs numpy, which is missing" in capsys.readouterr().out


def test_verify_passes_on_a_few_cases(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "cases", lambda *tile: cases(*tile)[::50])
    assert commands.verify() == 0
    assert "0 failures" in capsys.readouterr().out


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 7.0])
def test_verify_fails_on_a_wrong_number(
    error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "cases", lambda *tile: cases(*tile)[:1])
    monkeypatch.setattr(commands, "check", lambda *_: Outcome({"p": error}, {"p": 6.0}, []))
    assert commands.verify() == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_command_line_without_a_command_says_what_there_is() -> None:
    run = _run("-m", "fused_adamp")
    assert run.returncode == 2
    assert "usage: python -m fused_adamp" in run.stderr


def test_the_example_trains_every_optimizer_and_writes_what_it_says(tmp_path: Path) -> None:
    run = _run("examples/digits.py", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    rows = {row["optimizer"]: row for row in json.loads((tmp_path / "digits.json").read_text())["rows"]}
    assert list(rows) == ["SGD", "SGDP", "AdamW", "AdamP", "clovaai AdamP", "AdamP bf16 + remainder", "AdamP bf16"]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    # The same trajectory up to rounding; and the convolutions, all scale-invariant, are projected in most steps.
    assert rows["AdamP"]["norm_growth"] == pytest.approx(rows["clovaai AdamP"]["norm_growth"], rel=1e-3)
    assert rows["AdamP"]["norm_growth"] < rows["AdamW"]["norm_growth"]
    # The network computes in bfloat16, but the weights that are trained are float32's.
    assert rows["AdamP bf16 + remainder"]["norm_growth"] == pytest.approx(rows["AdamP"]["norm_growth"], rel=0.02)
    channels = [views["channel"] for layer, views in rows["AdamP"]["projected"].items() if layer.endswith("conv")]
    assert len(channels) == 8
    assert min(channels) > 0.9
