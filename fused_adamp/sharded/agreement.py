"""The ranks compare their parameters and hyperparameters, and add up their sums."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_adamp.batch import PROJECTIONS, Need
from fused_adamp.gather import gather, refit, takes_part
from fused_adamp.options import max_grad_norm_of
from fused_adamp.sharded.header import Header, compare_headers
from fused_adamp.sharded.placement import placement_of

if TYPE_CHECKING:
    from fused_adamp.batch import Batch
    from fused_adamp.memory import Owner
    from fused_adamp.sharded.exchange import Exchange, Outcome

__all__ = ["agree", "cosine_options", "gather_or_withdraw", "in_words", "measure", "options_in_words", "reduce_shares"]


def gather_or_withdraw(owner: Owner, *, make_state: bool = True, check: bool = False) -> list[Batch]:
    """As :func:`fused_adamp.gather.gather`. If it raises, the ranks that wait for this one get an error too.

    It checks ``max_grad_norm``, too. With ``check``, or if parameters lie on several ranks,
    :func:`fused_adamp.gather.refit` checks the tensors.
    """
    try:
        max_grad_norm_of(owner.param_groups)
        batches = gather(owner, make_state=make_state)
        return refit(owner, batches) if check or owner._memory.exchange is not None else batches
    except Exception:
        # An error of another rank or of the network must not hide this rank's own.
        with suppress(Exception):
            _withdraw(owner)
        raise


def _withdraw(owner: Owner) -> None:
    """Tells the ranks that wait for this one, if any, that it cannot take the step."""
    failed = Header.of((), failed=True)
    if owner._memory.agreed is not None:
        owner._memory.agreed.tell(failed)
    else:
        owners = [(p, group["channel_dim"]) for group in owner.param_groups for p in group["params"]]
        shared = [(p, placement_of(p), channel_dim) for p, channel_dim in owners if takes_part(owner, p)]
        layouts = [placement.layouts(p, dim) for p, placement, dim in shared if placement.is_shared]
        compare_headers([layout for of in layouts for layout in of], failed)


def agree(owner: Owner, exchange: Exchange) -> None:
    """Checks that all ranks share the same parameters, in the first step and whenever the parameters have changed.

    Raises:
        ValueError: the ranks have different parameters or hyperparameters; on every rank.
        RuntimeError: another rank has failed; or the step is captured in a CUDA graph.
    """
    if exchange.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the step of parameters that lie on several ranks cannot be captured in a CUDA graph: what the ranks "
            "tell each other is new in every step. Capture forward and backward, and step outside"
        )
    memory = owner._memory
    exchange.set_options(cosine_options(owner))
    if exchange is memory.agreed:
        return
    lines = options_in_words(owner, exchange)
    if memory.agreed is not None and memory.agreed.lines != exchange.lines:
        header = memory.agreed.tell(exchange.header(lines, moved=True))
        header.check_failure()
        if header.moved < header.ranks:
            raise ValueError(memory.agreed.disagreement([*exchange.lines, *lines]))
        memory.agreed = None
    if memory.agreed is None:
        header = compare_headers(exchange.layouts, exchange.header(lines))
        header.check_failure()
        if not header.agreed:
            raise ValueError(exchange.disagreement([*exchange.lines, *lines], replicas=True))
    memory.agreed = exchange


def measure(owner: Owner, exchange: Exchange, batches: list[Batch]) -> Outcome:
    """Adds up, over the ranks, the sums for clipping: squares and the cosine test's sums, of unscaled gradients."""
    agree(owner, exchange)
    exchange.ask_afresh(Need.TEST | Need.SQUARE)
    lines = [*options_in_words(owner, exchange), "clip_grad_norm_"]
    exchange.measured = reduce_shares(owner, exchange, batches, lines, scale=None)
    return exchange.measured


def reduce_shares(
    owner: Owner,
    exchange: Exchange,
    batches: list[Batch],
    lines: list[str],
    *,
    scale: Any,
    found_inf: Tensor | None = None,
    stale: bool = False,
) -> Outcome:
    """Lets the backends measure the sums that the exchange has asked for, and adds them up over the ranks.

    Raises:
        ValueError: ``lines`` differ between ranks. Raised on every rank, with the first line that differs.
        RuntimeError: another rank has failed.
    """
    for batch in batches:
        if batch.bucket.shared is not None:
            batch.bucket.key.backend.measure(batch)
    present = [
        layout.holds and (p.grad is not None or p in owner._memory.filled)
        for p, layout in zip(exchange.members, exchange.layouts, strict=True)
    ]
    try:
        outcome = exchange.reduce(exchange.header(lines, stale=stale), found_inf, present, scale)
        exchange.check(outcome, lines)
    except Exception:
        for batch in batches:  # sums, and weights moved by a guess, are not part of any later step
            batch.bucket.scratch = batch.bucket.key.backend.scratch(batch.bucket)
        raise
    return outcome


def cosine_options(owner: Owner) -> list[tuple[float, float, float]]:
    """The options of the cosine test of each parameter group: eps, delta, index of the projection."""
    return [
        (float(group["eps"]), float(group["delta"]), PROJECTIONS.index(group["projection"]))
        for group in owner.param_groups
    ]


def options_in_words(owner: Owner, exchange: Exchange) -> list[str]:
    """The hyperparameters that must be the same on all ranks, as text."""
    return [
        f"group {number}: {name}={in_words(value)}"
        for number in exchange.groups
        for name, value in owner.param_groups[number].items()
        if name in owner.defaults
    ]


def in_words(value: Any) -> str:
    """``repr()`` of a hyperparameter, without a device sync."""
    if not isinstance(value, Tensor):
        return repr(value)
    return repr(value.tolist()) if value.device.type == "cpu" else f"a tensor on {value.device.type}"
