"""Every backend against the reference in float64: the cases of the tests and of ``python -m fused_adamp verify``.

A case is one parameter with its gradients and options. The optimizer takes a few steps with the backend; before each,
its weight and state are copied to float64 and stepped by the reference, and the results are compared. So a step's error
is seen by itself, in units of the last place of the storage's dtype, and 16-bit storage needs no wider tolerance.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_adamp.adamp import AdamP
from fused_adamp.precision import join
from fused_adamp.reference import Decision, rows_first
from fused_adamp.sgdp import SGDP

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fused_adamp.optimizer import ProjectedOptimizer

__all__ = ["SHAPES", "TOLERANCE", "Case", "Outcome", "cases", "check", "lay_out", "make_gradient"]

_TILE = 32768
"""The CPU backend's tile."""


def shapes(tile: int = _TILE) -> dict[str, tuple[int, ...]]:
    """Edge shapes, by name, for a backend whose tiles have ``tile`` elements."""
    return {
        "scalar": (),
        "empty vector": (0,),
        "empty rows": (0, 5),
        "empty columns": (3, 0),
        "one element": (1,),
        "one by one": (1, 1),
        "vector shorter than a register": (5,),
        "vector of a prime length": (8191,),
        "vector one past a tile": (tile + 1,),
        "vector of many tiles": (3 * tile + 17,),
        "one row": (1, 300),
        "one column": (300, 1),
        "fewer columns than lanes": (40, 3),
        "prime matrix": (127, 131),
        "rows that fill tiles": (3 * tile // 256, 256),
        "rows that leave a tile part empty": (3 * tile // 1111 + 13, 1111),
        "row of exactly a tile": (3, tile),
        "row one past a tile": (2, tile + 1),
        "row of many tiles": (2, 4 * tile + 33),
        "one row of many tiles": (1, 2 * tile + 5),
        "tall": (5 * tile // 8, 2),
        "depthwise convolution": (32, 1, 3, 3),
        "convolution": (16, 8, 3, 3),
        "convolution of many tiles": (tile // 341, 64, 3, 3),
        "five dimensions": (4, 3, 2, 5, 3),
    }


SHAPES = shapes()

LAYOUTS = ("contiguous", "channels_last", "transposed", "gaps", "offset", "gradient transposed")
"""Memory layouts: strides and alignment of the parameter and its gradient, or of the gradient alone."""

# A large learning rate, so that an error of the update is an error of the weight.
ADAMP_OPTIONS: tuple[dict[str, Any], ...] = (
    {"lr": 0.5, "weight_decay": 0.1},
    {"lr": 0.5, "weight_decay": 0.1, "nesterov": True},
    {"lr": 0.5, "weight_decay": 0.1, "maximize": True, "wd_ratio": 0.5},
    {"lr": 0.5, "betas": (0.0, 0.5), "eps": 1e-3},
    {"lr": 0.5, "weight_decay": 0.1, "delta": 0.0},
    {"lr": 0.5, "delta": 1e3},
    {"lr": 50.0, "weight_decay": 0.001},
)
SGDP_OPTIONS: tuple[dict[str, Any], ...] = (
    {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1},
    {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "dampening": 0.25},
    {"lr": 0.5, "momentum": 0.9, "dampening": 0.5, "maximize": True},
    {"lr": 0.5, "momentum": 0.9, "project_buffer": True},
    {"lr": 0.5, "weight_decay": 0.1},
    {"lr": 0.5, "nesterov": True},
    {"lr": 0.5, "momentum": 0.9, "delta": 0.0},
    {"lr": 50.0, "momentum": 0.9, "weight_decay": 0.0001},
)
DTYPES: tuple[tuple[torch.dtype, torch.dtype], ...] = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
)
"""Parameter and gradient, beyond float32 and float64 for both."""

PRECISIONS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.bfloat16, {"state_dtype": torch.float32}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.float64, {"state_dtype": torch.float32}),
    (torch.bfloat16, {"rounding": "remainder"}),
    (torch.bfloat16, {"rounding": "remainder", "state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"rounding": "stochastic"}),
)
"""Parameter and gradient, and how the state is kept."""

TOLERANCE = {torch.float32: 6.0, torch.float64: 16.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Allowed error in units of the last place, by storage dtype.

float32: square root, division, fused multiply and subtraction round four times at the size of the terms, and twice
more where a guess was wrong and the old weight is recovered from the new one (csrc/algorithm.h, weight_correction).
float64: the reference rounds as much as the backend here, and its sums over a view lose a few places more.
16 bits: computed in float32, rounded once (half a unit); a value within float32's error of a tie may go either way.
Rounded stochastically, it may go to either neighbour: a whole unit, and what float32 was off before.
"""
_STOCHASTIC = 1.0 + 2**-10


@dataclass(frozen=True)
class Case:
    """One parameter, how it lies in memory, which decision its gradients force, and the optimizer's options."""

    shape: str
    optimizer: str
    options: dict[str, Any] = field(hash=False)
    decision: Decision = Decision.NONE
    dtype: torch.dtype = torch.float32
    gradient_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    late: bool = False
    """The first three quarters of the rows pass the cosine test, whatever the decision."""
    scale: float = 1.0
    """The factor of the gradient in the step: the inverse of GradScaler's scale."""
    tile: int = _TILE
    """The backend's tile: sizes around it are edges there and ordinary elsewhere."""

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items()).replace("torch.", "")
        dtypes = "/".join(str(d).removeprefix("torch.") for d in (self.dtype, self.gradient_dtype) if d)
        decision = self.decision.name.lower() + " late" * self.late + f" scale={self.scale:g}" * (self.scale != 1)
        return f"{self.optimizer}({options}) {self.shape} {decision} {dtypes} {self.layout}"


@dataclass(frozen=True)
class Outcome:
    """The result of :func:`check`."""

    error: dict[str, float]
    """Worst error of the weight ("p") and of each moment, in units of the last place."""
    allowed: dict[str, float]
    """The largest error that :data:`TOLERANCE` allows for each of them."""
    decisions: list[tuple[Decision, Decision]]
    """Per step, the backend's decision and the reference's."""

    def passed(self) -> bool:
        """Whether all decisions agree and all errors are within the tolerance. A NaN fails."""
        agree = all(ours == theirs for ours, theirs in self.decisions)
        return agree and all(error <= self.allowed[name] for name, error in self.error.items())


def cases(tile: int = _TILE) -> list[Case]:
    """The table: every shape with every decision it allows, then dtypes, layouts and options on a few shapes."""
    table = []
    few = ("prime matrix", "convolution", "row one past a tile", "rows that leave a tile part empty")
    for optimizer, (base, *others) in (("AdamP", ADAMP_OPTIONS), ("SGDP", SGDP_OPTIONS)):
        for shape in SHAPES:
            for decision in possible(SHAPES[shape]):
                table.append(Case(shape, optimizer, base, decision))
                table.append(Case(shape, optimizer, base, decision, torch.float64))
        for shape in few:
            for decision in Decision:
                table += [Case(shape, optimizer, base, decision, *dtypes) for dtypes in DTYPES]
                table += [
                    Case(shape, optimizer, base, decision, dtype, layout=layout)
                    for layout in LAYOUTS[1:]
                    if layout != "channels_last" or len(SHAPES[shape]) == 4
                    for dtype in (torch.float32, torch.bfloat16)
                ]
                table += [Case(shape, optimizer, options, decision) for options in others]
                table += [
                    Case(shape, optimizer, base | options, decision, dtype, layout=layout)
                    for dtype, options in PRECISIONS
                    for layout in ("contiguous", "transposed")
                ]
                table += [Case(shape, optimizer, base, decision, scale=scale) for scale in (2.0**-14, 3.0)]
        for shape, channel_dim in (("prime matrix", 1), ("convolution", 1), ("five dimensions", (0, 1))):
            options = base | {"channel_dim": channel_dim}
            table += [Case(shape, optimizer, options, decision) for decision in Decision]
        for shape in (
            "vector shorter than a register",
            "one column",
            "row of many tiles",
            "one row of many tiles",
            *few,
        ):
            for projection in ("channel", "layer", "none"):
                decision = Decision[projection.upper()] if len(SHAPES[shape]) > 1 else Decision.NONE
                table += [
                    Case(shape, optimizer, base | {"projection": projection}, decision, dtype)
                    for dtype in (torch.float32, torch.bfloat16)
                ]
        for shape in ("rows that leave a tile part empty", "convolution of many tiles"):
            for decision in (Decision.NONE, Decision.LAYER):
                for options in (base, *others):
                    table += [
                        Case(shape, optimizer, options, decision, dtype, late=True)
                        for dtype in (torch.float32, torch.float64)
                    ]
    return [replace(case, tile=tile) for case in table]


def possible(shape: tuple[int, ...]) -> tuple[Decision, ...]:
    """The decisions that a gradient other than zero can lead to."""
    if len(shape) < 2 or math.prod(shape) == 0:
        return (Decision.NONE,)
    channel = (Decision.CHANNEL,) if math.prod(shape[1:]) > 1 else ()
    layer = (Decision.LAYER,) if shape[0] > 1 else ()
    return (Decision.NONE, *channel, *layer)


def make_gradient(p: Tensor, decision: Decision, generator: torch.Generator, *, late: bool = False) -> Tensor:
    """A random gradient of ``p`` (float64) for which the cosine test clearly gives ``decision`` at delta = 0.1.

    With ``late`` the first three quarters of the rows pass the test all the same.
    """
    g = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=generator.device)
    if p.ndim < 2 or p.numel() == 0:
        return g
    rows, weight = g.view(p.size(0), -1), p.reshape(p.size(0), -1)
    if rows.size(1) > 1:  # nothing but zero is orthogonal to a single number
        rows -= (rows * weight).sum(1, keepdim=True) / (weight * weight).sum(1, keepdim=True) * weight
    first = 3 * p.size(0) // 4 if late else 0
    if decision is Decision.NONE:
        rows[first:] += weight[first:]
    if decision is Decision.LAYER:  # along the weight in every other row, and as much against it in the rest
        rows[first::2] += weight[first::2]
        rows[first + 1 :: 2] -= weight[first + 1 :: 2]
        rows[first:] -= (g * p).sum() / (weight[first:] ** 2).sum() * weight[first:]
    return g


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.mT.contiguous().mT if x.ndim == 2 else x.permute(1, 0, *range(2, x.ndim)).contiguous().transpose(0, 1)
    if layout == "gaps":
        return x.new_zeros(*x.shape[:-1], 2 * x.size(-1))[..., ::2].copy_(x)
    if layout == "offset":
        return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    return x.contiguous()


def check(case: Case, backend: str, device: torch.device | str = "cpu", *, steps: int = 3, seed: int = 0) -> Outcome:
    """Runs the case with the backend and compares every step with the reference in float64."""
    # For tensors this small, torch's own threads cost more than they bring.
    threads = torch.get_num_threads()
    with _threads(1):
        return _check(case, backend, device, steps, seed, threads)


def _check(case: Case, backend: str, device: torch.device | str, steps: int, seed: int, threads: int) -> Outcome:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    value = torch.randn(shapes(case.tile)[case.shape], generator=generator, dtype=torch.float64, device="cpu")
    whole = "contiguous" if case.layout == "gradient transposed" else case.layout
    p = torch.nn.Parameter(lay_out(value.to(device, case.dtype), whole))
    optimizer = (AdamP if case.optimizer == "AdamP" else SGDP)([p], **case.options, backend=backend)
    error: dict[str, float] = {}
    allowed: dict[str, float] = {}
    decisions = []
    for _ in range(steps):
        weight = rows_first(p.detach().cpu().double(), case.options.get("channel_dim", 0))
        gradient = make_gradient(weight.contiguous(), case.decision, generator, late=case.late)
        gradient = _rows_back(gradient, p, case.options.get("channel_dim", 0))
        layout = "transposed" if case.layout == "gradient transposed" else case.layout
        p.grad_dtype = case.gradient_dtype or case.dtype
        p.grad = lay_out(gradient.to(device, p.grad_dtype), layout)
        want, scale, decision = _reference(optimizer, p, case.scale)
        if case.scale != 1:
            scale_tensor = torch.tensor([1 / case.scale], dtype=torch.float64, device=device)
            setattr(optimizer, "grad_scale", scale_tensor)  # noqa: B010  # as GradScaler does
        with _threads(threads):
            optimizer.step()
        decisions.append((optimizer.decisions()[p], decision))
        for name, reference in want.items():
            got = rows_first(_stored(optimizer, p, name), case.options.get("channel_dim", 0))
            error[name] = max(error.get(name, 0.0), _ulps(got, reference, scale[name]), key=_nan_last)
            stochastic = case.options.get("rounding") == "stochastic" and got.dtype == torch.bfloat16
            allowed[name] = _STOCHASTIC if stochastic else TOLERANCE[got.dtype]
    return Outcome(error, allowed, decisions)


def _rows_back(g: Tensor, p: Tensor, channel_dim: int | tuple[int, ...]) -> Tensor:
    """Undoes rows_first: the values of ``g`` in the shape of ``p``."""
    whole = torch.empty_like(p, dtype=g.dtype, device=g.device, memory_format=torch.contiguous_format)
    rows_first(whole, channel_dim).copy_(g)
    return whole


def _stored(optimizer: ProjectedOptimizer, p: Tensor, name: str) -> Tensor:
    """The weight, with its remainder if it has one, or the moment of that name."""
    state = optimizer.state.get(p, {})
    if name != "p":
        moment: Tensor = state[name]
        return moment
    return join(p.detach(), state["remainder"]) if "remainder" in state else p.detach()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reference(
    optimizer: ProjectedOptimizer, p: Tensor, factor: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], Decision]:
    """The next step in float64: weight and state by name, the sizes at which they round, and the decision.

    A difference rounds at the size of its terms, not of the result. Their sum is what the same step gives when all
    terms have one sign; a projection subtracts p (p.u) / |p|^2 from u, and p.u rounds at the size |p| |u|.
    """
    (group,) = optimizer.param_groups
    names, state = optimizer.moments(group), optimizer.state.get(p, {})
    assert p.grad is not None, "a case has a gradient"

    def double(x: Tensor) -> Tensor:
        return rows_first(x.to(torch.float64, copy=True), group["channel_dim"])

    weight, gradient = double(_stored(optimizer, p, "p")), double(p.grad) * factor
    moments = [double(state[n]) if n in state else torch.zeros_like(weight) for n in names]
    step = torch.ones((), dtype=torch.float32, device="cpu") + state.get("step", 0)

    def stepped(w: Tensor, g: Tensor, old: list[Tensor], **options: Any) -> tuple[dict[str, Tensor], Decision]:
        results = {"p": w.clone()} | {n: m.clone() for n, m in zip(names, old, strict=True)}
        new_moments = [results[n] for n in names]
        decision = optimizer.reference_step(results["p"], g, new_moments, step, group | options)
        return results, decision

    want, decision = stepped(weight, gradient, moments)
    plain, _ = stepped(weight, gradient, moments, projection="none")
    first, second = [-m.abs() for m in moments[:1]], moments[1:]
    sizes, _ = stepped(weight.abs(), -gradient.abs(), first + second, projection="none", maximize=False)
    if decision:
        view = (weight.size(0) if decision is Decision.CHANNEL else 1, -1)
        length = weight.reshape(view).norm(dim=1, keepdim=True)
        for name, u in (("p", plain["p"] - weight), *((n, plain[n]) for n in names if not want[n].equal(plain[n]))):
            removed = weight.reshape(view).abs() * u.reshape(view).norm(dim=1, keepdim=True) / length
            sizes[name] = sizes[name].abs() + removed.view(weight.shape)
    return want, {name: size.abs() for name, size in sizes.items()}, decision


def _ulps(got: Tensor, want: Tensor, scale: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    info = torch.finfo(got.dtype)
    unit = (scale * info.eps).clamp(min=info.tiny * info.eps)
    return float(((got.double() - want).abs() / unit).max())


def _nan_last(x: float) -> float:
    return math.inf if math.isnan(x) else x
