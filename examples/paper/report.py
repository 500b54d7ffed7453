"""Writes the page of the paper's claims and its plots from the recorded results."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections import Counter
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
import training
from matplotlib.figure import Figure
from scipy import stats
from tasks import TASKS
from toy import GRID, LR, rosenbrock
from training import PAIRS, QUICK, Metric, Plan, Record, Run, Task, Tuning, read_json, write

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

CONFIDENCE = 0.95
COLORS = {"SGD": "tab:orange", "SGDP": "tab:red", "AdamW": "tab:cyan", "AdamP": "tab:blue"}
TOY_COLORS = ("tab:gray", "tab:orange", "tab:green", "tab:red")


class Interval(NamedTuple):
    """The mean of a sample and half the width of its confidence interval by Student's t."""

    mean: float
    half: float


def interval(values: list[float]) -> Interval:
    quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    return Interval(fmean(values), float(quantile * stdev(values) / math.sqrt(len(values))))


def verdict(difference: Interval, higher_is_better: bool) -> str:
    """The interval that holds 0 is no difference; one that ends at 0 holds it."""
    if abs(difference.mean) <= difference.half:
        return "no difference"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


def with_error(value: Interval, sign: str = "") -> str:
    """Two digits of the error, and as many of the mean."""
    decimals = max(0, 1 - math.floor(math.log10(value.half))) if value.half else 2
    return f"{round(value.mean, decimals) + 0.0:{sign}.{decimals}f} ± {value.half:.{decimals}f}"


class Outcome(NamedTuple):
    """A metric's values of the reported seeds, by optimizer, and the difference for each pair."""

    task: Task
    metric: Metric
    values: dict[str, list[float]]
    lr: dict[str, float]
    growth: dict[str, float]
    differences: dict[tuple[str, str], Interval]
    problems: list[str]


def outcome(task: Task, metric: Metric, plan: Plan, records: dict[Run, Record]) -> Outcome:
    """Of the pairs whose runs are all there; a diverged run leaves its pair without a difference."""
    found = Outcome(task, metric, {}, {}, {}, {}, [])
    for pair in PAIRS:
        tuning = training.tune(task, plan, pair, records)
        runs = {name: [Run(name, place, seed) for seed in plan.seeds] for name, place in tuning.best.items()}
        if not runs or any(run not in records for group in runs.values() for run in group):
            found.problems.append(f"{' and '.join(pair)}: not all runs are finished.")
            continue
        found.problems.extend(edges(tuning))
        for name, group in runs.items():
            finished = [records[run] for run in group if records[run]["metrics"] is not None]
            found.lr[name] = group[0].lr
            found.values[name] = [record["metrics"][metric.key] for record in finished]
            found.growth[name] = fmean(record["growth"] for record in finished) if finished else math.nan
            if len(finished) < len(group):
                found.problems.append(f"{name}: {len(group) - len(finished)} of {len(group)} runs diverged.")
        first, second = (found.values[name] for name in pair)
        if len(first) == len(second) == len(plan.seeds):
            found.differences[pair] = interval([b - a for a, b in zip(first, second, strict=True)])
    return found


def edges(tuning: Tuning) -> list[str]:
    ends = {tuning.grid[0]: "lowest", tuning.grid[-1]: "highest"}
    return [
        f"{name}: the best learning rate is the {ends[place]} one of the grid."
        for name, place in tuning.best.items()
        if place in ends
    ]


# The page.


def table(head: list[str], rows: list[list[str]]) -> str:
    first, *others = ("| " + " | ".join(line) + " |" for line in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


def wrapped(text: str) -> str:
    """Paragraphs in lines of at most 120 characters; tables, lists, headings and formulas as they are."""
    parts = (
        part if part[0] in "|#!- " else textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False)
        for part in re.split(r"\n{2,}", text.strip())
    )
    return "\n\n".join(parts) + "\n"


def lemma_section(lemma: dict[str, Any]) -> str:
    if not lemma:
        return "Not run yet."
    by_name = {(c["optimizer"], c["beta"]): c for c in lemma["curves"]}
    rows = []
    for beta in sorted({beta for _, beta in by_name}):
        sgd, sgdp = by_name["SGD", beta], by_name["SGDP", beta]
        ratios = [sgd["predicted_ratio"], sgd["ratio"][-1], sgdp["ratio"][-1]]
        norms = [sgd["norm"][-1], sgdp["norm"][-1]]
        rows.append(
            [f"{beta:g}", *(f"{r:.4g}" for r in ratios), f"{sgd['deviation']:.0e}", *(f"{n:.3f}" for n in norms)]
        )
    head = ["beta", "ratio, predicted", "SGD", "SGDP", "deviation", "norm growth, SGD", "SGDP"]
    return f"""{table(head, rows)}

The ratio is the growth of `|w|²` in {lemma["steps"]:,} steps over the sum of the squared lengths of the updates. The
deviation is that of the growth in one step of SGD from the lemma, over `|w|²`, and the largest of all steps: float64
rounds at 2e-16. With beta = 0.99, a gradient has an effect for hundreds of steps. So the ratio is below its limit by
the part of the growth that is still to come.

![Ratio of growth to squared updates over the steps, and norm, for SGD and SGDP](images/paper-lemma.svg)"""


def toy_section(toy: dict[str, Any]) -> str:
    if not toy:
        return "Not run yet."
    rows = [
        [
            name,
            f"{c['loss'][-1]:.2g}",
            f"{max(c['norm']):.2f}",
            f"{c['norm'][-1]:.2f}",
            f"{1e3 * fmean(c['effective_step'][len(c['norm']) // 2 :]):.2f}",
            f"{c['best_loss']:.1g} at {c['best_lr']:g}",
        ]
        for name, c in toy["curves"].items()
    ]
    head = ["optimizer", "last loss", "largest norm", "last norm", "effective step, mrad", "last loss if tuned"]
    tuned = sorted(toy["curves"], key=lambda name: toy["curves"][name]["best_loss"])
    return f"""{table(head, rows)}

All but the last column are at the learning rate {LR:g}. The effective step is the mean over the second half of the
steps. The last column has for each optimizer the learning rate with the lowest last loss, of {len(GRID)} between
{GRID[0]:g} and {GRID[-1]:g}. So tuned, the order from the lowest loss is: {", ".join(tuned)}.

![Paths on the sphere, norm, effective step and loss of four optimizers on the toy problem](images/paper-toy.svg)"""


def task_section(found: Outcome, plan: Plan) -> str:
    task, metric = found.task, found.metric
    about = metric.note or f"{task.about} Each run has {training.steps_of(task, plan)} steps of {task.batch} examples."
    rows = [
        [
            name,
            f"{found.lr[name]:g}",
            with_error(interval(values)) if len(values) > 1 else "diverged",
            f"{found.growth[name]:.3f}",
        ]
        for name, values in found.values.items()
    ]
    points = [f"- {b} - {a}: {difference_text(found, (a, b))}" for a, b in found.differences]
    points += [f"- {problem}" for problem in found.problems]
    return f"""## {metric.claim}

{about}

{table(["optimizer", "learning rate", metric.name, "norm growth"], rows)}

{chr(10).join(points)}

The paper's {metric.paper}"""


def difference_text(found: Outcome, pair: tuple[str, str]) -> str:
    if pair not in found.differences:
        return "not known"
    difference = found.differences[pair]
    return f"{with_error(difference, '+')}, {verdict(difference, found.metric.higher_is_better)}"


def summary(outcomes: list[Outcome]) -> str:
    rows = [
        [found.metric.claim, found.metric.name, *(difference_text(found, pair) for pair in PAIRS)] for found in outcomes
    ]
    counts = []
    for n, (a, b) in enumerate(PAIRS):
        verdicts = Counter(row[n + 2].rpartition(", ")[2] for row in rows)
        counts.append(f"{b} against {a}: " + ", ".join(f"{word} in {k}" for word, k in sorted(verdicts.items())) + ".")
    tasks = {found.task.name: found for found in outcomes}.values()  # a task with two metrics counts once
    shorter = [found.growth[b] < found.growth[a] for found in tasks for a, b in PAIRS if a in found.growth]
    return f"""{table(["claim", "metric", *(f"{b} - {a}" for a, b in PAIRS)], rows)}

Verdicts of the {len(outcomes)} comparisons of each pair. {" ".join(counts)} Norms grew less with the projection in
{sum(shorter)} of the {len(shorter)} pairs of networks, each optimizer at its own learning rate."""


def page(results: Path, plan: Plan) -> str:
    outcomes = all_outcomes(results, plan)
    contents = [read_json(results / f"{name}.json") for name in TASKS]
    words = "{cpu}, one thread for each run, torch {torch}, Python {python}"
    environments = {words.format(**c["environment"]) for c in contents if c}
    date = max((c["environment"]["date"] for c in contents if c), default="")
    runs = [row for c in contents for row in c.get("runs", [])]
    minutes = sum(row["seconds"] for row in runs) / 60
    grid = range(-plan.reach, plan.reach + 1)
    grids = "; ".join(f"{a}, {b}: " + ", ".join(f"{training.learning_rate(a, n):g}" for n in grid) for a, b in PAIRS)
    quick = "These are the short runs of `--quick`, which say nothing about the claims." if plan is QUICK else ""
    return wrapped(f"""# The paper's claims, run

The claims of [Heo et al., ICLR 2021](https://arxiv.org/abs/2006.08217), run in small: on data that this project makes
or that scikit-learn ships. This page is made from the records in `examples/paper/results`;
`make paper` runs everything again, into `out/paper`.
{quick}

The paper trains large networks on large data sets. These are small ones, trained for seconds. So their values cannot
be compared with the paper's beside them. The page says whether the effect shows in such networks too.

## Result

{summary(outcomes)}

![Differences between the optimizers of each pair, with confidence intervals](images/paper-tasks.svg)

"±" is the {CONFIDENCE:.0%} confidence interval by Student's t over {len(plan.seeds)} seeds. A difference is taken
between runs with the same seed, and so with the same initial weights and the same batches. Where its interval holds 0,
the verdict is "no difference". By chance, one interval in twenty misses the true value, and these are
{len(PAIRS) * len(outcomes)}.

## How the runs are made

The learning rate of each optimizer is tuned alike: both optimizers of a pair have the same grid, whose values differ by
the square root of ten, the same tuning seeds ({", ".join(map(str, plan.tuning_seeds))}), and the best mean of the
validation metric counts, on examples that neither training nor the test uses. The grids are {grids}. Where the best
value is at an edge, one more value is tried on that side for both, up to {plan.widen} times. The intervals do not
contain the chance in this choice.

All else is the same within a pair: momentum 0.9 and weight decay 1e-4 for SGD and SGDP, betas (0.9, 0.999) and weight
decay 0.01 for AdamW and AdamP. By default, SGDP and AdamP apply a tenth of the decay to the weights that they project.
The learning rate rises over the first {training.WARMUP:.0%} of the steps and then falls to zero along a cosine.

Two tasks were changed after a first run of all. Detection had 300 steps, after which single seeds were 30 points
apart; SGDP - SGD was +2.3 ± 2.9 and AdamP - AdamW +5.3 ± 3.0. Retrieval searched among digits that were not trained on,
for which SGD was best at the lowest learning rate; neither pair differed.

Norm growth is `|w|` at the end over `|w|` at the start: the mean over the scale-invariant weights and the seeds.

There were {len(runs)} runs, which took {minutes:.0f} minutes of the workers' time.
{"; ".join(sorted(environments))}; {date}.

## Lemma 2.2: norm growth

Claim: for a scale-invariant weight that is stepped by `w -= lr p` with the momentum `p = beta p + g`,

    |w(t+1)|² = |w(t)|² + lr² |p(t)|² + 2 lr² (sum over k < t of beta^(t-k) |p(k)|²)

In the long run, `|w|²` grows `1 + 2 beta / (1 - beta)` times as much as by updates of the same lengths without
momentum. `examples/paper/lemma.py` derives both.

Run: a layer whose outputs are normalized learns three classes from mini-batches in float64, with torch's SGD and with
SGDP.

{lemma_section(read_json(results / "lemma.json"))}

## The toy problem

Claim: on Rosenbrock's function over a sphere, momentum lengthens the weight and so shortens the effective steps before
the optimum is reached. Weight decay does not prevent the first growth. The projection does.

Run: 200 steps with momentum 0.9 from (-2, 2) to the optimum (1, 1), as on the authors'
[project page](https://clovaai.github.io/AdamP/). It does not give the unit of the angles, the function's factor, the
learning rate and the decay. Those in `examples/paper/toy.py` are chosen so that the norms are about those in its
figures: 3.2 at the end with momentum, 2.5 at the most with decay, and 1.1 with the projection.

{toy_section(read_json(results / "toy.json"))}

{(chr(10) * 2).join(task_section(found, plan) for found in outcomes)}

The paper's values are those of the tables on the authors' [project page](https://clovaai.github.io/AdamP/).""")


def all_outcomes(results: Path, plan: Plan) -> list[Outcome]:
    return [
        outcome(task, metric, plan, training.load_records(results, task, plan))
        for task in TASKS.values()
        for metric in task.metrics
    ]


# The plots.


def lemma_plot(lemma: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curve in sorted(lemma["curves"], key=lambda c: c["optimizer"]):
        name, beta = curve["optimizer"], curve["beta"]
        line = {0.5: ":", 0.9: "--", 0.99: "-"}[beta]
        style = {"color": COLORS[name], "linestyle": line, "label": f"{name}, beta {beta:g}"}
        left.plot(curve["step"], curve["ratio"], **style)
        right.plot(curve["step"], curve["norm"], **style)
        if name == "SGD":
            label = "predicted" if beta == 0.5 else None
            left.axhline(curve["predicted_ratio"], color="black", linewidth=0.8, label=label)
    left.set(yscale="log", title="Growth of $|w|^2$ over the sum of squared updates", xlabel="step", ylabel="ratio")
    right.set(title="Norm of the scale-invariant weight", xlabel="step", ylabel="$|w_t|\\,/\\,|w_0|$")
    finish(figure, [left, right], left)
    return figure


def toy_plot(toy: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 8), layout="constrained")
    (path, norm), (step, loss) = figure.subplots(2, 2)
    psi, phi = np.meshgrid(np.linspace(-2.1, 2.1, 40), np.linspace(-1, 3, 40))
    path.contour(psi, phi, rosenbrock(psi, phi), levels=np.geomspace(0.5, 300, 10), colors="lightgray", linewidths=0.8)
    path.plot(1, 1, marker="*", color="black", markersize=12, linestyle="none", label="optimum")
    for color, (name, curve) in zip(TOY_COLORS, toy["curves"].items(), strict=True):
        path.plot(curve["psi"], curve["phi"], ".-", markevery=4, color=color, linewidth=0.8, markersize=3, label=name)
        for axes, key in ((norm, "norm"), (step, "effective_step"), (loss, "loss")):
            axes.plot(curve[key], color=color)
    path.set(title="Path", xlabel="azimuth", ylabel="elevation", xlim=(-2.1, 2.1), ylim=(-1, 3))
    norm.set(title="Norm", xlabel="step", ylabel="$|w_t|$")
    step.set(title="Effective step", xlabel="step", ylabel="angle (radians)", yscale="log")
    loss.set(title="Loss", xlabel="step", ylabel="loss", yscale="log")
    finish(figure, [norm, step, loss], path)
    return figure


def tasks_plot(outcomes: list[Outcome]) -> Figure:
    """To the right of the line, the optimizer with projection is better."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, found in zip(figure.subplots(2, 3).flat, outcomes, strict=True):
        sign = 1 if found.metric.higher_is_better else -1
        for row, (pair, difference) in enumerate(found.differences.items()):
            axes.errorbar(sign * difference.mean, row, xerr=difference.half, fmt="o", color=COLORS[pair[1]], capsize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        first = axes.get_subplotspec().is_first_col()
        axes.set_yticks(range(len(found.differences)), [f"{b} - {a}" if first else "" for a, b in found.differences])
        label = textwrap.fill("gain in " + found.metric.name.split(" (")[0], 30)
        axes.set(title=found.metric.claim, ylim=(1.5, -0.5), xlabel=label)
        axes.grid(alpha=0.3, axis="x")
    return figure


def finish(figure: Figure, grids: list[Axes], legend: Axes) -> None:
    for axes in grids:
        axes.grid(alpha=0.3)
    figure.legend(*legend.get_legend_handles_labels(), loc="outside upper center", ncols=4)


def write_figure(path: Path, figure: Figure) -> None:
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": path.name}):  # the same plot has the same bytes
        figure.savefig(text, format="svg", metadata={"Date": None})
    write(path, "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines()))


def write_report(results: Path, pages: Path, plan: Plan) -> Path:
    """The page with its plots; returns its path."""
    lemma, toy = read_json(results / "lemma.json"), read_json(results / "toy.json")
    if lemma:
        write_figure(pages / "images" / "paper-lemma.svg", lemma_plot(lemma))
    if toy:
        write_figure(pages / "images" / "paper-toy.svg", toy_plot(toy))
    write_figure(pages / "images" / "paper-tasks.svg", tasks_plot(all_outcomes(results, plan)))
    write(pages / "paper.md", page(results, plan))
    return pages / "paper.md"
