"""The decision and projection of every parameter that lies on several ranks, made by all of them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fused_adamp.batch import Need
from fused_adamp.clipping import clipping_holds, factor_of, on_device, renew, with_scale
from fused_adamp.sharded.agreement import (
    agree,
    cosine_options,
    gather_or_withdraw,
    in_words,
    options_in_words,
    reduce_shares,
)
from fused_adamp.sharded.dtensor import local

if TYPE_CHECKING:
    from fused_adamp.batch import Batch
    from fused_adamp.memory import Owner
    from fused_adamp.sharded.exchange import Exchange

__all__ = ["decide_across_ranks"]


def decide_across_ranks(owner: Owner, exchange: Exchange, batches: list[Batch]) -> list[Batch]:
    """Writes the verdicts on parameters that lie on several ranks. Returns the batches, with scale and found_inf.

    Raises:
        ValueError: the ranks have different parameters or hyperparameters, or call other methods; on every rank.
        RuntimeError: another rank has failed.
    """
    agree(owner, exchange)
    memory, found_inf = owner._memory, getattr(owner, "found_inf", None)
    renewed = False  # a norm measured in this step is not checked again: gradients may have no version
    while True:
        clipping, factor = memory.clipping, factor_of(owner)
        clipped_to = None if clipping is None else in_words(clipping.max_norm)
        known = None if clipping is None else clipping.test_of(cosine_options(owner), exchange.measured)
        lines = [*options_in_words(owner, exchange), f"a step clipped to {clipped_to}"]
        lines += ["gradients are tested in this step"] if known is None else []  # the size of the pack depends on it
        if known is None:
            exchange.ask_afresh(Need.TEST | Need.DOT)
            scale: Any = 1.0
        else:  # the test has been made, of gradients as they are
            assert factor is not None, "a clipping gives a factor"
            scale = factor.to(exchange.device)
            exchange.ask(Need.DOT, only=exchange.undecided(known, scale))
        outcome = reduce_shares(
            owner,
            exchange,
            with_scale(owner, batches, factor, final=clipping is None and found_inf is None),
            lines,
            scale=scale,
            found_inf=found_inf,
            stale=not (renewed or clipping_holds(owner, batches)),
        )
        if not exchange.is_stale(outcome):
            break
        renew(owner, batches)
        renewed = True
    if missing := exchange.missing(outcome):  # on some ranks: there it counts as zero
        own = [p for p in missing if p.grad is None]
        try:
            memory.filled = {p: torch.zeros((), dtype=p.dtype, device=p.device).expand(local(p).shape) for p in own}
            batches = gather_or_withdraw(owner) if own else batches
            exchange.ask(Need.TEST | Need.DOT, only=exchange.mask(own))
            outcome = reduce_shares(
                owner, exchange, with_scale(owner, batches, factor), lines, scale=scale, found_inf=found_inf
            )
        finally:
            memory.filled = {}
    exchange.judge(outcome)
    if found_inf is not None or exchange.asynchronous:
        found_inf = exchange.found_inf(outcome)
    return [
        batch._replace(found_inf=on_device(found_inf, batch.bucket.key.device))
        for batch in with_scale(owner, batches, factor)
    ]
