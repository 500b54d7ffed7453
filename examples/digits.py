"""Trains a small residual network on handwritten digits with seven optimizers and shows how the weights' norms change.

The data are the 1797 real 8x8 digits that scikit-learn ships. Every convolution is followed by BatchNorm, so its weight
is scale-invariant: its length |w| does not change what the network computes, only how far a step of given length turns
it. Momentum makes |w| grow, and the longer the weight, the less a step turns it. SGDP and AdamP remove the part of the
step that makes it longer. Compare these columns, which are averages over the convolutions and the seeds:

- norm growth, |w_t| / |w_0|: well above 1 with SGD and AdamW, close to 1 with SGDP and AdamP;
- effective step size, the angle in radians between w_t and w_{t+1}: larger with SGDP than with SGD and with AdamP than
  with AdamW, at equal learning rates. For small steps it is the paper's |w_{t+1}/|w_{t+1}| - w_t/|w_t||, which for
  gradient descent is lr / |w_t|^2 times the gradient at w_t/|w_t|. The table has the mean over the last epoch before
  the learning rate falls;
- projected: the layers projected in more than half of the steps, and the share of the steps over all such layers;
- train loss: the mean over the last epoch. The last two rows train a bfloat16 network: with a remainder AdamP keeps the
  float32 weights, in no more memory than those, and ends where the float32 run does; without, each step rounds the
  weights, which this small network forgives;
- ms: the median time of optimizer.step(). The network is so small that this is mostly the cost of the call.

The learning rate is constant for three quarters of the run, and labels are smoothed so that gradients do not vanish
once the training set is learnt by heart: both would shrink the effective step for reasons that have nothing to do with
the norm. In the last quarter the learning rate falls to zero, so that the test accuracy does not hang on the last step.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import adamp
    import numpy as np
    import torch
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LambdaLR

    import fused_adamp
    from fused_adamp import Decision
    from fused_adamp.backends import choose
except ModuleNotFoundError as error:
    sys.exit(
        f"{error.name} is missing: run `make demo`, or `pip install . && pip install --group demo` in the checkout"
    )

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BATCH = 32
LABEL_SMOOTHING = 0.1
COOLDOWN = 0.25  # part of the steps in which the learning rate falls linearly to zero
WARMUP = 10  # steps left out of the timing: they allocate the state

# One set of hyperparameters per family, so that the projection is all that differs within it. The decay is as small as
# in practice and takes at most 3% off the norms over the run: the growth seen is that of the updates. torch's SGD adds
# it to the gradient, SGDP takes lr * weight_decay / (1 - momentum) off the weight: the same in the long run.
SGD_FAMILY: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
ADAM_FAMILY: dict[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


class Recipe(NamedTuple):
    build: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    color: str
    line: str
    dtype: torch.dtype | None = None  # of the network; None: torch's default


RECIPES = {
    "SGD": Recipe(lambda params: torch.optim.SGD(params, **SGD_FAMILY, fused=True), "tab:orange", "--"),
    "SGDP": Recipe(lambda params: fused_adamp.SGDP(params, **SGD_FAMILY), "tab:red", "-"),
    "AdamW": Recipe(lambda params: torch.optim.AdamW(params, **ADAM_FAMILY, fused=True), "tab:cyan", "--"),
    "AdamP": Recipe(lambda params: fused_adamp.AdamP(params, **ADAM_FAMILY), "tab:blue", "-"),
    "clovaai AdamP": Recipe(lambda params: adamp.AdamP(params, **ADAM_FAMILY), "black", ":"),
    "AdamP bf16 + remainder": Recipe(
        lambda params: fused_adamp.AdamP(params, **ADAM_FAMILY, rounding="remainder"), "tab:green", "-", torch.bfloat16
    ),
    "AdamP bf16": Recipe(lambda params: fused_adamp.AdamP(params, **ADAM_FAMILY), "tab:olive", "-", torch.bfloat16),
}


class Digits(NamedTuple):
    """Images ``(N, 1, 8, 8)`` of mean 0 and deviation 1, labels ``(N,)``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data() -> Digits:
    """The same stratified split, two thirds for training, whatever the seed of the run."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=1 / 3, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x, dtype=torch.get_default_dtype()).reshape(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = map(torch.tensor, split[2:])
    mean, std = train_x.mean(), train_x.std()
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
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def build_network() -> nn.Sequential:
    blocks = OrderedDict(block1=Block(12, 12, stride=1), block2=Block(12, 24, stride=2), block3=Block(24, 24, stride=1))
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(24, 10))
    return nn.Sequential(OrderedDict(stem=conv_bn(1, 12), relu=nn.ReLU(), **blocks, **head))


@dataclass
class Run:
    """Results of one training run; the lists have one entry per step."""

    accuracy: float = 0.0
    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    effective_step: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    decisions: Counter[tuple[str, Decision]] = field(default_factory=Counter)


def train(recipe: Recipe, seed: int, data: Digits, epochs: int, on_epoch: Callable[[], None]) -> Run:
    """Trains one network. Initial weights and batch order depend on the seed alone, not on the optimizer."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    network = build_network().to(recipe.dtype)
    train_x, test_x = data.train_x.to(recipe.dtype), data.test_x.to(recipe.dtype)
    optimizer = recipe.build(network.parameters())
    names = {p: name.removesuffix(".weight") for name, p in network.named_parameters() if p.ndim >= 2}
    invariant = [p for p, name in names.items() if name.endswith("conv")]
    steps = epochs * (len(data.train_y) // BATCH)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (COOLDOWN * steps)))
    run = Run()
    first_norms, directions = lengths_and_directions(invariant)
    for _ in range(epochs):
        shuffled = torch.randperm(len(data.train_y), generator=order)
        for batch in shuffled[: len(shuffled) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            logits = network(train_x[batch]).to(torch.get_default_dtype())
            loss = nn.functional.cross_entropy(logits, data.train_y[batch], label_smoothing=LABEL_SMOOTHING)
            loss.backward()
            run.loss.append(loss.item())
            start = time.perf_counter()
            optimizer.step()
            run.seconds.append(time.perf_counter() - start)
            schedule.step()

            before = directions
            norms, directions = lengths_and_directions(invariant)
            run.norm.append((norms / first_norms).mean().item())
            # From the chord: acos of a cosine next to 1 would keep no digit of so small an angle.
            chords = torch.stack([(new - old).norm() for new, old in zip(directions, before, strict=True)])
            run.effective_step.append((2 * torch.asin(chords / 2)).mean().item())
            if isinstance(optimizer, (fused_adamp.AdamP, fused_adamp.SGDP)):
                decisions = optimizer.decisions()
                run.decisions.update((name, decisions[p]) for p, name in names.items())
        on_epoch()
    network.eval()
    with torch.no_grad():
        run.accuracy = (network(test_x).argmax(dim=1) == data.test_y).double().mean().item()
    return run


def lengths_and_directions(weights: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """``|w|`` of every weight, ``(L,)``, and ``w / |w|``."""
    with torch.no_grad():
        wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
        norms = torch.stack([w.norm() for w in wide])
        return norms, [w / norm for w, norm in zip(wide, norms, strict=True)]


def summarize(name: str, runs: list[Run], epochs: int) -> dict[str, Any]:
    """One optimizer's row of the table, over the runs of all seeds."""
    steps = len(runs[0].norm)
    steady = round(steps * (1 - COOLDOWN))
    last_epoch = slice(max(0, steady - steps // epochs), steady)
    counts = sum((run.decisions for run in runs), Counter())
    return {
        "optimizer": name,
        "test_accuracy": [run.accuracy for run in runs],
        "train_loss": [fmean(run.loss[-(steps // epochs) :]) for run in runs],
        "norm_growth": fmean(run.norm[-1] for run in runs),
        "effective_step_rad": fmean(fmean(run.effective_step[last_epoch]) for run in runs),
        "ms_per_step": 1e3 * median(second for run in runs for second in run.seconds[WARMUP:]),
        "projected": {
            layer: {view.name.lower(): counts[layer, view] / (steps * len(runs)) for view in Decision if view}
            for layer in dict.fromkeys(layer for layer, _ in counts)
        },
    }


def results_table(rows: list[dict[str, Any]], caption: str) -> Table:
    measured = (
        "test accuracy %\nmean (min-max)",
        "train loss\nmean (min-max)",
        "norm growth\n|w_T| / |w_0|",
        "effective step\nmrad",
        "ms per\nstep",
    )
    headers = ("optimizer", *measured, "projected layers,\nshare of steps")
    table = Table(*headers, title="Digits, over all seeds", caption=caption, caption_justify="left")
    for row in rows:
        accuracy = [100 * a for a in row["test_accuracy"]]
        projected = []
        for kind in ("conv", "linear"):
            shares = [sum(views.values()) for layer, views in row["projected"].items() if layer.endswith(kind)]
            if shares:
                projected.append(f"{sum(s > 0.5 for s in shares)}/{len(shares)} {kind} {fmean(shares):.0%}")
        table.add_row(
            row["optimizer"],
            f"{fmean(accuracy):.2f} ({min(accuracy):.2f}-{max(accuracy):.2f})",
            "{:.4f} ({:.4f}-{:.4f})".format(fmean(row["train_loss"]), min(row["train_loss"]), max(row["train_loss"])),
            f"{row['norm_growth']:.3f}",
            f"{1e3 * row['effective_step_rad']:5.2f}",
            f"{row['ms_per_step']:.3f}",
            ", ".join(projected) or "-",
        )
    return table


def layers_table(rows: list[dict[str, Any]]) -> Table:
    rows = [row for row in rows if row["projected"]]
    table = Table("layer", title="Share of steps projected: channel + layer view")
    for row in rows:
        table.add_column(row["optimizer"], justify="right")
    for layer in rows[0]["projected"]:
        views = [row["projected"][layer] for row in rows]
        table.add_row(layer, *(f"{view['channel']:.1%} + {view['layer']:.1%}" for view in views))
    return table


def compare_with_clovaai(ours: list[Run], theirs: list[Run]) -> str:
    """Both follow one trajectory up to rounding: for how many steps, and what that makes of the accuracy."""
    pairs = list(zip(ours, theirs, strict=True))
    points = ", ".join(f"{100 * (a.accuracy - b.accuracy):+.2f}" for a, b in pairs)
    equal = [np.isclose(a.norm, b.norm, rtol=1e-6, atol=0) for a, b in pairs]
    together = ", ".join(str(len(e) if e.all() else e.argmin()) for e in equal)
    return (
        f"AdamP minus clovaai's AdamP, by seed: accuracy {points} points. Their norms agree to 1e-6 for the first "
        f"{together} of {len(equal[0])} steps. In float32 rounding sooner or later moves a ReLU across zero, and from "
        "there on they differ as two seeds do; with --float64 they stay together."
    )


def plot(results: dict[str, list[Run]], epochs: int, path: Path) -> None:
    """Means over the seeds with the range between them shaded, 1200 x 500 pixels."""
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    steps = len(results["SGD"][0].norm)
    left, right = figure.subplots(1, 2, sharex=True)
    for name, runs in results.items():
        norm = np.array([run.norm for run in runs])
        # Single steps scatter too much to compare curves by eye: one point per epoch, the mean of its steps.
        effective = np.array([run.effective_step for run in runs]).reshape(len(runs), epochs, -1).mean(axis=2)
        middles = (np.arange(epochs) + 0.5) * steps / epochs
        for axes, x, y in ((left, np.arange(1, steps + 1), norm), (right, middles, effective)):
            color, line = RECIPES[name].color, RECIPES[name].line
            axes.plot(x, y.mean(axis=0), color=color, linestyle=line, linewidth=2, label=name)
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, linewidth=0)
    left.set(title="Norm of the scale-invariant weights", ylabel="$|w_t|\\,/\\,|w_0|$ (ratio)")
    right.set(title="Effective step size, mean of each epoch", ylabel="angle between $w_t$ and $w_{t+1}$ (radians)")
    right.set_yscale("log")
    for axes in (left, right):
        axes.axvspan((1 - COOLDOWN) * steps, steps, color="gray", alpha=0.1, linewidth=0, label="learning rate falls")
        axes.set(xlabel="optimizer step", xlim=(0, steps))
        axes.grid(alpha=0.3, which="both")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=(len(results) + 2) // 2)
    figure.savefig(path)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds (default 3)")
    parser.add_argument("--epochs", type=positive, default=8, help="passes over the training set (default 8)")
    parser.add_argument("--threads", type=positive, default=1, help="for torch (default 1: the network is small)")
    parser.add_argument("--float64", action="store_true", help="train in double precision")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for plot and JSON (default out)")
    return parser.parse_args()


def main() -> None:
    started = time.perf_counter()
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.set_default_dtype(torch.float64 if args.float64 else torch.float32)
    # A log file has no width of its own, and the usual 80 columns would break the table.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    environment = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_adamp": fused_adamp.__version__,
        "fused_adamp backend": choose(torch.device("cpu"), backend=None, fused=None, foreach=None).name,
    }
    config = {
        "SGD, SGDP": SGD_FAMILY,
        "AdamW, AdamP": ADAM_FAMILY,
        "epochs": args.epochs,
        "seeds": args.seeds,
        "batch": BATCH,
        "label smoothing": LABEL_SMOOTHING,
        "weights": sum(p.numel() for p in build_network().parameters()),
        "dtype": str(torch.get_default_dtype()),
    }
    console.print(", ".join(f"{name} {value}" for name, value in environment.items()))

    data = load_data()
    results: dict[str, list[Run]] = {name: [] for name in RECIPES}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(RECIPES) * args.seeds * args.epochs)
        for name, recipe in RECIPES.items():
            for seed in range(args.seeds):
                progress.update(task, description=f"{name}, seed {seed}")
                run = train(recipe, seed, data, args.epochs, on_epoch=lambda: progress.advance(task))
                results[name].append(run)
                console.print(f"{name:13}  seed {seed}  test accuracy {run.accuracy:.2%}")

    rows = [summarize(name, runs, args.epochs) for name, runs in results.items()]
    console.print(results_table(rows, "\n".join(f"{name}: {value}" for name, value in config.items())))
    console.print(layers_table(rows))
    console.print(compare_with_clovaai(results["AdamP"], results["clovaai AdamP"]))
    image, record = args.out / "digits.png", args.out / "digits.json"
    plot(results, args.epochs, image)
    record.write_text(json.dumps({"environment": environment, "config": config, "rows": rows}, indent=2) + "\n")
    console.print(f"Plot: {image}  Records: {record}", soft_wrap=True)
    console.print(f"{len(RECIPES) * args.seeds} trainings in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
