"""Lemma 2.2 of the paper: how much momentum lengthens a scale-invariant weight.

Gradient descent with momentum steps by w(t+1) = w(t) - lr p(t), where p(t) = beta p(t-1) + g(t). The gradient g(t) of a
scale-invariant weight is orthogonal to w(t), so that

    w(t).p(t) = beta w(t).p(t-1) = beta (w(t-1).p(t-1) - lr |p(t-1)|^2) = -lr sum over k < t of beta^(t-k) |p(k)|^2,
    |w(t+1)|^2 - |w(t)|^2 = lr^2 |p(t)|^2 - 2 lr w(t).p(t)
                          = lr^2 |p(t)|^2 + 2 lr^2 sum over k < t of beta^(t-k) |p(k)|^2,

which is the lemma. Summed over all steps, the first term counts |p(k)|^2 once, and the second one
2 (beta + beta^2 + ...) times. So in the long run the growth is 1 + 2 beta / (1 - beta) times lr^2 sum |p|^2, which is
the growth by updates of the same lengths without momentum. SGDP takes the radial part off each update: the weight then
grows by lr^2 |update|^2 alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

import fused_adamp

BETAS = (0.5, 0.9, 0.99)
STEPS = 3000
POINTS = 150  # of each curve that are kept, at least
LR = 0.5  # times 1 - beta


def descend(optimizer: str, beta: float, steps: int) -> dict[str, Any]:
    """Trains one scale-invariant layer of a network in float64 and compares its norm with the lemma.

    The layer's outputs are normalized as by BatchNorm with eps=0, so that its length has no effect at all on the loss.
    The batches are random, as in stochastic gradient descent: the lemma holds for another loss in each step too.
    """
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(512, 16, generator=generator, dtype=torch.float64)
    labels = (data[:, :3] * data[:, 3:6]).argmax(dim=1)
    layer = nn.Linear(16, 24, bias=False, dtype=torch.float64)
    head = torch.randn(3, 24, generator=generator, dtype=torch.float64) / 24**0.5
    with torch.no_grad():
        layer.weight.copy_(torch.randn(24, 16, generator=generator, dtype=torch.float64) / 4)
    w, lr = layer.weight, LR * (1 - beta)
    cls = {"SGD": torch.optim.SGD, "SGDP": fused_adamp.SGDP}[optimizer]
    stepper = cls([w], lr=lr, momentum=beta)

    start, history, updates, deviation, ratios, norms = squared(w), 0.0, 0.0, 0.0, [], []
    for _ in range(steps):
        batch = torch.randint(len(data), (64,), generator=generator)
        stepper.zero_grad()
        outputs = layer(data[batch])
        normalized = (outputs - outputs.mean(dim=0)) / outputs.std(dim=0)
        functional.cross_entropy(normalized.relu() @ head.T, labels[batch]).backward()
        old = w.detach().clone()
        stepper.step()
        update = squared(old - w)  # lr^2 |p(t)|^2
        predicted = update + 2 * history if optimizer == "SGD" else update
        deviation = max(deviation, abs(squared(w) - squared(old) - predicted) / squared(w))
        history, updates = beta * (history + update), updates + update
        ratios.append((squared(w) - start) / updates)
        norms.append((squared(w) / start) ** 0.5)
    stride = max(1, steps // POINTS)
    kept = range(stride - 1, steps, stride)
    return {
        "optimizer": optimizer,
        "beta": beta,
        "predicted_ratio": 1 + 2 * beta / (1 - beta) if optimizer == "SGD" else 1.0,
        "deviation": deviation,  # of the growth in a step from the lemma's, over |w|^2; the largest
        "step": [i + 1 for i in kept],
        "ratio": [float(f"{ratios[i]:.6g}") for i in kept],
        "norm": [float(f"{norms[i]:.6g}") for i in kept],
    }


def squared(x: torch.Tensor) -> float:
    return x.detach().square().sum().item()


def measure(steps: int = STEPS) -> dict[str, Any]:
    return {"steps": steps, "curves": [descend(name, beta, steps) for beta in BETAS for name in ("SGD", "SGDP")]}
