"""Torch's ambient modes: what is active around a call changes none of its numbers."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import no_default_device
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from trajectory import default_dtype

from fused_adamp import SGDP, AdamP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Makes torch fill new tensors of torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def inside_of_vmap() -> Iterator[None]:
    """On tensors that it does not map."""
    torch._C._functorch._vmap_increment_nesting(2, "same")
    try:
        yield
    finally:
        torch._C._functorch._vmap_decrement_nesting()


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("hpu"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": deterministic,
    "functions": Functions,
    "operators": Operators,
    "flops": lambda: FlopCounterMode(display=False),
    "vmap": inside_of_vmap,
    "forward mode": torch.autograd.forward_ad.dual_level,
}

CALLS = ["construct", "clip", "step", "second clip", "second step", "load", "step after", "report"]

OPTIMIZERS: dict[str, tuple[Any, torch.dtype, dict[str, Any], list[str]]] = {
    "AdamP": (AdamP, torch.float32, {}, [*CALLS, "all"]),
    "SGDP": (SGDP, torch.bfloat16, {"momentum": 0.9, "rounding": "stochastic"}, ["step", "all"]),
    "remainder": (AdamP, torch.bfloat16, {"rounding": "remainder", "channel_dim": -1}, ["step", "all"]),
}
"""Class, dtype of the weights, options, and around which of the calls a mode is tried."""

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers_of(name: str, backend: str, around: Callable[[str], AbstractContextManager[Any]]) -> list[Any]:
    """All that comes out of two steps, a load and a further step; ``around`` is what each call is made in."""
    torch.manual_seed(0)
    kind, dtype, options, _ = OPTIMIZERS[name]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((6, 5), (5,), (4, 3, 2))]

    def backward() -> None:
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)

    lr = torch.tensor(0.1)
    with around("construct"):
        optimizer = kind([{"params": params[:2]}, {"params": params[2:]}], lr=lr, backend=backend, **options)
    found: list[Any] = []
    for prefix in ("", "second "):
        backward()
        with around(prefix + "clip"):
            found.append(optimizer.clip_grad_norm_(1.0))
        with around(prefix + "step"):
            optimizer.step()
        found.append([p.detach().clone() for p in params])
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry |= {"step": torch.tensor(1001.0)} if "step" in entry else {}
    with around("load"):
        optimizer.load_state_dict(saved)
    backward()
    with around("step after"):
        optimizer.step()
    with around("report"):
        found.append([str(optimizer.projection_report()), list(optimizer.decisions().values())])
    return [*found, params, [optimizer.state[p] for p in params]]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_no_number(mode: str, name: str, backend: str) -> None:
    expected = numbers_of(name, backend, lambda call: contextlib.nullcontext())
    for active in OPTIMIZERS[name][3]:
        found = numbers_of(
            name, backend, lambda call, at=active: MODES[mode]() if at in (call, "all") else contextlib.nullcontext()
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert repr(ours) == repr(theirs), active


def test_parameters_of_inference_mode_are_stepped_inside_of_it(backend: str) -> None:
    results = []
    for mode in (torch.inference_mode, contextlib.nullcontext):
        with mode():
            p = nn.Parameter(torch.ones(3, 3), requires_grad=False)
            p.grad = torch.eye(3)
            optimizer = AdamP([p], backend=backend)
            for _ in range(2):
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
            results.append(repr((p.tolist(), str(optimizer.projection_report()))))
    assert results[0] == results[1]


def test_a_count_that_is_a_number_is_kept_under_a_coarse_default_dtype(backend: str) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.ones(3, 3)
    optimizer = AdamP([p], backend=backend)
    optimizer.step()
    optimizer.state[p]["step"] = 1001.0
    optimizer.param_groups[0]["state_dtype"] = torch.float64
    with default_dtype(torch.bfloat16):
        optimizer.step()
    assert optimizer.state[p]["step"] == 1002


# FakeTensorMode: nothing is computed, but state has its shapes.


def description(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    return tuple(t.shape), t.dtype, t.device, t.stride()


def shapes_of(name: str, backend: str) -> list[Any]:
    """Shapes, dtypes and versions in a training loop, without the numbers: a FakeTensor has none."""
    kind, dtype, options, _ = OPTIMIZERS[name]
    model = nn.Sequential(nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 3, dtype=dtype))
    optimizer = kind(model.parameters(), backend=backend, **options)
    found: list[Any] = []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=dtype)).sum().backward()
        versions = [p._version for p in model.parameters()]
        for norm_type in (2.0, float("inf")):
            found.append(description(optimizer.clip_grad_norm_(1.0, norm_type)))
        assert optimizer.step(lambda: 5) == 5
        for limit in (1.0, None):
            for group in optimizer.param_groups:
                group["max_grad_norm"] = limit
            optimizer.step()
            found.append(description(optimizer.grad_norm))
        assert all(p._version > old for p, old in zip(model.parameters(), versions, strict=True))
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    optimizer.step()
    optimizer.projection_report(model)
    optimizer.decisions()
    for entry in optimizer.state_dict()["state"].values():
        found.append({key: description(value) for key, value in entry.items()})
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fake_tensors_get_state_of_the_real_shapes(name: str, backend: str) -> None:
    with FakeTensorMode():
        found = shapes_of(name, backend)
    assert found == shapes_of(name, backend)


@pytest.mark.parametrize(("left", "device"), [(False, "cuda"), (False, "cpu"), (True, "cpu")])
def test_fake_state_is_fake(left: bool, device: str) -> None:
    """In the mode, and after it was left; for a GPU that need not be here."""
    with FakeTensorMode() as mode:
        params = [nn.Parameter(torch.empty(shape, device=device)) for shape in ((4, 6), (6,))]
        for p in params:
            p.grad = torch.ones_like(p)
    with contextlib.nullcontext() if left else mode:
        optimizer = AdamP(params, fused=True)
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.step()
        assert isinstance(norm, FakeTensor)
        for p in params:
            assert all(isinstance(t, FakeTensor) for t in optimizer.state[p].values())
            assert optimizer.state[p]["exp_avg"].device.type == device
        assert not optimizer.projection_report()


def test_real_parameters_beside_fake_ones_are_stepped(backend: str) -> None:
    results = []
    for mode in (FakeTensorMode, None):
        p, other = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(2))
        if mode is not None:
            with mode():
                other = nn.Parameter(torch.ones(2))
        for t in (p, other):
            t.grad = torch.ones_like(t)
        optimizer = AdamP([p, other], backend=backend)
        for _ in range(3):
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("call", ["step", "clip"])
def test_real_parameters_in_the_mode_are_torchs_error(call: str, stepped: bool, backend: str) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.ones(3, 3)
    optimizer = AdamP([p], backend=backend)
    if stepped:
        optimizer.step()
    before = p.detach().clone(), optimizer.state_dict()["state"].get(0, {}).get("step")
    with pytest.raises(AssertionError, match="Please convert all Tensors to FakeTensors"), FakeTensorMode():
        optimizer.step() if call == "step" else optimizer.clip_grad_norm_(1.0)
    assert torch.equal(p, before[0])
    assert optimizer.state_dict()["state"].get(0, {}).get("step") == before[1]
    optimizer.step()
    assert not torch.equal(p, before[0])


def test_a_fake_gradient_of_a_real_parameter_is_an_error(backend: str) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    with FakeTensorMode():
        p.grad = torch.ones(3, 3)
    optimizer = AdamP([p], backend=backend)
    with pytest.raises((TypeError, AssertionError), match=r"a tensor of FakeTensorMode|convert all Tensors to Fake"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 3))
    assert optimizer.state[p]["step"] == 0


# A default device, once more: calls in which no tensor can be made without naming its device.

TESTS = Path(__file__).parents[1]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_call_takes_the_default_device() -> None:
    selection = ["-k", "test_report or float64", f"{TESTS}/options/test_report.py", __file__]
    run = run_python("-m", "pytest", "-q", *selection, **{no_default_device.ENVIRONMENT: "none"})
    assert run.returncode == 0, run.stdout[-5000:]


def test_a_call_that_takes_the_default_device_is_found() -> None:
    """The test above relies on this."""
    code = """
import no_default_device
no_default_device.install()
import torch
from fused_adamp import AdamP

class Careless(AdamP):
    def moments(self, group):
        torch.zeros(2)
        return super().moments(group)

Careless([torch.nn.Parameter(torch.ones(2, 2))]).step()
"""
    run = run_python("-c", code, PYTHONPATH=f"{TESTS.parent}:{TESTS}/support")
    assert "torch.zeros was called without a device" in run.stderr
