"""Situations from users' training code: each test covers a kind, not one instance of it."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import weakref
from collections import UserList
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import fused_adamp

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY_RULE = pytest.mark.parametrize("rule", [fused_adamp.AdamP, fused_adamp.SGDP], ids=["AdamP", "SGDP"])
OPTIONS: dict[Any, dict[str, Any]] = {fused_adamp.AdamP: {"lr": 0.1}, fused_adamp.SGDP: {"lr": 0.1, "momentum": 0.9}}


def with_gradient(t: Tensor) -> nn.Parameter:
    p = nn.Parameter(t)
    p.grad = torch.randn(t.shape)
    return p


# Parameters that share memory.

ALIASES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "the same tensor": lambda w: [w, w, w],
    "transposed": lambda w: [w, w.t()],
    "reshaped": lambda w: [w, w.view(-1), w.view(128, 512)],
    "parts that meet": lambda w: [w[:20], w[10:30], w[25:]],
    "around two others": lambda w: [w, w[2:4], w[20:22]],
    "two pairs": lambda w: [w[:10], w[20:], w[:10], w[20:]],
    "beside others": lambda w: [torch.ones(5, 3), w, torch.ones(7), w, torch.ones(2, 2)],
    "no overlap": lambda w: [w[:16], w[16:]],
}


@EVERY_RULE
@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("groups", [False, True], ids=["one group", "buckets of their own"])
def test_parameters_that_share_memory_are_stepped_one_after_the_other(
    rule: Any, name: str, groups: bool, backend: str
) -> None:
    """In the order of the groups, as one optimizer for each of them would; in several buckets too."""
    results = []
    for together in (True, False):
        torch.manual_seed(0)
        w = torch.randn(512, 128)  # two tiles on the CPU, whose jobs others come between
        params = [nn.Parameter(t) for t in ALIASES[name](w)]
        settings = [{"state_dtype": torch.float64 if groups and i % 2 else None} for i in range(len(params))]
        parts = [{"params": [p], **own} for p, own in zip(params, settings, strict=True)]
        optimizers = [
            rule(part, backend=backend, **OPTIONS[rule]) for part in ([parts] if together else [[x] for x in parts])
        ]
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape)
            for optimizer in optimizers:
                optimizer.step()
        results.append([p.detach().clone() for p in params])
    for ours, theirs in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)


def test_addresses_that_change_are_looked_at_again(backend: str) -> None:
    params = [with_gradient(torch.randn(512, 128)), with_gradient(torch.randn(8, 128))]
    optimizer = fused_adamp.AdamP(params, lr=0.1, backend=backend)
    optimizer.step()
    params[1].data = params[0].data[100:108]
    alone = copy.deepcopy(params[0])
    alone.grad, others = params[0].grad, [copy.deepcopy(optimizer.state[p]) for p in params]
    for i, member in enumerate((alone, nn.Parameter(alone.data[100:108]))):
        member.grad = params[i].grad
        by_itself = fused_adamp.AdamP([member], lr=0.1, backend=backend)
        by_itself.state[member] = others[i]
        by_itself.step()
    optimizer.step()
    assert torch.equal(params[0], alone), "one after the other"


# Storage that an offloading tool has freed.


@EVERY_RULE
@pytest.mark.parametrize("call", ["step", "clip_grad_norm_"])
@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("role", ["weight", "gradient"])
def test_freed_storage_is_an_error_and_nothing_moves(rule: Any, call: str, size: int, role: str, backend: str) -> None:
    params = [with_gradient(torch.randn(30, 30)) for _ in range(2)]
    optimizer = rule(params, backend=backend, **OPTIONS[rule])
    optimizer.step()
    before = params[0].detach().clone()
    freed = params[1] if role == "weight" else params[1].grad
    assert freed is not None
    freed.untyped_storage().resize_(size)
    with pytest.raises(ValueError, match=f"storage of .*parameter 1 of group 0 holds {size} bytes.*bring it back"):
        optimizer.step() if call == "step" else optimizer.clip_grad_norm_(1.0)
    assert torch.equal(params[0], before)
    freed.untyped_storage().resize_(30 * 30 * 4)
    freed.data.fill_(1.0)
    optimizer.step()
    assert not torch.equal(params[0], before)


# State that users make, share, free or replace.

GIVEN: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "in shared memory": (lambda p: torch.zeros(p.shape).share_memory_(), lambda: torch.zeros(())),
    "bfloat16": (lambda p: torch.zeros_like(p, dtype=torch.bfloat16), lambda: torch.zeros(())),
    "float64": (lambda p: torch.zeros_like(p, dtype=torch.float64), lambda: torch.zeros(())),
    "a step of shape (1,)": (torch.zeros_like, lambda: torch.zeros(1)),
    "in another order": (lambda p: torch.zeros(p.shape[::-1]).t(), lambda: torch.zeros(())),
    "part of a flat tensor": (
        lambda p: torch.zeros(2 * p.numel() + 3)[3:].view(2, *p.shape)[1],
        lambda: torch.zeros(()),
    ),
}


@EVERY_RULE
def test_state_whose_elements_share_memory_is_copied(rule: Any, backend: str) -> None:
    ours, expected = (rule([with_gradient(torch.ones(6, 4))], backend=backend, **OPTIONS[rule]) for _ in range(2))
    (p,), (other,) = (optimizer.param_groups[0]["params"] for optimizer in (ours, expected))
    other.grad = p.grad
    for optimizer in (ours, expected):
        optimizer.step()
    for name, t in expected.state[other].items():
        if t.ndim:
            t.fill_(0.5)
            ours.state[p][name] = torch.tensor(0.5).expand(t.shape)
    for optimizer in (ours, expected):
        optimizer.step()
    assert torch.equal(p, other)
    for name, t in expected.state[other].items():
        assert torch.equal(ours.state[p][name], t), name


@EVERY_RULE
@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("door", ["new", "unpickled", "after a step"])
def test_state_that_is_given_is_used_where_it_lies(rule: Any, name: str, door: str, backend: str) -> None:
    make, step = GIVEN[name]
    params = [with_gradient(torch.randn(6, 4)) for _ in range(3)]
    optimizer = rule(params, backend=backend, **OPTIONS[rule])
    if door == "after a step":
        optimizer.step()
    if door == "unpickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
        params = optimizer.param_groups[0]["params"]
        for p in params:
            p.grad = torch.randn_like(p)
    keys = ["exp_avg", "exp_avg_sq"] if rule is fused_adamp.AdamP else ["momentum_buffer"]
    for p in params[:2]:
        optimizer.state[p] = {key: make(p.detach()) for key in keys}
        if rule is fused_adamp.AdamP:
            optimizer.state[p]["step"] = step()
    given = {(p, key): t for p in params[:2] for key, t in optimizer.state[p].items()}
    storages = {place: (t.data_ptr(), t.dtype, t.is_shared()) for place, t in given.items()}
    for _ in range(3):
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    for (p, key), t in given.items():
        assert optimizer.state[p][key] is t
        assert (t.data_ptr(), t.dtype, t.is_shared()) == storages[p, key]
        assert t.any()
    other = rule([nn.Parameter(p.detach().clone()) for p in params], backend=backend, **OPTIONS[rule])
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        q.grad = p.grad
    optimizer.step()
    other.step()
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


@EVERY_RULE
def test_moments_may_be_freed_and_restored(rule: Any, backend: str) -> None:
    """As offloading tools do: by their storages, or by other tensors in their place."""
    twins = []
    for offload in (False, True):
        torch.manual_seed(0)
        params = [with_gradient(torch.randn(30, 20)) for _ in range(3)]
        optimizer = rule(params, backend=backend, **OPTIONS[rule])
        for number in range(6):
            optimizer.step()
            for state in optimizer.state.values() if offload else ():
                for key, t in state.items():
                    kept, size = t.clone(), t.untyped_storage().size()
                    if number % 2 and key != "step":
                        t.untyped_storage().resize_(0)
                        with pytest.raises(ValueError, match=f"state '{key}' of parameter . of group 0 holds 0 bytes"):
                            optimizer.step()
                        t.untyped_storage().resize_(size)
                        t.copy_(kept)
                    else:
                        state[key] = kept
        twins.append(params)
    for p, q in zip(*twins, strict=True):
        assert torch.equal(p, q)


@EVERY_RULE
def test_replaced_moments_are_not_kept_alive(rule: Any, backend: str) -> None:
    params = [with_gradient(torch.randn(30, 20)) for _ in range(3)]
    optimizer = rule(params, backend=backend, **OPTIONS[rule])
    optimizer.step()
    optimizer.clip_grad_norm_(1.0)
    seen = [weakref.ref(t) for state in optimizer.state.values() for t in state.values()]
    optimizer.state.clear()
    assert not any(there() is not None for there in seen)


@EVERY_RULE
def test_two_optimizers_that_load_one_state_dict_share_no_state(rule: Any, backend: str) -> None:
    source = rule([with_gradient(torch.ones(3, 4))], backend=backend, **OPTIONS[rule])
    source.step()
    loaded = [rule([with_gradient(torch.ones(3, 4))], backend=backend, **OPTIONS[rule]) for _ in range(2)]
    for optimizer in loaded:
        optimizer.load_state_dict(source.state_dict())
    states = [next(iter(optimizer.state.values())) for optimizer in (source, *loaded)]
    for key in states[0]:
        assert len({state[key].data_ptr() for state in states}) == len(states)


# Parameters that are swapped for others.


@EVERY_RULE
@pytest.mark.parametrize("carried", [False, True], ids=["no state", "with the state"])
@pytest.mark.parametrize("shapes", ["alike", "different"])
def test_swapped_parameters(rule: Any, carried: bool, shapes: str, backend: str) -> None:
    """An optimizer made anew in every step, with the same state, does the same bit for bit."""
    torch.manual_seed(0)
    params = [with_gradient(torch.randn(6, 4)) for _ in range(5)] + [with_gradient(torch.randn(7)) for _ in range(3)]
    optimizer = rule(params, backend=backend, **OPTIONS[rule])
    optimizer.step()
    for number in range(6):
        for index in {number % 5, number * 3 % 8}:
            old = optimizer.param_groups[0]["params"][index]
            new = with_gradient(torch.randn(old.shape if shapes == "alike" else (3, 2 + number)))
            optimizer.param_groups[0]["params"][index] = new
            state = optimizer.state.pop(old)
            if carried and shapes == "alike":
                optimizer.state[new] = state
        params = optimizer.param_groups[0]["params"]
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        fresh = rule(copies, backend=backend, **OPTIONS[rule])
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad
            if p in optimizer.state:
                fresh.state[q] = {key: t.clone() for key, t in optimizer.state[p].items()}
        optimizer.step()
        fresh.step()
        assert set(optimizer.decisions()) == set(params)
        for p, q in zip(params, copies, strict=True):
            assert torch.equal(p, q)
            assert optimizer.decisions()[p] == fresh.decisions()[q]


# Frozen and unfinished parameters.

FROZEN: dict[str, Callable[[], Tensor]] = {
    "uint8": lambda: torch.zeros(8, 1, dtype=torch.uint8),
    "int64": lambda: torch.zeros(3, dtype=torch.int64),
    "complex": lambda: torch.zeros(3, 2, dtype=torch.complex64),
    "float8": lambda: torch.zeros(3, 2).to(torch.float8_e4m3fn),
    "meta": lambda: torch.empty(3, 2, device="meta"),
    "expanded": lambda: torch.ones(1, 2).expand(3, 2),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@EVERY_RULE
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_are_not_judged(rule: Any, name: str, backend: str) -> None:
    p, frozen = with_gradient(torch.ones(3, 3)), nn.Parameter(FROZEN[name](), requires_grad=False)
    optimizer = rule([frozen, p], backend=backend, **OPTIONS[rule])
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert frozen not in optimizer.state
    assert not torch.equal(p, torch.ones(3, 3))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


@EVERY_RULE
def test_lazy_modules(rule: Any, backend: str) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    optimizer = rule(model.parameters(), backend=backend, **OPTIONS[rule])
    optimizer.step()
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())


def test_betas_may_be_any_sequence_of_two() -> None:
    p = with_gradient(torch.ones(2, 2))
    fused_adamp.AdamP([p], betas=UserList([0.9, 0.99])).step()  # type: ignore[arg-type]
    for bad in ("ab", 0.9, [0.9], {"a": 1, "b": 2}):
        with pytest.raises(ValueError, match="is not a pair"):
            fused_adamp.AdamP([p], betas=bad)  # type: ignore[arg-type]


# Groups that change.

CHANGES: dict[str, Callable[[Any, nn.Linear], object]] = {
    "the first is removed": lambda o, m: o.param_groups.pop(0),
    "the last is removed": lambda o, m: o.param_groups.pop(),
    "reversed": lambda o, m: o.param_groups.reverse(),
    "sorted": lambda o, m: o.param_groups.sort(key=lambda group: group["weight_decay"]),
    "inserted": lambda o, m: o.param_groups.insert(0, dict(o.param_groups[1], params=[with_gradient(torch.ones(5))])),
    "vectors alone": lambda o, m: (o.param_groups.pop(1), o.param_groups[0].update(params=[m.bias])),
    "a row as a leaf": lambda o, m: o.param_groups[0].update(params=[with_gradient(m.weight.detach()[1])]),
    "a column as a leaf": lambda o, m: o.param_groups[0].update(params=[with_gradient(m.weight.detach()[:, 1])]),
}


@EVERY_RULE
@pytest.mark.parametrize("change", CHANGES)
def test_groups_may_change(rule: Any, change: str, backend: str) -> None:
    m = nn.Linear(4, 4)
    groups = [{"params": [m.weight], "weight_decay": 0.1}, {"params": [m.bias], "weight_decay": 0.0}]
    optimizer = rule(groups, backend=backend, **OPTIONS[rule])
    m(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    CHANGES[change](optimizer, m)
    moving = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in moving]
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(moving, before, strict=True))
    assert all(record.name for record in optimizer.projection_report())


# Wrappers, hooks and errors.


class Wrapper:
    """As Lightning's and Fabric's: subclasses the optimizer's class and copies its attributes."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "__del__")}
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})
        self._wrapped = optimizer

    def step(self, closure: Any = None) -> Any:
        return self._wrapped.step(closure)


@EVERY_RULE
@pytest.mark.parametrize("stepped_before", [False, True])
def test_what_is_called_through_a_wrapper_is_the_optimizers(rule: Any, stepped_before: bool, backend: str) -> None:
    results = []
    for wraps in (False, True):
        torch.manual_seed(0)
        p = with_gradient(torch.randn(4, 4))
        raw = rule([p], backend=backend, **OPTIONS[rule])
        if stepped_before:
            raw.step()
        optimizer: Any = Wrapper(raw) if wraps else raw
        for _ in range(2):
            optimizer.clip_grad_norm_(1e-3)
            optimizer.step()
        report = optimizer.projection_report()
        assert len(report) == 1
        assert optimizer.decisions() == raw.decisions()
        results.append((p.detach().clone(), str(report)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@EVERY_RULE
@pytest.mark.parametrize("amp_scaling", [True, False])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_a_clip_in_a_hook_takes_the_norm_of_what_the_step_uses(
    rule: Any, amp_scaling: bool, norm_type: float, backend: str
) -> None:
    results = []
    for scaled in (True, False):
        torch.manual_seed(0)
        m = nn.Linear(8, 8)
        optimizer = rule(m.parameters(), amp_scaling=amp_scaling, backend=backend, **OPTIONS[rule])
        norms: list[Tensor] = []
        optimizer.register_step_pre_hook(lambda o, *_, to=norms: to.append(o.clip_grad_norm_(1e-2, norm_type)))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        scaler.scale(m(torch.ones(4, 8)).square().mean()).backward()
        scaler.step(optimizer)
        results.append((m.weight.detach().clone(), norms[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_only_asked_for_options_follow_torchs_words() -> None:
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        fused_adamp.AdamP([nn.Parameter(torch.ones(2))], lr=torch.ones(2))
    with pytest.raises(RuntimeError, match=r"`fused=True` requires all the params to be floating point Tensors"):
        fused_adamp.AdamP([nn.Parameter(torch.empty(2, device="meta"))], fused=True)


# An option of the test that changes between clip_grad_norm_ and step.


@EVERY_RULE
@pytest.mark.parametrize("after", [{"projection": "layer"}, {"delta": 30.0}, {"delta": 0.0}, {"eps": 1e4}], ids=str)
def test_a_step_goes_by_the_options_it_finds(rule: Any, after: dict[str, Any], backend: str) -> None:
    results = []
    for changed_before in (True, False):
        torch.manual_seed(0)
        p = with_gradient(torch.randn(6, 9))
        optimizer = rule([p], backend=backend, **OPTIONS[rule])
        optimizer.step()
        p.grad = torch.randn(6, 9)
        if changed_before:
            optimizer.param_groups[0].update(after)
        optimizer.clip_grad_norm_(0.5)
        optimizer.param_groups[0].update(after)
        optimizer.step()
        results.append((p.detach().clone(), optimizer.decisions()[p]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is results[1][1]


# Ambient modes.

UNDER_A_DEFAULT_DEVICE = """
import sys, torch, pytest
torch.set_default_device("meta")
from fused_adamp import AdamP, SGDP
for rounding, dtype in (("nearest", torch.float32), ("stochastic", torch.bfloat16), ("remainder", torch.bfloat16)):
    for cls, options in ((AdamP, {}), (SGDP, {"momentum": 0.9})):
        w = torch.ones(8, 4, device="cpu").to(dtype)
        p = torch.nn.Parameter(w.clone()); p.grad = torch.ones(8, 4, device="cpu").to(dtype)
        v = torch.nn.Parameter(w[0].clone()); v.grad = p.grad[0].clone()
        o = cls([p, v], lr=torch.tensor(0.1, device="cpu"), rounding=rounding, backend=sys.argv[1], **options)
        o.clip_grad_norm_(1.0); o.step(); o.clip_grad_norm_(1.0, 1.0); o.step(); o.projection_report(); o.decisions()
        o.load_state_dict(o.state_dict()); o.step()
        assert p.device.type == "cpu" and not torch.equal(p, w), (rounding, cls)
        assert all(t.device.type == "cpu" for state in o.state.values() for t in state.values())
"""


def test_a_default_device_of_the_users_finds_no_tensor_of_ours(backend: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", UNDER_A_DEFAULT_DEVICE, backend],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
