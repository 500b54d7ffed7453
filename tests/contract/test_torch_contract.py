"""PyTorch's own expectations of an optimizer (its test/test_optim.py, class TestOptimRenewed), held against ours.

The configurations are OptimizerInfos, with which torch describes an optimizer under test. Step-by-step comparisons with
the reference are in test_contract.py.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from tolerances import assert_close, assert_identical
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)
from trajectory import SHAPES, Run, assert_same_outcome, assert_snapshots_equal, default_dtype, parameters, snapshot

from fused_adamp import SGDP, AdamP
from fused_adamp.backends import available

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

# The optimizers, in torch's description.


def inputs(configurations: dict[str, Callable[[], dict[str, Any]]], device: Any, dtype: Any = None) -> list[Any]:
    """Made anew at every call: schedulers write into tensors of hyperparameters."""
    return [OptimizerInput(params=None, kwargs=make(), desc=name) for name, make in configurations.items()]


COMMON: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "other lr": lambda: {"lr": 0.01},
    "tensor lr": lambda: {"lr": torch.tensor(0.01)},
    "never projected": lambda: {"delta": 0},
}
ADAMP_INPUTS = COMMON | {
    "decay": lambda: {"weight_decay": 0.1},
    "maximize": lambda: {"weight_decay": 0.1, "maximize": True},
    "nesterov": lambda: {"weight_decay": 0.1, "nesterov": True},
    "always projected": lambda: {"weight_decay": 0.1, "wd_ratio": 0.5, "delta": 10.0},
    "other betas": lambda: {"betas": (0.5, 0.75), "eps": 1e-3},
    "tensor betas": lambda: {"betas": (torch.tensor(0.5), torch.tensor([[0.75]]))},
}
SGDP_INPUTS = COMMON | {
    "momentum": lambda: {"momentum": 0.9},
    "decay": lambda: {"momentum": 0.9, "weight_decay": 0.1},
    "maximize": lambda: {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    "nesterov": lambda: {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "always projected": lambda: {"momentum": 0.9, "weight_decay": 0.1, "wd_ratio": 0.5, "delta": 10.0},
    "dampening": lambda: {"momentum": 0.9, "dampening": 0.5},
    "projected buffer": lambda: {"momentum": 0.9, "delta": 10.0, "project_buffer": True},
}


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """Torch's own for every optimizer, in its words, and one more that its optimizers refuse too."""
    errors = get_error_inputs_for_all_optims(device, dtype)
    overridden = OptimizerInput([{"params": [torch.zeros(2)], "lr": 0.1}], {"lr": -1.0}, "a default no group uses")
    return [*errors, ErrorOptimizerInput(overridden, error_type=ValueError, error_regex=r"lr=-1\.0 is outside")]


def describe(cls: type[AdamP | SGDP], configurations: dict[str, Callable[[], dict[str, Any]]]) -> OptimizerInfo:
    arguments = inspect.signature(cls).parameters.values()
    return OptimizerInfo(
        cls,
        optim_inputs_func=partial(inputs, configurations),
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=(
            [],
            [partial(lr_scheduler.StepLR, gamma=0.9, step_size=3)],
            [partial(lr_scheduler.LinearLR, start_factor=0.4, end_factor=0.8, total_iters=4)],
            [
                partial(lr_scheduler.ConstantLR, factor=0.4, total_iters=4),
                partial(lr_scheduler.ExponentialLR, gamma=0.99),
                lr_scheduler.ReduceLROnPlateau,
            ],
            [partial(lr_scheduler.PolynomialLR, power=0.9, total_iters=40)],
        ),
        supported_impls=("foreach", "fused"),
        # The authors' package has the positional ones.
        not_og_supported_flags=tuple(a.name for a in arguments if a.kind is a.KEYWORD_ONLY),
        supports_sparse=False,
        supports_complex=False,
        supports_fused_on=("cpu", "cuda"),
    )


INFOS = {info.name: info for info in (describe(AdamP, ADAMP_INPUTS), describe(SGDP, SGDP_INPUTS))}


class Config(NamedTuple):
    """One of an optimizer's configurations."""

    info: OptimizerInfo
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return next(i.kwargs for i in self.info.optim_inputs_func("cpu") if i.desc == self.name)

    def optimizer(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        return self.info.optim_cls(params, **{**self.options, **more})


CONFIGS = [Config(info, i.desc) for info in INFOS.values() for i in info.optim_inputs_func("cpu")]


def configs(chosen: Iterable[Config] = CONFIGS) -> Any:
    return pytest.mark.parametrize("config", [pytest.param(c, id=f"{c.info.name} {c.name}") for c in chosen])


EVERY_INFO = pytest.mark.parametrize("info", list(INFOS.values()), ids=list(INFOS))


def members(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(*optimizers: torch.optim.Optimizer) -> None:
    """The same random gradients to each."""
    for row in zip(*map(members, optimizers), strict=True):
        g = torch.randn_like(row[0])
        for p in row:
            p.grad = g.clone()
    for optimizer in optimizers:
        optimizer.step()


def clones(params: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def named(params: list[Any], prefix: str | None) -> list[Any]:
    return params if prefix is None else [(f"{prefix}{i}", p) for i, p in enumerate(params)]


# The description itself, and errors.


@EVERY_INFO
def test_inputs_leave_the_implementation_open(info: OptimizerInfo) -> None:
    for config in info.optim_inputs_func("cpu"):
        assert not config.kwargs.keys() & {"foreach", "fused", "differentiable", "backend"}


ERRORS = [
    pytest.param(info, error, id=f"{info.name}: {error.optimizer_error_input.desc}")
    for info in INFOS.values()
    for error in info.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize(("info", "error"), ERRORS)
def test_constructor_refuses(info: OptimizerInfo, error: ErrorOptimizerInput) -> None:
    caught = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with caught(error.error_type, match=error.error_regex):
        info.optim_cls(error.optimizer_error_input.params, **error.optimizer_error_input.kwargs)


@EVERY_INFO
def test_meta_model_trains_once_it_has_data(info: OptimizerInfo, backend: str) -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="meta device"):
        info.optim_cls(model.parameters(), backend=backend)
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p)
    optimizer = info.optim_cls(model.parameters(), backend=backend)
    before = snapshot(optimizer)["weights"]
    step(optimizer)
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))


# Training goes where it should.


class Regression:
    """The loss (W x + b)^2 of a weight and a bias."""

    def __init__(self, strided: bool = False) -> None:
        self.x = torch.randn(5)
        self.weight = nn.Parameter(torch.randn(10, 5, 2)[..., 0] if strided else torch.randn(10, 5))
        self.bias = nn.Parameter(torch.randn(10, 2)[..., 0] if strided else torch.randn(10))
        assert self.weight.is_contiguous() is not strided

    def loss(self) -> Tensor:
        return (self.weight.mv(self.x) + self.bias).square().sum()

    def train(self, optimizer: torch.optim.Optimizer, schedulers: Iterable[Any] = ()) -> None:
        """20 steps; afterwards the loss is lower, or higher where that was asked for."""
        first = self.loss().item()
        for _ in range(20):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(*([loss.item()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        change = self.loss().item() - first
        assert change > 0 if optimizer.param_groups[0]["maximize"] else change < 0


@configs()
@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("strided", [False, True])
def test_loss_goes_in_the_right_direction(config: Config, schedule: int, strided: bool, backend: str) -> None:
    regression = Regression(strided)
    optimizer = config.optimizer([regression.weight, regression.bias], backend=backend)
    regression.train(optimizer, [make(optimizer) for make in config.info.scheduler_inputs[schedule]])


@configs()
@pytest.mark.parametrize("rate", [1e-28, 1e-300])
def test_group_with_a_vanishing_rate_stays(config: Config, rate: float, backend: str) -> None:
    """Not a bit of it moves, while the other group trains."""
    groups = [{"params": parameters((4, 3), (3,), dtype=torch.float32)} for _ in range(2)]
    groups[0] |= {"lr": 1e-3, **config.options}
    optimizer = config.info.optim_cls(groups, lr=rate, backend=backend)
    before = snapshot(optimizer)["weights"]
    for _ in range(5):
        step(optimizer)
    for i, (p, old) in enumerate(zip(members(optimizer), before, strict=True)):
        assert torch.equal(p, old) == (i >= 2)
        assert all(value.isfinite().all() for value in optimizer.state[p].values())


@EVERY_INFO
def test_groups_are_separate_optimizers(info: OptimizerInfo, backend: str) -> None:
    """Every configuration as a group of one optimizer, and as an optimizer of its own: the same bits."""
    chosen = [c for c in CONFIGS if c.info is info]
    parts = [parameters(*SHAPES, dtype=torch.float32) for _ in chosen]
    apart = [c.optimizer(clones(part), backend=backend) for part, c in zip(parts, chosen, strict=True)]
    groups = [{"params": part, **c.options} for part, c in zip(parts, chosen, strict=True)]
    assert_same_bits(info.optim_cls(groups, backend=backend), parts, apart)


@configs()
def test_mixed_dtypes_are_separate_optimizers(config: Config, backend: str) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    parts = [parameters((4, 6), (5,), (3, 2, 2), dtype=dtype) for dtype in dtypes]
    apart = [config.optimizer(clones(part), backend=backend) for part in parts]
    shuffled = [p for row in zip(*parts, strict=True) for p in row]
    assert_same_bits(config.optimizer(shuffled, backend=backend), parts, apart)


def assert_same_bits(together: torch.optim.Optimizer, parts: list[Any], apart: list[torch.optim.Optimizer]) -> None:
    """Five steps of one optimizer give its parts what they give one optimizer each."""
    pairs = [(p, q, o) for part, o in zip(parts, apart, strict=True) for p, q in zip(part, members(o), strict=True)]
    for _ in range(5):
        for p, q, _ in pairs:
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    for p, q, optimizer in pairs:
        assert_identical(p, q)
        assert together.state[p].keys() == optimizer.state[q].keys()
        for name, value in together.state[p].items():
            assert_identical(value, optimizer.state[q][name], name)


# One implementation is the other.


class Net(nn.Module):
    """A scale-invariant convolution, a linear layer, a scalar and a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(12, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.nothing = nn.Parameter(torch.ones(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(self.norm(self.conv(x)).relu().flatten(1)) + self.nothing.sum()


@pytest.mark.skipif(not any(b.fused for b in available(torch.device("cpu"))), reason="no fused backend on the CPU")
@configs()
@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_implementations_agree(config: Config, flag: str, dtype: torch.dtype) -> None:
    """Step by step, through a step without gradients and a layer that is frozen for a while."""
    assert flag in config.info.supported_impls
    nets = [Net().to(dtype) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [config.optimizer(net.parameters(), **{flag: on}) for net, on in zip(nets, (False, True), strict=True)]
    x = torch.randn(4, 2, 3, 3, dtype=dtype)
    for t in range(7):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net.linear.requires_grad_(t not in (3, 4))
            if t != 2:
                net(x).square().mean().backward()
            optimizer.step()
        assert_agree_and_align(*optimizers)


def assert_agree_and_align(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Equal to rounding; ``b`` then takes over ``a``'s bits, so that the next step starts from the same."""
    for p, q in zip(members(a), members(b), strict=True):
        assert a.state.get(p, {}).keys() == b.state.get(q, {}).keys()
        state = [(name, value, b.state[q][name]) for name, value in a.state.get(p, {}).items()]
        for name, x, y in [("weight", p, q), *state]:
            assert_close(y, x, name)
            y.detach().copy_(x.detach())


@configs()
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_tensor_lr_is_the_float(config: Config, dims: int, backend: str) -> None:
    lr = 2**-7  # exact in every dtype
    params = parameters(*SHAPES, dtype=torch.float32)
    number = config.optimizer(params, lr=lr, backend=backend)
    tensor = config.optimizer(clones(params), lr=torch.full([1] * dims, lr), backend=backend)
    for _ in range(5):
        step(number, tensor)
    assert tensor.param_groups[0]["lr"].shape == (1,) * dims
    tensor.param_groups[0]["lr"] = lr
    assert_same_outcome(tensor, number)


@configs()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_default_dtype_changes_nothing(config: Config, dtype: torch.dtype, backend: str) -> None:
    one = config.optimizer(parameters(*SHAPES, dtype=torch.float32), backend=backend)
    other = config.optimizer(clones(members(one)), backend=backend)
    for _ in range(3):
        step(one)
        for p, q in zip(members(one), members(other), strict=True):
            q.grad = p.grad
        with default_dtype(dtype):
            other.step()
    assert_same_outcome(other, one)


# Gradients: absent, zero, and never written.


@configs()
def test_tensors_that_need_no_gradient_stay(config: Config, backend: str) -> None:
    optimizer = config.optimizer([torch.randn(4, 3), torch.randn(3)], backend=backend)
    before = snapshot(optimizer)
    assert optimizer.step(lambda: 2.5) == 2.5
    assert_snapshots_equal(snapshot(optimizer), before)


@configs(c for c in CONFIGS if not c.options.get("weight_decay"))
def test_zero_gradients_move_nothing(config: Config, backend: str) -> None:
    optimizer = config.optimizer(parameters(*SHAPES, dtype=torch.float32), backend=backend)
    before = snapshot(optimizer)["weights"]
    for _ in range(3):
        for p in members(optimizer):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, old in zip(members(optimizer), before, strict=True):
        assert_identical(p, old)


@configs()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_never_written(config: Config, dtype: torch.dtype, backend: str) -> None:
    """Nor kept: what is written into them after the step reaches no state."""
    optimizer = config.optimizer(parameters(*SHAPES, dtype=dtype), backend=backend)
    for _ in range(3):
        grads = [torch.randn_like(p, requires_grad=False) for p in members(optimizer)]
        before = [(g.clone(), g._version) for g in grads]
        for p, g in zip(members(optimizer), grads, strict=True):
            p.grad = g
        optimizer.step()
        for p, g, (old, version) in zip(members(optimizer), grads, before, strict=True):
            assert p.grad is g
            assert_identical(g, old)
            assert g._version == version
        after = snapshot(optimizer)
        for g in grads:
            g.fill_(7)
        assert_snapshots_equal(snapshot(optimizer), after)


# State.


@configs()
def test_no_state_is_empty(config: Config, backend: str) -> None:
    """A parameter that needs no state has no entry, as with torch's SGD without momentum."""
    optimizer = config.optimizer(parameters((4, 3), (3,)), backend=backend)
    step(optimizer)
    assert all(optimizer.state.values())
    assert all(optimizer.state_dict()["state"].values())


def without_names(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    taken = snapshot(optimizer)
    for group in taken["state"]["param_groups"]:
        group.pop("param_names", None)
    return taken


@configs()
@pytest.mark.parametrize("prefix", [None, "a"])
@pytest.mark.parametrize("other_prefix", [None, "b"])
def test_state_dict_is_deterministic(
    config: Config, prefix: str | None, other_prefix: str | None, backend: str
) -> None:
    """Equal and not identical parameters, with names or without, end in equal state dicts."""
    params = parameters((2, 3), (2,), dtype=torch.float32)
    one = config.optimizer(named(params, prefix), backend=backend)
    for _ in range(3):
        step(one)
    other = config.optimizer(named(clones(params), other_prefix), backend=backend)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        step(one, other)
    assert_snapshots_equal(without_names(other), without_names(one))


@EVERY_INFO
def test_group_that_is_listed_twice_is_saved_alike(info: OptimizerInfo, backend: str) -> None:
    optimizer = info.optim_cls(parameters((2, 3), (2,)), backend=backend)
    step(optimizer)
    optimizer.param_groups *= 2
    first, second = optimizer.state_dict()["param_groups"]
    assert first == second


@EVERY_INFO
@pytest.mark.parametrize("prefix", [None, "a"])
@pytest.mark.parametrize("other_prefix", [None, "b"])
def test_names_after_loading(info: OptimizerInfo, prefix: str | None, other_prefix: str | None, backend: str) -> None:
    """The loaded ones, or those that were there if none were loaded."""
    params = parameters((2, 3), (2,))
    one = info.optim_cls(named(params, prefix), backend=backend)
    step(one)
    other = info.optim_cls(named(clones(params), other_prefix), backend=backend)
    other.load_state_dict(one.state_dict())
    last = prefix or other_prefix
    assert other.state_dict()["param_groups"][0].get("param_names") == (last and [f"{last}0", f"{last}1"])
    step(other)


@configs()
def test_older_state_dict_goes_on(config: Config, backend: str) -> None:
    """Without the keys that our first version did not have, into an optimizer made with the same options."""
    one = config.optimizer(parameters(*SHAPES), backend=backend)
    step(one)
    older = copy.deepcopy(one.state_dict())
    for flag in config.info.not_og_supported_flags:
        if flag != "backend":  # ours are known by it
            older["param_groups"][0].pop(flag, None)
    other = config.optimizer(clones(members(one)), backend=backend)
    other.load_state_dict(older)
    assert_same_outcome(other, one)
    step(one, other)
    assert_same_outcome(other, one)


@configs(c for c in CONFIGS if c.info.name == "AdamP")
@pytest.mark.parametrize("number", [int, float])
def test_step_that_was_saved_as_a_number(config: Config, number: type, backend: str) -> None:
    one = config.optimizer(parameters(*SHAPES), backend=backend)
    for _ in range(3):
        step(one)
    saved = copy.deepcopy(one.state_dict())
    for values in saved["state"].values():
        values["step"] = number(values["step"])
    other = config.optimizer(clones(members(one)), backend=backend)
    other.load_state_dict(saved)
    step(one, other)
    assert_same_outcome(other, one)


LOADING: dict[str, dict[str, Any]] = {
    "pickle": {"weights_only": False},
    "weights_only": {"weights_only": True},
    "mmap": {"weights_only": True, "mmap": True},
}


@configs()
@pytest.mark.parametrize("how", list(LOADING))
def test_file_holds_the_state_dict(config: Config, how: str, backend: str, tmp_path: Path) -> None:
    one = config.optimizer(parameters(*SHAPES, dtype=torch.float32), backend=backend)
    for _ in range(2):
        step(one)
    torch.save(one.state_dict(), tmp_path / "state")
    loaded = torch.load(tmp_path / "state", **LOADING[how])
    assert_snapshots_equal({"weights": [], "state": loaded}, {"weights": [], "state": one.state_dict()})
    other = config.optimizer(clones(members(one)), backend=backend)
    other.load_state_dict(loaded)
    step(one, other)
    assert_same_outcome(other, one)


# Copies.


def through_pickle(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return pickle.loads(pickle.dumps(optimizer))


COPIES: dict[str, Callable[[torch.optim.Optimizer], torch.optim.Optimizer]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
}


def public(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: value for name, value in vars(optimizer).items() if not name.startswith("_")}


@configs()
@pytest.mark.parametrize("how", list(COPIES))
def test_copy_has_all_public_attributes(config: Config, how: str, backend: str) -> None:
    optimizer = config.optimizer(parameters(*SHAPES), backend=backend)
    for _ in range(2):
        step(optimizer)
    twin = COPIES[how](optimizer)
    assert public(twin).keys() == public(optimizer).keys()
    assert twin.defaults == optimizer.defaults
    assert_same_outcome(twin, optimizer)


@EVERY_INFO
@pytest.mark.parametrize("how", list(COPIES))
def test_copy_takes_hooks(info: OptimizerInfo, how: str, backend: str) -> None:
    """Its own: torch copies none, and the original's stay with the original."""
    optimizer = info.optim_cls(parameters((4, 3)), backend=backend)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("original"))
    twin = COPIES[how](optimizer)
    twin.register_step_post_hook(lambda *_: calls.append("copy"))
    step(twin)
    step(optimizer)
    assert calls == ["copy", "original"]


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [(AdamP, torch.optim.AdamW), (partial(SGDP, momentum=0.9), partial(torch.optim.SGD, momentum=0.9))],
    ids=list(INFOS),
)
def test_pickle_is_as_small_as_torchs(ours: Any, torchs: Any, backend: str) -> None:
    optimizers = [ours(parameters(*[(30, 30)] * 20), backend=backend), torchs(parameters(*[(30, 30)] * 20))]
    step(*optimizers)
    mine, reference = (len(pickle.dumps(optimizer)) for optimizer in optimizers)
    assert mine < 1.1 * reference


# Hooks.


@EVERY_INFO
def test_state_dict_pre_hook_writes_into_the_state(info: OptimizerInfo, backend: str) -> None:
    """An entry that belongs to no parameter is saved and loaded, and stands in nobody's way."""
    optimizer = info.optim_cls(parameters((4, 3)), backend=backend)
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update(note=1))
    step(optimizer)
    saved = optimizer.state_dict()
    assert saved["state"]["note"] == 1
    step(optimizer)
    other = info.optim_cls(parameters((4, 3)), backend=backend)
    other.load_state_dict(saved)
    step(other)
    assert other.state["note"] == 1


@EVERY_INFO
def test_state_dict_post_hook_changes_what_is_returned(info: OptimizerInfo, backend: str) -> None:
    optimizer = info.optim_cls(parameters((4, 3)), backend=backend)
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update(note=1))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": saved["state"].pop("note")})
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    assert "note" not in saved["state"]


def load_with_rate(rate: float, _: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    saved = copy.deepcopy(saved)
    saved["param_groups"][0]["lr"] = rate
    return saved


@EVERY_INFO
@pytest.mark.parametrize("prepend", [False, True])
def test_last_load_pre_hook_decides(info: OptimizerInfo, prepend: bool, backend: str) -> None:
    optimizer = info.optim_cls(parameters((4, 3)), backend=backend)
    optimizer.register_load_state_dict_pre_hook(partial(load_with_rate, 0.25))
    handle = optimizer.register_load_state_dict_pre_hook(partial(load_with_rate, 0.5), prepend=prepend)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == (0.25 if prepend else 0.5)
    handle.remove()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert saved["param_groups"][0]["lr"] == 1e-3


@EVERY_INFO
def test_load_post_hook_sees_what_was_loaded_and_may_change_it(info: OptimizerInfo, backend: str) -> None:
    optimizer = info.optim_cls(parameters((4, 3)), backend=backend)
    optimizer.register_load_state_dict_pre_hook(partial(load_with_rate, 0.25))
    rates = []

    def hook(o: torch.optim.Optimizer) -> None:
        rates.append(o.param_groups[0]["lr"])
        o.param_groups[0]["lr"] = 0.0

    optimizer.register_load_state_dict_post_hook(hook)
    optimizer.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)["weights"]
    step(optimizer)
    assert rates == [0.25]
    assert_identical(members(optimizer)[0], before[0])


@EVERY_INFO
def test_step_hooks_run_in_order_until_they_are_removed(info: OptimizerInfo, backend: str) -> None:
    optimizers = [info.optim_cls(parameters((4, 3)), backend=backend), torch.optim.SGD(parameters((4, 3)))]
    calls: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: calls.append(what)

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        *(o.register_step_pre_hook(note("pre")) for o in optimizers),
        *(o.register_step_post_hook(note("post")) for o in optimizers),
    ]
    try:
        for optimizer in (*optimizers, optimizers[0]):
            step(optimizer)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"] * 3
    for optimizer in optimizers:
        step(optimizer)
    assert len(calls) == 12


@EVERY_INFO
def test_step_hooks_stand_before_and_after_the_step(info: OptimizerInfo, backend: str) -> None:
    """A pre hook may set the gradients and replace the closure; a post hook sees the stepped weights."""
    optimizer = info.optim_cls(parameters((4, 3)), lr=0.1, backend=backend)
    (p,) = members(optimizer)
    start = p.detach().clone()
    seen = []

    def pre(*_: Any) -> Any:
        p.grad = torch.ones_like(p)
        return (optimizer, lambda: 2.5), {}

    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(lambda *_: seen.append(p.detach().clone()))
    assert optimizer.step() == 2.5
    assert_identical(seen[0], p)
    assert (p < start).all()


# Loading what was saved from other dtypes and devices.


@EVERY_INFO
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_state_keeps_its_dtype_through_loading(
    info: OptimizerInfo, saved: torch.dtype, loaded: torch.dtype, backend: str
) -> None:
    """Nothing is cast, where torch would cast to the parameters' dtype, and the reference goes on from there."""
    run = Run(info.name, parameters(*SHAPES, dtype=loaded), backend)
    params = [nn.Parameter(p.detach().to(saved)) for p in run.params]
    one = info.optim_cls(params, **{k: v for k, v in run.optimizer.param_groups[0].items() if k != "params"})
    for _ in range(3):
        step(one)
    run.optimizer.load_state_dict(one.state_dict())
    for p, q in zip(run.params, params, strict=True):
        hand = run.hands[p]
        hand.steps = 3
        hand.moments = {name: x.clone() for name, x in one.state[q].items() if name != "step"}
        dtypes = {name: x.dtype for name, x in run.optimizer.state[p].items() if name != "step"}
        assert dtypes == dict.fromkeys(hand.moments, saved)
    run.steps(4)


@configs(c for c in CONFIGS if c.info.name == "AdamP" or c.options.get("momentum"))
def test_file_saved_on_a_gpu_loads_here(
    config: Config, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file says of every tensor that it lives on cuda:0, as one that was saved there does."""
    one = config.optimizer(parameters(*SHAPES, dtype=torch.float32), backend=backend)
    step(one)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(one.state_dict(), tmp_path / "state")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="map_location"):
            torch.load(tmp_path / "state")
    other = config.optimizer(clones(members(one)), backend=backend)
    other.load_state_dict(torch.load(tmp_path / "state", map_location="cpu"))
    step(one, other)
    assert_same_outcome(other, one)


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: crossing devices was not checked")


@ON_A_GPU
@configs()
@pytest.mark.parametrize("fused", [None, True, False])
def test_state_crosses_to_the_device_of_the_parameters_and_back(config: Config, fused: bool | None) -> None:
    """The state dict stays as it was; training goes on in the same place on both sides."""
    here = config.optimizer(parameters(*SHAPES, dtype=torch.float32), fused=fused)
    for _ in range(3):
        step(here)
    there = config.optimizer([nn.Parameter(p.detach().cuda()) for p in members(here)], fused=fused)
    saved = here.state_dict()
    before = snapshot(here)
    there.load_state_dict(saved)
    assert_snapshots_equal(snapshot(here), before)
    for _ in range(3):
        for p, q in zip(members(here), members(there), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        here.step()
        there.step()
        for p, q in zip(members(here), members(there), strict=True):
            assert_close(q.cpu(), p)
            for name, value in here.state[p].items():
                moved = there.state[q][name]
                assert name == "step" or moved.is_cuda
                assert_close(moved.cpu(), value, name)
    back = config.optimizer([nn.Parameter(p.detach().cpu()) for p in members(there)], fused=fused)
    back.load_state_dict(there.state_dict())
    step(back)
    assert all(value.device.type == "cpu" for values in back.state.values() for value in values.values())


@ON_A_GPU
@configs()
def test_one_optimizer_for_two_devices(config: Config) -> None:
    params = parameters(*SHAPES, dtype=torch.float32)
    far = [nn.Parameter(p.detach().cuda()) for p in params]
    both = config.optimizer([p for pair in zip(params, far, strict=True) for p in pair])
    for _ in range(5):
        for p, q in zip(params, far, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        both.step()
    for p, q in zip(params, far, strict=True):
        assert_close(q.cpu(), p)
