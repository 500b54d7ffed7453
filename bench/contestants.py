"""The optimizers under test, each with its peer, and the cases it is timed in.

All of a family share their hyperparameters. The learning rate is so small that no step of a run changes what the cosine
test says of the inputs; the time of a step does not depend on it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import adamp
import pytorch_optimizer
import torch

import fused_adamp
from fused_adamp.backends import choose
from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["CONTESTANTS", "Contestant", "Family", "Side"]

_MAX_NORM = 1e30
"""Of gradient clipping: never reached, so that values stay as they are from round to round. The cost is that of
clipping all the same: torch multiplies every gradient in place by a coefficient that is clamped to 1."""


class Family(NamedTuple):
    """Optimizers that keep the same state and are measured against the same peer."""

    peer: str
    moments: int

    def bytes_per_param(self, clip: bool, itemsize: int = 4) -> int:
        """Bytes that a step must move per parameter, every tensor read and written once.

        reads g, p, moments + writes p, moments: 28 for two float32 moments, 20 for one. torch's clipping reads g, then
        reads and writes it: 12 more. What an optimizer moves beyond that makes its GB/s of this formula lower.
        """
        return itemsize * ((2 + self.moments) + (1 + self.moments) + 3 * clip)


ADAM = Family(peer="adamw_fused", moments=2)
SGD = Family(peer="sgd_fused", moments=1)


def torch_clip(optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_(params, _MAX_NORM)


class Contestant(NamedTuple):
    """An optimizer under test.

    Attributes:
        optimizer, backend: as the results name them.
        family: what it is compared with.
        make: the optimizer, from its parameters.
        cases: the decisions it is timed with (see :func:`bench.workloads.tensors`).
        clips: whether to clip before the step; its peer then clips too.
        clip: how it clips.
    """

    optimizer: str
    backend: str
    family: Family
    make: Callable[[list[Tensor]], Optimizer]
    cases: tuple[Decision, ...] = (Decision.NONE,)
    clips: tuple[bool, ...] = (False,)
    clip: Callable[[Optimizer, Sequence[Tensor]], None] = torch_clip


_OURS = choose(torch.device("cpu"), backend=None, fused=None, foreach=None).name
_BOTH = (False, True)
_PROJECTED_OR_NOT = (Decision.NONE, Decision.CHANNEL)


def _with(optimizer: Callable[..., Optimizer], **arguments: float) -> Callable[[list[Tensor]], Optimizer]:
    return partial(optimizer, lr=1e-8, weight_decay=1e-2, **arguments)


CONTESTANTS: dict[str, Contestant] = {
    "adamp": Contestant("fused_adamp.AdamP", _OURS, ADAM, _with(fused_adamp.AdamP), tuple(Decision), _BOTH),
    "sgdp": Contestant("fused_adamp.SGDP", _OURS, SGD, _with(fused_adamp.SGDP, momentum=0.9), tuple(Decision), _BOTH),
    # Two peers are timed against themselves as well: how far their ratio is from 1 is the error of the others.
    "adamw_fused": Contestant("torch.AdamW", "fused", ADAM, _with(torch.optim.AdamW, fused=True)),
    "sgd_fused": Contestant("torch.SGD", "fused", SGD, _with(torch.optim.SGD, momentum=0.9, fused=True)),
    "adamw_foreach": Contestant("torch.AdamW", "foreach", ADAM, _with(torch.optim.AdamW, foreach=True)),
    "adamw_forloop": Contestant("torch.AdamW", "forloop", ADAM, _with(torch.optim.AdamW, foreach=False)),
    "clovaai_adamp": Contestant("clovaai.AdamP", "forloop", ADAM, _with(adamp.AdamP), _PROJECTED_OR_NOT),
    "clovaai_sgdp": Contestant("clovaai.SGDP", "forloop", SGD, _with(adamp.SGDP, momentum=0.9), _PROJECTED_OR_NOT),
    "pytorch_optimizer_adamp": Contestant(
        "pytorch_optimizer.AdamP", "forloop", ADAM, _with(pytorch_optimizer.AdamP), _PROJECTED_OR_NOT
    ),
}


class Side:
    """One contestant with weights, gradients and state of its own, so that a pair shares no cache line.

    Attributes:
        params: clones of the given weights, with clones of the gradients.
        step: clips if asked, and steps: what is timed.
    """

    def __init__(self, contestant: Contestant, weights: Sequence[Tensor], grads: Sequence[Tensor], clip: bool) -> None:
        self.params = [w.clone().requires_grad_() for w in weights]
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.clone()
        self._optimizer = contestant.make(self.params)
        self._clip = contestant.clip
        self.step: Callable[[], object] = self._clip_and_step if clip else self._optimizer.step

    def _clip_and_step(self) -> None:
        self._clip(self._optimizer, self.params)
        self._optimizer.step()
