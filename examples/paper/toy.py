"""The paper's toy problem: Rosenbrock's function on a sphere, which makes it scale-invariant.

The weight is a point in space. The function reads two angles of it, not its length r: the azimuth psi and the elevation
phi, both in units of half a radian, so that the function's usual domain fits a hemisphere. The paper's project page
gives the kind of function, start (-2, 2), optimum (1, 1), length 1 and 200 steps. The unit of the angles, the factor
VALLEY, the learning rates and the decay are chosen here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fused_adamp

STEPS = 200
MOMENTUM = 0.9
UNIT = 0.5  # of the angles, in radians
VALLEY = 10  # how steep the walls of the valley are
LR = 5e-4  # of the curves: with it, the norms end about where those of the paper's figures do
GRID = [float(f"{10 ** (n / 4):.3g}") for n in range(-20, -7)]  # learning rates to choose from
CURVES: dict[str, dict[str, Any]] = {
    "GD without momentum": {"optimizer": torch.optim.SGD},
    "GD with momentum": {"optimizer": torch.optim.SGD, "momentum": MOMENTUM},
    "GD with momentum and weight decay": {"optimizer": torch.optim.SGD, "momentum": MOMENTUM, "weight_decay": 2.0},
    "SGDP": {"optimizer": fused_adamp.SGDP, "momentum": MOMENTUM},
}


def rosenbrock(psi: Any, phi: Any) -> Any:
    return (1 - psi) ** 2 + VALLEY * (phi - psi**2) ** 2


def angles(w: Tensor) -> tuple[Tensor, Tensor]:
    x, y, z = w.unbind(dim=-1)
    return torch.atan2(y, x) / UNIT, torch.asin(z / w.norm(dim=-1)) / UNIT


def point(psi: float, phi: float) -> Tensor:
    """Of length 1, as a weight with one output channel."""
    a, b = torch.tensor([psi, phi], dtype=torch.float64) * UNIT
    return torch.stack([b.cos() * a.cos(), b.cos() * a.sin(), b.sin()]).reshape(1, 3)


def descend(optimizer: type[torch.optim.Optimizer], lr: float = LR, **options: float) -> dict[str, Any]:
    w = point(-2, 2).requires_grad_()
    stepper = optimizer([w], lr=lr, **options)
    curve: dict[str, Any] = {"psi": [], "phi": [], "loss": [], "norm": [], "effective_step": []}
    for _ in range(STEPS):
        psi, phi = angles(w)
        loss = rosenbrock(psi, phi).sum()
        stepper.zero_grad()
        loss.backward()
        old = w.detach().clone()
        stepper.step()
        chord = (w.detach() / w.norm() - old / old.norm()).norm().item()
        row = psi.item(), phi.item(), loss.item(), old.norm().item(), chord
        for values, value in zip(curve.values(), row, strict=True):
            values.append(float(f"{value:.5g}"))
    return curve


def measure() -> dict[str, Any]:
    """The curves at one learning rate; and each one's learning rate with the lowest loss at the end."""
    curves = {name: descend(**options) for name, options in CURVES.items()}
    for name, options in CURVES.items():
        ends = {lr: descend(lr=lr, **options)["loss"][-1] for lr in GRID}
        curves[name]["best_lr"] = min(ends, key=lambda lr: (not math.isfinite(ends[lr]), ends[lr]))
        curves[name]["best_loss"] = ends[curves[name]["best_lr"]]
    return {"curves": curves}
