"""Tables and figures of docs/large-models.md, from the results of large_models.py."""

from __future__ import annotations

import math
import re
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from gpt import NORMALIZED, NORMS, kind_of
from report import interval
from training import write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Results = dict[str, Any]

KINDS = ("embedding", "query", "key", "value", "out", "up", "down", "head")
SETTINGS = {
    "embedding": "`none`",
    "query": "`auto` with QK-norm, else `none`",
    "key": "`auto` with QK-norm, else `none`",
    "value": "`auto` with sandwich norm, else `none`",
    "out": "`auto` with sandwich norm, else `none`",
    "up": "`none`",
    "down": "`auto` with sandwich norm, else `none`",
    "head": "`none`",
}
TITLES = {"pre": "pre-norm", "qk": "pre-norm and QK-norm", "sandwich": "sandwich norm and QK-norm"}
WD_RATIO = 0.1
CHANCE = math.erf(0.1 / math.sqrt(2))  # P(|N(0, 1)| < delta)
CHANCE_MEDIAN = 0.6745 / 0.1  # of |N(0, 1)|, over delta


def runs_of(results: Results, norms: str, optimizer: str, other: tuple[float, float] | None = None) -> list[Results]:
    """The recorded runs, by seed; of another learning rate and decay if given."""
    settings = results["settings"]
    lr, decay = other or (settings["lr"], settings["decay"])
    name = f"{norms}, {optimizer}, lr {lr:g}, decay {decay:g}, seed"
    return [results["runs"][f"{name} {seed}"] for seed in range(settings["seeds"])]


def weights_of(runs: list[Results], *kinds: str) -> list[Results]:
    return [w for run in runs for name, w in run["weights"].items() if kind_of(name) in kinds]


def mean_over(weights: list[Results], value: str, phase: int | None = None) -> float:
    values = [w[value] if phase is None else [w[value][phase]] for w in weights]
    return fmean(v for phases in values for v in phases)


def table(*rows: tuple[str, ...]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def percent(share: float) -> str:
    return "0%" if share == 0 else "100%" if share == 1 else f"{100 * share:.1f}%"


def difference(ours: list[Results], theirs: list[Results]) -> tuple[float, float]:
    """Mean of the differences between runs of the same seed, and half of its 95% interval."""
    pairs = [a["validation"] - b["validation"] for a, b in zip(ours, theirs, strict=True)]
    return interval(pairs)


def verdict(mean: float, half: float) -> str:
    word = "no difference" if abs(mean) <= half else "lower" if mean < 0 else "higher"
    return f"{mean:+.4f} ± {half:.4f}: {word}"


# Tables.


def decisions(results: Results) -> str:
    rows: list[tuple[str, ...]] = [("weight", *(TITLES[norms] for norms in NORMS), "`projection`")]
    for kind in KINDS:
        cells = []
        for norms in NORMS:
            weights = weights_of(runs_of(results, norms, "AdamP"), kind)
            views = {view: mean_over(weights, view) for view in ("channel", "layer")}
            cell = " and ".join(f"{view} in {percent(share)}" for view, share in views.items() if share) or "never"
            cells.append(f"**{cell}**" if kind in NORMALIZED[norms] else cell)
        rows.append((kind, *cells, SETTINGS[kind]))
    return table(*rows, ("gains of norms", *["never tested"] * len(NORMS), "any"))


def losses(results: Results) -> str:
    rows: list[tuple[str, ...]] = [
        ("norms", "lr", "decay", "AdamW", "AdamP", "AdamP minus AdamW", "chosen minus AdamP")
    ]
    settings = results["settings"]
    cases = [(norms, settings["lr"], settings["decay"]) for norms in NORMS]
    cases += [(NORMS[-1], *other) for other in settings["others"]]
    for norms, *other in cases:
        w, p = (runs_of(results, norms, name, tuple(other)) for name in ("AdamW", "AdamP"))
        means = [f"{fmean(run['validation'] for run in runs):.4f}" for runs in (w, p)]
        chosen = "not run"
        if len(rows) <= len(NORMS):
            chosen = verdict(*difference(runs_of(results, norms, unprojected(norms)), p))
        rows.append((TITLES[norms], *(f"{x:g}" for x in other), *means, verdict(*difference(p, w)), chosen))
    return table(*rows, best(results))


def best(results: Results) -> tuple[str, ...]:
    """The row of the model with the most norms in which each optimizer has its best learning rate."""
    settings, norms = results["settings"], NORMS[-1]
    lrs = [settings["lr"], *(lr for lr, decay in settings["others"] if decay == settings["decay"])]
    chosen = {}
    for name in ("AdamW", "AdamP"):
        tried = {lr: runs_of(results, norms, name, (lr, settings["decay"])) for lr in lrs}
        chosen[name] = min(tried.items(), key=lambda item: fmean(run["validation"] for run in item[1]))
    (w_lr, w), (p_lr, p) = chosen.values()
    means = [f"{fmean(run['validation'] for run in runs):.4f}" for runs in (w, p)]
    label = f"{w_lr:g} and {p_lr:g}"
    return TITLES[norms], label, f"{settings['decay']:g}", *means, verdict(*difference(p, w)), "not run"


def unprojected(norms: str) -> str:
    """The optimizer that leaves alone what the test finds by chance: AdamW where no weight is before a norm."""
    return "AdamP chosen" if NORMALIZED[norms] else "AdamW"


def chance(results: Results) -> str:
    rows: list[tuple[str, ...]] = [("shape", "channel view", "predicted", "either view", "predicted")]
    for name, rates in results["runs"].items():
        if name.startswith("chance "):
            shape = name.removeprefix("chance ")
            channel = CHANCE ** int(shape.split("x")[0])
            either = rates["channel"] + rates["layer"]
            rows.append((shape, f"{rates['channel']:.2%}", f"{channel:.2%}", f"{either:.2%}", f"{CHANCE:.2%}"))
    return table(*rows)


def by_chance(results: Results) -> str:
    """The weights that no norm follows, over all three models."""
    rows: list[tuple[str, ...]] = [("weight", "projected, by quarter", "radial part", "mean decay", "norm")]
    for kind in KINDS:
        cases = [norms for norms in NORMS if kind not in NORMALIZED[norms]]
        weights = [w for norms in cases for w in weights_of(runs_of(results, norms, "AdamP"), kind)]
        quarters = [sum(mean_over(weights, view, i) for view in ("channel", "layer")) for i in range(4)]
        others = [w for norms in cases for w in weights_of(runs_of(results, norms, unprojected(norms)), kind)]
        norm = fmean(a["norm"][-1] / b["norm"][-1] for a, b in zip(weights, others, strict=True))
        numbers = mean_over(weights, "radial"), 1 - (1 - WD_RATIO) * fmean(quarters), norm
        rows.append((kind, ", ".join(map(percent, quarters)), *(f"{number:.3f}" for number in numbers)))
    return table(*rows)


def lengths(results: Results) -> str:
    """The weights that a norm follows: length at the end, over that at the start, and turn per step."""
    rows: list[tuple[str, ...]] = [
        ("norms", "lr", "decay", "norm, AdamW", "norm, AdamP", "turn, AdamW", "turn, AdamP", "radial part")
    ]
    settings = results["settings"]
    cases = [(norms, settings["lr"], settings["decay"]) for norms in NORMS if NORMALIZED[norms]]
    cases += [(NORMS[-1], *other) for other in settings["others"]]
    for norms, *other in cases:
        w, p = (
            weights_of(runs_of(results, norms, name, tuple(other)), *NORMALIZED[norms]) for name in ("AdamW", "AdamP")
        )
        growth = [f"{fmean(x['norm'][-1] / x['norm'][0] for x in weights):.2f}" for weights in (w, p)]
        turns = [f"{1e3 * mean_over(weights, 'turn'):.1f}" for weights in (w, p)]
        numbers = [f"{x:g}" for x in other]
        rows.append((TITLES[norms], *numbers, *growth, *turns, f"{mean_over(p, 'radial'):.2f}"))
    return table(*rows)


def walks(results: Results) -> str:
    """Measured, over what the equilibrium's formulas give for lr = 0.01, decay 1 and 4096 elements."""
    rows: list[tuple[str, ...]] = [("optimizer", "norm", "predicted", "turn per step, mrad", "predicted")]
    for name, ratio in (("AdamW", 1 / 19), ("0.1", 0.1), ("1/19", 1 / 19)):
        walk = results["runs"][f"walk {name}"]
        title = name if name == "AdamW" else f"AdamP, `wd_ratio={name}`"
        norm, turn = math.sqrt(1e-2 * 4096 / (2 * 19 * ratio)), math.sqrt(2e-2 * ratio)
        rows.append((title, f"{walk['norm']:.2f}", f"{norm:.2f}", f"{1e3 * walk['turn']:.1f}", f"{1e3 * turn:.1f}"))
    return table(*rows)


def setting(results: Results) -> str:
    s = results["settings"]
    return (
        f"Width {s['width']}, {s['depth']} blocks, {s['heads']} heads, {s['context']} bytes of context, batches of "
        f"{s['batch']}, {s['steps']} steps, {s['seeds']} seeds, betas (0.9, 0.95). The learning rate rises for a tenth "
        f"of the steps to {s['lr']:g} and falls along a cosine to a tenth of that. torch "
        f"{results['environment']['torch'].partition('+')[0]}, one thread."
    )


TABLES = {function.__name__: function for function in (decisions, losses, chance, by_chance, lengths, walks, setting)}


def filled(text: str, results: Results) -> str:
    """The page's text with every part between ``<!-- name -->`` and ``<!-- /name -->`` made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        parts = re.split(f"(?s){begin}.*?{end}", text)
        if len(parts) != 2:
            raise ValueError(f"the page has {len(parts) - 1} parts between {begin} and {end}: leave it one")
        text = f"{begin}\n{make(results)}\n{end}".join(parts)
    return text


# Figures.


def curves(results: Results, norms: str) -> Iterator[tuple[str, list[float]]]:
    """Of each kind of weight, the median cosine of the layer view in every phase, over its threshold."""
    runs = runs_of(results, norms, "AdamP")
    for kind in KINDS:
        weights = weights_of(runs, kind)
        phases = len(weights[0]["layer_cosine"])
        yield kind, [median(w["layer_cosine"][phase] for w in weights) for phase in range(phases)]


def draw_cosines(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, len(NORMS), sharey=True)
    for axes, norms in zip(panels, NORMS, strict=True):
        for i, (kind, values) in enumerate(curves(results, norms)):
            marker = "o" if kind in NORMALIZED[norms] else "s"
            axes.plot(range(1, len(values) + 1), values, marker=marker, color=f"C{i}", label=kind)
        axes.axhline(1, color="black", linewidth=1.5)
        axes.axhline(CHANCE_MEDIAN, color="gray", linewidth=1, linestyle="--")
        axes.annotate("threshold: projected below", (1, 0.7), va="top", fontsize=9)
        axes.annotate("median of random weights", (1, 0.85 * CHANCE_MEDIAN), va="top", color="gray", fontsize=9)
        axes.set(title=TITLES[norms], xlabel="quarter of training", yscale="log", xticks=range(1, len(values) + 1))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("cosine of the layer view over its threshold")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(KINDS))
    save(figure, path)


def draw_lengths(results: Results, path: Path) -> None:
    """The scale-invariant weights of the model with the most norms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    norms = NORMS[-1]
    settings = results["settings"]
    for (lr, decay), line in (((settings["lr"], settings["decay"]), "-"), (settings["others"][-1], "--")):
        for optimizer, color in (("AdamW", "tab:orange"), ("AdamP", "tab:blue")):
            weights = weights_of(runs_of(results, norms, optimizer, (lr, decay)), *NORMALIZED[norms])
            count = len(weights[0]["norm"])
            style = {"color": color, "linestyle": line, "marker": "o", "label": f"{optimizer}, decay {decay:g}"}
            growth = [fmean(w["norm"][i] / w["norm"][0] for w in weights) for i in range(count)]
            left.plot(range(count), growth, **style)
            turns = [1e3 * mean_over(weights, "turn", phase) for phase in range(count - 1)]
            right.plot(range(1, count), turns, **style)
    left.set(title="Norm of the weights before a norm", xlabel="quarters trained", ylabel="norm over that at the start")
    right.set(title="Turn per step, median of each quarter", xlabel="quarter of training", ylabel="turn (mrad)")
    left.set_xticks(range(count))
    right.set(yscale="log", xticks=range(1, count))
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """As SVG with neither date nor random names in it."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})


def draw(results: Results, page: Path, images: Path) -> None:
    """Fills in the page's tables and draws its figures."""
    write(page, filled(page.read_text(), results))
    draw_cosines(results, images / "large-models-cosines.svg")
    draw_lengths(results, images / "large-models-lengths.svg")
