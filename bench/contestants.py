"""The optimizers that bench/cpu.py and bench/sharded.py time, each with its peer and its cases."""

from __future__ import annotations

from typing import Any

import adamp
import pytorch_optimizer
import torch

import fused_adamp
from bench.harness import ADAM, SGD, Contestant, Dtypes, Family, making, our_clip
from fused_adamp.backends import choose
from fused_adamp.reference import Decision

__all__ = ["CONTESTANTS"]

_OURS = choose(torch.device("cpu"), backend=None, fused=None, foreach=None).name
_BOTH = (False, True)
_PROJECTED_OR_NOT = (Decision.NONE, Decision.CHANNEL)


def _stored(name: str, dtypes: Dtypes) -> Contestant:
    """AdamP with other storage, beside AdamP in float32."""
    make = making(fused_adamp.AdamP, **dtypes.options)
    return Contestant(f"fused_adamp.AdamP {name}", _OURS, Family("adamp", 2), make, _PROJECTED_OR_NOT, dtypes=dtypes)


def _rival(name: str, backend: str, family: Family, optimizer: Any, **arguments: Any) -> Contestant:
    """AdamP or SGDP of others. All have lr and weight_decay in common with ours."""
    return Contestant(name, backend, family, making(optimizer, **arguments), _PROJECTED_OR_NOT)


CONTESTANTS: dict[str, Contestant] = {
    "adamp": Contestant("fused_adamp.AdamP", _OURS, ADAM, making(fused_adamp.AdamP), tuple(Decision), _BOTH, our_clip),
    "sgdp": Contestant(
        "fused_adamp.SGDP", _OURS, SGD, making(fused_adamp.SGDP, momentum=0.9), tuple(Decision), _BOTH, our_clip
    ),
    "adamp_bf16_state": _stored("float32, bf16 state", Dtypes(torch.float32, torch.bfloat16)),
    "adamp_remainder": _stored("bf16, remainder", Dtypes(torch.bfloat16, torch.float32, "remainder")),
    "adamp_bf16": _stored("bf16", Dtypes(torch.bfloat16)),
    "adamp_bf16_f32_state": _stored("bf16, float32 state", Dtypes(torch.bfloat16, torch.float32)),
    "adamp_stochastic": _stored("bf16, stochastic", Dtypes(torch.bfloat16, None, "stochastic")),
    # Two peers are timed against themselves as well: how far their ratio is from 1 is the error of the others.
    "adamw_fused": Contestant("torch.AdamW", "fused", ADAM, making(torch.optim.AdamW, fused=True)),
    "sgd_fused": Contestant("torch.SGD", "fused", SGD, making(torch.optim.SGD, momentum=0.9, fused=True)),
    "adamw_foreach": Contestant("torch.AdamW", "foreach", ADAM, making(torch.optim.AdamW, foreach=True)),
    "adamw_forloop": Contestant("torch.AdamW", "forloop", ADAM, making(torch.optim.AdamW, foreach=False)),
    "clovaai_adamp": _rival("clovaai.AdamP", "forloop", ADAM, adamp.AdamP),
    "clovaai_sgdp": _rival("clovaai.SGDP", "forloop", SGD, adamp.SGDP, momentum=0.9),
    "pytorch_optimizer_adamp": _rival("pytorch_optimizer.AdamP", "forloop", ADAM, pytorch_optimizer.AdamP),
    # Moments, decay and update are operations on lists of tensors. The projection goes tensor by tensor: it computes
    # both views of each matrix and selects on the device, where "forloop" waits for the answer and skips the rest.
    "pytorch_optimizer_adamp_foreach": _rival(
        "pytorch_optimizer.AdamP", "foreach", ADAM, pytorch_optimizer.AdamP, foreach=True
    ),
    "pytorch_optimizer_sgdp_foreach": _rival(
        "pytorch_optimizer.SGDP", "foreach", SGD, pytorch_optimizer.SGDP, momentum=0.9, foreach=True
    ),
}
