"""The torch.optim contract: what training code does with an optimizer, against the reference called by hand."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import TYPE_CHECKING, Any

import adamp
import pytest
import torch
from tolerances import assert_close, assert_identical
from torch import Tensor, nn
from torch.optim import lr_scheduler
from trajectory import RULES, SHAPES, Run, assert_same_outcome, assert_snapshots_equal, gradient, parameters, snapshot

import fused_adamp.backends
from fused_adamp import SGDP, AdamP

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))


# Signatures.


@pytest.mark.parametrize(
    ("cls", "oracle", "keywords"),
    [
        (AdamP, adamp.AdamP, {"foreach", "maximize", "fused", "differentiable", "backend"}),
        (SGDP, adamp.SGDP, {"foreach", "maximize", "fused", "differentiable", "backend", "project_buffer"}),
    ],
)
def test_signature(cls: Any, oracle: Any, keywords: set[str]) -> None:
    """The authors' arguments come first, in their order and with their defaults; ours can be given by keyword only."""
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (cls, oracle))
    shared = ours[: len(theirs)]
    assert [a.name for a in shared] == [a.name for a in theirs]
    assert all(a.kind is a.POSITIONAL_OR_KEYWORD for a in shared)
    for mine, other in zip(shared, theirs, strict=True):
        if mine.name == "lr":  # required in the authors' SGDP; torch.optim's default here
            assert mine.default == 1e-3
        else:
            assert mine.default == other.default
            assert type(mine.default) is type(other.default)
    own = ours[len(theirs) :]
    assert all(a.kind is a.KEYWORD_ONLY for a in own)
    assert {a.name for a in own} >= keywords
    defaults = {a.name: a.default for a in own if a.name in keywords}
    assert {n for n, d in defaults.items() if d is False} == keywords & {"maximize", "differentiable", "project_buffer"}
    assert {n for n, d in defaults.items() if d is None} == keywords & {"foreach", "fused", "backend"}
    step = inspect.signature(cls.step).parameters
    assert list(step) == ["self", "closure"]
    assert step["closure"].default is None


@EVERY_RULE
def test_positional_arguments_arrive(rule: str) -> None:
    cls, _ = RULES[rule]
    values = {
        "AdamP": {"lr": 0.5, "betas": (0.1, 0.2), "eps": 0.3, "weight_decay": 0.4, "delta": 0.6, "wd_ratio": 0.7},
        "SGDP": {"lr": 0.5, "momentum": 0.1, "dampening": 0.2, "weight_decay": 0.4},
    }[rule] | {"nesterov": True}
    group = cls(parameters((2, 2)), *values.values()).param_groups[0]
    assert {name: group[name] for name in values} == values


# Groups, closures, schedulers.


@EVERY_RULE
def test_groups_with_their_own_hyperparameters(rule: str, backend: str) -> None:
    """Every hyperparameter differs between groups whose parameters share a bucket."""
    common: list[dict[str, Any]] = [
        {},
        {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.3, "wd_ratio": 0.9, "nesterov": True},
        {"delta": 0, "weight_decay": 0, "maximize": True},
    ]
    own: list[dict[str, Any]] = {
        "AdamP": [{}, {"betas": (0.5, 0.6)}, {"betas": (0.0, 0.0), "eps": 0.1}],
        "SGDP": [{"project_buffer": True}, {"momentum": 0.5}, {"dampening": 1}],
    }[rule]
    run = Run(rule, [{"params": parameters(*SHAPES), **a, **b} for a, b in zip(common, own, strict=True)], backend)
    run.steps(6)
    run.check_all_seen()


@EVERY_RULE
def test_hyperparameters_may_change_between_steps(rule: str, backend: str) -> None:
    run = Run(rule, parameters(*SHAPES), backend)
    changes: list[dict[str, Any]] = [
        {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.0},
        {"nesterov": True, "wd_ratio": 1, "delta": 0.3},
        {"maximize": True, "weight_decay": 0.2},
        {"betas": (0.5, 0.9)} if rule == "AdamP" else {"momentum": 0.3, "dampening": 0.5},
        {"betas": (0.9, 0.99)} if rule == "AdamP" else {"nesterov": False, "project_buffer": True},
    ]
    for change in changes:
        run.steps(2)
        run.optimizer.param_groups[0].update(change)
    run.steps(2)


@pytest.mark.parametrize("momenta", [(0, 0.9, 0.9), (0.9, 0, 0.9), (0, 0, 0.5)])
def test_momentum_may_be_switched_on_and_off(momenta: tuple[float, ...], backend: str) -> None:
    """The buffer is made when it is first needed, and kept unread where it is not."""
    run = Run("SGDP", parameters(*SHAPES), backend)
    for momentum in momenta:
        run.optimizer.param_groups[0]["momentum"] = momentum
        run.steps(3)


@EVERY_RULE
@pytest.mark.parametrize("keyword", [False, True])
def test_closure(rule: str, keyword: bool, backend: str) -> None:
    run = Run(rule, parameters((4, 6)), backend)
    p, c = run.params[0], torch.randn(4, 6, dtype=torch.float64)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        run.optimizer.zero_grad()
        loss = (p * c).square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    for t in range(3):
        hand = run.hands[p]
        hand.step(2 * hand.p * c**2, run.optimizer.param_groups[0])
        with torch.no_grad():
            loss = run.optimizer.step(closure=closure) if keyword else run.optimizer.step(closure)
            assert not torch.is_grad_enabled()
        assert loss is calls[-1]
        assert len(calls) == t + 1
        run.check()


@EVERY_RULE
def test_what_the_closure_returns_is_returned(rule: str, backend: str) -> None:
    run = Run(rule, parameters((4, 6)), backend)
    run.step()
    assert run.optimizer.step() is None
    assert run.optimizer.step(lambda: 1.5) == 1.5
    assert run.optimizer.step(lambda: None) is None


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@EVERY_RULE
@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_scheduler(rule: str, name: str, tensor_lr: bool, backend: str) -> None:
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
    run = Run(rule, [{"params": parameters(*SHAPES)}, {"params": parameters((3, 4))}], backend, lr=lr)
    scheduler = SCHEDULERS[name](run.optimizer)
    momentum = "betas" if rule == "AdamP" else "momentum"
    rates, momenta = set(), set()
    for _ in range(6):
        group = run.optimizer.param_groups[0]
        rates.add(float(group["lr"]))
        momenta.add(group[momentum])
        run.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(rates) > 1
    assert (len(momenta) > 1) == (name in ("OneCycleLR", "CyclicLR"))


# One-element tensors as hyperparameters.


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=["0-d", "1-d", "2-d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rule", "name"),
    [(rule, name) for rule in RULES for name in ("lr", "eps", "weight_decay", "delta", "wd_ratio")]
    + [("AdamP", "betas"), ("SGDP", "momentum"), ("SGDP", "dampening")],
)
def test_tensor_hyperparameter(rule: str, name: str, dtype: torch.dtype, shape: tuple[int, ...], backend: str) -> None:
    """Whatever may be a tensor by its check gives the numbers of the float it holds, at every parameter shape."""
    value = {**RULES[rule][1], "eps": 1e-3, "delta": 0.1}[name]
    tensor: Any = torch.full(shape, 0.0, dtype=dtype)
    if name == "betas":
        tensor = tuple(torch.full(shape, beta, dtype=dtype) for beta in value)
    else:
        tensor.fill_(value)
    run = Run(rule, parameters(*SHAPES), backend, **{name: tensor})
    run.steps(4)
    run.check_all_seen()
    group = run.optimizer.param_groups[0]
    assert group[name] is tensor
    if name != "betas":
        tensor.mul_(0.5)  # as schedulers and capturable training do
        run.steps(2)


# State: round trips and copies.


def fresh(run: Run) -> torch.optim.Optimizer:
    """An optimizer over copies of the weights, with other hyperparameters, which loading has to replace."""
    cls, _ = RULES[run.rule]
    copies = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in run.params]
    backend = run.optimizer.param_groups[0]["backend"]  # the one thing that loading leaves alone
    return cls([{"params": copies[:2]}, {"params": copies[2:]}], lr=0.7, weight_decay=0.9, delta=0.5, backend=backend)


def through_state_dict(run: Run) -> torch.optim.Optimizer:
    other = fresh(run)
    other.load_state_dict(run.optimizer.state_dict())
    return other


def through_state_dict_after_a_step(run: Run) -> torch.optim.Optimizer:
    """Into an optimizer that has buckets and state of its own."""
    other = fresh(run)
    weights = [p.detach().clone() for group in other.param_groups for p in group["params"]]
    for group in other.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    other.step()
    with torch.no_grad():
        for p, w in zip((p for group in other.param_groups for p in group["params"]), weights, strict=True):
            p.copy_(w)
    other.load_state_dict(run.optimizer.state_dict())
    return other


def through_file(run: Run) -> torch.optim.Optimizer:
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    other = fresh(run)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def through_pickle(run: Run) -> torch.optim.Optimizer:
    return pickle.loads(pickle.dumps(run.optimizer))


def through_deepcopy(run: Run) -> torch.optim.Optimizer:
    return copy.deepcopy(run.optimizer)


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "trip",
    [through_state_dict, through_state_dict_after_a_step, through_file, through_pickle, through_deepcopy],
)
def test_copy_continues_bit_for_bit_and_alone(rule: str, trip: Any, dtype: torch.dtype, backend: str) -> None:
    params = parameters(*SHAPES, dtype=dtype)
    params[1].data = params[1].data.t().contiguous().t()
    run = Run(rule, [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], backend)
    for _ in range(3):
        step_both(run.optimizer)
    other = trip(run)
    assert_same_outcome(other, run.optimizer)
    before = snapshot(run.optimizer)
    twin = copy.deepcopy(other)
    for _ in range(3):  # the copy moves alone: the original stays
        step_both(twin)
        step_both(other)
    assert_snapshots_equal(snapshot(run.optimizer), before)
    for p in run.params:
        p.grad = None
    third = copy.deepcopy(trip(run))  # a state_dict shares the original's tensors until the next step, as in torch
    for _ in range(3):
        step_both(run.optimizer, third)
        assert_same_outcome(third, run.optimizer)


def step_both(*optimizers: torch.optim.Optimizer) -> None:
    """The same random gradients to each."""
    params = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for row in zip(*params, strict=True):
        g = torch.randn_like(row[0])
        for p in row:
            p.grad = g.clone(memory_format=torch.preserve_format)
    for optimizer in optimizers:
        optimizer.step()


@EVERY_RULE
def test_loaded_trajectory_is_the_references(rule: str, backend: str) -> None:
    """Not only equal to a sister run: equal to the reference, before and after loading."""
    run = Run(rule, parameters(*SHAPES), backend)
    run.steps(3)
    saved, weights = copy.deepcopy(run.optimizer.state_dict()), [p.detach().clone() for p in run.params]
    hands = [copy.deepcopy(run.hands[p]) for p in run.params]
    run.steps(3)
    run.optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, w, hand in zip(run.params, weights, hands, strict=True):
            p.copy_(w)
            run.hands[p] = hand
    run.steps(4)
    run.check_all_seen()


@EVERY_RULE
def test_state_dict_of_an_older_version_gets_the_defaults(rule: str, backend: str) -> None:
    """A group key that a later version added has its default, whatever was saved without it."""
    run = Run(rule, parameters(*SHAPES), backend)
    run.steps(2)
    saved = run.optimizer.state_dict()
    for group in saved["param_groups"]:
        for name in ("nesterov", "maximize", "foreach", "fused", "delta"):
            del group[name]
    run.optimizer.load_state_dict(saved)
    assert run.optimizer.param_groups[0]["maximize"] is False
    run.steps(2)


# Hooks, names, printing, zero_grad.


@EVERY_RULE
def test_hooks(rule: str, backend: str) -> None:
    run = Run(rule, parameters((4, 6)), backend)
    calls: list[str] = []
    optimizer = run.optimizer
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state_dict post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    run.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["step pre", "step post", "state_dict pre", "state_dict post", "load pre", "load post"]
    run.step()
    assert calls[-2:] == ["step pre", "step post"]


@EVERY_RULE
def test_names(rule: str, backend: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double()
    run = Run(rule, model.named_parameters(), backend)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    run.steps(2)
    assert run.optimizer.param_groups[0]["param_names"] == names
    assert run.optimizer.state_dict()["param_groups"][0]["param_names"] == names
    model[1].weight.grad = torch.zeros(3, 4, dtype=torch.float64).to_sparse()
    with pytest.raises(TypeError, match=r"parameter '1\.weight'"):
        run.optimizer.step()


@EVERY_RULE
def test_printing_shows_every_hyperparameter(rule: str, backend: str) -> None:
    cls, options = RULES[rule]
    groups = [{"params": parameters((2, 3))}, {"params": parameters((3,)), "lr": 0.125}]
    text = repr(cls(groups, **options, backend=backend))
    assert text.startswith(f"{rule} (")
    assert "Parameter Group 1" in text
    assert "lr: 0.125" in text
    for name in (*options, "eps", "delta", "nesterov", "maximize"):
        assert f"    {name}: " in text


@EVERY_RULE
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(rule: str, set_to_none: bool, backend: str) -> None:
    """Gradients of zero are a step (momentum goes on, decay acts); no gradient is none."""
    run = Run(rule, parameters(*SHAPES), backend)
    run.steps(2)
    before = snapshot(run.optimizer)
    run.optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else (p.grad == 0).all() for p in run.params)
    run.advance()
    if set_to_none:
        assert_snapshots_equal(snapshot(run.optimizer), before)
    run.steps(2)


# Which path runs.


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the extension was not built."""
    reason = "the compiled extension is missing; install a C++17 compiler"
    monkeypatch.setattr(fused_adamp.backends.cpu, "load", lambda: reason)
    monkeypatch.setattr(fused_adamp.backends, "_warned", set())
    monkeypatch.delenv("FUSED_ADAMP_BACKEND", raising=False)


def chosen(optimizer: Any) -> set[str]:
    """The backends behind the optimizer's buckets."""
    return {bucket.key.backend.name for bucket in optimizer.buckets}


@EVERY_RULE
@pytest.mark.parametrize("flags", [{"fused": False}, {"foreach": True}, {"fused": False, "foreach": True}])
def test_flags_for_the_reference_path(rule: str, flags: dict[str, bool]) -> None:
    """No warning, which would be an error here, and the reference whether or not a faster backend exists."""
    cls, options = RULES[rule]
    optimizer = cls(parameters(*SHAPES), **options, **flags)
    step_both(optimizer)
    assert chosen(optimizer) == {"reference"}


@EVERY_RULE
def test_fused_needs_a_fused_backend(rule: str, no_extension: None) -> None:
    cls, options = RULES[rule]
    optimizer = cls(parameters(*SHAPES), **options, fused=True)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"fused=True cannot run on device 'cpu'.*install a C\+\+17 compiler"):
        step_both(optimizer)
    assert_snapshots_equal(snapshot(optimizer), before)


@EVERY_RULE
def test_slow_path_by_default_says_so_once(rule: str, no_extension: None) -> None:
    cls, options = RULES[rule]
    optimizer = cls(parameters(*SHAPES), **options)
    with pytest.warns(RuntimeWarning, match=r"slow reference path.*install a C\+\+17 compiler.*fused=False") as caught:
        step_both(optimizer)
    assert len(caught) == 1
    step_both(optimizer)  # a second warning would be an error
    step_both(cls(parameters(*SHAPES), **options))
    assert chosen(optimizer) == {"reference"}


@EVERY_RULE
def test_fused_and_foreach_exclude_each_other(rule: str) -> None:
    cls, options = RULES[rule]
    with pytest.raises(ValueError, match="fused=True and foreach=True exclude each other"):
        cls(parameters((2, 3)), **options, fused=True, foreach=True)


@EVERY_RULE
def test_backend_by_environment(rule: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, options = RULES[rule]
    monkeypatch.setenv("FUSED_ADAMP_BACKEND", backend)
    optimizer = cls(parameters(*SHAPES), **options)
    step_both(optimizer)
    assert chosen(optimizer) == {backend}


# Gradients that are not there, and parameters of every layout.


@EVERY_RULE
def test_missing_gradients(rule: str, backend: str) -> None:
    """Parameter i has a gradient in the steps whose mask has bit i set: every mixture, none at all included."""
    run = Run(rule, [{"params": parameters(*SHAPES[:2])}, {"params": parameters(*SHAPES[2:4])}], backend)
    masks = (1, 0, 2, 5, 10, 15, 0, 7, 8, 15, 15)
    for mask in masks:
        run.step([g if mask >> i & 1 else None for i, g in enumerate(run.gradients())])
    run.check_all_seen()
    assert [run.hands[p].steps for p in run.params] == [sum(mask >> i & 1 for mask in masks) for i in range(4)]


@EVERY_RULE
def test_no_gradient_at_all(rule: str, backend: str) -> None:
    run = Run(rule, parameters(*SHAPES), backend)
    before = snapshot(run.optimizer)
    run.advance()
    assert_snapshots_equal(snapshot(run.optimizer), before)
    assert not run.optimizer.state
    assert not run.optimizer.decisions()


@EVERY_RULE
@pytest.mark.parametrize("start", [True, False])
def test_toggling_requires_grad(rule: str, start: bool, backend: str) -> None:
    """A frozen parameter keeps its state; one that trains late starts fresh, at step 1 of its own."""
    run = Run(rule, parameters((4, 6), (5, 7), (9,)), backend)
    run.params[1].requires_grad_(start)
    for requires_grad in (start, not start, start, not start):
        run.params[1].requires_grad_(requires_grad)
        for _ in range(2):
            run.step([g if p.requires_grad else None for p, g in zip(run.params, run.gradients(), strict=True)])
    assert [run.hands[p].steps for p in run.params] == [8, 4, 8]


@EVERY_RULE
def test_a_gradient_on_a_frozen_parameter_is_stepped(rule: str, backend: str) -> None:
    """As in torch.optim: what counts is p.grad."""
    run = Run(rule, parameters((4, 6), (5, 7)), backend)
    run.params[0].requires_grad_(False)
    run.steps(3)


@EVERY_RULE
def test_empty_and_scalar_parameters(rule: str, backend: str) -> None:
    shapes = [(), (0,), (1,), (0, 3), (3, 0), (2, 0, 4), (1, 1), (1, 5), (5, 1), (1, 1, 1, 1), (2, 3)]
    run = Run(rule, [{"params": parameters(*shapes)}, {"params": parameters((0,))}, {"params": []}], backend)
    run.steps(2)
    for late in (0, 1):  # every other one without a gradient
        run.step([g if i % 2 == late else None for i, g in enumerate(run.gradients())])
    run.steps(2)


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "contiguous": lambda x: embed(x, tuple(range(4)), 0, False),
    "channels_last": lambda x: embed(x, (0, 2, 3, 1), 0, False),
    "transposed": lambda x: embed(x, (1, 0, 2, 3), 0, False),
    "reversed": lambda x: embed(x, (3, 2, 1, 0), 0, False),
    "misaligned": lambda x: embed(x, tuple(range(4)), 1, False),
    "gaps": lambda x: embed(x, tuple(range(4)), 3, True),
    "gaps and transposed": lambda x: embed(x, (2, 0, 3, 1), 1, True),
}


def embed(x: Tensor, order: tuple[int, ...], offset: int, gaps: bool) -> tuple[Tensor, Tensor]:
    """A copy of ``x`` with its dims in this order in memory, and the buffer of 7s around it."""
    step = 2 if gaps else 1
    stride, strides = step, [0] * 4
    for dim in reversed(order):
        strides[dim] = stride
        stride *= x.shape[dim] * step
    buffer = torch.full((offset + stride + 5,), 7.0, dtype=x.dtype)
    view = buffer.as_strided(x.shape, strides, offset)
    view.copy_(x)
    return view, buffer


@EVERY_RULE
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_strides(rule: str, layout: str, grad_layout: str, dtype: torch.dtype, backend: str) -> None:
    """Any layout of the weight with any other of the gradient; nothing between a weight's elements is written."""
    shape = (4, 3, 5, 2)
    view, buffer = LAYOUTS[layout](torch.randn(shape, dtype=dtype))
    p = nn.Parameter(view)
    assert p.data_ptr() == view.data_ptr()
    untouched = torch.ones_like(buffer, dtype=torch.bool)
    untouched.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    run = Run(rule, [p, *parameters((3, 4), dtype=dtype)], backend)
    for _ in range(3):
        g = gradient(p, ("channel", "layer", "free")[run.count % 3])
        if grad_layout == "expanded":
            g = torch.randn(4, 1, 1, 2, dtype=dtype).expand(shape)
        else:
            g = LAYOUTS[grad_layout](g)[0]
        other = run.params[1]
        run.step([g, torch.randn_like(other)])
        assert p.stride() == view.stride()
    assert (buffer[untouched] == 7).all()
    for name in run.hands[p].moments:
        assert run.optimizer.state[p][name].stride() == torch.empty_like(p).stride()


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["grad_dtype", ".data"])
def test_gradient_of_another_dtype(
    rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, how: str, backend: str
) -> None:
    run = Run(rule, parameters((4, 6), (5, 7), (9,), dtype=dtype), backend)
    for t in range(4):
        for i, (p, g) in enumerate(zip(run.params, run.gradients(), strict=True)):
            # In three of the four steps one gradient has its parameter's dtype: mixtures within a bucket.
            wanted = dtype if i == t else grad_dtype
            p.grad = None
            if how == "grad_dtype":
                p.grad_dtype = wanted
                p.grad = g.to(wanted)
            else:
                p.grad = torch.zeros_like(p)
                p.grad.data = g.to(wanted)
            assert p.grad.dtype == wanted
        run.advance()


# The optimizer's parameters, groups and state are changed from outside: never silently stale.


def other_weight(run: Run, i: int, value: Tensor) -> None:
    """Let the hand-made trajectory go on from this weight."""
    run.hands[run.params[i]].p = value.detach().clone(memory_format=torch.contiguous_format)


def add_group(run: Run) -> None:
    run.optimizer.add_param_group({"params": parameters((3, 8), (2,)), "lr": 0.01, "weight_decay": 0.3})


def add_group_of_another_dtype(run: Run) -> None:
    run.optimizer.add_param_group({"params": parameters((3, 8), (2,), dtype=torch.float32), "lr": 0.01})


def remove_group(run: Run) -> None:
    del run.optimizer.param_groups[0]


def remove_parameter(run: Run) -> None:
    del run.optimizer.param_groups[0]["params"][0]


def reorder_parameters(run: Run) -> None:
    run.optimizer.param_groups[0]["params"].reverse()


def reorder_groups(run: Run) -> None:
    run.optimizer.param_groups.reverse()


def exchange_parameters(run: Run) -> None:
    a, b = (group["params"] for group in run.optimizer.param_groups)
    a[0], b[0] = b[0], a[0]


def move_the_boundary_between_groups(run: Run) -> None:
    """The same parameters in the same order, but one belongs to the other group now."""
    a, b = (group["params"] for group in run.optimizer.param_groups)
    b.insert(0, a.pop())


def empty_a_group(run: Run) -> None:
    """The first group's parameters move into the second: the order stays."""
    a, b = (group["params"] for group in run.optimizer.param_groups)
    b[:0] = a
    a.clear()


def replace_group(run: Run) -> None:
    """Another dict with other hyperparameters."""
    run.optimizer.param_groups[0] = {**run.optimizer.param_groups[0], "lr": 0.2, "weight_decay": 0.5}


def new_parameter(run: Run) -> None:
    run.optimizer.param_groups[0]["params"][0] = parameters((3, 7))[0]


def new_parameter_of_the_same_shape(run: Run) -> None:
    params = run.optimizer.param_groups[0]["params"]
    params[0] = nn.Parameter(torch.randn_like(params[0]))


def new_parameter_keeps_the_state(run: Run) -> None:
    """As sharding wrappers do: the state dict moves to the new key."""
    params = run.optimizer.param_groups[0]["params"]
    old, new = params[0], nn.Parameter(torch.randn_like(params[0]))
    params[0] = new
    run.optimizer.state[new] = run.optimizer.state.pop(old)
    run.meet()
    run.hands[new].moments, run.hands[new].steps = run.hands[old].moments, run.hands[old].steps


def new_data(run: Run) -> None:
    p = run.params[0]
    p.data = torch.randn_like(p)
    other_weight(run, 0, p)


def new_data_of_other_strides(run: Run) -> None:
    p = run.params[1]
    p.data = torch.randn(p.shape[::-1], dtype=p.dtype).t()
    other_weight(run, 1, p)


def new_data_with_gaps(run: Run) -> None:
    p = run.params[1]
    p.data = torch.randn(*p.shape, 3, dtype=p.dtype)[..., 1]
    other_weight(run, 1, p)


def view_as_another_matrix(run: Run) -> None:
    """The same memory in another shape: rows and columns are others, and the state has to follow."""
    p = run.params[1]
    p.data = p.data.view(p.shape[0] // 2, -1)
    state, hand = run.optimizer.state[p], run.hands[p]
    for name in hand.moments:
        state[name] = state[name].view(p.shape)
        hand.moments[name] = hand.moments[name].view(p.shape)
    other_weight(run, 1, p)


def swap_tensors(run: Run) -> None:
    p, q = run.params[0], nn.Parameter(torch.randn_like(run.params[0]))
    torch.utils.swap_tensors(p, q)
    other_weight(run, 0, p)


def swap_tensors_of_two_parameters(run: Run) -> None:
    """The tensors change places under the parameter objects; the state belongs to the objects."""
    (p,), (q,) = (group["params"][:1] for group in run.optimizer.param_groups)
    p.data, q.data = torch.randn(4, 4, dtype=p.dtype), torch.randn(4, 4, dtype=p.dtype)
    run.optimizer.state.clear()
    for x in (p, q):
        del run.hands[x]
    for hand in run.hands.values():
        hand.moments, hand.steps = {}, 0
    run.meet()
    run.step()
    a, b = p.detach().clone(), q.detach().clone()
    p.grad = q.grad = None
    torch.utils.swap_tensors(p, q)
    assert_identical(p, b)
    run.hands[p].p, run.hands[q].p = b, a


def replace_state(run: Run) -> None:
    p = run.params[0]
    for name in run.hands[p].moments:
        value = torch.rand_like(p)
        run.optimizer.state[p][name] = value
        run.hands[p].moments[name] = value.clone()


def replace_state_by_other_strides(run: Run) -> None:
    p = run.params[1]
    for name in run.hands[p].moments:
        value = torch.rand(p.shape[::-1], dtype=p.dtype).t()
        run.optimizer.state[p][name] = value
        run.hands[p].moments[name] = value.clone()


def write_into_state(run: Run) -> None:
    p = run.params[0]
    for name, moment in run.hands[p].moments.items():
        run.optimizer.state[p][name].mul_(0.25)
        moment.mul_(0.25)


def replace_step(run: Run) -> None:
    if run.rule == "AdamP":
        run.optimizer.state[run.params[0]]["step"] = torch.tensor(7.0)
        run.hands[run.params[0]].steps = 7


def replace_step_by_a_number(run: Run) -> None:
    """As old checkpoints and other packages count."""
    if run.rule == "AdamP":
        run.optimizer.state[run.params[1]]["step"] = 7
        run.hands[run.params[1]].steps = 7


def exchange_states(run: Run) -> None:
    """Two parameters of one shape change their states."""
    add_twins(run)
    p, q = run.params[-2:]
    state = run.optimizer.state
    state[p], state[q] = state[q], state[p]
    a, b = run.hands[p], run.hands[q]
    a.moments, b.moments, a.steps, b.steps = b.moments, a.moments, b.steps, a.steps


def hand_state_on(run: Run) -> None:
    """One parameter takes over another's state, which starts afresh."""
    add_twins(run)
    p, q = run.params[-2:]
    run.optimizer.state[q] = run.optimizer.state.pop(p)
    a, b = run.hands[p], run.hands[q]
    b.moments, b.steps, a.moments, a.steps = a.moments, a.steps, {}, 0


def add_twins(run: Run) -> None:
    run.optimizer.add_param_group({"params": parameters((4, 6), (4, 6))})
    run.steps(2)


def clear_state(run: Run) -> None:
    run.optimizer.state.clear()
    for hand in run.hands.values():
        hand.moments, hand.steps = {}, 0


def clear_the_state_of_one(run: Run) -> None:
    del run.optimizer.state[run.params[0]]
    run.hands[run.params[0]].moments, run.hands[run.params[0]].steps = {}, 0


def everything_to_another_dtype(run: Run) -> None:
    """As model.float(): the parameters' data is replaced under the same objects."""
    holder = nn.ParameterList(run.params)
    holder.float()
    for p in run.params:
        run.hands[p].adopt(p, run.optimizer.state[p])


def one_to_another_dtype(run: Run) -> None:
    p = run.params[1]
    p.grad = None
    p.data = p.data.float()
    run.hands[p].adopt(p, run.optimizer.state[p])


def tie_to_the_module(run: Run) -> None:
    """Weights are written in place between steps, as by an averaging or a clipping of weights."""
    with torch.no_grad():
        for p in run.params:
            p.mul_(0.5)
            run.hands[p].p.mul_(0.5)


@EVERY_RULE
@pytest.mark.parametrize(
    "change",
    [
        add_group,
        add_group_of_another_dtype,
        remove_group,
        remove_parameter,
        reorder_parameters,
        reorder_groups,
        exchange_parameters,
        move_the_boundary_between_groups,
        empty_a_group,
        replace_group,
        new_parameter,
        new_parameter_of_the_same_shape,
        new_parameter_keeps_the_state,
        new_data,
        new_data_of_other_strides,
        new_data_with_gaps,
        view_as_another_matrix,
        swap_tensors,
        swap_tensors_of_two_parameters,
        replace_state,
        replace_state_by_other_strides,
        write_into_state,
        replace_step,
        replace_step_by_a_number,
        exchange_states,
        hand_state_on,
        clear_state,
        clear_the_state_of_one,
        everything_to_another_dtype,
        one_to_another_dtype,
        tie_to_the_module,
    ],
    ids=lambda f: f.__name__,
)
def test_change_from_outside(rule: str, change: Callable[[Run], None], backend: str) -> None:
    run = Run(
        rule,
        [
            {"params": parameters(*SHAPES)},
            {"params": parameters((4, 4), (3,)), "lr": 0.01, "weight_decay": 0.3, "delta": 0.3, "nesterov": True},
        ],
        backend,
    )
    run.steps(3)
    for p in run.params:
        p.grad = None
    change(run)
    run.steps(4)
    run.check_all_seen()


@EVERY_RULE
def test_saved_state_survives_clearing_and_starting_over(rule: str, backend: str) -> None:
    """Tensors taken out of the optimizer before its state was cleared are nobody's to write to."""
    run = Run(rule, parameters(*SHAPES), backend)
    run.steps(2)
    saved = run.optimizer.state_dict()
    before = copy.deepcopy(saved)
    clear_state(run)
    run.steps(2)
    for i, entries in saved["state"].items():
        for name, value in entries.items():
            assert_identical(value, before["state"][i][name], f"{name} of parameter {i}")


@EVERY_RULE
def test_model_double(rule: str, backend: str) -> None:
    """A module that becomes float64 in training goes on in float64; its state keeps its dtype."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    run = Run(rule, model.parameters(), backend)
    x = torch.randn(5, 6)
    for dtype in (torch.float32, torch.float64, torch.float64):
        model.to(dtype)
        for p, hand in run.hands.items():
            hand.adopt(p, run.optimizer.state[p])
        for _ in range(2):
            run.optimizer.zero_grad()
            model(x.to(dtype)).square().mean().backward()
            run.advance()


# Autograd.


@EVERY_RULE
def test_autograd_notices_the_step(rule: str, backend: str) -> None:
    """Backward through a graph that saved the weight before the step raises."""
    run = Run(rule, parameters((4, 6), (3, 4)), backend)
    p, other = run.params
    loss = p.square().sum()
    version = p._version
    run.step([torch.randn_like(p), torch.randn_like(other)])
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EVERY_RULE
def test_a_weight_that_did_not_move_did_not_change_for_autograd(rule: str, backend: str) -> None:
    """A parameter without a gradient may have graphs that go on living through the step, as in torch.optim."""
    run = Run(rule, parameters((4, 6), (3, 4)), backend)
    run.step()
    p, other = run.params
    loss = other.square().sum()
    version = other._version
    run.step([torch.randn_like(p), None])
    assert other._version == version
    loss.backward()
    assert_close(other.grad, 2 * other)


@EVERY_RULE
def test_step_records_no_graph(rule: str, backend: str) -> None:
    run = Run(rule, parameters(*SHAPES), backend)
    run.steps(2)
    for p in run.params:
        assert p.is_leaf
        assert p.requires_grad
        assert not any(value.requires_grad for value in run.optimizer.state[p].values())


@EVERY_RULE
def test_groups_of_an_older_version_get_the_options_that_they_lack(rule: str, backend: str) -> None:
    cls, options = RULES[rule]
    old = cls(parameters((2, 3)), **options, backend=backend)
    state = pickle.loads(pickle.dumps(old.__getstate__()))
    for group in state["param_groups"]:
        del group["rounding"]
    new = cls(parameters((2, 3)), **options, backend=backend)
    new.__setstate__(state)
    assert new.param_groups[0]["rounding"] == "nearest"
    new.param_groups[0]["params"][0].grad = torch.ones(2, 3, dtype=torch.float64)
    new.step()


@EVERY_RULE
def test_a_parameter_in_the_place_of_another_has_no_decision_yet(rule: str, backend: str) -> None:
    cls, options = RULES[rule]
    optimizer = cls(parameters((2, 3), (2, 3)), **options, backend=backend)
    first, second = optimizer.param_groups[0]["params"]
    for p in (first, second):
        p.grad = torch.ones_like(p)
    optimizer.step()
    (new,) = optimizer.param_groups[0]["params"][:1] = parameters((2, 3))
    optimizer.step()
    assert set(optimizer.decisions()) == {second}
    assert len(optimizer.projection_report()) == 1
    assert new not in optimizer.state
