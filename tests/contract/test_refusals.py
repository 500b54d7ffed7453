"""Bad inputs: the message says what was wrong and what would do, and nothing has moved.

The pieces that every message is searched for: the argument's or parameter's name, the value received, the allowed range
or the remedy.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tolerances import assert_identical
from torch import Tensor, nn
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.tensor import DTensor, Partial
from trajectory import RULES, Run, assert_snapshots_equal, gradient, parameters, snapshot

from fused_adamp.backends import BACKENDS, available

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))


def raises(error: type[Exception] | tuple[type[Exception], ...], *pieces: str) -> Any:
    """Expects the error with all pieces in its message, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, pieces)))


# Hyperparameters.

OPEN, UNIT, BELOW_ONE = "[0, inf)", "[0, 1]", "[0, 1)"
RANGES: list[tuple[str, str, str]] = [
    *((rule, name, OPEN) for rule in RULES for name in ("lr", "eps", "weight_decay", "delta")),
    *((rule, "wd_ratio", UNIT) for rule in RULES),
    ("AdamP", "betas[0]", BELOW_ONE),
    ("AdamP", "betas[1]", BELOW_ONE),
    ("SGDP", "momentum", BELOW_ONE),
    ("SGDP", "dampening", UNIT),
]
ABOVE = {OPEN: (math.inf,), UNIT: (math.nextafter(1, 2), 7, math.inf), BELOW_ONE: (1, 1.0, 1.5, math.inf)}

OUTSIDE = [
    (rule, name, value, (name, f"={value!r} is outside {allowed}: pass "), ValueError)
    for rule, name, allowed in RANGES
    for value in (-1e-9, -1, -math.inf, math.nan, *ABOVE[allowed])
]
NO_NUMBER = [
    (rule, name, value, (name, f"={value!r} is a {type(value).__name__}; pass a number"), TypeError)
    for rule, name, _ in RANGES
    for value in ("0.1", None, True, 1j, [0.1])
]
TENSORS = [
    (rule, name, tensor, (name, message), ValueError)
    for rule, name, _ in RANGES
    for tensor, message in (
        (torch.tensor([0.1, 0.2]), "must be 1-element, but it has 2 elements: pass a number or a 1-element tensor"),
        (torch.empty(0), "must be 1-element, but it has 0 elements: pass a number or a 1-element tensor"),
        (torch.tensor(-1.0), "=-1.0 is outside [0, "),
        (torch.tensor([math.nan]), "=nan is outside [0, "),
    )
]
NO_PAIR = [
    ("AdamP", "betas", value, ("betas=", "not a pair", "pass two decay rates"), ValueError)
    for value in (0.9, (), (0.9,), (0.9, 0.99, 0.999), "no", None, {0.9, 0.99})
]
HYPERPARAMETERS = [
    pytest.param(*case, id=f"{case[0]}-{case[1]}={case[2]!r}") for case in (*OUTSIDE, *NO_NUMBER, *TENSORS, *NO_PAIR)
]


def argument(name: str, value: Any) -> dict[str, Any]:
    """``betas[1]`` is a place in a pair whose other value is good."""
    if name.startswith("betas["):
        return {"betas": (value, 0.9) if name == "betas[0]" else (0.9, value)}
    return {name: value}


@pytest.mark.parametrize(("rule", "name", "value", "pieces", "error"), HYPERPARAMETERS)
def test_hyperparameter(rule: str, name: str, value: Any, pieces: tuple[str, ...], error: type[Exception]) -> None:
    """In the constructor, in a group of the constructor, and in a group added later, which leaves no trace."""
    cls, options = RULES[rule]
    bad = argument(name, value)
    with raises(error, *pieces):
        cls(parameters((2, 3)), **{**options, **bad})
    with raises(error, *pieces):
        cls([{"params": parameters((2, 3))}, {"params": parameters((3,)), **bad}], **options)
    run = Run(rule, parameters((2, 3)), "reference")
    run.step()
    before, groups = snapshot(run.optimizer), list(run.optimizer.param_groups)
    with raises(error, *pieces):
        run.optimizer.add_param_group({"params": parameters((3,)), **bad})
    assert all(a is b for a, b in zip(run.optimizer.param_groups, groups, strict=True))
    assert_snapshots_equal(snapshot(run.optimizer), before)
    run.step()


@pytest.mark.parametrize(("rule", "name", "allowed"), RANGES)
def test_the_ends_of_the_range(rule: str, name: str, allowed: str) -> None:
    """What the messages allow is allowed."""
    cls, options = RULES[rule]
    ends = {OPEN: (0, 0.0, 1e30), UNIT: (0, 1, 0.0, 1.0), BELOW_ONE: (0, 0.0, math.nextafter(1, 0))}[allowed]
    for value in (*ends, torch.tensor(0.5)):
        cls(parameters((2, 3)), **{**options, **argument(name, value)})


@EVERY_RULE
def test_differentiable(rule: str) -> None:
    cls, options = RULES[rule]
    with raises(ValueError, "differentiable=True is not supported", "leave it False"):
        cls(parameters((2, 3)), **options, differentiable=True)


# Parameters.

PARAMETERS: dict[str, tuple[Callable[[], Tensor], type[Exception], tuple[str, ...]]] = {
    "integer": (
        lambda: torch.ones(2, 3, dtype=torch.int64), TypeError,
        ("dtype torch.int64", "torch.float32", "pass a floating"),
    ),
    "boolean": (
        lambda: torch.ones(2, 3, dtype=torch.bool), TypeError,
        ("dtype torch.bool", "torch.float32", "pass a floating"),
    ),
    "float8": (
        lambda: torch.ones(2, 3).to(torch.float8_e4m3fn), TypeError,
        ("dtype torch.float8_e4m3fn", "torch.float32", "pass a floating"),
    ),
    "complex": (
        lambda: torch.ones(2, 3, dtype=torch.complex64), TypeError,
        ("dtype torch.complex64", "torch.float32", "torch.view_as_real"),
    ),
    "sparse": (lambda: torch.ones(2, 3).to_sparse(), TypeError, ("layout torch.sparse_coo", "to_dense()")),
    "meta": (lambda: torch.ones(2, 3, device="meta"), TypeError, ("meta device", "to_empty()")),
    "expanded": (
        lambda: torch.ones(1, 3).expand(2, 3), ValueError, ("share memory", "(2, 3)", "(0, 1)", "p.contiguous()"),
    ),
    "overlapping": (
        lambda: torch.ones(6).as_strided((2, 3), (1, 1)), ValueError,
        ("share memory", "(2, 3)", "(1, 1)", "p.contiguous()"),
    ),
}  # fmt: skip
"""A tensor that cannot be trained; the error; the pieces of its message."""


@EVERY_RULE
@pytest.mark.parametrize("kind", list(PARAMETERS))
def test_parameter(rule: str, kind: str) -> None:
    make, error, pieces = PARAMETERS[kind]
    cls, options = RULES[rule]
    good, bad = parameters((2, 3)), nn.Parameter(make(), requires_grad=False)
    if bad.is_floating_point() or bad.is_complex():
        bad.requires_grad_()
    else:
        bad.grad = torch.ones_like(bad)
    with raises(error, "parameter 1 of group 0", *pieces):
        cls([*good, bad], **options)
    with raises(error, "parameter 0 of group 1", *pieces):
        cls([{"params": good}, {"params": [bad]}], **options)
    with raises(error, "parameter 'encoder.weight'", *pieces):
        cls([("bias", good[0]), ("encoder.weight", bad)], **options)
    run = Run(rule, good, "reference")
    run.step()
    before, groups = snapshot(run.optimizer), list(run.optimizer.param_groups)
    with raises(error, "parameter 0 of group 1", *pieces):
        run.optimizer.add_param_group({"params": [bad]})
    assert all(a is b for a, b in zip(run.optimizer.param_groups, groups, strict=True))
    assert_snapshots_equal(snapshot(run.optimizer), before)
    run.step()


@EVERY_RULE
def test_part_of_a_flat_parameter_of_fsdp1(rule: str) -> None:
    """A vector that once was part of a matrix would silently be stepped by Adam's rule."""
    cls, options = RULES[rule]
    shard = nn.Parameter(torch.ones(6))
    _set_fsdp_flattened(shard)  # as FSDP1 does
    with raises(TypeError, "parameter 0 of group 0", "flat parameter of FSDP1", "fully_shard"):
        cls([shard], **options)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@EVERY_RULE
def test_sums_that_are_not_summed_yet(rule: str, mesh: Any) -> None:
    cls, options = RULES[rule]
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]))
    with raises(TypeError, "parameter 0 of group 0", "Partial", "redistribute"):
        cls([partial], **options)


@EVERY_RULE
def test_slice_of_a_matrix(rule: str) -> None:
    """As Megatron's distributed optimizer and ZeRO make them: here, or in place of what the optimizer was given."""
    cls, options = RULES[rule]
    matrix = nn.Parameter(torch.ones(4, 3))
    with raises(TypeError, "parameter 0 of group 0", "slice of a tensor of shape (4, 3)", "fused_adamp.mark_slice"):
        cls([matrix.detach().view(-1)[2:7].requires_grad_()], **options)
    optimizer = cls([matrix], **options)
    matrix.grad = torch.ones(4, 3)
    optimizer.step()
    flat = nn.Parameter(matrix.detach().view(-1))  # all of its memory
    flat.grad = torch.ones(12)
    before = flat.detach().clone()
    optimizer.param_groups[0]["params"] = [flat]
    with raises(TypeError, "parameter 0 of group 0", "place of matrices", "fused_adamp.mark_slice"):
        optimizer.step()
    assert_identical(flat.detach(), before)


# Tensors that are bad when the step begins.


class Detached(nn.Parameter):
    """A parameter whose gradient is on another device: torch's own setter refuses that."""

    elsewhere: Tensor | None = None

    @property
    def grad(self) -> Any:
        return self.elsewhere if self.elsewhere is not None else super().grad

    @grad.setter
    def grad(self, value: Any) -> None:
        self.elsewhere = None
        nn.Parameter.grad.__set__(self, value)


def data_gradient(make: Callable[[Tensor], Tensor]) -> Callable[[Run, Tensor], None]:
    """Through .data, which the check in the setter of p.grad does not see."""

    def spoil(run: Run, p: Tensor) -> None:
        p.grad = torch.zeros_like(p)
        p.grad.data = make(p)

    return spoil


def sparse_gradient(run: Run, p: Tensor) -> None:
    p.grad = torch.ones_like(p).to_sparse()


def gradient_elsewhere(run: Run, p: Any) -> None:
    p.elsewhere = torch.ones_like(p, device="meta")


def expand_weight(run: Run, p: Tensor) -> None:
    p.data = p.data[:1].expand(p.shape)


def complex_weight(run: Run, p: Tensor) -> None:
    p.grad = None
    p.data = p.data.to(torch.complex64)
    p.grad = torch.ones_like(p)


def resize_weight(run: Run, p: Tensor) -> None:
    p.grad = None
    p.data = torch.ones(7, 5, dtype=p.dtype)
    p.grad = torch.ones_like(p)


def resize_state(run: Run, p: Tensor) -> None:
    p.grad = torch.ones_like(p)
    name = next(iter(run.hands[p].moments))
    run.optimizer.state[p][name] = torch.ones(5, 4, dtype=p.dtype)


def lose_state(run: Run, p: Tensor) -> None:
    p.grad = torch.ones_like(p)
    run.optimizer.state[p] = {"something": torch.ones(3)}


BAD: dict[str, tuple[Callable[[Run, Tensor], None], type[Exception], tuple[str, ...]]] = {
    "sparse gradient": (sparse_gradient, TypeError, ("gradient of {}", "layout torch.sparse_coo", "sparse=False")),
    "gradient of another shape": (
        data_gradient(lambda p: torch.ones(6, 4, dtype=p.dtype)), ValueError, ("gradient of {}", "(6, 4)", "(4, 6)"),
    ),
    "gradient of another rank": (
        data_gradient(lambda p: torch.ones(24, dtype=p.dtype)), ValueError, ("gradient of {}", "(24,)", "(4, 6)"),
    ),
    "empty gradient": (
        data_gradient(lambda p: torch.ones(0, 6, dtype=p.dtype)), ValueError, ("gradient of {}", "(0, 6)", "(4, 6)"),
    ),
    "integer gradient": (
        data_gradient(lambda p: torch.ones(4, 6, dtype=torch.int32)), TypeError,
        ("gradient of {}", "dtype torch.int32", "torch.float32"),
    ),
    "complex gradient": (
        data_gradient(lambda p: torch.ones(4, 6, dtype=torch.complex64)), TypeError,
        ("gradient of {}", "dtype torch.complex64", "torch.float32"),
    ),
    "gradient on another device": (
        gradient_elsewhere, ValueError, ("gradient of {}", "on meta", "on cpu", "move one of them"),
    ),
    "overlapping weight": (expand_weight, ValueError, ("{}", "share memory", "strides (0, 1)", "contiguous()")),
    "complex weight": (complex_weight, TypeError, ("{}", "dtype torch.complex64", "view_as_real")),
    "resized weight": (resize_weight, ValueError, ("{}", "(4, 6)", "(7, 5)", "clear this parameter's state")),
    "resized state": (resize_state, ValueError, ("{}", "(5, 4)", "(4, 6)", "clear this parameter's state")),
    "incomplete state": (lose_state, ValueError, ("{}", "something", "lacks", "clear this parameter's state")),
}  # fmt: skip
"""What is done to one parameter of shape (4, 6); the error; the pieces of its message, {} for the parameter's label."""

PLACES = {
    # place: (groups as lists of dtypes, the bad parameter's label)
    "alone": ([[torch.float64]], "parameter 0 of group 0"),
    "last of its bucket": ([[torch.float64] * 3], "parameter 2 of group 0"),
    "second group, same bucket": ([[torch.float64] * 2, [torch.float64]], "parameter 0 of group 1"),
    "second bucket": ([[torch.float64, torch.float32]], "parameter 1 of group 0"),
    "second group and bucket": ([[torch.float64] * 2, [torch.float32]], "parameter 0 of group 1"),
}


@EVERY_RULE
@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("kind", list(BAD))
def test_step_refuses_and_moves_nothing(rule: str, kind: str, place: str, backend: str) -> None:
    """Weights, state and step counts keep their bits; with the cause gone, training goes on as if nothing was."""
    spoil, error, pieces = BAD[kind]
    dtypes, label = PLACES[place]
    groups = [{"params": [Detached(torch.randn(4, 6, dtype=dtype)) for dtype in group]} for group in dtypes]
    run = Run(rule, groups, backend)
    run.steps(2)
    for p in run.params[:-1]:
        p.grad = gradient(p, "free")
    bad = run.params[-1]
    data, state = bad.data, dict(run.optimizer.state[bad])
    spoil(run, bad)
    before = snapshot(run.optimizer)
    decisions = run.optimizer.decisions()
    for _ in range(2):  # nor does failing once change what happens next
        with raises(error, *(piece.format(label) for piece in pieces)):
            run.optimizer.step()
        assert_snapshots_equal(snapshot(run.optimizer), before)
        assert run.optimizer.decisions() == decisions
    bad.grad = None
    bad.data = data
    run.optimizer.state[bad] = state
    run.check()
    run.steps(3)


@EVERY_RULE
@pytest.mark.parametrize("place", list(PLACES))
def test_first_step_refuses_and_moves_nothing(rule: str, place: str, backend: str) -> None:
    """The same when there is no state yet: no step is counted, and the next one is the first."""
    dtypes, label = PLACES[place]
    groups = [{"params": [nn.Parameter(torch.randn(4, 6, dtype=dtype)) for dtype in group]} for group in dtypes]
    run = Run(rule, groups, backend)
    for p in run.params:
        p.grad = gradient(p, "free")
    sparse_gradient(run, run.params[-1])
    weights = [p.detach().clone() for p in run.params]
    with raises(TypeError, f"gradient of {label}"):
        run.optimizer.step()
    for p, w in zip(run.params, weights, strict=True):
        assert torch.equal(p, w)
        assert not any(value.any() for value in run.optimizer.state[p].values())
    run.steps(3)


@EVERY_RULE
def test_bad_state_without_a_gradient_is_no_matter(rule: str, backend: str) -> None:
    """A parameter that takes no part in the step cannot spoil it."""
    run = Run(rule, parameters((4, 6), (4, 6)), backend)
    run.step()
    p, other = run.params
    state = dict(run.optimizer.state[other])
    lose_state(run, other)
    other.grad = None
    p.grad = gradient(p, "channel")
    run.optimizer.step()
    run.hands[p].step(p.grad, run.optimizer.param_groups[0])
    run.optimizer.state[other] = state
    run.check()


# The choice of a backend.


@EVERY_RULE
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_unknown_backend(rule: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, options = RULES[rule]
    params = parameters((2, 3))
    weight = params[0].detach().clone()
    params[0].grad = torch.ones_like(weight)
    source = "backend" if how == "argument" else "the environment variable FUSED_ADAMP_BACKEND"
    if how == "environment":
        monkeypatch.setenv("FUSED_ADAMP_BACKEND", "cdua")
    with raises(ValueError, f"{source}='cdua' is not a backend", "choose one of", "'reference'", "leave it out"):
        cls(params, **options, backend="cdua" if how == "argument" else None).step()
    assert torch.equal(params[0], weight)


@EVERY_RULE
def test_backend_that_cannot_run_here(rule: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, options = RULES[rule]
    chosen = next(b for b in BACKENDS if b.name == backend)
    monkeypatch.setattr(type(chosen), "unavailable", lambda self, device: "it is out today; ask tomorrow")
    params = parameters((2, 3))
    weight = params[0].detach().clone()
    params[0].grad = torch.ones_like(weight)
    optimizer = cls(params, **options, backend=backend)
    with raises(RuntimeError, f"backend='{backend}' cannot run on device 'cpu'", "ask tomorrow"):
        optimizer.step()
    assert torch.equal(params[0], weight)
    assert not any(optimizer.state.values())
    monkeypatch.undo()
    optimizer.step()
    assert not torch.equal(params[0], weight)


@EVERY_RULE
def test_fused_demands_what_the_reference_is_not(rule: str) -> None:
    cls, options = RULES[rule]
    params = parameters((2, 3))
    params[0].grad = torch.ones_like(params[0])
    with raises(RuntimeError, "reference: it is not fused"):
        cls(params, **options, fused=True, backend="reference").step()


# Memory.

OUT_OF_MEMORY = """
    import ctypes, resource, sys
    import torch
    from fused_adamp import SGDP, AdamP

    torch.set_num_threads(1)
    # malloc shall give freed memory back to the system, so that the limit counts what is in use.
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)

    def step(optimizer, seed):
        torch.manual_seed(seed)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = (torch.zeros_like(p) if p.grad is None else p.grad).normal_()
        optimizer.step()

    def values(optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return [p.detach() for p in params] + [t for p in params for t in optimizer.state.get(p, {}).values()]

    def limited_step(optimizer):
        # The limit leaves room for the small bucket's state, not for the large one's.
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
        try:
            step(optimizer, seed=2)
        except (RuntimeError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return "no error"

    def run(backend, cls, options, started, limited):
        torch.manual_seed(0)
        small = [torch.nn.Parameter(torch.randn(16, 8)) for _ in range(2)]
        large = torch.nn.Parameter(torch.randn(64, 1 << 14, dtype=torch.float64))  # 8 MiB
        optimizer = cls(small, lr=0.1, weight_decay=0.1, backend=backend, **options)
        if started:
            step(optimizer, seed=1)
        optimizer.add_param_group({"params": [large]})
        if limited:
            for p in (*small, large):
                p.grad = torch.zeros_like(p)  # the gradients are there before the limit is
            before = [t.clone() for t in values(optimizer)]
            error = limited_step(optimizer)
            assert "memory" in error.lower(), error
            after = values(optimizer)
            assert len(before) == len(after)
            assert all(torch.equal(a, b) for a, b in zip(before, after))
            assert sum(bool(state) for state in optimizer.state.values()) == (2 if started else 0)
        step(optimizer, seed=2)
        return values(optimizer)

    for backend in sys.argv[1:]:
        for cls, options in ((AdamP, {}), (SGDP, {"momentum": 0.9})):
            for started in (False, True):
                fresh, after_error = (run(backend, cls, options, started, limited) for limited in (False, True))
                assert len(fresh) == len(after_error) > 3
                assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(fresh, after_error))
                print(backend, cls.__name__, "started" if started else "first step", flush=True)
"""


@pytest.fixture(scope="module")
def out_of_memory() -> subprocess.CompletedProcess[str]:
    """One process for all backends: most of its time goes into importing torch."""
    names = [b.name for b in available(torch.device("cpu"))]
    command = [sys.executable, "-c", textwrap.dedent(OUT_OF_MEMORY), *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space by way of Linux's /proc")
@pytest.mark.parametrize("when", ["first step", "started"])
@EVERY_RULE
def test_out_of_memory_while_state_is_made(
    rule: str, when: str, backend: str, out_of_memory: subprocess.CompletedProcess[str]
) -> None:
    """A real shortage. Nothing has moved then; with memory, the step is as if it was the first try."""
    assert f"{backend} {rule} {when}" in out_of_memory.stdout.splitlines(), out_of_memory.stderr
