"""Trains small GPTs with the norms of large ones and records what AdamP decides about each weight.

    python examples/paper/large_models.py            # all runs, then docs/large-models.md with their tables, in out/
    python examples/paper/large_models.py --quick    # the same machinery in under a minute
    python examples/paper/large_models.py --record   # the results, tables and figures of docs/; with --draw no runs

Three optimizers train the same models on the same batches:

- AdamW is torch's;
- AdamP has its defaults, apart from the learning rate, the betas and the weight decay, which all three share;
- AdamP chosen has `projection="none"` for the weights that no normalization follows. In the model without QK-norm and
  sandwich norm these are all weights, which makes it AdamW, so it is not run there.

A run that is recorded is not repeated, so the script can be stopped and started again. Other settings start over.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

try:
    import torch
    from gpt import NORMALIZED, NORMS, Norms, batch_of, build_gpt, kind_of, sources
    from large_models_page import draw
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor, nn
    from torch.nn import functional
    from torch.optim.lr_scheduler import LambdaLR
    from training import read_json, write

    import fused_adamp
    from fused_adamp.reference import Decision, cosine, decide, project
except ModuleNotFoundError as error:
    sys.exit(
        f"{error.name} is missing: run `make demo`, or `pip install . && pip install --group demo` in the checkout"
    )

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "paper" / "results" / "large-models.json"
OPTIMIZERS = ("AdamW", "AdamP", "AdamP chosen")
WARMUP, FLOOR = 0.1, 0.1  # part of the steps in which the learning rate rises; where it ends, as part of its peak
DELTA, EPS, BETAS = 0.1, 1e-8, (0.9, 0.95)
PHASES = 4  # of equal length; whatever is recorded over time is recorded per phase
HELD_OUT_BATCHES, HELD_OUT_SIZE = 8, 64
SHAPES = ((1, 64), (2, 64), (3, 64), (64, 64))  # of the random tensors that are tested


@dataclass(frozen=True)
class Settings:
    """Of all runs: sizes of the model and of a batch, and what is repeated."""

    width: int = 64
    depth: int = 2
    heads: int = 4
    context: int = 64
    batch: int = 8
    steps: int = 400
    lr: float = 1e-2
    decay: float = 0.1
    others: tuple[tuple[float, float], ...] = ((5e-3, 0.1), (2e-2, 0.1), (1e-2, 0.5))  # lr and decay; see jobs
    seeds: int = 3
    every: int = 5  # steps between two records of cosines and lengths
    draws: int = 20_000  # random tensors of each shape
    walk: int = 6_000  # steps of a random walk


QUICK = Settings(
    32, depth=1, heads=2, context=32, batch=4, steps=40, others=((1e-2, 0.5),), seeds=2, draws=500, walk=300
)


def build_optimizer(name: str, model: nn.Module, norms: Norms, lr: float, decay: float) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=decay, fused=True)
    groups: dict[str, list[nn.Parameter]] = {"auto": [], "none": []}
    for weight, p in model.named_parameters():
        tested = name == "AdamP" or kind_of(weight) in NORMALIZED[norms]
        groups["auto" if tested else "none"].append(p)
    options = [{"params": params, "projection": projection} for projection, params in groups.items() if params]
    return fused_adamp.AdamP(options, lr=lr, betas=BETAS, weight_decay=decay, delta=DELTA, eps=EPS)


class Course:
    """One weight over training: its decisions of all steps, its lengths, and values of every few steps, by phase."""

    def __init__(self, p: nn.Parameter) -> None:
        self.p = p
        self.norms = [p.detach().norm().item()]
        self.decided: list[list[Decision]] = [[] for _ in range(PHASES)]
        self.values: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in range(PHASES)])

    def measure(self, phase: int, before: Tensor, state: dict[str, Tensor] | None) -> None:
        """Cosine and turn of the last step; with AdamP's state, also what it removes or would remove."""
        assert self.p.grad is not None
        old, new = (w.double().flatten() for w in (before, self.p.detach()))
        ratio = cosine(self.p.grad.reshape(1, -1), before.reshape(1, -1), EPS).item() * math.sqrt(old.numel()) / DELTA
        self.values["layer_cosine"][phase].append(ratio)
        self.values["turn"][phase].append((new / new.norm() - old / old.norm()).norm().item())
        if state is None:
            return
        root = state["exp_avg_sq"].sqrt() / math.sqrt(1 - BETAS[1] ** state["step"].item())
        update = state["exp_avg"] / (root + EPS)
        left = project(update, before, self.decided[phase][-1] or Decision.LAYER, EPS)
        self.values["radial"][phase].append(((update - left).norm() / update.norm()).item())

    def record(self) -> dict[str, Any]:
        shares = {
            view.name.lower(): [fmean(d is view for d in phase) for phase in self.decided]
            for view in (Decision.CHANNEL, Decision.LAYER)
            if all(self.decided)
        }
        medians = {name: [median(phase) for phase in phases] for name, phases in self.values.items()}
        record = {"shape": list(self.p.shape), "norm": self.norms, **shares, **medians}
        return {
            name: [float(f"{v:.4g}") for v in values] if name != "shape" else values for name, values in record.items()
        }


def train(norms: Norms, optimizer_name: str, lr: float, decay: float, seed: int, settings: Settings) -> dict[str, Any]:
    """One run. Initial weights and batches depend on the norms and the seed alone, not on the optimizer."""
    torch.manual_seed(seed)
    model = build_gpt(settings.width, settings.depth, settings.heads, norms)
    batches, (text, held_out) = torch.Generator().manual_seed(seed), sources()
    optimizer = build_optimizer(optimizer_name, model, norms, lr, decay)
    steps, warmup = settings.steps, WARMUP * settings.steps
    fall = [FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps + 1)]
    schedule = LambdaLR(optimizer, lambda t: min((t + 1) / warmup, fall[t]))
    courses = {name: Course(p) for name, p in model.named_parameters() if p.ndim > 1}
    projected = optimizer if isinstance(optimizer, fused_adamp.AdamP) else None
    for step in range(steps):
        phase, recorded = step * PHASES // steps, step % settings.every == 0
        optimizer.zero_grad()
        loss_of(model, *batch_of(text, settings.batch, settings.context, batches)).backward()
        before = {name: course.p.detach().clone() for name, course in courses.items()} if recorded else {}
        optimizer.step()
        if projected is not None:
            decisions = projected.decisions()
            for course in courses.values():
                course.decided[phase].append(Decision(decisions[course.p]))
        for name, weight in before.items():
            state = None if projected is None else optimizer.state[courses[name].p]
            courses[name].measure(phase, weight, state)
        if recorded and projected is not None:
            for line in projected.projection_report(model):
                if line.name in courses and not math.isnan(line.cosine):
                    courses[line.name].values["channel_cosine"][phase].append(line.cosine)
        schedule.step()
        if (step + 1) * PHASES % steps < PHASES:
            for course in courses.values():
                course.norms.append(course.p.detach().norm().item())
    windows = torch.Generator().manual_seed(1000)  # the same for all runs
    with torch.no_grad():
        losses = [
            loss_of(model, *batch_of(held_out, HELD_OUT_SIZE, settings.context, windows)).item()
            for _ in range(HELD_OUT_BATCHES)
        ]
    bits = fmean(losses) / math.log(2)
    return {"validation": round(bits, 5), "weights": {name: course.record() for name, course in courses.items()}}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def pass_rates(rows: int, cols: int, draws: int) -> dict[str, float]:
    """How often a random gradient passes the test of a random weight, by view."""
    generator = torch.Generator().manual_seed(0)
    pairs = (torch.randn(2, rows, cols, generator=generator) for _ in range(draws))
    found = [decide(gradient, weight, DELTA, EPS) for gradient, weight in pairs]
    return {view.name.lower(): found.count(view) / draws for view in (Decision.CHANNEL, Decision.LAYER)}


def random_walk(projection: str, wd_ratio: float, steps: int) -> dict[str, float]:
    """Length and turn per step of a scale-invariant weight whose gradients are noise, once decay balances growth.

    Root mean squares over the second half of the steps.
    """
    lr, decay, elements = 1e-2, 1.0, 4096
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(1, elements, generator=generator) * 0.07)
    options: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": decay, "wd_ratio": wd_ratio}
    optimizer = fused_adamp.AdamP([w], lr=lr, projection=projection, **options)
    squares = []
    for _ in range(steps):
        noise, old = torch.randn(1, elements, generator=generator), w.detach() / w.detach().norm()
        w.grad = noise - old * (noise * old).sum()
        optimizer.step()
        new = w.detach()
        squares.append((new.square().sum().item(), (new / new.norm() - old).square().sum().item()))
    norm, turn = (math.sqrt(fmean(column)) for column in zip(*squares[steps // 2 :], strict=True))
    return {"norm": float(f"{norm:.4g}"), "turn": float(f"{turn:.4g}")}


def jobs(settings: Settings) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """All results by name: function and arguments. The model with the most norms is trained with other settings too."""
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for shape in SHAPES:
        found["chance {}x{}".format(*shape)] = pass_rates, (*shape, settings.draws)
    for name, projection, ratio in (("AdamW", "none", 1.0), ("0.1", "layer", 0.1), ("1/19", "layer", 1 / 19)):
        found[f"walk {name}"] = random_walk, (projection, ratio, settings.walk)
    main = product(range(settings.seeds), [(settings.lr, settings.decay)], NORMS, OPTIMIZERS)
    others = product(range(settings.seeds), settings.others, NORMS[-1:], OPTIMIZERS[:2])
    for seed, (lr, decay), norms, name in (*main, *others):
        if name != "AdamP chosen" or NORMALIZED[norms]:
            label = f"{norms}, {name}, lr {lr:g}, decay {decay:g}, seed {seed}"
            found[label] = train, (norms, name, lr, decay, seed, settings)
    return found


def record(results: dict[str, Any], path: Path) -> None:
    """Writes one run per line."""
    runs = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in results["runs"].items())
    head = {name: value for name, value in results.items() if name != "runs"}
    write(path, json.dumps(head, indent=1)[:-2] + f',\n "runs": {{\n{runs}\n}}\n}}\n')


def run_all(settings: Settings, path: Path, console: Console) -> dict[str, Any]:
    """The results of all jobs; those that the file has for the same settings are not repeated."""
    results: dict[str, Any] = {
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "threads": 1},
        "settings": json.loads(json.dumps(asdict(settings))),
        "runs": {},
    }
    recorded = read_json(path)
    if recorded.get("settings") == results["settings"]:
        results["runs"] = recorded["runs"]
    todo = {name: job for name, job in jobs(settings).items() if name not in results["runs"]}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for name in progress.track(todo, description="runs"):
            function, arguments = todo[name]
            run = results["runs"][name] = function(*arguments)
            record(results, path)
            bits = f"{run['validation']:.4f} bits per byte" if "validation" in run else str(run)
            console.print(f"{name}: {bits}", highlight=False)
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny settings; leaves the document alone")
    parser.add_argument("--draw", action="store_true", help="train nothing: draw the runs that are recorded")
    parser.add_argument("--record", action="store_true", help=f"results in {RESULTS.relative_to(ROOT)}, tables in docs")
    parser.add_argument("--out", type=Path, help="file of the results (out/large-models.json, or ...-quick.json)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    own = args.out or ROOT / "out" / ("large-models-quick.json" if args.quick else "large-models.json")
    path: Path = RESULTS if args.record else own
    console = Console()
    try:
        results = read_json(path) if args.draw else run_all(QUICK if args.quick else Settings(), path, console)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: finished runs are in {path}, and the same command goes on from there")
    except OSError as error:
        sys.exit(f"{error.filename or path}: {error.strerror or error}")
    if not args.record:
        page, images = path.with_suffix(".md"), path.parent
        page.write_text((ROOT / "docs" / "large-models.md").read_text())
    else:
        page, images = ROOT / "docs" / "large-models.md", ROOT / "docs" / "images"
    draw(results, page, images)
    console.print(f"Results: {path}  Tables: {page}  Figures: {images}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
