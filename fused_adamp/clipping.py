"""The factor of a step's gradients: GradScaler's scale, and the norm that ``clip_grad_norm_`` takes."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_adamp.gather import refit
from fused_adamp.host import marks_of, present
from fused_adamp.memory import Clipping, Seen
from fused_adamp.sharded import agreement
from fused_adamp.sharded.dtensor import local, local_gradient
from fused_adamp.tensors import promoted

if TYPE_CHECKING:
    from fused_adamp.batch import Batch
    from fused_adamp.host import Marks
    from fused_adamp.memory import Owner
    from fused_adamp.sharded.exchange import Outcome

__all__ = [
    *("clip", "clipping_holds", "factor_of", "norm_of_fakes", "renew", "returned", "scaled", "unscale_of"),
    "with_scale",
]


def scaled(owner: Owner, batches: list[Batch]) -> list[Batch]:
    """The batches with the scale and found_inf of this step, from GradScaler and clip_grad_norm_.

    If gradients or weights have changed since clip_grad_norm_, the norm is measured again.
    """
    if batches and not clipping_holds(owner, batches):
        renew(owner, refit(owner, batches))
    return with_scale(owner, batches, factor_of(owner))


def factor_of(owner: Owner) -> Tensor | None:
    """The factor of the gradients in the step: 0-dim float64; None is 1."""
    unscale, clipping = unscale_of(owner), owner._memory.clipping
    factor = None if clipping is None else clipping.coefficient(unscale)
    if unscale is not None:
        factor = unscale if factor is None else factor.to(unscale.device, non_blocking=True) * unscale
    return factor


def unscale_of(owner: Owner) -> Tensor | None:
    """The factor that GradScaler leaves to the step, the inverse of its scale: 0-dim float64. None is 1."""
    grad_scale = getattr(owner, "grad_scale", None)
    return None if grad_scale is None else grad_scale.double().reciprocal().reshape(())


def with_scale(owner: Owner, batches: list[Batch], factor: Tensor | None, *, final: bool = False) -> list[Batch]:
    """The batches with a factor of their gradients and GradScaler's ``found_inf``."""
    found_inf = getattr(owner, "found_inf", None)
    if factor is None and found_inf is None and not final:
        return batches
    return [
        batch._replace(
            scale=on_device(factor, batch.bucket.key.device),
            found_inf=on_device(found_inf, batch.bucket.key.device),
            final=final,
        )
        for batch in batches
    ]


def on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A one-element tensor as ``(1,)`` on the device, without a sync; None stays None."""
    return None if tensor is None else tensor.to(device, non_blocking=True).reshape(1)


def clip(
    owner: Owner, batches: list[Batch], max_norm: Any, norm_type: float, *, unscaled: bool, in_step: bool = False
) -> Clipping:
    """Computes the norm of all gradients. Returns it with its inputs, for the next step.

    With ``in_step`` it is for the step that is being taken, in which no gradient changes.
    """
    norm, outcome = _total_norm(owner, batches, norm_type)
    options = [] if outcome is None else agreement.cosine_options(owner)
    limit = max_norm if isinstance(max_norm, Tensor) else float(max_norm)
    seen = None if in_step else Seen.of(*_gradients(batches))
    return Clipping(limit, norm_type, norm, unscaled, seen, outcome, options)


def returned(clipping: Clipping, unscale: Tensor | None, batches: list[Batch]) -> Tensor:
    """The norm as users get it: a tensor of their own, 0-dim, in the dtype that the gradients' dtypes promote to."""
    dtypes = {g.dtype: None for batch in batches for g in present(batch.grads, batch.grads)}
    return clipping.norm_over(unscale).to(promoted([*dtypes]), copy=True)


def clipping_holds(owner: Owner, batches: list[Batch]) -> bool:
    """Whether the gradients and weights are those that were clipped, unchanged; True if nothing was clipped."""
    seen = None if (clipping := owner._memory.clipping) is None else clipping.seen
    return seen is None or seen.still_holds(*_gradients(batches))


def renew(owner: Owner, batches: list[Batch]) -> None:
    """Clips again, as the last call of clip_grad_norm_ asked for."""
    old = owner._memory.clipping
    assert old is not None, "nothing was clipped"
    owner._memory.clipping = clip(owner, batches, old.max_norm, old.norm_type, unscaled=old.unscaled)


def _total_norm(owner: Owner, batches: list[Batch], norm_type: float) -> tuple[Tensor, Outcome | None]:
    """The norm of all gradients taken together, 0-dim float64 on the first one's device.

    Also the sums of the cosine test, if ranks share parameters and the order is 2; else None.
    """
    exchange = owner._memory.exchange
    if norm_type != 2.0:
        found = [(p, local_gradient(p)) for batch in batches for p in batch.bucket.index]
        grads = {p: g for p, g in found if g is not None}
        if exchange is None:
            return torch.nn.utils.get_total_norm(grads.values(), norm_type).double(), None
        agreement.agree(owner, exchange)
        return torch.linalg.vector_norm(torch.stack(exchange.norms(grads, norm_type)), norm_type), None
    squares, outcome = [], None
    for batch in batches:
        if batch.bucket.shared is None:
            square = batch.bucket.key.backend.square_norm(batch)
            if square is None:
                return _total_norm(owner, refit(owner, batches), norm_type)
            squares.append(square)
    if exchange is not None:
        outcome = agreement.measure(owner, exchange, batches)
        squares.append(exchange.square_norm(outcome))
    if not squares:
        return torch.zeros((), dtype=torch.float64, device="cpu"), None
    square = torch.stack([square.to(squares[0].device, non_blocking=True) for square in squares]).sum()
    return square.sqrt(), outcome


def norm_of_fakes(owner: Owner, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """The norm of this rank's gradients as a FakeTensor, 0-dim. The next step does not clip."""
    owner._memory.clipping = None
    params = chain.from_iterable(group["params"] for group in owner.param_groups)
    grads = [g for p in params if (g := local_gradient(p)) is not None]
    return torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite).to(promoted([g.dtype for g in grads]))


def _gradients(batches: list[Batch]) -> tuple[list[Tensor], list[Tensor], list[Marks]]:
    """The weights that have a gradient, and their gradients; for DTensors also their local tensors. And their marks.

    A DTensor and its local tensor have separate version counters.
    """
    params, grads, places = [], [], []
    for batch in batches:
        bucket = batch.bucket
        if bucket.has_own_tensors and not bucket.distributed and bucket.shared is None:
            params += present(bucket.params, batch.grads)
            grads += present(batch.grads, batch.grads)
            places += [marks_of(batch, "p", batch.params), marks_of(batch, "g", batch.grads)]
            continue
        of = [p for p in bucket.params if p.grad is not None]
        gradients = [p.grad for p in of if p.grad is not None]
        params += of
        grads += gradients
        of, gradients = list(map(local, of)), list(map(local, gradients))
        if bucket.distributed:
            params += of
            grads += gradients
        places += [marks_of(batch, "clipped p", of), marks_of(batch, "clipped g", gradients)]
    return params, grads, places
