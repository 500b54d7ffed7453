"""State_dicts of clovaai, timm, pytorch_optimizer and torch.optim: loaded, continued, handed back, refused in words."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

import adamp
import pytest
import pytorch_optimizer
import torch
from tolerances import assert_close, assert_identical
from torch import Tensor, nn
from trajectory import KINDS, gradient, parameters

from fused_adamp import SGDP, AdamP, checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_thread")

StateDict = dict[str, Any]

SHAPES = ((4, 3, 3, 3), (6, 10), (5, 7), (9,), (), (3, 4))
STEPS = 4
ADAM: StateDict = {"lr": 0.02, "betas": (0.85, 0.97), "weight_decay": 0.1}
SGD: StateDict = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
PLAIN = {"delta": 0.0}  # never projects: torch's rule


def timm_like(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimizer that saves what timm 1.0.31 does by its source: clovaai's state and groups, plus caution=False.

    Its rule is clovaai's too, except that SGDP without nesterov steps from a copy of the buffer.
    """

    class Timm(cls):  # type: ignore[misc,valid-type]
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            self.defaults["caution"] = False
            for group in self.param_groups:
                group["caution"] = False

    return Timm


def real_timm(name: str) -> Any:
    """The class of timm itself, if installed. ``import timm`` needs torchvision, these files need torch only."""

    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        spec = importlib.util.find_spec("timm")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("timm is not installed; what it saves is imitated by timm_like")
        package = types.ModuleType("timm_optim")
        package.__path__ = [f"{spec.submodule_search_locations[0]}/optim"]
        sys.modules["timm_optim"] = package
        return getattr(importlib.import_module(f"timm_optim.{name.lower()}"), name)(params, **options)

    return make


def case(target: str, theirs: Any, ours: Any, options: StateDict, name: str, **extra: Any) -> Any:
    return pytest.param(target, theirs, ours, options, extra, id=f"{target}-{name}")


NESTEROV = {"nesterov": True}
# In pytorch_optimizer's AdamP the bias correction also divides eps: equal to the last bits only with eps=0.
KOZISTR = ADAM | {"eps": 0.0}
CASES = [
    case("clovaai", adamp.AdamP, AdamP, ADAM, "AdamP"),
    case("clovaai", adamp.AdamP, AdamP, ADAM | NESTEROV, "AdamP-nesterov"),
    case("clovaai", adamp.SGDP, SGDP, SGD | NESTEROV, "SGDP-nesterov"),
    case("clovaai", adamp.SGDP, SGDP, SGD | {"dampening": 0.2}, "SGDP", project_buffer=True),
    case("clovaai", adamp.SGDP, SGDP, SGD | {"momentum": 0}, "SGDP-no-momentum"),
    case("timm", timm_like(adamp.AdamP), AdamP, ADAM | NESTEROV, "like-AdamP"),
    case("timm", timm_like(adamp.SGDP), SGDP, SGD | NESTEROV, "like-SGDP-nesterov"),
    case("timm", real_timm("AdamP"), AdamP, ADAM | NESTEROV, "AdamP"),
    case("timm", real_timm("SGDP"), SGDP, SGD, "SGDP"),
    case("pytorch_optimizer", pytorch_optimizer.AdamP, AdamP, KOZISTR, "AdamP"),
    case("pytorch_optimizer", pytorch_optimizer.AdamP, AdamP, KOZISTR | NESTEROV, "AdamP-nesterov"),
    case("pytorch_optimizer", pytorch_optimizer.SGDP, SGDP, SGD, "SGDP"),
    case("pytorch_optimizer", pytorch_optimizer.SGDP, SGDP, SGD | NESTEROV, "SGDP-nesterov"),
    case("torch", torch.optim.AdamW, AdamP, ADAM, "AdamW", **PLAIN),
    case("torch", torch.optim.AdamW, AdamP, ADAM | {"maximize": True}, "AdamW-maximize", **PLAIN),
    case("torch", torch.optim.Adam, AdamP, ADAM | {"weight_decay": 0}, "Adam", **PLAIN),
    case("torch", torch.optim.SGD, SGDP, SGD | {"weight_decay": 0, "dampening": 0.2}, "SGD", **PLAIN),
    case("torch", torch.optim.SGD, SGDP, SGD | NESTEROV | {"weight_decay": 0}, "SGD-nesterov", **PLAIN),
    case("torch", torch.optim.SGD, SGDP, {"lr": 0.02}, "SGD-no-momentum", **PLAIN),
]
"""Target, their class, our class, the options of both, the options of ours alone with which the rules are the same."""

EVERY_CASE = pytest.mark.parametrize(("target", "theirs", "ours", "options", "extra"), CASES)


def make(cls: Any, params: list[nn.Parameter], **options: Any) -> Any:
    """Two groups that differ in lr, over parameters of which the last is never stepped."""
    if cls in (AdamP, SGDP):
        options["backend"] = "reference"
    return cls([{"params": params[:2], "lr": 0.03}, {"params": params[2:]}], **options)


def members(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(*optimizers: torch.optim.Optimizer, steps: int = STEPS) -> None:
    """The same gradients to each, which decide differently from step to step; none to the last parameter."""
    for t in range(steps):
        for i, row in enumerate(list(zip(*map(members, optimizers), strict=True))[:-1]):
            g = gradient(row[0], KINDS[(i + t) % 3])
            for p in row:
                p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()


def twin(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in members(optimizer)]


def options_of(optimizer: torch.optim.Optimizer) -> list[StateDict]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def to_ours(state_dict: StateDict, optimizer: Any) -> StateDict:
    """Converted and checked for ``optimizer``, with the input compared afterwards."""
    before = copy.deepcopy(state_dict)
    result = checkpoint.to_ours(state_dict, adaptive=optimizer.adaptive, options=options_of(optimizer))
    assert_same(state_dict, before)
    assert_alone(result, state_dict)
    labels = [f"parameter {i}" for i in range(len(members(optimizer)))]
    checkpoint.check(result, [group["params"] for group in optimizer.param_groups], labels)
    return result


def export(state_dict: StateDict, target: str) -> StateDict:
    before = copy.deepcopy(state_dict)
    result = checkpoint.export(state_dict, target)
    assert_same(state_dict, before)
    assert_alone(result, state_dict)
    return result


def assert_alone(result: StateDict, state_dict: StateDict) -> None:
    """Whoever writes into the result's dictionaries and lists does not write into the input's."""
    assert result["state"] is not state_dict["state"]
    for new, old in zip(result["param_groups"], state_dict["param_groups"], strict=True):
        assert new is not old
        assert new["params"] is not old["params"]
    for i, entry in result["state"].items():
        assert not isinstance(entry, dict) or entry is not state_dict["state"][i]


def assert_same(actual: StateDict, expected: StateDict) -> None:
    """The same groups, keys, types and bits. A parameter without momentum may have an empty state or none."""
    actual, expected = ({**d, "state": {i: s for i, s in d["state"].items() if s != {}}} for d in (actual, expected))
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for i, entry in expected["state"].items():
        if not isinstance(entry, dict):
            assert actual["state"][i] == entry
            continue
        assert actual["state"][i].keys() == entry.keys()
        for key, value in entry.items():
            if isinstance(value, Tensor):
                assert_identical(actual["state"][i][key], value, f"{key} of {i}")
            else:
                assert actual["state"][i][key] == value


def assert_weights_close(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for i, (p, q) in enumerate(zip(members(a), members(b), strict=True)):
        assert_close(p, q, f"weight {i}")


def trained(cls: Any, **options: Any) -> Any:
    optimizer = make(cls, parameters(*SHAPES), **options)
    run(optimizer)
    return optimizer


# There and back.


@EVERY_CASE
def test_ours_continues_theirs(target: str, theirs: Any, ours: Any, options: StateDict, extra: StateDict) -> None:
    other = trained(theirs, **options)
    optimizer = make(ours, twin(other), lr=0.7, weight_decay=0.9, **extra)
    optimizer.load_state_dict(to_ours(copy.deepcopy(other.state_dict()), optimizer))
    run(other, optimizer)
    assert_weights_close(optimizer, other)
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.02]


@EVERY_CASE
def test_theirs_continues_ours(target: str, theirs: Any, ours: Any, options: StateDict, extra: StateDict) -> None:
    optimizer = trained(ours, **options, **extra)
    other = make(theirs, twin(optimizer), lr=0.7)
    other.load_state_dict(copy.deepcopy(export(optimizer.state_dict(), target)))
    run(other, optimizer)
    assert_weights_close(optimizer, other)


@EVERY_CASE
def test_there_and_back_is_the_same(target: str, theirs: Any, ours: Any, options: StateDict, extra: StateDict) -> None:
    optimizer = trained(ours, **options, **extra)
    saved = optimizer.state_dict()
    assert_same(to_ours(export(saved, target), optimizer), saved)


@EVERY_CASE
def test_exported_keys_are_theirs(target: str, theirs: Any, ours: Any, options: StateDict, extra: StateDict) -> None:
    """As a stepped optimizer of theirs saves them, and in types that continue to count."""
    made = export(trained(ours, **options, **extra).state_dict(), target)
    saved = trained(theirs, **options).state_dict()
    for group, expected in zip(made["param_groups"], saved["param_groups"], strict=True):
        # pytorch_optimizer's SGDP counts steps that nothing reads.
        assert {*group, "step"} == {*expected, "step"}
        if ours is AdamP:
            assert ("step" in group) == ("step" in expected)
    for i, entry in made["state"].items():
        assert entry.keys() == saved["state"][i].keys()
        assert all(type(entry[key]) is type(value) for key, value in saved["state"][i].items())
        assert all(entry[key].dtype == v.dtype for key, v in saved["state"][i].items() if isinstance(v, Tensor))


@pytest.mark.parametrize("switch", ["fused", "foreach"])
@pytest.mark.parametrize("theirs", [torch.optim.AdamW, torch.optim.SGD])
def test_torchs_switches_are_not_ours(theirs: Any, switch: str) -> None:
    options = {"lr": 0.02, "weight_decay": 0, switch: True} | ({"momentum": 0.9} if theirs is torch.optim.SGD else {})
    other = trained(theirs, **options)
    optimizer = make(SGDP if theirs is torch.optim.SGD else AdamP, twin(other), **PLAIN)
    optimizer.load_state_dict(to_ours(copy.deepcopy(other.state_dict()), optimizer))
    group = optimizer.param_groups[0]
    assert (group["fused"], group["foreach"], group["backend"]) == (None, None, "reference")
    run(other, optimizer)
    assert_weights_close(optimizer, other)


def test_through_a_file() -> None:
    """Nothing in the result that ``torch.load`` would not take back by default."""
    optimizer = trained(AdamP, **ADAM)
    for target in ("clovaai", "timm", "pytorch_optimizer", "torch"):
        made, file = export(optimizer.state_dict(), target), io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        assert_same(torch.load(file, weights_only=True), made)


# Where each value ends up.


def one(cls: Any, **options: Any) -> tuple[Any, StateDict]:
    """An optimizer of one stepped matrix and its state_dict, for changing."""
    params = parameters((3, 4))
    if cls in (AdamP, SGDP):
        options["backend"] = "reference"
    optimizer = cls(params, **{"lr": 0.1, **options})
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    return optimizer, copy.deepcopy(optimizer.state_dict())


def convert(state_dict: StateDict, cls: Any = AdamP, **options: Any) -> StateDict:
    return to_ours(state_dict, cls(parameters((3, 4)), backend="reference", **options))


@pytest.mark.parametrize(
    "step",
    [5, 5.0, torch.tensor(5.0), torch.tensor([5.0]), torch.tensor(5), torch.tensor([[5.0]], dtype=torch.float64)],
    ids=repr,
)
def test_step_counts(step: Any) -> None:
    _, saved = one(adamp.AdamP)
    saved["state"][0]["step"] = step
    got = convert(saved)["state"][0]["step"]
    assert_identical(got, torch.tensor(5.0))
    assert not isinstance(step, Tensor) or got.data_ptr() != step.data_ptr(), "the other optimizer would count here too"
    _, mine = one(AdamP)
    mine["state"][0]["step"] = step
    assert_identical(convert(mine)["state"][0]["step"], torch.tensor(5.0))


def test_step_in_the_group_goes_to_every_parameter_that_has_state() -> None:
    other = trained(pytorch_optimizer.AdamP, **ADAM)
    result = to_ours(other.state_dict(), make(AdamP, twin(other)))
    steps = [entry["step"] for entry in result["state"].values()]
    assert list(result["state"]) == [0, 1, 2, 3, 4]
    assert len({step.data_ptr() for step in steps}) == len(steps)
    for step in steps:
        assert_identical(step, torch.tensor(float(STEPS)))
    assert all("step" not in group for group in result["param_groups"])


def test_hyperparameters_come_from_the_checkpoint_and_the_rest_from_the_options() -> None:
    _, saved = one(torch.optim.AdamW, betas=(0.5, 0.6), eps=1e-6, weight_decay=0.3, maximize=True, foreach=True)
    saved["param_groups"][0] |= {"initial_lr": 0.4, "param_names": ["w"]}
    options = {"delta": 0.7, "wd_ratio": 0.6, "nesterov": True, "foreach": False, "fused": False}
    group = convert(saved, lr=9.0, weight_decay=9.0, **options)["param_groups"][0]
    expected = {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-6, "weight_decay": 0.3, "maximize": True}
    expected |= {"initial_lr": 0.4, "param_names": ["w"], "params": [0], "backend": "reference"} | options
    assert group.items() >= expected.items()
    assert group.keys() == AdamP(parameters((1,))).state_dict()["param_groups"][0].keys() | {
        "initial_lr",
        "param_names",
    }


def test_what_another_package_does_not_say_stays() -> None:
    _, saved = one(adamp.SGDP, momentum=0.9)
    for project_buffer in (False, True):
        group = convert(saved, SGDP, project_buffer=project_buffer)["param_groups"][0]
        assert group["project_buffer"] is project_buffer
    assert convert(saved, SGDP, maximize=True)["param_groups"][0]["maximize"] is True


def test_ours_keeps_its_groups_except_for_the_backend() -> None:
    _, saved = one(AdamP, foreach=True, delta=0.4)
    saved["param_groups"][0] |= {"backend": "elsewhere", "initial_lr": 0.4}
    del saved["param_groups"][0]["wd_ratio"]
    saved["state"][0] |= {"remainder": torch.ones(3, 4, dtype=torch.int16), "rounding_seed": torch.tensor(7)}
    result = convert(saved, fused=False, wd_ratio=0.7)
    assert result["param_groups"] == [saved["param_groups"][0] | {"backend": "reference", "wd_ratio": 0.7}]
    assert_same({**result, "param_groups": []}, {**saved, "param_groups": []})
    for target in ("clovaai", "timm", "pytorch_optimizer", "torch"):
        made = export(result, target)
        assert {"exp_avg", "exp_avg_sq"} <= made["state"][0].keys() <= {"exp_avg", "exp_avg_sq", "step"}
        assert made["param_groups"][0]["initial_lr"] == 0.4


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_every_hyperparameter_is_known(cls: Any) -> None:
    """A new one must be entered in checkpoint.py, or export would hand it to packages that have no such thing."""
    assert cls(parameters((1,))).defaults.keys() <= checkpoint._OURS


def test_momentum_buffer_of_none_or_of_no_momentum_is_dropped() -> None:
    _, saved = one(torch.optim.SGD)
    saved["state"][0] = {"momentum_buffer": None}  # as older torch kept it
    assert convert(saved, SGDP)["state"] == {}
    _, saved = one(adamp.SGDP)
    assert "momentum" in saved["state"][0]
    assert convert(saved, SGDP)["state"] == {}


def test_amsgrad_that_was_switched_off_is_dropped() -> None:
    _, saved = one(torch.optim.AdamW, amsgrad=True)
    saved["param_groups"][0]["amsgrad"] = False
    assert convert(saved)["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_options_that_change_nothing_are_dropped() -> None:
    _, saved = one(pytorch_optimizer.AdamP, adanorm=False, adanorm_r=0.9, ams_bound=True, cautious=False)
    assert saved["param_groups"][0].keys() >= {"adanorm_r", "ams_bound", "cautious"}
    group = convert(saved)["param_groups"][0]
    assert group.keys() == AdamP(parameters((1,))).state_dict()["param_groups"][0].keys()


def test_decay_that_is_not_decoupled_is_no_matter_without_decay() -> None:
    for other in (torch.optim.Adam, pytorch_optimizer.AdamP):
        _, saved = one(other)
        saved["param_groups"][0] |= {"weight_decouple": False, "fixed_decay": True, "decoupled_weight_decay": False}
        assert convert(saved)["param_groups"][0]["weight_decay"] == 0


def test_adam_that_does_not_say_counts_as_adamw() -> None:
    _, saved = one(torch.optim.Adam, weight_decay=0.1)
    del saved["param_groups"][0]["decoupled_weight_decay"]
    assert convert(saved)["param_groups"][0]["weight_decay"] == 0.1


def test_torchs_decay_becomes_decay_of_the_same_strength() -> None:
    """SGD's L2 penalty and SGDP's decoupled decay shrink a weight without gradient by the same rate over the steps."""
    weights = [nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(2)]
    other = torch.optim.SGD(weights[:1], lr=0.01, momentum=0.9, weight_decay=0.01)
    optimizer = SGDP(weights[1:], backend="reference", **PLAIN)
    weights[0].grad, weights[1].grad = torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for _ in range(100):
        other.step()
    with torch.no_grad():
        weights[1].copy_(weights[0])
    optimizer.load_state_dict(to_ours(copy.deepcopy(other.state_dict()), optimizer))
    optimizer.state[weights[1]]["momentum_buffer"].zero_()  # the decay that it still holds would count twice
    before = weights[0].detach().clone()
    for _ in range(100):
        other.step()
        optimizer.step()
    rates = [(w.detach() / before).log().mean().item() for w in weights]
    assert rates[1] == pytest.approx(rates[0], rel=0.02)


def test_state_of_nobody_passes_through() -> None:
    """torch.optim copies state under keys that are no parameter's as it is."""
    _, saved = one(adamp.AdamP)
    saved["state"]["global"] = 0
    assert convert(saved)["state"]["global"] == 0


# Group keys and state that schedulers and wrappers add.

WRAPPED: StateDict = {
    "lookahead_slow_buff": torch.ones(3, 4),
    "exp_inf": torch.ones(3),
    "swa_count": 3,
    "history": [0.5, 0.25],
    "note": None,
}
"""State that wrappers keep: copies, other shapes, and values that are no tensors."""


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_state_of_wrappers_passes_through(cls: Any) -> None:
    added = WRAPPED | {"note": "x"} | ({"step": torch.tensor(3.0)} if cls is SGDP else {"momentum_buffer": 0.5})
    optimizer, saved = one(cls, **({"momentum": 0.9} if cls is SGDP else {}))
    own = set(saved["state"][0])
    saved["state"][0] |= added
    fresh = cls(twin(optimizer), backend="reference")
    fresh.load_state_dict(copy.deepcopy(saved))
    assert_entries_equal(fresh.state[members(fresh)[0]], saved["state"][0])
    for each in (optimizer, fresh):
        members(each)[0].grad = torch.ones(3, 4, dtype=torch.float64)
        each.step()
    assert_identical(members(fresh)[0], members(optimizer)[0], "the weight")
    kept = fresh.state_dict()["state"][0]
    assert_entries_equal({k: v for k, v in kept.items() if k not in own}, added)


@pytest.mark.parametrize(("target", "theirs", "ours"), [(c.values[0], *c.values[1:3]) for c in CASES])
def test_state_of_wrappers_passes_both_ways(target: str, theirs: Any, ours: Any) -> None:
    options = {"momentum": 0.9} if ours is SGDP else {}
    added = {k: v for k, v in WRAPPED.items() if k != "exp_inf"}
    _, saved = one(theirs, **options)
    saved["state"][0] |= added
    loaded = convert(saved, ours)
    assert_entries_equal({k: loaded["state"][0][k] for k in added}, added)
    _, mine = one(ours, **options, **({"project_buffer": target == "clovaai"} if ours is SGDP else {}))
    mine["state"][0] |= added
    made = export(mine, target)
    assert made["state"][0].keys() == saved["state"][0].keys()
    assert_entries_equal({k: made["state"][0][k] for k in added}, added)


def assert_entries_equal(actual: StateDict, expected: StateDict) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert type(actual[key]) is type(value), key
        assert torch.equal(actual[key], value) if isinstance(value, Tensor) else actual[key] == value, key


SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
    lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["OneCycleLR", "CyclicLR", "CosineAnnealingLR", "SWALR"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (torch.optim.AdamW, AdamP),
        (torch.optim.SGD, SGDP),
        (adamp.AdamP, AdamP),
        (pytorch_optimizer.SGDP, SGDP),
        (AdamP, AdamP),
    ],
)
def test_group_keys_of_schedulers_and_users_pass(theirs: Any, ours: Any, scheduler: Callable[[Any], Any]) -> None:
    other = theirs(parameters((3, 4)), lr=0.1, **({"momentum": 0.9} if ours is SGDP else {}))
    before = set(other.param_groups[0])
    scheduler(other)
    users = {"param_names": ["w"], "name": "head", "lr_scale": 0.5, "lookahead_k": 6, "n_avg": 2, "step_counter": 3}
    other.param_groups[0] |= users
    added = other.param_groups[0].keys() - before
    assert added > users.keys()
    group = convert(other.state_dict(), ours)["param_groups"][0]
    assert {key: group[key] for key in added} == {key: other.param_groups[0][key] for key in added}


# Optimizers of other rules, all that are installed.


UNBUILT = {"demo", "distributedmuon"}
"""These need einops and a process group."""


def every_optimizer() -> dict[str, Any]:
    names = [name for name in pytorch_optimizer.get_supported_optimizers() if name not in UNBUILT]
    found = {f"pytorch_optimizer.{name}": pytorch_optimizer.load_optimizer(name) for name in names}
    for name, cls in vars(torch.optim).items():
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            found[f"torch.{name}"] = cls
    return found


def built(cls: Any, model: nn.Module, **options: Any) -> Any:
    """An optimizer from whichever arguments it takes; None where it takes none of these."""
    params = list(model.parameters())
    attempts: list[Callable[[], Any]] = [
        lambda: cls(params, lr=0.01, **options),
        lambda: cls(params, **options),
        lambda: cls(model, lr=0.01, **options),
        lambda: cls(params, num_data=3, **options),
        lambda: cls(params, num_iterations=3, **options),
        lambda: cls([{"params": params, "use_muon": True}], **options),
    ]
    for attempt in attempts:
        try:
            return attempt()
        except Exception:
            continue
    return None


EVERYBODY = every_optimizer()
SAME_RULE = {
    "pytorch_optimizer.adam": AdamP,  # torch's own
    "pytorch_optimizer.adamw": AdamP,  # torch's own
    "pytorch_optimizer.adamp": AdamP,
    "pytorch_optimizer.sgd": SGDP,  # torch's own
    "pytorch_optimizer.sgdp": SGDP,
    "torch.Adam": AdamP,
    "torch.AdamW": AdamP,
    "torch.SGD": SGDP,
}
"""Which of ours continues which optimizer. Nobody else's state_dict may be taken."""


def saved_by(name: str, **options: Any) -> tuple[Any, nn.Module, StateDict]:
    """The state_dict of an optimizer after two steps, or after none where it needs a closure or a second order."""
    model = nn.Linear(4, 4, bias=False)
    optimizer = built(EVERYBODY[name], model, **options)
    assert optimizer is not None, f"{name} takes none of the known arguments: add what it takes to built"
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
    return optimizer, model, optimizer.state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERYBODY)
def test_no_other_rule_is_taken_for_ours(name: str) -> None:
    """By default, and with momentum and weight decay where the optimizer has them. Nothing but ValueError escapes."""
    for options in ({}, {"momentum": 0.9}, {"weight_decay": 0.1}):
        if options and built(EVERYBODY[name], nn.Linear(4, 4, bias=False), **options) is None:
            continue
        _, _, saved = saved_by(name, **options)
        l2 = name.endswith((".adam", ".Adam")) and "weight_decay" in options
        for cls in (AdamP, SGDP):
            fresh = cls(nn.Linear(4, 4, bias=False).parameters(), backend="reference")
            before = copy.deepcopy(fresh.state_dict())
            try:
                fresh.load_state_dict(copy.deepcopy(saved))
            except ValueError:
                assert_same(fresh.state_dict(), before)
                assert SAME_RULE.get(name) is not cls or l2, f"{cls.__name__} refuses {name} with {options}"
            else:
                assert (SAME_RULE.get(name), l2) == (cls, False), f"{cls.__name__} takes {name} with {options}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERYBODY)
def test_group_keys_of_every_optimizer_are_known(name: str) -> None:
    """Each is a key of our formats, or refused by name in them. The exceptions are keys of schedulers and wrappers."""
    _, _, saved = saved_by(name)
    known = checkpoint._OTHER_HYPERPARAMETERS.union(*(fmt.keys for fmt in checkpoint._FORMATS))
    known |= {"params", "initial_lr", "max_lr", "name", "step_counter"}
    for group in saved.get("param_groups", []):
        assert not group.keys() - known, f"enter these keys of {name} in checkpoint.py"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAME_RULE)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_who_is_taken_goes_on_with_the_same_numbers(name: str, momentum: float) -> None:
    ours = SAME_RULE[name]
    options: StateDict = {"weight_decay": 0.0} | (
        {"momentum": momentum, "nesterov": momentum > 0} if ours is SGDP else {}
    )
    if name.endswith("p"):
        options["eps"] = 0.0 if ours is AdamP else 1e-8
    other, model, saved = saved_by(name, **options)
    weight = next(model.parameters())
    mine = nn.Parameter(weight.detach().clone())
    optimizer = ours([mine], backend="reference", **({} if name.endswith("p") else PLAIN))
    optimizer.load_state_dict(copy.deepcopy(saved))
    for t in range(4):
        g = gradient(weight, KINDS[t % 3])
        weight.grad, mine.grad = g.clone(), g.clone()
        other.step()
        optimizer.step()
    assert_close(mine, weight, name)


# Refused, in words.


def with_group(cls: Any, change: StateDict, **options: Any) -> Callable[[], Any]:
    def attempt() -> None:
        _, saved = one(cls, **options)
        saved["param_groups"][0] |= change
        convert(saved, SGDP if "momentum" in saved["param_groups"][0] else AdamP)

    return attempt


KOZ = pytorch_optimizer
LOADS = {
    "bias_correction": (with_group(torch.optim.AdamW, {"bias_correction": False}),
                        r"bias_correction=False in group 0 .*Adam\(W\) then leaves .* set bias_correction=True there"),
    "corrected_weight_decay": (with_group(torch.optim.AdamW, {"corrected_weight_decay": True}, weight_decay=0.1),
                               "corrected_weight_decay=True .* set corrected_weight_decay=False or weight_decay=0"),
    "trust_coefficient": (with_group(torch.optim.SGD, {"trust_coefficient": 0.001}),
                          r"group key 'trust_coefficient' \(at 0\.001\) in group 0 of the state_dict: torch\.optim\."
                          r"SGD has no such .* allowed are \['capturable', .* Load .* or delete"),
    "integral": (with_group(KOZ.SGDP, {"integral": 5.0}), r"group key 'integral' \(at 5\.0\) .* pytorch_optimizer"),
    "lambd": (with_group(adamp.AdamP, {"lambd": torch.ones(9)}), r"group key 'lambd' \(at a Tensor\) .* adamp\.AdamP"),
    "two": (with_group(torch.optim.AdamW, {"rectify": True, "dampening": 0}),
            r"group keys 'dampening' \(at 0\), 'rectify' \(at True\) in group 0"),
    "timm SGDW": (with_group(torch.optim.SGD, {"caution": False}), r"group key 'caution' \(at False\)"),
    "amsgrad": (with_group(torch.optim.AdamW, {}, amsgrad=True), r"amsgrad=True in group 0 .*Adam\(W\) then divides .* "
                r"set amsgrad=False there to continue by AdamP's rule"),
    "L2": (with_group(torch.optim.Adam, {}, weight_decay=0.1), "decoupled_weight_decay=False in group 0 .* adds weight "
           "decay to the gradient.* set decoupled_weight_decay=True or weight_decay=0 there"),
    "caution": (with_group(adamp.AdamP, {"caution": True}), "caution=True .* timm.optim.AdamP then masks"),
    "caution-SGDP": (with_group(adamp.SGDP, {"caution": True}), "caution=True .* timm.optim.SGDP then masks"),
    "cautious": (with_group(KOZ.AdamP, {}, cautious=True), "cautious=True .* set cautious=False"),
    "adanorm": (with_group(KOZ.AdamP, {}, adanorm=True), "adanorm=True .* rescales gradients"),
    "adam_debias": (with_group(KOZ.AdamP, {}, adam_debias=True), "adam_debias=True .* uncorrected"),
    "use_gc": (with_group(KOZ.AdamP, {}, use_gc=True), "use_gc=True .* centralises"),
    "fixed_decay": (with_group(KOZ.SGDP, {}, fixed_decay=True, weight_decay=0.1), "fixed_decay=True .* not multiply"),
    "weight_decouple": (with_group(KOZ.AdamP, {}, weight_decouple=False, weight_decay=0.1), "weight_decouple=False"),
    "dampening": (with_group(torch.optim.SGD, {}, dampening=0.5), "dampening=0.5 .* torch.optim.SGD ignores it"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
def test_other_rules_are_refused(name: str) -> None:
    attempt, message = LOADS[name]
    with pytest.raises(ValueError, match=message):
        attempt()


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (torch.optim.SGD, AdamP, r"seems to come from torch\.optim\.SGD, which AdamP cannot continue: .* into SGDP"),
        (torch.optim.AdamW, SGDP, r"come from torch\.optim\.Adam\(W\), which SGDP cannot continue: .* into AdamP"),
        (adamp.SGDP, AdamP, r"come from adamp\.SGDP, which AdamP cannot"),
        (pytorch_optimizer.AdamP, SGDP, r"come from pytorch_optimizer\.AdamP, which SGDP cannot"),
        (timm_like(adamp.AdamP), SGDP, r"come from timm\.optim\.AdamP, which SGDP cannot"),
        (SGDP, AdamP, r"come from fused_adamp\.SGDP, which AdamP cannot"),
        (torch.optim.RMSprop, AdamP, r"groups have the keys \['alpha', .* not those of fused_adamp\.AdamP, .*"),
        (torch.optim.NAdam, AdamP, r"'momentum_decay'.* not those of .*: load the state_dict of one of these"),
    ],
)
def test_another_optimizer_is_named(theirs: Any, ours: Any, message: str) -> None:
    _, saved = one(theirs)
    with pytest.raises(ValueError, match=message):
        convert(saved, ours)


@pytest.mark.parametrize(
    ("theirs", "ours"), [(torch.optim.AdamW, AdamP), (torch.optim.SGD, SGDP), (adamp.AdamP, AdamP)]
)
def test_every_group_is_checked(theirs: Any, ours: Any) -> None:
    saved = trained(theirs).state_dict()
    other = make(ours, parameters(*SHAPES))
    for change, message in (
        ({"lambd": 1}, "'lambd' .* in group 1"),
        ({"weight_decay": None}, r"group 1 .* lacks \['wei"),
    ):
        broken = copy.deepcopy(saved)
        broken["param_groups"][1] |= change
        if "lambd" not in change:
            del broken["param_groups"][1]["weight_decay"]
        with pytest.raises(ValueError, match=message):
            to_ours(broken, other)


@pytest.mark.parametrize(
    ("theirs", "ours", "alien"),
    [
        (torch.optim.AdamW, AdamP, "exp_inf"),
        (torch.optim.AdamW, AdamP, "momentum_buffer"),
        (adamp.AdamP, AdamP, "exp_avg_var"),
        (torch.optim.SGD, SGDP, "momentum"),
        (torch.optim.SGD, SGDP, "exp_avg_sq"),
        (adamp.SGDP, SGDP, "i_buffer"),
    ],
)
def test_state_of_another_rule_is_refused(theirs: Any, ours: Any, alien: str) -> None:
    _, saved = one(theirs)
    saved["state"].setdefault(0, {})[alien] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=rf"state of parameter 0 has \['{alien}'\], .* allowed are .* or delete"):
        convert(saved, ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": []}, "state is a list and its param_groups are a list, allowed are"),
        ({"param_groups": {}}, "param_groups are a dict, allowed are a dict and a list"),
        ({"param_groups": [[]]}, "group 0 of the state_dict is a list, allowed is a dict with 'params'"),
        ({"param_groups": [{"lr": 1}]}, r"group 0 of the state_dict is \['lr'\], allowed is"),
        ({"state": {0: 5}}, r"state of parameter 0 is a int, allowed is a dict with \['exp_avg', 'exp_avg_sq'\]"),
    ],
)
def test_what_is_no_state_dict_is_refused(change: StateDict, message: str) -> None:
    _, saved = one(torch.optim.AdamW)
    with pytest.raises(ValueError, match=message):
        convert(saved | change)


def test_a_checkpoint_around_the_state_dict() -> None:
    with pytest.raises(ValueError, match=r"has \['model', 'optimizer'\] and lacks \['param_groups', 'state'\]: pass"):
        checkpoint.to_ours({"model": {}, "optimizer": {}}, adaptive=True, options=[{}])


def changed(key: str, value: Any) -> Callable[[StateDict], Any]:
    return lambda state: state.update({key: value})


MISFITS: dict[str, tuple[Any, Callable[[StateDict], Any], str]] = {
    "shape": (AdamP, changed("exp_avg_sq", torch.zeros(4, 3)),
              r"'exp_avg_sq' of parameter 'w' has shape \(4, 3\), the parameter \(3, 4\): load a whole state_dict"),
    "step shape": (AdamP, changed("step", torch.zeros(2)), r"'step' of parameter 'w' has shape \(2,\), allowed is"),
    "missing moment": (AdamP, lambda s: s.pop("exp_avg_sq"), r"parameter 'w' .* lacks \['exp_avg_sq'\]: .* or delete"),
    "missing step": (AdamP, lambda s: s.pop("step"), r"the state of parameter 'w' .* lacks \['step'\]"),
    "number": (SGDP, changed("momentum_buffer", 0.5), r"'momentum_buffer' of parameter 'w' is a float, not a tensor"),
    "text": (AdamP, changed("step", "five"), r"'step' of parameter 'w' is a str, not a tensor"),
    "integers": (SGDP, changed("momentum_buffer", torch.zeros(3, 4, dtype=torch.int32)),
                 r"'momentum_buffer' of parameter 'w' has dtype torch\.int32, allowed are torch\.float32, "),
    "complex": (AdamP, changed("exp_avg", torch.zeros(3, 4, dtype=torch.complex64)), r"has dtype torch\.complex64"),
    "remainder": (AdamP, changed("remainder", torch.zeros(3, 4)), r"'remainder' .* allowed are torch\.int16: "),
    "remainder shape": (SGDP, changed("remainder", torch.zeros(3, dtype=torch.int16)), r"'remainder' .* shape \(3,\)"),
    "seed": (AdamP, changed("rounding_seed", torch.zeros(())), r"'rounding_seed' .* allowed are torch\.int64"),
}  # fmt: skip
"""Our class, what happens to the state, what the message says."""


@pytest.mark.parametrize("name", MISFITS)
def test_state_that_does_not_fit(name: str) -> None:
    cls, change, message = MISFITS[name]
    optimizer, saved = one(cls, **({"momentum": 0.9} if cls is SGDP else {}))
    params = [group["params"] for group in optimizer.param_groups]
    checkpoint.check(saved, params, ["parameter 'w'"])
    change(saved["state"][0])
    result = checkpoint.to_ours(saved, adaptive=cls.adaptive, options=options_of(optimizer))
    with pytest.raises(ValueError, match=message):
        checkpoint.check(result, params, ["parameter 'w'"])


def test_the_misfit_is_named_among_many() -> None:
    optimizer = trained(AdamP)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][3]["exp_avg"] = torch.zeros(8)
    labels = [f"parameter {i} of group {n}" for n, ids in enumerate(([0, 1], [0, 1, 2, 3])) for i in ids]
    with pytest.raises(ValueError, match="'exp_avg' of parameter 1 of group 1 has shape"):
        checkpoint.check(saved, [group["params"] for group in optimizer.param_groups], labels)


def test_counts_are_named() -> None:
    optimizer = trained(AdamP)
    saved, params = optimizer.state_dict(), [group["params"] for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="has 2 parameter groups, the optimizer 1: build the optimizer with"):
        checkpoint.to_ours(saved, adaptive=True, options=options_of(optimizer)[:1])
    with pytest.raises(ValueError, match="has 2 parameter groups, the optimizer 3"):
        checkpoint.check(saved, [*params, []], ["p"] * 6)
    with pytest.raises(ValueError, match="group 1 of the state_dict has 4 parameters, the optimizer 3"):
        checkpoint.check(saved, [params[0], params[1][1:]], ["p"] * 5)


def test_state_without_a_momentum_buffer_fits() -> None:
    """As of momentum that was switched on since the last step."""
    optimizer, saved = one(SGDP)
    saved["param_groups"][0]["momentum"] = 0.9
    saved["state"][0] = {"rounding_seed": torch.tensor(7)}
    checkpoint.check(saved, [group["params"] for group in optimizer.param_groups], ["p"])


EVERY = ("clovaai", "timm", "pytorch_optimizer")
EXPORTS: list[tuple[tuple[str, ...], Any, StateDict, str]] = [
    (EVERY, AdamP, {"maximize": True}, "maximize=True in group 0 .*AdamP has no maximize .* set maximize=False there "
     "and negate the loss"),
    (
        (*EVERY, "torch"), AdamP, {"max_grad_norm": 1.0},
        "max_grad_norm=1.0 .* set max_grad_norm=None there and call torch.nn.utils.clip_grad_norm_ before each step",
    ),
    (("torch",), SGDP, {"max_grad_norm": 1.0}, "max_grad_norm=1.0 .* torch.optim.SGD has no max_grad_norm"),
    (EVERY, AdamP, {"projection": "layer"}, "projection='layer' .* set projection='auto', and delta=0 for 'none',"),
    (EVERY, SGDP, {"channel_dim": 1}, "channel_dim=1 .* set channel_dim=0 there"),
    (("clovaai",), SGDP, {"momentum": 0.9}, r"project_buffer=False .* adamp\.SGDP has no project_buffer and does what "
     "project_buffer=True does; set project_buffer=True there"),
    (("timm", "pytorch_optimizer"), SGDP, {"momentum": 0.9, "project_buffer": True}, "project_buffer=True in group 0"),
    (("torch",), AdamP, {"nesterov": True}, r"nesterov=True .*Adam\(W\) has no nesterov"),
    (("torch",), SGDP, {"dampening": 0.5}, "dampening=0.5 .* ignores it"),
    (("apex",), AdamP, {}, "target='apex' is unknown: choose one of 'pytorch_optimizer', 'timm', 'clovaai', 'torch'"),
    (("fused_adamp",), AdamP, {}, "target='fused_adamp' is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "cls", "change", "message"), [(target, *rest) for targets, *rest in EXPORTS for target in targets]
)
def test_what_the_target_lacks_is_refused(target: str, cls: Any, change: StateDict, message: str) -> None:
    _, saved = one(cls)
    saved["param_groups"][0] |= change
    with pytest.raises(ValueError, match=message):
        checkpoint.export(saved, target)


@pytest.mark.parametrize("change", [{"momentum": 0}, {"delta": 0}, {"nesterov": True}], ids=str)
def test_project_buffer_matters_only_where_it_has_an_effect(change: StateDict) -> None:
    for target, project_buffer in (("clovaai", False), ("timm", True), ("pytorch_optimizer", True)):
        _, saved = one(SGDP, momentum=0.9, project_buffer=project_buffer)
        saved["param_groups"][0] |= change
        assert "project_buffer" not in export(saved, target)["param_groups"][0]


def test_options_of_the_projection_are_left_behind_for_torch() -> None:
    _, saved = one(AdamP)
    saved["param_groups"][0] |= {"projection": "layer", "channel_dim": 1}
    assert not export(saved, "torch")["param_groups"][0].keys() & {"projection", "channel_dim", "delta", "wd_ratio"}


def test_one_step_count_per_group() -> None:
    optimizer = trained(AdamP)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] += 2  # a group of its own count is fine
    saved["state"][1]["step"] += 2
    assert [group["step"] for group in export(saved, "pytorch_optimizer")["param_groups"]] == [STEPS + 2, STEPS]
    saved["state"][3]["step"] += 1
    message = r"steps differ within group 1 \(4 of parameters \[2, 4\], 5 of parameters \[3\]\), and .* counts once"
    with pytest.raises(ValueError, match=message):
        checkpoint.export(saved, "pytorch_optimizer")


def test_export_takes_ours_only() -> None:
    _, saved = one(torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"seems to come from torch\.optim\.Adam\(W\): pass one of fused_adamp"):
        checkpoint.export(saved, "clovaai")
