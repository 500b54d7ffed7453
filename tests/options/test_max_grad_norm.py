"""The option ``max_grad_norm``: every step is clip_grad_norm_ and step, bit for bit, and leaves the norm."""

from __future__ import annotations

import copy
import math
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from test_clipping import BF16, F32, LARGE, ClippedRun
from tolerances import assert_identical
from torch import Tensor, nn
from trajectory import RULES, SHAPES, assert_snapshots_equal, gradient, parameters, snapshot

from fused_adamp.precision import ROUNDINGS
from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Twins:
    """One optimizer with the option and one without, on which clip_grad_norm_ is called: their results are equal."""

    def __init__(self, rule: str, backend: str | None, max_norm: Any, dtype: torch.dtype = F32, **options: Any) -> None:
        cls, defaults = RULES[rule]
        params = [*parameters(*SHAPES, (300, 128), dtype=dtype), *parameters((6, 10), (9,))]
        self.made = 0
        self.optimizers: list[Any] = []
        for limit in (max_norm, None):
            of = [nn.Parameter(p.detach().clone()) for p in params]
            groups = [{"params": of[:3]}, {"params": of[3:], "lr": 0.02}]
            torch.manual_seed(1)  # of the stochastic rounding
            self.optimizers.append(cls(groups, **defaults | options, max_grad_norm=limit, backend=backend))
        self.seen: set[Decision] = set()

    @property
    def params(self) -> list[list[Tensor]]:
        return [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in self.optimizers]

    def set(self, max_norm: Any) -> None:
        for group in self.optimizers[0].param_groups:
            group["max_grad_norm"] = max_norm

    def give(self, grads: Sequence[Tensor] | None = None) -> None:
        kinds = ("channel", "layer", "free")
        made = [gradient(p, kinds[(i + self.made) % 3]) for i, p in enumerate(self.params[0])]
        self.made += 1
        for params in self.params:
            for p, g in zip(params, made if grads is None else grads, strict=True):
                p.grad = g.clone()

    def step(self, max_norm: Any, *, call: Any = None) -> None:
        """A step of both; ``max_norm`` is what the other one clips to, ``call`` what the first one clips to by hand."""
        ours, theirs = self.optimizers
        if call is not None:
            ours.clip_grad_norm_(call)
        norm = None if max_norm is None else theirs.clip_grad_norm_(max_norm)
        for optimizer in self.optimizers:
            torch.manual_seed(self.made)  # of the seeds of stochastic rounding, which the first step draws
            optimizer.step()
        if norm is None:
            assert ours.grad_norm is None
        else:
            assert_identical(ours.grad_norm, norm, "norm")
        assert theirs.grad_norm is None
        self.compare()
        self.seen |= set(ours.decisions().values())

    def compare(self) -> None:
        found = list(map(snapshot, self.optimizers))
        for one in found:
            one["state"]["param_groups"] = []
        assert_snapshots_equal(*found)
        decisions = [list(optimizer.decisions().values()) for optimizer in self.optimizers]
        assert decisions[0] == decisions[1]


LIMITS = [0.5, 0, 1e9, math.inf, np.float64(0.05), torch.tensor(0.25), torch.tensor([2], dtype=torch.int32)]


@EVERY_RULE
@pytest.mark.parametrize("limit", LIMITS, ids=repr)
def test_a_step_is_clip_and_step(rule: str, limit: Any, backend: str) -> None:
    """Bit for bit, over several groups, dtypes and plans; the norm too."""
    twins = Twins(rule, backend, limit)
    for _ in range(3):
        twins.give()
        twins.step(limit)
    assert twins.seen == set(Decision) or limit == 0  # clipped to zero, every row passes the test


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_in_16_bits(rounding: str, backend: str) -> None:
    twins = Twins("AdamP", backend, 0.5, BF16, rounding=rounding)
    for _ in range(3):
        twins.give()
        twins.step(0.5)


@EVERY_RULE
def test_it_clips(rule: str, backend: str) -> None:
    """As torch does, and then the reference."""
    run = ClippedRun(rule, parameters(*SHAPES, *LARGE), backend, max_grad_norm=0.5)
    for _ in range(3):
        run.limit = 0.5, 2.0
        run.step()
    assert run.optimizer.grad_norm is not None
    expected = torch.nn.utils.get_total_norm([p.grad for p in run.params if p.grad is not None])
    torch.testing.assert_close(run.optimizer.grad_norm, expected)


@EVERY_RULE
def test_changes_between_steps_take_effect(rule: str, backend: str) -> None:
    twins = Twins(rule, backend, None)
    for limit in (None, 0.5, 0.05, None, torch.tensor(0.1), 1e9):
        twins.set(limit)
        twins.give()
        twins.step(limit)


def test_a_tensor_that_is_written_to(backend: str) -> None:
    limit = torch.tensor(0.5)
    twins = Twins("AdamP", backend, limit)
    for value in (0.5, 0.05):
        limit.fill_(value)
        twins.give()
        twins.step(torch.tensor(value))


def test_groups_may_have_tensors_of_their_own(backend: str) -> None:
    """As after loading a checkpoint that keeps no identities."""
    twins = Twins("AdamP", backend, None)
    for group, value in zip(twins.optimizers[0].param_groups, (torch.tensor(0.5), 0.5), strict=True):
        group["max_grad_norm"] = value
    twins.give()
    twins.step(0.5)


@pytest.mark.parametrize("option", [0.5, 0.05])
@pytest.mark.parametrize("call", [0.05, 0.5, math.inf])
def test_a_call_counts_in_place_of_the_option(option: float, call: float, backend: str) -> None:
    """In its one step; also if the gradients have changed since."""
    for change in (False, True):
        twins = Twins("AdamP", backend, option)
        for count in range(4):
            twins.give()
            if count % 2 == 0:
                twins.step(option)
                continue
            twins.optimizers[0].clip_grad_norm_(call)
            if change:
                twins.give()
            twins.step(call)


def test_gradients_that_torch_has_clipped_are_clipped_again(backend: str) -> None:
    """As by a second call of torch's function: within the limit nothing changes."""
    twins = Twins("AdamP", backend, 0.5)
    for limit in (0.1, 5.0):
        twins.give()
        for params in twins.params:
            torch.nn.utils.clip_grad_norm_(params, limit)
        twins.step(0.5)


@pytest.mark.parametrize("call", [False, True], ids=["option", "call"])
def test_a_step_that_fails_leaves_no_clip(call: bool, backend: str) -> None:
    """But for that of a call, which still counts."""
    twins = Twins("AdamP", backend, 0.05)
    twins.give()
    twins.step(0.05)
    (p, *_), ours = twins.params[0], twins.optimizers[0]
    twins.give()
    if call:
        ours.clip_grad_norm_(0.2)
    moment, norm = ours.state[p]["exp_avg"], ours.grad_norm
    ours.state[p]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="has shape"):
        ours.step()
    assert ours.grad_norm is norm
    ours.state[p]["exp_avg"] = moment
    twins.set(None if not call else 7.0)
    twins.step(0.2 if call else None)


@pytest.mark.parametrize("missing", ["all", "one"])
def test_missing_gradients(missing: str, backend: str) -> None:
    """Without any, the norm is a zero of the default dtype."""
    twins = Twins("AdamP", backend, 0.05)
    for _ in range(2):
        twins.give()
        for params in twins.params:
            for p in params[: None if missing == "all" else 1]:
                p.grad = None
        twins.step(0.05)


def test_gradients_of_inference_mode(backend: str) -> None:
    """They keep no version; nothing has changed within the step all the same."""
    twins = Twins("AdamP", backend, 0.05)
    with torch.inference_mode():
        twins.give()
    twins.step(0.05)


def test_the_norm_is_the_users(backend: str) -> None:
    twins = Twins("AdamP", backend, 0.05)
    norms = []
    for _ in range(3):
        twins.give()
        twins.step(0.05)
        norms.append((twins.optimizers[0].grad_norm, twins.optimizers[0].grad_norm.item()))
    assert len({value for _, value in norms}) == 3
    assert [norm.item() for norm, _ in norms] == [value for _, value in norms]


@EVERY_RULE
def test_closure(rule: str, backend: str) -> None:
    """Its gradients are clipped. A call within it counts."""
    for call in (None, 0.01):
        twins = Twins(rule, backend, 0.05)
        twins.give([torch.zeros_like(p) for p in twins.params[0]])
        norms = []
        for _ in range(2):
            grads = [torch.randn_like(p) for p in twins.params[0]]

            def closure(grads: list[Tensor] = grads, twins: Twins = twins, call: float | None = call) -> float:
                twins.give(grads)
                if call is not None:
                    twins.optimizers[0].clip_grad_norm_(call)
                return 5.0

            assert twins.optimizers[0].step(closure) == 5.0
            norms.append(twins.optimizers[1].clip_grad_norm_(0.05 if call is None else call))
            twins.optimizers[1].step()
            twins.compare()
            assert_identical(twins.optimizers[0].grad_norm, norms[-1])


# Loss scaling.


@EVERY_RULE
@pytest.mark.parametrize("native", [True, False], ids=["native", "amp_scaling=False"])
def test_loss_scaling(rule: str, native: bool, backend: str) -> None:
    """Unscaled gradients are clipped, by whomever they are unscaled. The scale is a power of two: to the bit."""
    twins = Twins(rule, backend, 0.5, amp_scaling=native)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    for bad in (False, True, False):
        twins.give()
        for p in twins.params[0]:
            assert p.grad is not None
            p.grad *= scaler.get_scale()
            if bad:
                p.grad.view(-1)[0] = math.inf
        before = twins.optimizers[0].grad_norm
        scaler.step(twins.optimizers[0])
        scaler.update()
        norm = twins.optimizers[0].grad_norm
        if bad:  # a scaler that unscales by itself does not call the step
            assert norm.isinf() if native else norm is before
        else:
            assert_identical(norm, twins.optimizers[1].clip_grad_norm_(0.5))
            twins.optimizers[1].step()
        twins.compare()


# Copies and checkpoints.


@EVERY_RULE
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_clip_too(rule: str, how: str, backend: str) -> None:
    twins = Twins(rule, backend, 0.05)
    twins.give()
    twins.step(0.05)
    first = twins.optimizers[0]
    twins.optimizers[0] = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    assert twins.optimizers[0].grad_norm is None
    twins.give()
    twins.step(0.05)
    assert first.grad_norm is not None


def test_a_pickle_from_before_the_option(backend: str) -> None:
    twins = Twins("AdamP", backend, None)
    twins.give()
    twins.step(None)
    state = twins.optimizers[0].__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        del options["max_grad_norm"]
    twins.optimizers[0] = type(twins.optimizers[0]).__new__(type(twins.optimizers[0]))
    twins.optimizers[0].__setstate__(state)
    twins.give()
    twins.step(None)
    twins.optimizers[0].add_param_group({"params": parameters((2, 3))})


@EVERY_RULE
def test_checkpoints(rule: str, backend: str) -> None:
    """They have the option and not the norm. One from before the option leaves it as it is."""
    twins = Twins(rule, backend, 0.5)
    twins.give()
    twins.step(0.5)
    ours = twins.optimizers[0]
    saved = copy.deepcopy(ours.state_dict())
    assert saved.keys() == {"state", "param_groups"}
    assert [group["max_grad_norm"] for group in saved["param_groups"]] == [0.5, 0.5]
    twins.set(0.05)
    ours.load_state_dict(saved)
    assert ours.grad_norm is None
    twins.give()
    twins.step(0.5)
    old = copy.deepcopy(ours.state_dict())
    for group in old["param_groups"]:
        del group["max_grad_norm"]
    twins.set(0.05)
    ours.load_state_dict(old)
    twins.give()
    twins.step(0.05)


def test_a_group_that_is_added_takes_the_default(backend: str) -> None:
    twins = Twins("AdamP", backend, 0.05)
    for optimizer in twins.optimizers:
        torch.manual_seed(3)
        optimizer.add_param_group({"params": parameters((3, 4))})
    twins.give()
    twins.step(0.05)


# With a GPU.


@CUDA
@EVERY_RULE
def test_on_the_gpu(rule: str) -> None:
    """Limit and norm stay on the device."""
    limit = torch.tensor(0.5, device="cuda")
    twins = Twins(rule, None, limit)
    for params in twins.params:
        for p in params:
            p.data = p.data.cuda()
    for _ in range(3):
        twins.give()
        twins.step(limit)
        assert twins.optimizers[0].grad_norm.device.type == "cuda"
        limit.mul_(0.1)
