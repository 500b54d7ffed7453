"""``python -m fused_adamp doctor``, ``verify`` and ``bench``, and the example."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_adamp
from fused_adamp import commands as shared
from fused_adamp.__main__ import main
from fused_adamp.backends import BACKENDS, ENVIRONMENT, available, triton
from fused_adamp.commands.doctor import doctor
from fused_adamp.reference import Decision
from fused_adamp.verify import Outcome, cases

ROOT = Path(__file__).parents[2]
benching = importlib.import_module("fused_adamp.commands.bench")
verifying = importlib.import_module("fused_adamp.commands.verify")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


MODELS = """
from torch import nn

def model():
    return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20, bias=False))

def parameters():
    return list(model().parameters())

def nothing():
    return nn.ReLU()

def fails():
    raise KeyError("no weights\\nhere")

def interrupted():
    raise KeyboardInterrupt
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, by a name that no other test has imported."""
    name = f"user_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def line_of(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one line on stderr of a command that cannot be done."""
    try:
        found = main(arguments)
    except SystemExit as exit_:
        found = int(str(exit_.code))
    assert found == status
    text = capsys.readouterr().err.strip()
    assert "\n" not in text
    return text


def test_doctor_names_versions_devices_and_every_backend() -> None:
    run = _run("-m", "fused_adamp", "doctor")
    assert run.returncode == 0, run.stderr
    for piece in (torch.__version__, "threads", "\ncpu (", *(f"\n  {backend.name} " for backend in BACKENDS)):
        assert piece in run.stdout
    assert run.stdout.count("runs by default") == 1 + torch.cuda.device_count()


def test_doctor_in_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())
    cpu, *gpus = found["devices"]
    assert len(gpus) == torch.cuda.device_count()
    assert [*cpu["backends"]] == [backend.name for backend in BACKENDS]
    assert cpu["backends"]["reference"] == {"unavailable": None}
    assert cpu["backends"][cpu["default"]] == {"unavailable": None}
    assert cpu["problem"] is None


def test_doctor_says_that_a_forced_backend_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    chosen = next(backend for backend in BACKENDS if backend.name == "cpu")
    monkeypatch.setattr(type(chosen), "unavailable", lambda self, device: "it is out today")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "  backend='cpu' cannot run on device 'cpu': cpu: it is out today\n" in out
    assert "it is 'cpu' now" in out
    assert "runs by default" not in out


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
    assert doctor() == 0
    verdict = reason or "runs with backend='triton'"
    assert f"  {'triton':<10} {verdict}\n" in capsys.readouterr().out


@pytest.mark.skipif(triton.load() is not None, reason=str(triton.load()))
def test_doctor_says_that_the_interpreter_needs_numpy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert doctor() == 0
    assert "needs numpy, which is missing" in capsys.readouterr().out


def few(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(verifying, "cases", lambda *tile: cases(*tile)[::step])


@pytest.mark.parametrize("extent", ["--quick", "--full"])
def test_verify_passes_on_a_few_cases(
    extent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch, 150)
    assert main(["verify", extent]) == 0
    out = capsys.readouterr().out
    total = sum(len(cases()[::150]) for _ in available(torch.device("cpu"))) * (1 + torch.cuda.device_count())
    assert ("cases take about" in out) == (extent == "--full")
    assert "passed: 0 failures in" in out
    assert f"of {total} cases" in out
    for backend in available(torch.device("cpu")):
        assert f"cpu      {backend.name:<10} float32 " in out
    assert re.search(r"\d\.\d\d +\d+\.\d\d  (p|exp_avg|exp_avg_sq|momentum_buffer) +(AdamP|SGDP)\(", out)


def test_verify_is_quick_unless_all_cases_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clock that says ten seconds a case: quick ends after a case of each dtype, all of it is announced."""
    few(monkeypatch, 100)
    now = itertools.count(0, 10)
    monkeypatch.setattr(verifying, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(verifying, "check", lambda *_: Outcome({"p": 1.0}, {"p": 6.0}, []))
    assert main(["verify"]) == 0
    out = capsys.readouterr().out
    count = int(re.search(r"in (\d+) of (\d+) cases", out)[1])  # type: ignore[index]
    dtypes = {case.dtype for case in cases()[::100]}
    assert count == len(dtypes) * len(available(torch.device("cpu"))) * (1 + torch.cuda.device_count())
    for backend, dtype in itertools.product(available(torch.device("cpu")), dtypes):
        assert f"cpu      {backend.name:<10} {str(dtype).removeprefix('torch.')} " in out
    assert "; --full checks all of them in about " in out
    assert main(["verify", "--full"]) == 0
    count, total = re.search(r"in (\d+) of (\d+) cases", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert count == total


def test_verify_checks_every_dtype_early() -> None:
    table = cases()
    order = verifying.spread(table)
    assert sorted(map(str, order)) == sorted(map(str, table))
    start = order[:40]
    assert {case.dtype for case in start} == {case.dtype for case in table}
    assert {case.optimizer for case in start} == {"AdamP", "SGDP"}
    assert len({case.shape for case in start}) > 8


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 7.0])
def test_verify_fails_on_a_wrong_number(
    error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch, 10000)
    monkeypatch.setattr(verifying, "check", lambda *_: Outcome({"q": 5.0, "p": error}, {"q": 6.0, "p": 6.0}, []))
    assert main(["verify"]) == 1
    out = capsys.readouterr().out
    assert f"FAILED cpu cpu {cases()[0]}: p is off by {error:.2f}, allowed 6.00\n" in out
    assert f"{error:7.2f}    6.00  p               {cases()[0]}\n" in out
    assert "FAILED: " in out


def test_verify_fails_on_a_wrong_decision_and_on_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch, 10000)
    decisions = [(Decision.NONE, Decision.NONE), (Decision.LAYER, Decision.NONE)]
    monkeypatch.setattr(verifying, "check", lambda *_: Outcome({"p": 1.0}, {"p": 6.0}, decisions))
    assert main(["verify"]) == 1
    assert ": step 2 decided layer, the reference none\n" in capsys.readouterr().out

    def fail(*_: Any) -> Outcome:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(verifying, "check", fail)
    assert main(["verify"]) == 1
    assert f"FAILED cpu cpu {cases()[0]}: RuntimeError: no such kernel\n" in capsys.readouterr().out


def test_progress_is_written_while_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few(monkeypatch, 200)
    monkeypatch.setattr(shared.Progress, "EVERY", 0.0)
    assert main(["verify"]) == 0
    assert re.search(r"^cpu cpu: 2 of \d+ cases, 0 failures, \d+ s left$", capsys.readouterr().err, re.MULTILINE)


# bench.


@pytest.mark.parametrize(("optimizer", "theirs"), [("adamp", "AdamW"), ("sgdp", "SGD")])
@pytest.mark.parametrize("function", ["model", "parameters"])
def test_bench_prints_a_table_and_a_chart(
    optimizer: str, theirs: str, function: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = function == "model"
    settings = ["--set", "max_grad_norm=1.0"] if clips else []
    name = "AdamP" if optimizer == "adamp" else "SGDP"
    assert main(["bench", f"{model}:{function}", "--optimizer", optimizer, "--rounds", "2", *settings]) == 0
    out = capsys.readouterr().out
    assert "3 tensors, 0.00 million parameters on cpu" in out
    assert ("'max_grad_norm': 1.0" in out) == clips
    for gradients in ("random", "orthogonal"):
        assert re.search(rf"^torch.optim.{theirs}\(fused=True\)  {gradients} +(\d+\.\d+[ *]+){{3}} *\d", out, re.M)
        line = re.search(rf"^fused_adamp.{name} +{gradients} .*$", out, re.M)
        assert line is not None
        assert line[0].endswith("2 of 3") or gradients == "random"
        assert re.search(rf"^fused_adamp.{name}, {gradients} +█+ \d", out, re.M)
    assert re.search(r"^copy +█+ \d", out, re.M)


def test_bytes_of_a_step() -> None:
    """28 a parameter with two moments of float32, 20 with one; 4 more for the norm."""
    params = [torch.nn.Parameter(torch.ones(4, 5)), torch.nn.Parameter(torch.ones(3))]
    for make, options, count in (
        (fused_adamp.AdamP, {}, 28),
        (torch.optim.AdamW, {"fused": True}, 28),
        (fused_adamp.SGDP, {"momentum": 0.9}, 20),
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}, 20),
        (fused_adamp.AdamP, {"state_dtype": torch.bfloat16}, 20),
    ):
        side = benching.Side("", make, params, {"lr": 0.1, **options})
        assert side.nbytes(clips=False) == 23 * count
        assert side.nbytes(clips=True) == 23 * (count + 4)


def test_both_sides_clip(model: str) -> None:
    params = [torch.nn.Parameter(torch.ones(4, 5))]
    side = benching.Side("", torch.optim.SGD, params, {"lr": 0.1}, 1.0)
    side.give([torch.full((4, 5), 100.0)])
    side.step()
    assert torch.linalg.vector_norm(side.params[0].grad).item() == pytest.approx(1.0)  # type: ignore[arg-type]


def test_bench_writes_the_chart_to_a_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chart.png"
    assert main(["bench", f"{model}:model", "--rounds", "1", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"chart written to {path}" in capsys.readouterr().out


# What cannot be done is one line.

MISTAKES = {
    "no command": ([], "the following arguments are required: {doctor,verify,bench}"),
    "wrong command": (["verfy"], "invalid choice: 'verfy'"),
    "wrong flag": (["verify", "--ful"], "unrecognized arguments: --ful"),
    "two extents": (["verify", "--quick", "--full"], "not allowed with argument"),
    "no model": (["bench"], "the following arguments are required: module:function"),
    "no function": (["bench", "{model}"], "is not module:function, such as train:build_model"),
    "no such module": (["bench", "nowhere:model"], "ModuleNotFoundError: No module named 'nowhere'"),
    "no such function": (["bench", "{model}:modell"], "AttributeError: module '{model}' has no attribute 'modell'"),
    "a function that fails": (["bench", "{model}:fails"], "KeyError: 'no weights"),
    "nothing to train": (["bench", "{model}:nothing"], "no parameters that train: return the model"),
    "no such device": (["bench", "{model}:model", "--device", "gpu"], "on gpu: RuntimeError: "),
    "no rounds": (["bench", "{model}:model", "--rounds", "0"], "'0' is not a number of at least 1"),
    "no value": (["bench", "{model}:model", "--set", "eps"], "--set eps is not OPTION=VALUE"),
    "no such option": (["bench", "{model}:model", "--set", "momentun=0"], "AdamP has no option 'momentun': lr, betas,"),
    "bad value": (["bench", "{model}:model", "--set", "delta=-1"], "fused_adamp.AdamP: delta=-1 is outside [0, inf)"),
    "bad value of both": (["bench", "{model}:model", "--set", "lr=-1"], "AdamW(fused=True): Invalid learning rate: -1"),
    "no image": (["bench", "{model}:model", "--plot", "a.txt"], "--plot a.txt: 'txt' is not an image"),
    "no folder": (["bench", "{model}:model", "--plot", "nowhere/a.png"], "there is no folder 'nowhere'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[name]
    line = line_of(capsys, *(argument.replace("{model}", model) for argument in arguments))
    assert line.startswith("python -m fused_adamp")
    assert message.replace("{model}", model) in line


def test_a_missing_extra_is_one_line(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    line = line_of(capsys, "bench", f"{model}:model", "--plot", "a.png")
    assert line.endswith("pip install matplotlib, or leave out --plot for a chart in text")


def test_a_wrong_environment_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(ENVIRONMENT, "cdua")
    for command in ("doctor", "verify"):
        assert f"the environment variable {ENVIRONMENT}='cdua' is not a backend" in line_of(capsys, command)


def test_an_interruption_is_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line_of(capsys, "bench", f"{model}:interrupted", status=130) == "python -m fused_adamp: interrupted"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m fused_adamp doctor --json | head -n 1"
    run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout == "{\n"
    assert not run.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    out = capsys.readouterr().out
    for name in ("doctor", "verify", "bench"):
        assert re.search(rf"^    {name} ", out, re.MULTILINE)


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
