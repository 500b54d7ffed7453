"""The optimizers under test, each with its peer, and the cases it is timed in.

All of a family share their hyperparameters. The learning rate is so small that no step of a run changes what the cosine
test says of the inputs; the time of a step does not depend on it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

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
    """Optimizers that keep the same state and are measured against the same peer.

    Attributes:
        peer: what they are compared with.
        weight, state: bytes per parameter, of the weight (and as many of the gradient) and of the moments.
    """

    peer: str
    weight: int
    state: int

    def bytes_per_param(self, clip: bool) -> int:
        """Bytes that a step must move per parameter, every tensor read and written once.

        reads g, p, state + writes p, state: 28 for two float32 moments, 20 for one. torch's clipping reads g, then
        reads and writes it: 12 more. What an optimizer moves beyond that makes its GB/s of this formula lower.
        """
        return 3 * self.weight + 2 * self.state + 3 * self.weight * clip


ADAM = Family(peer="adamw_fused", weight=4, state=8)
SGD = Family(peer="sgd_fused", weight=4, state=4)


def precision(weight: int, state: int) -> Family:
    """AdamP with other storage, beside AdamP in float32."""
    return Family(peer="adamp", weight=weight, state=state)


def torch_clip(optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_(params, _MAX_NORM)


def our_clip(optimizer: Any, params: Sequence[Tensor]) -> None:
    optimizer.clip_grad_norm_(_MAX_NORM)


class Contestant(NamedTuple):
    """An optimizer under test.

    Attributes:
        optimizer, backend: as the results name them.
        family: what it is compared with.
        make: the optimizer, from its parameters.
        cases: the decisions it is timed with (see :func:`bench.workloads.tensors`).
        clips: whether to clip before the step; its peer then clips too.
        clip: how it clips.
        dtype: of the weights and gradients.
    """

    optimizer: str
    backend: str
    family: Family
    make: Callable[[list[Tensor]], Optimizer]
    cases: tuple[Decision, ...] = (Decision.NONE,)
    clips: tuple[bool, ...] = (False,)
    clip: Callable[[Optimizer, Sequence[Tensor]], None] = torch_clip
    dtype: torch.dtype = torch.float32


_OURS = choose(torch.device("cpu"), backend=None, fused=None, foreach=None).name
_BOTH = (False, True)
_PROJECTED_OR_NOT = (Decision.NONE, Decision.CHANNEL)


def _with(optimizer: Callable[..., Optimizer], **arguments: Any) -> Callable[[list[Tensor]], Optimizer]:
    return partial(optimizer, lr=1e-8, weight_decay=1e-2, **arguments)


def _mode(name: str, family: Family, dtype: torch.dtype, **options: Any) -> Contestant:
    make = _with(fused_adamp.AdamP, **options)
    return Contestant(f"fused_adamp.AdamP {name}", _OURS, family, make, _PROJECTED_OR_NOT, dtype=dtype)


CONTESTANTS: dict[str, Contestant] = {
    "adamp": Contestant("fused_adamp.AdamP", _OURS, ADAM, _with(fused_adamp.AdamP), tuple(Decision), _BOTH, our_clip),
    "sgdp": Contestant(
        "fused_adamp.SGDP", _OURS, SGD, _with(fused_adamp.SGDP, momentum=0.9), tuple(Decision), _BOTH, our_clip
    ),
    "adamp_bf16_state": _mode("float32, bf16 state", precision(4, 4), torch.float32, state_dtype=torch.bfloat16),
    "adamp_remainder": _mode("bf16, remainder", precision(2, 10), torch.bfloat16, rounding="remainder"),
    "adamp_bf16": _mode("bf16", precision(2, 4), torch.bfloat16),
    "adamp_bf16_f32_state": _mode("bf16, float32 state", precision(2, 8), torch.bfloat16, state_dtype=torch.float32),
    "adamp_stochastic": _mode("bf16, stochastic", precision(2, 4), torch.bfloat16, rounding="stochastic"),
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
        self.params = [w.to(contestant.dtype, copy=True).requires_grad_() for w in weights]
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.to(contestant.dtype, copy=True)
        self._optimizer = contestant.make(self.params)
        self._clip = contestant.clip
        self.step: Callable[[], object] = self._clip_and_step if clip else self._optimizer.step

    def _clip_and_step(self) -> None:
        self._clip(self._optimizer, self.params)
        self._optimizer.step()
