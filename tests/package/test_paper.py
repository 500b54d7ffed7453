"""The paper's claims, run in small: the lemma, the statistics, tuning, resuming, the page and the errors."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "paper"
sys.path.append(str(EXAMPLE))
lemma, report, run, tasks, toy, training = map(
    importlib.import_module, ("lemma", "report", "run", "tasks", "toy", "training")
)

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = training.Plan(seeds=(1, 2), tuning_seeds=(101,), reach=1, widen=1)
TASK = training.Task(
    name="tiny",
    about="",
    load=lambda: {name: (torch.arange(6.0).reshape(6, 1),) for name in ("train", "validation", "test")},
    build=lambda: nn.Linear(1, 1),
    loss=lambda network, x: network(x).square().mean(),
    measure=lambda network, x: {"loss": network(x).square().mean().item()},
    metrics=(training.Metric("loss", "Tiny", "loss", "Table 0", higher_is_better=False),),
    steps=20,
    batch=3,
)
PAIR = "SGD", "SGDP"
ALL_RUNS = 4 * (3 + 2)  # of TASK under PLAN, if no grid is widened


# The lemma and the toy problem.


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_the_lemma_holds_in_every_step(beta: float) -> None:
    sgd, sgdp = (lemma.descend(name, beta, 80) for name in ("SGD", "SGDP"))
    assert sgd["deviation"] < 1e-14
    assert sgdp["deviation"] < 1e-8  # its projection leaves a part of eps = 1e-8 of the radial component
    assert sgd["ratio"][-1] == pytest.approx(1 + 2 * beta / (1 - beta), rel=0.1)
    assert sgdp["ratio"][-1] == pytest.approx(1, rel=1e-6)
    assert sgd["norm"][-1] > sgdp["norm"][-1] > 1


def test_the_toy_problem_does_not_depend_on_the_length() -> None:
    w = toy.point(-2, 2)
    assert [x.item() for x in toy.angles(3 * w)] == pytest.approx([-2, 2])
    assert toy.rosenbrock(1, 1) == 0
    plain, momentum, _, sgdp = (toy.descend(**options) for options in toy.CURVES.values())
    assert 1 < plain["norm"][-1] < sgdp["norm"][-1] < 1.2 < 3 < momentum["norm"][-1]


# Statistics.


def test_an_interval_is_that_of_students_t() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0, 5.0], [1.5, 2.0, 4.0, 4.5, 6.5]
    assert report.interval(a) == pytest.approx((3, 2.776445 * math.sqrt(2.5 / 5)), rel=1e-6)
    theirs = stats.ttest_rel(b, a).confidence_interval(0.95)
    mean, half = report.interval([y - x for x, y in zip(a, b, strict=True)])
    assert (mean - half, mean + half) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize(
    ("mean", "half", "higher", "word"),
    [
        (1.0, 0.9, True, "better"),
        (1.0, 0.9, False, "worse"),
        (-1.0, 0.9, True, "worse"),
        (-1.0, 0.9, False, "better"),
        (1.0, 1.0, True, "no difference"),
        (0.0, 0.0, True, "no difference"),
    ],
)
def test_verdicts(mean: float, half: float, higher: bool, word: str) -> None:
    assert report.verdict(report.Interval(mean, half), higher) == word


# Tuning.


def tuning_records(plan: Any, losses: dict[str, dict[int, float | None]]) -> dict[Any, Any]:
    """For SGD and SGDP, by place; the seeds' losses lie around the one given."""
    return {
        training.Run(name, place, seed): {"metrics": None if loss is None else {"loss": loss + 0.1 * (-1) ** seed}}
        for name, by_place in losses.items()
        for place, loss in by_place.items()
        for seed in plan.tuning_seeds
    }


def test_tuning_takes_the_best_mean_of_the_validation_metric() -> None:
    plan = PLAN._replace(tuning_seeds=(101, 102), reach=2)
    losses = {"SGD": {-2: 5, -1: 1, 0: 2, 1: None, 2: 9}, "SGDP": {-2: 5, -1: 3, 0: 3, 1: 4, 2: None}}
    tuning = training.tune(TASK, plan, PAIR, tuning_records(plan, losses))
    assert tuning == (range(-2, 3), [], {"SGD": -1, "SGDP": 0})
    assert report.edges(tuning) == []


def test_a_best_place_at_an_edge_widens_the_grid_for_both() -> None:
    losses: dict[str, dict[int, float | None]] = {"SGD": {-1: 5, 0: 4, 1: 3}, "SGDP": {-1: 3, 0: 2, 1: 3}}
    tuning = training.tune(TASK, PLAN, PAIR, tuning_records(PLAN, losses))
    assert tuning.grid == range(-1, 3)
    assert tuning.missing == [training.Run(name, 2, 101) for name in PAIR]
    for by_place in losses.values():
        by_place[2] = 1
    tuning = training.tune(TASK, PLAN, PAIR, tuning_records(PLAN, losses))
    assert tuning == (range(-1, 3), [], {"SGD": 2, "SGDP": 2})  # and PLAN allows no further one
    assert report.edges(tuning) == [f"{name}: the best learning rate is the highest one of the grid." for name in PAIR]


# Training.


@pytest.mark.parametrize("name", tasks.TASKS)
def test_each_task_trains_and_repeats(name: str) -> None:
    plan = training.FULL._replace(length=0.01)
    task = tasks.TASKS[name]
    first, again, test = (training.train(task, plan, training.Run("AdamP", 0, seed)) for seed in (101, 101, 1))
    assert first == again != test
    assert {metric.key for metric in task.metrics} <= first["metrics"].keys()
    assert 0.9 < first["growth"] < 1.1


@pytest.mark.parametrize("name", sorted(tasks.TASKS.keys() - {"language"}))  # sources repeat themselves
def test_splits_share_no_example(name: str) -> None:
    splits = [{x.numpy().tobytes() for x in split[0]} for split in tasks.TASKS[name].load().values()]
    assert len(splits[0] | splits[1] | splits[2]) == sum(map(len, splits))


def test_a_run_that_diverges_is_recorded_as_such() -> None:
    task = training.Task(**{**vars(TASK), "loss": lambda network, x: network(x).mean() * math.inf})
    assert training.train(task, PLAN, training.Run("SGD", 0, 1)) == {"metrics": None, "growth": None}


def test_corruptions_keep_shape_and_range() -> None:
    x, _ = tasks.images()
    corrupted = tasks.corruptions(x)
    assert len(corrupted) == 8
    for name, image in corrupted.items():
        assert image.shape == x.shape, name
        assert 0 <= image.min() < image.max() <= 1, name
        assert (image - x).abs().mean() > 0.02, name
        assert torch.equal(image, tasks.corruptions(x)[name]), name


def test_average_precision() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [8, 8, 9, 9]])
    overlap = tasks.overlaps(boxes, boxes)
    assert overlap[0].tolist() == pytest.approx([1, 1 / 3, 0])
    # One image with two objects of class 0. In order of score: a hit, the same object again, a miss, the other object.
    labels, kind = torch.tensor([[0, 0, -1]]), torch.zeros(1, 4, dtype=torch.long)
    score = torch.tensor([[0.6, 0.9, 0.8, 0.7]])
    overlap = torch.tensor([[[0.1, 0.9, 0], [0.8, 0.1, 0], [0.7, 0.2, 0], [0.4, 0.3, 0]]])
    assert tasks.average_precision(0, score, kind, overlap, labels) == pytest.approx((1 + 2 / 4) / 2)
    assert tasks.average_precision(1, score, kind, overlap, labels) == 0


# Records, resuming and errors.


class InThisProcess(Executor):
    """Runs at once; takes and ignores the arguments of a pool of processes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs that are trained, with one tiny task in place of the real ones."""
    runs: list[Any] = []

    def train(task: Any, plan: Any, one: Any) -> Any:
        runs.append(one)
        return {"metrics": {"loss": 1.0 + abs(one.place) + one.seed / 1000}, "growth": 1.0}

    for module in (run, report):
        monkeypatch.setattr(module, "TASKS", {"tiny": TASK})
    monkeypatch.setattr(run, "STUDIES", {})
    monkeypatch.setattr(run, "FULL", PLAN)
    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(report, "tasks_plot", lambda _: report.Figure())
    return runs


def test_a_rerun_skips_what_is_recorded(trained: list[Any], tmp_path: Path) -> None:
    command = [f"--out={tmp_path}"]
    run.main(command)
    assert len(trained) == len(set(trained)) == ALL_RUNS
    before = (tmp_path / "tiny.json").read_text(), (tmp_path / "paper.md").read_text()
    run.main(command)
    assert len(trained) == ALL_RUNS
    assert before == ((tmp_path / "tiny.json").read_text(), (tmp_path / "paper.md").read_text())
    assert "| Tiny | loss | +0.00 ± 0.00, no difference | +0.00 ± 0.00, no difference |" in before[1]
    run.main([*command, "--fresh"])
    assert len(trained) == 2 * ALL_RUNS
    content = json.loads(before[0])
    content["settings"]["batch"] = 5  # records of other settings do not count
    (tmp_path / "tiny.json").write_text(json.dumps(content))
    run.main(command)
    assert len(trained) == 3 * ALL_RUNS


def stopped(monkeypatch: pytest.MonkeyPatch, trained: list[Any], after: int, error: BaseException) -> None:
    train = run.train

    def stop(*arguments: Any) -> Any:
        if len(trained) == after:
            raise error
        return train(*arguments)

    monkeypatch.setattr(run, "train", stop)


def test_an_interrupt_keeps_finished_runs(trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [f"--out={tmp_path}", "--workers=1"]
    with monkeypatch.context() as patch:
        stopped(patch, trained, 7, KeyboardInterrupt())
        with pytest.raises(SystemExit, match=f"^interrupted: finished runs are in {tmp_path}, and the same command"):
            run.main(command)
    assert len(json.loads((tmp_path / "tiny.json").read_text())["runs"]) == 7
    assert not (tmp_path / "paper.md").exists()
    run.main(command)
    assert len(trained) == len(set(trained)) == ALL_RUNS


def test_a_full_disk_keeps_earlier_results(trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stopped(patch, trained, 3, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            run.main([f"--out={tmp_path}", "--workers=1"])
    before = (tmp_path / "tiny.json").read_bytes()

    def full(path: Path, text: str) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match=rf"^{tmp_path}/tiny.json: No space left on device$"):
        run.main([f"--out={tmp_path}"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]
    assert (tmp_path / "tiny.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds=3"], "unrecognized arguments: --seeds=3"),
        (["--only", "images"], "argument --only: invalid choice: 'images'"),
        (["--workers=0"], "argument --workers: invalid choice: 0"),
    ],
)
def test_a_wrong_flag_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert says in line


def test_a_broken_file_of_results_is_one_line(trained: list[Any], tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text("{")
    with pytest.raises(SystemExit, match=rf"^{tmp_path}/tiny.json: not a file of results: delete it to start anew$"):
        run.main([f"--out={tmp_path}"])
    assert (tmp_path / "tiny.json").read_text() == "{"


def test_a_missing_package_is_one_line() -> None:
    script = f"import sys, runpy; sys.modules['adamp'] = None; runpy.run_path({str(EXAMPLE / 'run.py')!r})"
    paths = os.pathsep.join([str(EXAMPLE), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    (line,) = ended.stderr.splitlines()
    assert line.startswith("adamp is missing: run `make paper`, or")


# The page.


def test_the_page_is_made_of_the_recorded_results() -> None:
    assert (ROOT / "docs" / "paper.md").read_text() == report.page(EXAMPLE / "results", training.FULL)


def test_the_paper_s_differences_are_in_the_page() -> None:
    """A few values that the project page prints as differences: +0.45, +0.40, +9.70, -0.12."""
    page = (ROOT / "docs" / "paper.md").read_text()
    for name, a, b, difference in (
        ("ResNet18", 70.28, 70.73, 0.45),
        ("ResNet18", 70.41, 70.81, 0.40),
        ("attacked, l-infinity, 4/255", 56.58, 66.28, 9.70),
        ("Transformer-XL", 23.38, 23.26, -0.12),
    ):
        assert b - a == pytest.approx(difference)
        assert any(line.startswith(f"| {name} ") and f"{a:g} | {b:g}" in line for line in page.splitlines()), name
