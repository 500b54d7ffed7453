"""Sharded parameters, on real process groups: the numbers of one process, and as many collectives as promised."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from distributed import (
    FLAT,
    LAYOUTS,
    MIXED,
    Collectives,
    Pair,
    Record,
    Run,
    assert_within,
    backends,
    full,
    holds,
    laid_out,
    mesh,
    named,
    ranks_of,
    record,
    run,
)
from tolerances import assert_close, assert_identical
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from trajectory import RULES

from fused_adamp.backends import triton
from fused_adamp.precision import join
from fused_adamp.reference import Decision
from fused_adamp.sharded.dtensor import local
from fused_adamp.sharded.placement import placement_of

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20
FASTEST, *OTHERS = backends()
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))


def every_layout(*layouts: str) -> Any:
    """With the fastest backend; with others, to save time, those in which rows are split."""
    others = [
        pytest.param(layout, other, marks=() if layout == "TP row" else pytest.mark.exhaustive)
        for layout in layouts
        for other in OTHERS
        if layout in {"TP row", "FSDP2 x TP", FLAT}
    ]
    return pytest.mark.parametrize(("layout", "backend"), [*((layout, FASTEST) for layout in layouts), *others])


COLLECTIVES = {"DDP": 0, "replicated": 0, "FSDP2 x TP": 2, "two meshes": 2, "crossed": 3}
"""Collectives of a step by layout, if not 1; clipping has as many again."""


def follow(
    layout: str,
    rule: str,
    records: Sequence[Record],
    max_norm: float | None,
    options: dict[str, Any],
    *,
    hooks: bool = True,
) -> None:
    """Does in a layout what was done in one process, and compares.

    Args:
        hooks: whether the first run gets its gradients by way of autograd and the layout's hooks.
    """
    collectives = COLLECTIVES.get(layout, 1) * (1 if max_norm is None else 2)
    if layout == "crossed" and options.get("channel_dim") == (0, 1):  # all are rows
        collectives = collectives * 2 // 3
    for number, expected in enumerate(records):
        run = Run(layout, expected.weights, rule, **options)
        for step, (grads, norm, decisions) in enumerate(
            zip(expected.grads, expected.norms, expected.decisions, strict=True)
        ):
            (run.backward if hooks and number == 0 else run.give)(grads)
            with Collectives() if step in (1, 2) else contextlib.nullcontext() as seen:  # in step 0 the ranks meet
                found = run.advance(max_norm)
            assert seen is None or len(seen.names) == collectives, f"step {step}: {seen.names}"
            assert run.decisions() == decisions, f"step {step}"
            if max_norm is not None:
                assert abs(found - norm) <= 1e-12 * norm
        assert_within(run.values(), expected.values)


@functools.cache
def records(sharing: str, rule: str, max_norm: float | None, backend: str, seeds: int) -> list[Record]:
    """They are the same for every layout."""
    found = [record(sharing, rule, STEPS, seed, max_norm, backend=backend) for seed in range(seeds)]
    assert {d for one in found for by_name in one.decisions for d in by_name.values()} == set(Decision)
    return found


@every_layout(*LAYOUTS, FLAT)
@pytest.mark.parametrize("sharing", ["even", "uneven", "empty"])
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["no clip", "clip"])
@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
@EVERY_RULE
def test_numbers_of_one_process(
    rule: str, seeds: int, max_norm: float | None, sharing: str, layout: str, backend: str
) -> None:
    """Within 1e-12 after 20 steps, with the same decisions on the way."""
    expected = records(sharing, rule, max_norm, backend, seeds)
    run(ranks_of(layout, sharing), follow, layout, rule, expected, max_norm, {"backend": backend})


SHARDED = [*LAYOUTS[1:], *MIXED, FLAT]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channel_dim=1": {"channel_dim": 1},
    "channel_dim=(0, 1)": {"channel_dim": (0, 1)},
    "channels": {"projection": "channel"},
    "layers": {"projection": "layer"},
    "no projection": {"projection": "none"},
    "delta=0": {"delta": 0},
    "nesterov": {"nesterov": True},
    "maximize": {"maximize": True},
    "no momentum": {"momentum": 0},
    "project_buffer": {"project_buffer": True},
    "large eps": {"eps": 1.0},
}


def variants(rule: str) -> dict[str, dict[str, Any]]:
    known = RULES[rule][0]([torch.zeros(1)]).defaults
    return {name: options for name, options in VARIANTS.items() if options.keys() <= known.keys()}


@functools.cache
def records_of_variants(rule: str, backend: str, max_norm: float | None) -> dict[str, Record]:
    return {
        name: record("uneven", rule, 3, 0, max_norm, **options, backend=backend)
        for name, options in variants(rule).items()
    }


def follow_variants(layout: str, rule: str, of: dict[str, Record], max_norm: float | None, backend: str) -> None:
    for name, expected in of.items():
        if layout == FLAT and "channel_dim" in VARIANTS[name]:  # which is refused
            continue
        with named(name):
            follow(layout, rule, [expected], max_norm, VARIANTS[name] | {"backend": backend}, hooks=False)


@every_layout(*SHARDED)
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["no clip", "clip"])
@EVERY_RULE
def test_options(rule: str, max_norm: float | None, layout: str, backend: str) -> None:
    expected = records_of_variants(rule, backend, max_norm)
    run(ranks_of(layout, "uneven"), follow_variants, layout, rule, expected, max_norm, backend)


# Missing, frozen and changed gradients.


def frozen(pair: Pair) -> None:
    for one in pair:
        one.params["conv"].requires_grad_(False)
    pair.give()
    for one in pair:
        one.params["conv"].grad = None
    pair.advance(0.5)
    assert "conv" not in pair.sharded.decisions()


def none_on_one_rank(pair: Pair) -> None:
    """Counts as zero there."""
    pair.steps(1)
    for max_norm in (None, 0.5):
        pair.give()
        for name, p in pair.sharded.params.items():
            lacking = holds(p, last=True) and not holds(p, last=False)
            if lacking:
                local(p.grad).zero_()
            pair.whole.params[name].grad = full(p.grad, p)
            if lacking:
                p.grad = None
        pair.advance(max_norm)
    pair.steps(1)


def none_on_all_ranks(pair: Pair) -> None:
    for max_norm in (None, 0.5, None):
        pair.give()
        for one in pair:
            one.params["conv"].grad = None
        pair.advance(max_norm)
    pair.steps(1)


def other_placements(pair: Pair) -> None:
    for step in range(2):
        pair.give()
        for name, p in pair.sharded.params.items():
            if isinstance(p, DTensor):
                g, over = pair.whole.params[name].grad, p.device_mesh
                whole, parts = [[kind] * over.ndim for kind in (Replicate(), Partial())]
                p.grad = (
                    DTensor.from_local(g / over.size(), over, parts, run_check=False)
                    if step
                    else DTensor.from_local(g.clone(), over, whole, run_check=False)
                )
        pair.advance()


def changed_after_clipping(pair: Pair) -> None:
    """The step measures again, on every rank."""
    pair.steps(1)
    pair.give()
    for one in pair:
        one.optimizer.clip_grad_norm_(0.5)
    for name, p in pair.sharded.params.items():
        if holds(p, last=False):
            local(p.grad).mul_(3)
        if placement_of(p).is_shared:
            pair.whole.params[name].grad.copy_(full(p.grad, p))
    pair.advance()


def changed_as_a_whole_after_clipping(pair: Pair) -> None:
    """By an operation on a DTensor, which its local tensor does not count."""
    pair.steps(1)
    pair.give()
    for one in pair:
        for p in one.params.values():
            p.grad = p.grad.clone()  # slices are views of whole gradients
        one.optimizer.clip_grad_norm_(0.5)
    for one in pair:
        for p in one.params.values():
            p.grad.mul_(3)
    pair.advance()


def loaded_after_clipping(pair: Pair) -> None:
    """Other buckets do not hold what was measured for clipping."""
    pair.steps(1)
    for _ in range(3):  # all decisions
        pair.give()
        for one in pair:
            one.optimizer.clip_grad_norm_(0.5)
            one.optimizer.load_state_dict(one.optimizer.state_dict())
        pair.advance()


def options_changed_after_clipping(pair: Pair) -> None:
    """The step goes by the options of the test that it finds."""
    pair.steps(1)
    for values in ({"delta": 30.0}, {"delta": 0.1}, {"projection": "layer"}, {"projection": "auto", "eps": 1e4}):
        pair.give()
        for one in pair:
            one.optimizer.clip_grad_norm_(0.5)
            for group in one.optimizer.param_groups:
                group.update(values)
        pair.advance()


def norms(pair: Pair) -> None:
    for norm_type in (1.0, 3.0, math.inf, -math.inf, 0.0):
        with named(f"norm_type={norm_type}"):
            pair.give()
            pair.advance(0.01, norm_type=norm_type)


def by_option(pair: Pair) -> None:
    """The same as clip_grad_norm_, to the bit, and as many collectives; the norm is that of all ranks."""
    expected = pair.another()
    for one in pair:
        for group in one.optimizer.param_groups:
            group["max_grad_norm"] = 0.5
    for step in range(4):
        seen = []
        for of, limit in ((pair, None), (expected, 0.5)):
            of.give()
            with Collectives() as collectives:
                norm = of.sharded.advance(limit)
            of.whole.advance(limit)
            seen.append(collectives.names)
        assert seen[0] == seen[1] or not step, seen  # in step 0 the ranks meet
        found = pair.sharded.optimizer.grad_norm
        assert found.item() == norm
        assert abs(found - pair.whole.optimizer.grad_norm) <= 1e-12 * found
        for p, q in zip(pair.sharded.params.values(), expected.sharded.params.values(), strict=True):
            assert_identical(local(p.detach()), local(q.detach()))
        pair.check()


def norm_to_nothing(pair: Pair) -> None:
    pair.steps(2, max_norm=0.0)


def not_finite(pair: Pair) -> None:
    """All ranks raise, and nothing has moved."""
    pair.steps(1)
    before = pair.sharded.values()
    pair.give()
    for p in pair.sharded.params.values():
        if holds(p, last=False):
            local(p.grad).fill_(math.inf)
    for norm_type in (2.0, 1.0):
        with pytest.raises(RuntimeError, match="so they cannot be clipped"):
            pair.sharded.optimizer.clip_grad_norm_(1.0, norm_type=norm_type, error_if_nonfinite=True)
    assert_within(pair.sharded.values(), before, 0)
    pair.steps(1)


def scaled(pair: Pair) -> None:
    """An infinity on one rank keeps all of them from stepping."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in pair]
    for step in range(4):
        pair.give()
        for one in pair:
            for p in one.params.values():
                p.grad = p.grad * 1024.0
        if step == 1:
            for p in pair.sharded.params.values():
                if holds(p, last=False):
                    local(p.grad).fill_(math.inf)
            for p in pair.whole.params.values():
                p.grad.fill_(math.inf)
        for one, scaler in zip(pair, scalers, strict=True):
            scaler.scale(torch.zeros(()))
            if step >= 2:
                one.optimizer.clip_grad_norm_(0.5 * 1024.0)
            scaler.step(one.optimizer)
            scaler.update(1024.0)
        pair.check()


def told_infinite_on_one_rank(pair: Pair) -> None:
    """As by a scaler that looks at its own rank only; replicas see the same."""
    pair.steps(1)
    before = pair.sharded.values()
    pair.give()
    optimizer = pair.sharded.optimizer
    found = holds(pair.sharded.params["conv"], last=False)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(float(found))
    optimizer.step()
    assert_within(pair.sharded.values(), before, 0)
    del optimizer.grad_scale, optimizer.found_inf
    pair.steps(1)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        *(frozen, none_on_one_rank, none_on_all_ranks, other_placements, changed_after_clipping),
        *(changed_as_a_whole_after_clipping, loaded_after_clipping, norms, norm_to_nothing, not_finite, scaled),
        *(options_changed_after_clipping, told_infinite_on_one_rank, by_option),
    )
}


def play(layout: str, rule: str, sharing: str, names: list[str], options: dict[str, Any]) -> None:
    for name in names:
        with named(name):
            SCENARIOS[name](Pair(layout, rule, sharing, **options))


@every_layout(*LAYOUTS[1:], FLAT)
@pytest.mark.parametrize("sharing", ["uneven", "empty"])
@EVERY_RULE
def test_what_may_happen_to_gradients(rule: str, sharing: str, layout: str, backend: str) -> None:
    # An infinity that a scaler sees on its own rank alone has to go along with the step.
    options = {"backend": backend, "amp_scaling": True}
    run(ranks_of(layout, sharing), play, layout, rule, sharing, list(SCENARIOS), options)


# Modules that compute.


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.norm(self.up(self.embedding(tokens))).tanh())


PLAN = {"up": ColwiseParallel(output_layouts=Replicate()), "down": RowwiseParallel(input_layouts=Replicate())}


def shard(network: nn.Module, layout: str) -> tuple[nn.Module, int, int]:
    """And which share of the data is this rank's, of how many."""
    ranks = dist.get_world_size()
    over = mesh(2, 2) if layout in {"HSDP", "FSDP2 x TP"} else mesh(ranks)
    if layout == "DDP":
        return DistributedDataParallel(network), dist.get_rank(), ranks
    if "TP" in layout:
        parallelize_module(network, over["b"] if "x" in layout else over, PLAN)
    if layout == "TP":
        return network, 0, 1
    data = over["a"] if "x" in layout else over
    for module in (network.up, network.down, network):
        fully_shard(module, mesh=data)
    return network, *((data.get_local_rank(), 2) if "x" in layout else (dist.get_rank(), ranks))


def train(layout: str, rule: str, max_norm: float | None, options: dict[str, Any]) -> None:
    """Every rank on its share of the data, beside a copy on all of it."""
    cls, defaults = RULES[rule]
    whole = Network().double()
    sharded, share, shares = shard(copy.deepcopy(whole), layout)
    both, optimizers = ((sharded, slice(share, None, shares)), (whole, slice(None))), []
    for network, _ in both:
        params = list(network.parameters())
        groups = [{"params": params[::2]}, {"params": params[1::2], "delta": 2.0}]
        optimizers.append(cls(groups, **defaults, **options))
    for _ in range(10):
        tokens, target = torch.randint(12, (8,)), torch.randn(8, 4, dtype=torch.float64)
        for (network, mine), optimizer in zip(both, optimizers, strict=True):
            optimizer.zero_grad()
            (network(tokens[mine]) - target[mine]).square().mean().backward()
            if max_norm is not None:
                optimizer.clip_grad_norm_(max_norm)
            optimizer.step()
        seen = [list(optimizer.decisions().values()) for optimizer in optimizers]
        assert seen[0] == seen[1]
        assert len(set(seen[0])) > 1
    ours, theirs = [{str(i): p.detach() for i, p in enumerate(n.parameters())} for n, _ in both]
    assert_within(ours, theirs)


@every_layout("DDP", "FSDP2", "HSDP", "TP", "FSDP2 x TP")
@pytest.mark.parametrize("max_norm", [None, 0.1], ids=["no clip", "clip"])
@EVERY_RULE
def test_modules(rule: str, max_norm: float | None, layout: str, backend: str) -> None:
    """Forward and backward by torch's parallel modules."""
    run(ranks_of(layout, "even"), train, layout, rule, max_norm, {"backend": backend})


# Precision.


def store(layout: str, rule: str, options: dict[str, Any]) -> None:
    """The numbers of one process, as exactly as they are stored."""
    for mode, more in {
        "state_dtype": {"state_dtype": torch.float32},
        "remainder": {"rounding": "remainder"},
        "stochastic": {"rounding": "stochastic"},
        "stochastic, wide": {"rounding": "stochastic", "state_dtype": torch.float32},
    }.items():
        with named(mode):
            pair = Pair(layout, rule, "uneven", dtype=torch.bfloat16, **options, **more)
            pair.give()
            pair.whole.optimizer.step()
            pair.sharded.optimizer.step()
            for name, p in pair.sharded.params.items():  # the same seeds, among other things
                local(p.data).copy_(local(laid_out(pair.whole.params[name].data, p)))
                for key, t in pair.whole.optimizer.state[pair.whole.params[name]].items():
                    ours = local(pair.sharded.optimizer.state[p][key])
                    ours.copy_(local(laid_out(t, p)) if t.ndim or ours.ndim else t)
            for step in range(5):
                pair.give()
                for one in pair:
                    one.advance(0.5 if step == 4 else None)
                assert pair.sharded.decisions() == pair.whole.decisions()
            values = [{name: full(t) for name, t in one.values().items()} for one in pair]
            for one in values if mode == "remainder" else ():
                for name in pair.whole.params:
                    one[name] = join(one[name], one.pop(f"remainder of {name}"))
            for name, expected in values[1].items():
                same = assert_close if expected.dtype is torch.float32 else assert_identical
                same(values[0][name], expected, name)


@every_layout(*LAYOUTS[1:], FLAT)
@EVERY_RULE
def test_bfloat16(rule: str, layout: str, backend: str) -> None:
    run(ranks_of(layout, "uneven"), store, layout, rule, {"backend": backend})


# The report, and GPU kernels.


def report(layout: str, rule: str, options: dict[str, Any]) -> None:
    pair = Pair(layout, rule, "uneven", **options)
    for step in range(3):
        pair.give()
        pair.advance(0.5 if step == 2 else None)
        ours, theirs = (one.optimizer.projection_report() for one in pair)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.name, a.shape, a.decision) == (b.name, b.shape, b.decision)
            for field in ("cosine", "norm", "growth", "effective_step"):
                x, y = getattr(a, field), getattr(b, field)
                assert x == pytest.approx(y, rel=1e-9, abs=1e-14, nan_ok=True), f"{field} of {a.name}"


@every_layout(*SHARDED)
@EVERY_RULE
def test_projection_report(rule: str, layout: str, backend: str) -> None:
    run(ranks_of(layout, "uneven"), report, layout, rule, {"backend": backend})


def follow_interpreted(layout: str, rule: str, told: Record, max_norm: float | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter's
        follow(layout, rule, [told], max_norm, {"backend": "triton"})


@pytest.mark.skipif(triton.load() is not None, reason=str(triton.load()))
@pytest.mark.parametrize(
    ("layout", "max_norm"),
    [
        ("TP row", 0.5),
        *(
            pytest.param(layout, max_norm, marks=pytest.mark.exhaustive)
            for layout, max_norm in (("TP row", None), *product(("FSDP2 x TP", FLAT), (None, 0.5)))
        ),
    ],
)
@EVERY_RULE
def test_triton(rule: str, max_norm: float | None, layout: str) -> None:
    """In its interpreter, which the workers have on."""
    told = record("uneven", rule, 3, 0, max_norm, backend="reference")
    run(ranks_of(layout, "uneven"), follow_interpreted, layout, rule, told, max_norm)
