"""Five optimizers train one small residual network on handwritten digits, three seeds each.

The data are the 1797 real 8x8 digits that scikit-learn ships. Every convolution is followed by BatchNorm, so its weight
is scale-invariant: its length |w| does not change the network's output, only how far a step of given length turns it.
Momentum makes |w| grow, and the longer the weight, the less a step turns it. SGDP and AdamP remove the part of the step
that makes it longer.

What to look at, in the table and in the plot, always averaged over the convolutions:

- norm growth, |w_t| / |w_0|: far above 1 with SGD and AdamW, near 1 with SGDP and AdamP;
- effective step size, the angle in radians between w_t and w_{t+1}: larger with SGDP than with SGD, and with AdamP than
  with AdamW, at the same learning rate. It is the same for SGD and Adam, and to first order it is the paper's
  |w_{t+1}/|w_{t+1}| - w_t/|w_t||, which is proportional to lr / |w_t|^2 for plain gradient descent. In the table:
  the mean over the last epoch;
- projected: the layers that were projected in more than half of the steps, and in what share of the steps;
- ms: the median time of one optimizer.step(). The network is so small that this is mostly the cost of the call.

The learning rate is constant and labels are smoothed: with a schedule, or with gradients that vanish as the training
set is learnt by heart, the effective step would shrink for reasons that have nothing to do with the norm.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import adamp
    import numpy as np
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import Tensor, nn

    import fused_adamp
    from fused_adamp.backends import choose
    from fused_adamp.reference import Decision
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing: pip install 'fused_adamp[demo]' (in a checkout: pip install '.[demo]')")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BATCH = 32
LABEL_SMOOTHING = 0.1
WARMUP = 10  # steps left out of the timing: they allocate the state
COMPARED = 10  # the step after which our AdamP's weights are compared with clovaai's

# One set of hyperparameters per family, so that the projection is the only difference within it. The decay is as small
# as in practice: it takes at most 4% off the norms over the run, so the growth seen is that of the updates. torch's SGD
# adds it to the gradient and SGDP applies lr * weight_decay / (1 - momentum) to the weight: the same in the long run.
SGD_FAMILY = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
ADAM_FAMILY = {"lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


class Recipe(NamedTuple):
    build: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    color: str
    line: str


RECIPES = {
    "SGD": Recipe(lambda params: torch.optim.SGD(params, **SGD_FAMILY, fused=True), "tab:orange", "--"),
    "SGDP": Recipe(lambda params: fused_adamp.SGDP(params, **SGD_FAMILY), "tab:red", "-"),
    "AdamW": Recipe(lambda params: torch.optim.AdamW(params, **ADAM_FAMILY, fused=True), "tab:cyan", "--"),
    "AdamP": Recipe(lambda params: fused_adamp.AdamP(params, **ADAM_FAMILY), "tab:blue", "-"),
    "clovaai AdamP": Recipe(lambda params: adamp.AdamP(params, **ADAM_FAMILY), "black", ":"),
}


class Digits(NamedTuple):
    """Images ``(N, 1, 8, 8)`` of mean 0 and deviation 1, labels ``(N,)``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data() -> Digits:
    """The same stratified split, three quarters for training, whatever the seed of the run."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) for x in split[:2])
    mean, std = train_x.mean(), train_x.std()
    train_y, test_y = map(torch.tensor, split[2:])
    return Digits((train_x - mean) / std, train_y, (test_x - mean) / std, test_y)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride)
        self.second = conv_bn(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else conv_bn(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def build_network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            stem=conv_bn(1, 12),
            relu=nn.ReLU(),
            block1=Block(12, 12, stride=1),
            block2=Block(12, 24, stride=2),
            block3=Block(24, 24, stride=1),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(24, 10),
        )
    )


@dataclass
class Run:
    """What one training left behind; the lists have one entry per step."""

    accuracy: float = 0.0
    norm: list[float] = field(default_factory=list)
    effective_step: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    decisions: Counter[tuple[str, Decision]] = field(default_factory=Counter)
    early_weights: Tensor | None = None


def train(recipe: Recipe, seed: int, data: Digits, epochs: int, on_epoch: Callable[[], None]) -> Run:
    """Trains one network. Initial weights and batch order depend on the seed alone, not on the optimizer."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    network = build_network()
    optimizer = recipe.build(network.parameters())
    names = {p: name.removesuffix(".weight") for name, p in network.named_parameters() if p.ndim >= 2}
    invariant = [p for p, name in names.items() if name.endswith("conv")]
    run = Run()
    norms, directions = lengths_and_directions(invariant)
    first_norms = norms
    for _ in range(epochs):
        network.train()
        shuffled = torch.randperm(len(data.train_y), generator=order)
        for batch in shuffled[: len(shuffled) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            logits = network(data.train_x[batch])
            F.cross_entropy(logits, data.train_y[batch], label_smoothing=LABEL_SMOOTHING).backward()
            start = time.perf_counter()
            optimizer.step()
            run.seconds.append(time.perf_counter() - start)

            before = directions
            norms, directions = lengths_and_directions(invariant)
            # From the chord: acos of a cosine next to 1 would keep no digit of so small an angle.
            chords = torch.stack([(new - old).norm() for new, old in zip(directions, before, strict=True)])
            run.effective_step.append((2 * torch.asin(chords / 2)).mean().item())
            run.norm.append((norms / first_norms).mean().item())
            if isinstance(optimizer, (fused_adamp.AdamP, fused_adamp.SGDP)):
                decisions = optimizer.decisions()
                run.decisions.update((name, decisions[p]) for p, name in names.items())
            if len(run.norm) == COMPARED:
                run.early_weights = nn.utils.parameters_to_vector(network.parameters()).detach()
        on_epoch()
    network.eval()
    with torch.no_grad():
        run.accuracy = (network(data.test_x).argmax(dim=1) == data.test_y).double().mean().item()
    return run


def lengths_and_directions(weights: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """``|w|`` of every weight, ``(L,)``, and ``w / |w|``."""
    with torch.no_grad():
        norms = torch.stack([w.norm() for w in weights])
        return norms, [w / norm for w, norm in zip(weights, norms, strict=True)]


def summarize(name: str, runs: list[Run], epochs: int) -> dict[str, Any]:
    """One row of the table, over the runs of all seeds."""
    steps = len(runs[0].norm)
    counts = sum((run.decisions for run in runs), Counter())
    layers = dict.fromkeys(layer for layer, _ in counts)
    return {
        "optimizer": name,
        "test_accuracy": [run.accuracy for run in runs],
        "norm_growth": fmean(run.norm[-1] for run in runs),
        "effective_step_rad": fmean(fmean(run.effective_step[-(steps // epochs) :]) for run in runs),
        "ms_per_step": 1e3 * median(second for run in runs for second in run.seconds[WARMUP:]),
        "projected": {
            layer: {view.name.lower(): counts[layer, view] / (steps * len(runs)) for view in Decision if view}
            for layer in layers
        },
    }


def projected_in_short(projected: dict[str, dict[str, float]]) -> str:
    parts = []
    for kind in ("conv", "linear"):
        shares = [sum(views.values()) for layer, views in projected.items() if layer.endswith(kind)]
        if shares:
            parts.append(f"{sum(share > 0.5 for share in shares)}/{len(shares)} {kind} {fmean(shares):.0%}")
    return ", ".join(parts) or "-"


def results_table(rows: list[dict[str, Any]], caption: str) -> Table:
    table = Table(title="Digits: mean over seeds", caption=caption, caption_justify="left")
    table.add_column("optimizer")
    for header in ("test accuracy %\nmean (min-max)", "norm growth\n|w_T| / |w_0|", "effective step\nat the end, mrad"):
        table.add_column(header, justify="right")
    table.add_column("ms per\nstep", justify="right")
    table.add_column("projected layers,\nshare of steps")
    for row in rows:
        accuracy = [100 * a for a in row["test_accuracy"]]
        table.add_row(
            row["optimizer"],
            f"{fmean(accuracy):.2f} ({min(accuracy):.2f}-{max(accuracy):.2f})",
            f"{row['norm_growth']:.3f}",
            f"{1e3 * row['effective_step_rad']:.2f}",
            f"{row['ms_per_step']:.3f}",
            projected_in_short(row["projected"]),
        )
    return table


def layers_table(rows: list[dict[str, Any]]) -> Table:
    rows = [row for row in rows if row["projected"]]
    table = Table(title="Projected, share of steps: by channel + as a whole layer")
    table.add_column("layer")
    for row in rows:
        table.add_column(row["optimizer"], justify="right")
    for layer in rows[0]["projected"]:
        shares = [row["projected"][layer] for row in rows]
        table.add_row(layer, *(f"{share['channel']:.1%} + {share['layer']:.1%}" for share in shares))
    return table


def compare_with_clovaai(ours: list[Run], theirs: list[Run]) -> str:
    # Measured: in float64 the two stay within 5e-15 of each other over 168 steps. In float32 they do too, at 3e-7, until
    # rounding puts one ReLU on the other side of zero; from there on they differ like two seeds.
    points = ", ".join(f"{100 * (a.accuracy - b.accuracy):+.2f}" for a, b in zip(ours, theirs, strict=True))
    distance = max(
        ((a.early_weights - b.early_weights).norm() / b.early_weights.norm()).item()
        for a, b in zip(ours, theirs, strict=True)
        if a.early_weights is not None and b.early_weights is not None
    )
    return (
        f"AdamP minus clovaai's AdamP: accuracy {points} points, by seed; relative distance of the weights after "
        f"{COMPARED} steps at most {distance:.0e} (float32 rounding, which training then amplifies)."
    )


def plot(results: dict[str, list[Run]], epochs: int, path: Path) -> None:
    """Means over the seeds with the range between them shaded; 1200 x 500 pixels."""
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, runs in results.items():
        norm = np.array([run.norm for run in runs])
        # Single steps scatter too much to compare curves by eye: one point per epoch, the mean of its steps.
        effective = np.array([run.effective_step for run in runs]).reshape(len(runs), epochs, -1).mean(axis=2)
        steps = norm.shape[1]
        middles = (np.arange(epochs) + 0.5) * steps / epochs
        for axes, x, y in ((left, np.arange(1, steps + 1), norm), (right, middles, effective)):
            color, line = RECIPES[name].color, RECIPES[name].line
            axes.plot(x, y.mean(axis=0), color=color, linestyle=line, linewidth=2, label=name)
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, linewidth=0)
    left.set(title="Norm of the scale-invariant weights", ylabel="$|w_t|\\,/\\,|w_0|$ (ratio)")
    right.set(title="Effective step size, mean of each epoch", ylabel="angle between $w_t$ and $w_{t+1}$ (radians)")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3, which="both")
    left.legend(loc="upper left")
    figure.savefig(path)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, counted from 0")
    parser.add_argument("--epochs", type=positive, default=8, help="passes over the training set")
    parser.add_argument("--threads", type=positive, default=1, help="torch threads; the network is too small for more")
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory for digits.png and digits.json")
    return parser.parse_args()


def main() -> None:
    started = time.perf_counter()
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    # A log file has no width of its own, and 80 columns would break the table.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    environment = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_adamp": fused_adamp.__version__,
        "backend": choose(torch.device("cpu"), backend=None, fused=None, foreach=None).name,
        "adamp": version("adamp"),
    }
    console.print(", ".join(f"{name} {value}" for name, value in environment.items()))

    data = load_data()
    results: dict[str, list[Run]] = {name: [] for name in RECIPES}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(RECIPES) * args.seeds * args.epochs)
        for name, recipe in RECIPES.items():
            for seed in range(args.seeds):
                progress.update(task, description=f"{name}, seed {seed}")
                run = train(recipe, seed, data, args.epochs, on_epoch=lambda: progress.advance(task))
                results[name].append(run)
                console.print(f"{name:13}  seed {seed}  test accuracy {run.accuracy:.2%}", soft_wrap=True)

    config = {
        "sgd_family": SGD_FAMILY,
        "adam_family": ADAM_FAMILY,
        "batch": BATCH,
        "label_smoothing": LABEL_SMOOTHING,
        "epochs": args.epochs,
        "seeds": args.seeds,
        "parameters": sum(p.numel() for p in build_network().parameters()),
    }
    rows = [summarize(name, runs, args.epochs) for name, runs in results.items()]
    console.print(results_table(rows, "\n".join(f"{name}: {value}" for name, value in config.items())))
    console.print(layers_table(rows))
    console.print(compare_with_clovaai(results["AdamP"], results["clovaai AdamP"]))
    plot(results, args.epochs, args.out / "digits.png")
    record = {"environment": environment, "config": config, "rows": rows}
    (args.out / "digits.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"Plot: {args.out / 'digits.png'}   records: {args.out / 'digits.json'}", soft_wrap=True)
    console.print(f"{len(RECIPES) * args.seeds} runs in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
