"""The authors' package, adamp 0.3.0, as a second oracle besides our own reference, in float64."""

from __future__ import annotations

from typing import Any

import adamp
import pytest
import torch
from tolerances import TOLERANCE, assert_close
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from trajectory import KINDS, gradient, parameters

from fused_adamp import SGDP, AdamP
from fused_adamp.reference import Decision

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 24
SHAPES = ((8, 4, 3, 3), (6, 10), (5, 1, 7), (3, 2), (11,), ())

ADAM: dict[str, Any] = {"lr": 0.02, "betas": (0.85, 0.97)}
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.9}
CASES = [
    pytest.param(AdamP, adamp.AdamP, ADAM, {}, id="AdamP"),
    pytest.param(AdamP, adamp.AdamP, {**ADAM, "nesterov": True}, {}, id="AdamP-nesterov"),
    pytest.param(SGDP, adamp.SGDP, {**SGD, "nesterov": True}, {}, id="SGDP-nesterov"),
    pytest.param(SGDP, adamp.SGDP, {**SGD, "nesterov": True, "dampening": 0.2}, {}, id="SGDP-nesterov-dampened"),
    # Without nesterov, clovaai's d_p aliases the buffer: projecting the update in place projects the buffer too.
    pytest.param(SGDP, adamp.SGDP, SGD, {"project_buffer": True}, id="SGDP-buffer-projected"),
    pytest.param(SGDP, adamp.SGDP, {**SGD, "dampening": 0.2}, {"project_buffer": True}, id="SGDP-both"),
]
"""Our class, theirs, the options of both, the options of ours alone."""

KEYS = {"momentum": "momentum_buffer"}  # clovaai's state key -> ours, where they differ


def compare(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for i, (p, q) in enumerate(pairs):
        assert_close(p, q, f"weight {i}")
        mine, other = ours.state[p], theirs.state[q]
        assert set(mine) == {KEYS.get(name, name) for name in other}
        for name, value in other.items():
            assert_close(mine[KEYS.get(name, name)], torch.as_tensor(value), f"{name} of parameter {i}", dtype=q.dtype)


@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize(("cls", "oracle", "options", "extra"), CASES)
def test_given_gradients(
    cls: Any, oracle: Any, options: dict[str, Any], extra: dict[str, Any], weight_decay: float, backend: str
) -> None:
    """The same gradients to both, built so that every matrix takes all three decisions in turn."""
    params = parameters(*SHAPES)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    options = {**options, "weight_decay": weight_decay, "wd_ratio": 0.3}
    ours, theirs = cls(params, **options, **extra, backend=backend), oracle(copies, **options)
    seen: list[set[Decision]] = [set() for _ in params]
    for t in range(STEPS):
        for i, (p, q) in enumerate(zip(params, copies, strict=True)):
            q.grad = gradient(q, KINDS[(i + t) % 3])
            p.grad = q.grad.clone()
        ours.step()
        theirs.step()
        compare(ours, theirs)
        for i, p in enumerate(params):
            seen[i].add(ours.decisions()[p])
    for p, decisions in zip(params, seen, strict=True):
        assert decisions == (set(Decision) if p.ndim > 1 else {Decision.NONE})


class Net(nn.Module):
    """Convolution and linear layer under a normalization (scale-invariant), one of each without, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3)
        # No bias under a normalization: its gradient is rounding noise, which Adam scales up to full steps.
        self.linear1 = nn.Linear(16, 12, bias=False)
        self.norm2 = nn.BatchNorm1d(12)
        # Normalized as a whole: the gradient is orthogonal to all of the weight, not to its rows.
        self.linear2 = nn.utils.parametrizations.weight_norm(nn.Linear(12, 5), dim=None)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm1(self.conv1(x)))
        x = relu(self.conv2(x)).flatten(1)
        x = relu(self.norm2(self.linear1(x)))
        return self.linear2(x)


@pytest.mark.parametrize(("cls", "oracle", "options", "extra"), CASES)
def test_training_a_network(
    cls: Any, oracle: Any, options: dict[str, Any], extra: dict[str, Any], backend: str
) -> None:
    """Each trains its own copy of a network on its own gradients; rounding must not grow into another decision."""
    ours_net, theirs_net = Net().double(), Net().double()
    theirs_net.load_state_dict(ours_net.state_dict())
    options = {**options, "lr": 0.005, "weight_decay": 0.02}
    ours = cls(ours_net.parameters(), **options, **extra, backend=backend)
    theirs = oracle(theirs_net.parameters(), **options)
    x, y = torch.randn(32, 3, 6, 6, dtype=torch.float64), torch.randint(5, (32,))
    seen, losses = set(), []
    for _ in range(STEPS):
        for net, optimizer in ((ours_net, ours), (theirs_net, theirs)):
            loss = cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seen |= set(ours.decisions().values())
    assert seen == set(Decision)
    assert losses[-1] < losses[0]
    # Backward amplifies rounding from step to step: a thousand times the table's tolerance is far below a bug.
    for (name, p), q in zip(ours_net.named_parameters(), theirs_net.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e3 * TOLERANCE[torch.float64], name
        assert p.isfinite().all()
