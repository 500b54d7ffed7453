"""``python -m fused_adamp bench``: steps on the user's model against torch's optimizer of the same family."""

from __future__ import annotations

import ast
import importlib
import os
import platform
import statistics
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_adamp.adamp import AdamP
from fused_adamp.commands import Progress, RefusedError
from fused_adamp.options import chosen
from fused_adamp.sgdp import SGDP

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["bench"]

_WARM_UP = 3
_COPY = 1 << 28
"""Bytes that are copied to find what the memory can do; no cache should hold them."""
_BAR = 40
_DISTURBED = 1.25
"""If a side's median is more than this times its best round, other programs have slowed it down."""


class Family(NamedTuple):
    """Our optimizer, torch's, the options that both have, and those that are set unless the user sets them."""

    ours: Any
    theirs: Any
    common: tuple[str, ...]
    defaults: dict[str, Any]


_LR = {"lr": 1e-8}
"""The time does not depend on it, and with so small a one the weights stay what the cosine test says of them."""
_FAMILIES = {
    "adamp": Family(AdamP, torch.optim.AdamW, ("lr", "betas", "eps", "weight_decay", "maximize"), _LR),
    "sgdp": Family(
        SGDP,
        torch.optim.SGD,
        ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
        _LR | {"momentum": 0.9},
    ),
}


class Side:
    """An optimizer with parameters, gradients and state of its own."""

    def __init__(self, name: str, make: Any, params: list[Tensor], options: dict[str, Any], clip: Any = None) -> None:
        self.name, self.clip = name, clip
        self.params: list[Tensor] = [nn.Parameter(p.detach().clone()) for p in params]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        try:
            self.optimizer = make(self.params, **options)
            self.step()
        except (RuntimeError, TypeError, ValueError) as error:
            raise RefusedError(f"{name}: {error}") from error

    def step(self) -> None:
        """What is timed."""
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        self.optimizer.step()

    def give(self, grads: list[Tensor]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            assert p.grad is not None
            p.grad.copy_(g)

    def nbytes(self, *, clips: bool) -> int:
        """Bytes that a step cannot avoid: it reads gradients, and once more for their norm; reads and writes the rest.

        28 per parameter with two float32 moments, 20 with one.
        """
        state = [t for of in self.optimizer.state.values() for t in of.values() if isinstance(t, Tensor) and t.ndim]
        moved = sum(t.nbytes for t in (*self.params, *state))
        return 2 * moved + sum(p.nbytes for p in self.params) * (2 if clips else 1)


class Row(NamedTuple):
    """A line of the table: milliseconds (the best, percentiles), the median of the rounds' ratios, and GB/s."""

    name: str
    gradients: str
    best: float
    ms: tuple[float, float, float]
    ratio: float | None
    gbps: float
    projected: str


def bench(model: str, optimizer: str, settings: Sequence[str], *, device: str, rounds: int, plot: str | None) -> int:
    """Prints the times of both optimizers on the model's parameters, with random gradients and with projected ones."""
    if plot is not None:
        _check_plot(plot)
    options = dict(map(_setting, settings))
    family, progress = _FAMILIES[optimizer], Progress()
    if unknown := sorted(options.keys() - chosen(family.ours.options).keys()):
        raise RefusedError(f"{family.ours.__name__} has no option {unknown[0]!r}: {', '.join(family.ours.options)}")
    options = family.defaults | options
    shared = {name: value for name, value in options.items() if name in family.common}
    limit = options.get("max_grad_norm")
    params = _parameters(model, device)
    theirs = f"torch.optim.{family.theirs.__name__}"
    sides = [
        Side(f"{theirs}(fused=True)", family.theirs, params, shared | {"fused": True}, limit),
        Side(f"fused_adamp.{family.ours.__name__}", family.ours, params, options),
    ]
    where = params[0].device
    count, threads = sum(p.numel() for p in params), torch.get_num_threads()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()}, {threads} threads"
    backends = "+".join(dict.fromkeys(bucket.key.backend.name for bucket in sides[1].optimizer.buckets))
    print(f"{len(params)} tensors, {count / 1e6:.2f} million parameters on {where} ({name}), torch {torch.__version__}")
    print(f"options {options}, backend {backends}; {rounds} rounds of one step each, in turns\n")
    rows = []
    for gradients in ("random", "orthogonal"):
        grads = [_gradient(p, orthogonal=gradients == "orthogonal") for p in params]
        for side in sides:
            side.give(grads)
        rows += _rows(sides, gradients, rounds, progress, clips=limit is not None)
    copy = _copy_gbps(where)
    progress.clear()
    print("\n".join([*_table(rows, sides[0].name), "", *_chart(rows, copy)]))
    if plot is not None:
        _draw(rows, copy, plot)
        print(f"\nchart written to {plot}")
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """``name=value``; the value is Python's, a dtype such as torch.bfloat16, or a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise RefusedError(f"--set {text} is not OPTION=VALUE: write for instance --set weight_decay=0.01")
    if isinstance(dtype := getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        return name, dtype
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _parameters(target: str, device: str) -> list[Tensor]:
    """The parameters that train of what the user's function returns."""
    module, colon, function = target.partition(":")
    if not (module and colon and function):
        raise RefusedError(f"{target!r} is not module:function, such as train:build_model for build_model of train.py")
    try:
        made = getattr(importlib.import_module(module), function)()
        made = made.to(device) if isinstance(made, nn.Module) else made
        given = made.parameters() if isinstance(made, nn.Module) else made
        params = [p.to(device) for p in given if isinstance(p, Tensor) and p.requires_grad]
    except Exception as error:
        raise RefusedError(f"{target} on {device}: {type(error).__name__}: {error}") from error
    if not params:
        raise RefusedError(f"{target} returned no parameters that train: return the model, or a list of its parameters")
    return params


@torch.no_grad()
def _gradient(p: Tensor, *, orthogonal: bool) -> Tensor:
    """A random gradient. With ``orthogonal``, each row is orthogonal to the weight's row, so that it is projected."""
    g = torch.randn_like(p, dtype=torch.float32)
    if orthogonal and p.ndim > 1 and p.numel():
        rows, weight = g.flatten(1), p.detach().float().flatten(1)
        dots = (rows * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True).clamp(min=1e-30)
        g = (rows - dots * weight).view(p.shape)
    return g.to(p.dtype)


def _rows(sides: list[Side], gradients: str, rounds: int, progress: Progress, *, clips: bool) -> list[Row]:
    """Times the sides in turns, so that whatever else the machine does disturbs both."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(_WARM_UP + rounds):
        progress.show(f"{gradients} gradients: round {number + 1} of {_WARM_UP + rounds}")
        for side, of in zip(sides, times, strict=True):
            of.append(_seconds(side))
    rows = []
    for side, of in zip(sides, times, strict=True):
        ms = [1e3 * seconds for seconds in of[_WARM_UP:]]
        ours = isinstance(side.optimizer, (AdamP, SGDP))
        pairs = zip(of[_WARM_UP:], times[0][_WARM_UP:], strict=True)
        decisions = side.optimizer.decisions() if ours else {}
        spread = statistics.quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else ms * 9
        rows.append(
            Row(
                side.name,
                gradients,
                min(ms),
                (spread[1], statistics.median(ms), spread[7]),
                statistics.median(mine / theirs for mine, theirs in pairs) if ours else None,
                side.nbytes(clips=clips) / statistics.median(ms) / 1e6,
                f"{sum(map(bool, decisions.values()))} of {len(decisions)}" if ours else "",
            )
        )
    return rows


def _seconds(side: Side) -> float:
    cuda = side.params[0].device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = perf_counter()
    side.step()
    if cuda:
        torch.cuda.synchronize()
    return perf_counter() - start


def _copy_gbps(device: torch.device) -> float:
    """What the memory can do: GB/s read and written by a copy."""
    source = torch.ones(_COPY // 4, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(6):  # the first finds its memory
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return 2 * _COPY / statistics.median(times[1:]) / 1e9


def _table(rows: list[Row], peer: str) -> list[str]:
    width = max(len(row.name) for row in rows)
    lines = [
        f"{'':<{width}}  {'gradients':<10} {'ms p20':>9} {'median':>9} {'p80':>9} {'ratio':>6} {'GB/s':>7}  projected"
    ]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        ms = " ".join(f"{value:9.3f}" for value in row.ms)
        mark = "*" if row.ms[1] > _DISTURBED * row.best else " "
        line = f"{row.name:<{width}}  {row.gradients:<10} {ms}{mark}{ratio:>6} {row.gbps:7.1f}  {row.projected}"
        lines.append(line.rstrip())
    lines.append(f"ratio: time over that of {peer}, median over the rounds")
    if any(row.ms[1] > _DISTURBED * row.best for row in rows):
        lines.append(f"*: disturbed, the median is over {_DISTURBED} times the best round; repeat on an idle machine")
    return lines


def _bars(rows: list[Row], copy: float) -> dict[str, float]:
    return {"copy": copy} | {f"{row.name}, {row.gradients}": row.gbps for row in rows}


def _chart(rows: list[Row], copy: float) -> list[str]:
    bars = _bars(rows, copy)
    width, most = max(map(len, bars)), max(bars.values())
    lines = [f"{name:<{width}}  {'█' * max(1, round(_BAR * gbps / most))} {gbps:.1f}" for name, gbps in bars.items()]
    return ["GB/s, each tensor read and written once (a cache may make a step faster than a copy)", *lines]


def _check_plot(path: str) -> None:
    """Before anything is timed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise RefusedError(
            "--plot needs matplotlib, which is missing: pip install matplotlib, or leave out --plot for a chart in text"
        ) from error
    allowed = FigureCanvasAgg.get_supported_filetypes()
    if (ending := os.path.splitext(path)[1][1:].lower()) not in allowed:
        raise RefusedError(f"--plot {path}: {ending!r} is not an image that matplotlib writes: {', '.join(allowed)}")
    if not os.path.isdir(folder := os.path.dirname(path) or "."):
        raise RefusedError(f"--plot {path}: there is no folder {folder!r}")


def _draw(rows: list[Row], copy: float, path: str) -> None:
    from matplotlib.figure import Figure

    bars = _bars(rows, copy)
    figure = Figure(figsize=(9, 0.6 * len(bars) + 1), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([*bars], [*bars.values()], color=["gray", *(["tab:cyan", "tab:blue"] * len(rows))[: len(rows)]])
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s, each tensor read and written once")
    figure.savefig(path)
