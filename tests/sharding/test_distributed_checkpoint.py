"""torch.distributed.checkpoint: saved on some ranks, loaded on others, as if nothing had come between."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import (
    SHAPES,
    Pair,
    Record,
    Run,
    assert_within,
    backends,
    full,
    named,
    random_weights,
    ranks_of,
    record,
    run,
)
from tolerances import assert_identical
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from trajectory import RULES

from fused_adamp.sharded.dtensor import local

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

BACKEND = {"backend": backends()[0]}
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
STEPS = 6
SAVED = 3
"""Steps before the checkpoint."""

OPTIONS = {
    "sharded": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
"""The ways to save."""

Values = dict[str, torch.Tensor]


def save(folder: Path, layout: str, rule: str, way: str, told: Record) -> tuple[Values, Values]:
    """The values of a run when it is saved, and at its end."""
    run = Run(layout, told.weights, rule, **BACKEND)
    for grads in told.grads[:SAVED]:
        run.give(grads)
        run.advance()
    run.optimizer.zero_grad()
    saved = {name: full(t) for name, t in run.values().items()}
    weights, state = get_state_dict(run.module, run.optimizer, options=OPTIONS[way])
    if way == "full":
        if dist.get_rank() == 0:
            torch.save((weights, state), folder / "full.pt")
        dist.barrier()
    else:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    for grads in told.grads[SAVED:]:
        run.give(grads)
        run.advance()
    return saved, {name: full(t) for name, t in run.values().items()}


def load(folder: Path, layout: str, rule: str, way: str, told: Record, saved: Values, final: Values) -> None:
    # Where rank 0 has it all, torch wants two calls: set_state_dict takes an empty dict for "none of the model".
    for separately in (True,) if way == "full" else (False, True):
        with named("one after the other" if separately else "together"):
            run = Run(layout, {name: torch.zeros_like(w) for name, w in told.weights.items()}, rule, **BACKEND)
            if way == "full":
                weights, state = torch.load(folder / "full.pt") if dist.get_rank() == 0 else ({}, {})
                how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            else:
                how = OPTIONS[way]
                weights = get_model_state_dict(run.module, options=how)
                state = get_optimizer_state_dict(run.module, run.optimizer, options=how)
                dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
            if separately:
                set_model_state_dict(run.module, weights, options=how)
                set_optimizer_state_dict(run.module, run.optimizer, state, options=how)
            else:
                set_state_dict(run.module, run.optimizer, model_state_dict=weights, optim_state_dict=state, options=how)
            assert_within(run.values(), saved, 0)
            for grads in told.grads[SAVED:]:
                run.give(grads)
                run.advance()
            assert_within(run.values(), final)


@pytest.mark.parametrize("way", list(OPTIONS))
@pytest.mark.parametrize("layout", ["FSDP2", "TP row"])
@EVERY_RULE
def test_saved_on_two_ranks(rule: str, layout: str, way: str, tmp_path: Path) -> None:
    """Loaded on one, three and four, bit for bit, and stepped on to what an uninterrupted run comes to."""
    told = record("uneven", rule, STEPS, 0, **BACKEND)
    (saved, final), _ = run(2, save, tmp_path, layout, rule, way, told)
    assert_within(final, told.values)
    for ranks, other in ((1, layout), (3, layout), (4, "FSDP2 x TP")):
        with named(f"on {ranks} as {other}"):
            run(ranks, load, tmp_path, other, rule, way, told, saved, final)


def remainders(folder: Path, rule: str, saved: Values | None) -> Values:
    """Trains and saves, or without training loads what was saved."""
    weights = {name: w.bfloat16() for name, w in random_weights(SHAPES["uneven"], seed=0).items()}
    trained = Run("FSDP2", weights, rule, rounding="remainder", **BACKEND)
    if saved is None:
        trained.give({name: w.sin() for name, w in weights.items()})
        trained.advance()
    module, state = get_state_dict(trained.module, trained.optimizer)
    if saved is None:
        dcp.save({"model": module, "optimizer": state}, checkpoint_id=folder)
    else:
        dcp.load({"model": module, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(trained.module, trained.optimizer, model_state_dict=module, optim_state_dict=state)
    values = {name: full(t) for name, t in trained.values().items()}
    for name, t in (saved or {}).items():
        assert_identical(values[name], t, name)
    return values


@EVERY_RULE
def test_remainders(rule: str, tmp_path: Path) -> None:
    """16-bit integers, saved on two ranks and loaded on three and one."""
    saved = run(2, remainders, tmp_path, rule, None)[0]
    assert saved["remainder of matrix"].any(), "a step leaves a remainder"
    for ranks in (3, 1):
        run(ranks, remainders, tmp_path, rule, saved)


# The step in which torch makes the state.

MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float64": (torch.float64, {}),
    "float32": (torch.float32, {"state_dtype": torch.bfloat16}),
    "bfloat16": (torch.bfloat16, {}),
    "wide state": (torch.bfloat16, {"state_dtype": torch.float32}),
    "remainder": (torch.bfloat16, {"rounding": "remainder"}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
}


def make_state(layout: str, rule: str) -> None:
    for mode, (dtype, more) in MODES.items():
        with named(mode):
            pair = Pair(layout, rule, "uneven", dtype=dtype, **BACKEND, **more)
            before = pair.sharded.weights()
            state = get_optimizer_state_dict(pair.sharded.module, pair.sharded.optimizer)
            assert len(state["state"]) == len(before)
            for name, p in pair.sharded.params.items():
                assert_identical(local(p), local(before[name]), name)


@pytest.mark.parametrize("layout", ["FSDP2", "TP row", "FSDP2 x TP"])
@EVERY_RULE
def test_making_state_moves_no_weight(rule: str, layout: str) -> None:
    run(ranks_of(layout, "uneven"), make_state, layout, rule)


# State from one process, and back.


def exchange_state(layout: str, rule: str) -> None:
    pair = Pair(layout, rule, "uneven", **BACKEND)
    for source, target in (pair, reversed(list(pair))):
        pair.steps(2)
        for p in target.params.values():
            target.optimizer.state[p].clear()
        target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
        assert_within(target.values(), source.values())
        pair.steps(2)


@pytest.mark.parametrize("layout", ["FSDP2", "HSDP", "TP row", "FSDP2 x TP"])
@EVERY_RULE
def test_state_of_one_process(rule: str, layout: str) -> None:
    """Loads into a sharded optimizer, and its into one that is not."""
    run(ranks_of(layout, "uneven"), exchange_state, layout, rule)
