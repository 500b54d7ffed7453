"""One loop for all tasks: which runs there are, a run, and the records of the runs that are finished."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import fused_adamp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WARMUP = 0.05  # part of the steps in which the learning rate rises; after that it falls to zero along a cosine

Split = tuple[Tensor, ...]
"""Inputs and targets, with the examples along the first dimension."""


class Metric(NamedTuple):
    key: str
    claim: str  # the heading of its section
    name: str
    paper: str  # the table of the paper that it stands beside: a caption, an empty line and the table
    higher_is_better: bool = True
    note: str = ""


@dataclass(frozen=True)
class Task:
    """What is learnt. ``measure`` gives a value for each metric; the first metric chooses the learning rate."""

    name: str
    about: str
    load: Callable[[], dict[str, Split]]  # the splits train, validation and test
    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]  # of the network and a batch
    measure: Callable[..., dict[str, float]]  # of the network and a split
    metrics: tuple[Metric, ...]
    steps: int
    batch: int
    invariant: tuple[str, ...] = ("conv",)  # names of modules whose weights are scale-invariant


class Optimizer(NamedTuple):
    build: Callable[..., torch.optim.Optimizer]
    exponent: float  # the middle of the grid of learning rates is 10 to this power


SGD_FAMILY: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}
ADAM_FAMILY: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 1e-2}
OPTIMIZERS = {
    "SGD": Optimizer(partial(torch.optim.SGD, **SGD_FAMILY, fused=True), -1),
    "SGDP": Optimizer(partial(fused_adamp.SGDP, **SGD_FAMILY), -1),
    "AdamW": Optimizer(partial(torch.optim.AdamW, **ADAM_FAMILY, fused=True), -2.5),
    "AdamP": Optimizer(partial(fused_adamp.AdamP, **ADAM_FAMILY), -2.5),
}
PAIRS = (("SGD", "SGDP"), ("AdamW", "AdamP"))


class Plan(NamedTuple):
    """How many runs there are, and how long they are."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tuning_seeds: tuple[int, ...] = (101, 102)
    reach: int = 2  # the grid has so many learning rates on each side of its middle
    widen: int = 2  # by so many learning rates at most, where the best one is at an edge
    length: float = 1.0  # part of the steps of each task


FULL = Plan()
QUICK = Plan(seeds=(1, 2), tuning_seeds=(101,), reach=1, widen=0, length=0.1)


class Run(NamedTuple):
    optimizer: str
    place: int  # in the grid of learning rates, 0 in the middle
    seed: int

    @property
    def lr(self) -> float:
        return learning_rate(self.optimizer, self.place)


def learning_rate(optimizer: str, place: int) -> float:
    """Neighbours in the grid differ by the square root of ten."""
    return float(f"{10 ** (OPTIMIZERS[optimizer].exponent + place / 2):.3g}")


Record = dict[str, Any]
"""A finished run: its ``metrics``, the ``growth`` of norms, and ``seconds``. The first two are None if it diverged."""


class Tuning(NamedTuple):
    """How far the tuning of a pair of optimizers is."""

    grid: range
    missing: list[Run]
    best: dict[str, int]  # the place that each optimizer chose; empty while runs are missing


def tune(task: Task, plan: Plan, pair: tuple[str, ...], records: dict[Run, Record]) -> Tuning:
    """A best place at an edge of the grid widens the grid on that side, for both optimizers of the pair."""
    grid = range(-plan.reach, plan.reach + 1)
    for widened in range(plan.widen + 1):
        runs = [Run(optimizer, place, seed) for optimizer in pair for place in grid for seed in plan.tuning_seeds]
        missing = [run for run in runs if run not in records]
        if missing:
            return Tuning(grid, missing, {})
        best = {optimizer: best_place(task, plan, optimizer, grid, records) for optimizer in pair}
        low, high = grid[0] in best.values(), grid[-1] in best.values()
        if widened == plan.widen or not (low or high):
            break
        grid = range(grid.start - low, grid.stop + high)
    return Tuning(grid, [], best)


def best_place(task: Task, plan: Plan, optimizer: str, grid: range, records: dict[Run, Record]) -> int:
    """By the mean over the tuning seeds; a place where a run diverged is the worst; the middle wins a tie."""
    sign = 1 if task.metrics[0].higher_is_better else -1

    def score(place: int) -> tuple[float, int]:
        found = [records[Run(optimizer, place, seed)]["metrics"] for seed in plan.tuning_seeds]
        if None in found:
            return -math.inf, -abs(place)
        return sign * fmean(metrics[task.metrics[0].key] for metrics in found), -abs(place)

    return max(grid, key=score)


def still_to_do(task: Task, plan: Plan, records: dict[Run, Record]) -> list[Run]:
    """The runs that can be started now: a pair's reported runs follow its tuning."""
    runs: list[Run] = []
    for pair in PAIRS:
        tuning = tune(task, plan, pair, records)
        runs += tuning.missing
        runs += [Run(name, place, seed) for name, place in tuning.best.items() for seed in plan.seeds]
    return [run for run in runs if run not in records]


def runs_in_all(task: Task, plan: Plan, records: dict[Run, Record]) -> int:
    """Grows when a grid is widened."""
    grids = [tune(task, plan, pair, records).grid for pair in PAIRS]
    return sum(2 * (len(grid) * len(plan.tuning_seeds) + len(plan.seeds)) for grid in grids)


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[Split]:
    """Without end: one random order of the examples after another."""
    while True:
        order = torch.randperm(len(split[0]), generator=generator)
        for indices in order[: len(order) // size * size].split(size):
            yield tuple(part[indices] for part in split)


def train(task: Task, plan: Plan, run: Run) -> Record:
    """Initial weights and the order of batches depend on the seed alone, not on the optimizer.

    A tuning run is measured on the validation split, any other on the test split.
    """
    diverged: Record = {"metrics": None, "growth": None}
    torch.manual_seed(run.seed)
    splits, network = task.load(), task.build()
    optimizer = OPTIMIZERS[run.optimizer].build(network.parameters(), lr=run.lr)
    steps = steps_of(task, plan)
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    names = {f"{name}.weight" for name, _ in network.named_modules() if name.rpartition(".")[2] in task.invariant}
    invariant = [p for name, p in network.named_parameters() if name in names or name in task.invariant]
    before = [p.norm().item() for p in invariant]
    order = torch.Generator().manual_seed(run.seed)
    for _, batch in zip(range(steps), batches(splits["train"], task.batch, order), strict=False):
        optimizer.zero_grad()
        loss = task.loss(network, *batch)
        if not math.isfinite(loss.item()):
            return diverged
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        metrics = task.measure(network, *splits["validation" if run.seed in plan.tuning_seeds else "test"])
    if not all(map(math.isfinite, metrics.values())):
        return diverged
    growth = fmean(p.norm().item() / norm for p, norm in zip(invariant, before, strict=True))
    return {"metrics": metrics, "growth": growth}


def steps_of(task: Task, plan: Plan) -> int:
    return max(1, round(task.steps * plan.length))


# Records on disk.


def settings_of(task: Task, plan: Plan) -> dict[str, Any]:
    """What a task's results depend on besides the run: records made under other settings do not count."""
    return {
        "steps": steps_of(task, plan),
        "batch": task.batch,
        "SGD, SGDP": SGD_FAMILY,
        "AdamW, AdamP": {**ADAM_FAMILY, "betas": list(ADAM_FAMILY["betas"])},
    }


def load_records(folder: Path, task: Task, plan: Plan) -> dict[Run, Record]:
    content = read_json(folder / f"{task.name}.json")
    if content.get("settings") != settings_of(task, plan):
        return {}
    return {Run(*(row.pop(key) for key in Run._fields)): row for row in content["runs"]}


def save_records(folder: Path, task: Task, plan: Plan, records: dict[Run, Record], environment: dict[str, Any]) -> None:
    rows = [json.dumps({**run._asdict(), **records[run]}) for run in sorted(records)]
    head = json.dumps({"environment": environment, "settings": settings_of(task, plan)}, indent=1)
    text = head.removesuffix("\n}") + ',\n "runs": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"  # a line for each run
    write(folder / f"{task.name}.json", text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, json.dumps(content) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise OSError(0, "not a file of results: delete it to start anew", str(path)) from error
    return content


def write(path: Path, text: str) -> None:
    """All or nothing: until the new file is complete, the old one stays."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
