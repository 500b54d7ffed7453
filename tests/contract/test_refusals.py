"""Bad inputs: what is refused, through which doors, and in which words; and nothing has moved.

A row of the table says what is bad, the error, and the pieces that its message must have in this order: the name of the
argument or parameter, the value received, what is allowed or the remedy. ``{}`` stands for the parameter's label. Every
row is tried at every door through which it could come in. Afterwards weights, state, step counts and decisions are what
they were, to the bit; with the cause gone, training goes on as the reference does.

Foreign checkpoints are refused in test_checkpoint_formats.py, ranks that differ in test_sharding_contract.py.
"""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from covering import usual
from tolerances import assert_identical
from torch import Tensor, nn
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.tensor import DTensor, Partial
from trajectory import RULES, Run, assert_snapshots_equal, gradient, parameters, snapshot

from fused_adamp.backends import BACKENDS, available
from fused_adamp.batch import PROJECTIONS
from fused_adamp.precision import ROUNDINGS
from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
AVAILABLE = [backend.name for backend in available(torch.device("cpu"))]


def raises(error: type[Exception] | tuple[type[Exception], ...], *pieces: str) -> Any:
    """Expects the error with all pieces in its message, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, pieces)))


class Refusal(NamedTuple):
    """A row of the table."""

    subject: str
    """The option, or the kind of tensor."""
    kind: str
    """How the value is bad, in words for the test's id."""
    bad: Any
    """The bad value. Each door turns it into a call in its own way."""
    error: type[Exception]
    pieces: tuple[str, ...]
    doors: tuple[str, ...]
    rules: tuple[str, ...] = tuple(RULES)

    def __str__(self) -> str:
        return f"{self.subject}: {self.kind}"


# Options. A number is read from the group at every step without another check, a word is checked again.

AT_THE_START = ("constructor", "group of the constructor", "add_param_group")
NUMBERS = (*AT_THE_START, "load_state_dict")
WORDS = (*NUMBERS, "step", "clip_grad_norm_")

OPEN, UNIT, BELOW_ONE = "[0, inf)", "[0, 1]", "[0, 1)"
BOTH, ADAMP, SGDP = tuple(RULES), ("AdamP",), ("SGDP",)
RANGES: list[tuple[str, str, tuple[str, ...]]] = [
    *((name, OPEN, BOTH) for name in ("lr", "eps", "weight_decay", "delta")),
    ("wd_ratio", UNIT, BOTH),
    ("betas[0]", BELOW_ONE, ADAMP),
    ("betas[1]", BELOW_ONE, ADAMP),
    ("momentum", BELOW_ONE, SGDP),
    ("dampening", UNIT, SGDP),
]
ABOVE = {OPEN: (math.inf,), UNIT: (math.nextafter(1, 2), 7, math.inf), BELOW_ONE: (1, 1.0, 1.5, math.inf)}
ONE, CHOOSE = "pass a number or a 1-element tensor", "choose one of"
OF_TENSORS = (
    (torch.tensor([0.1, 0.2]), f"must be 1-element, but it has 2 elements: {ONE}"),
    (torch.empty(0), f"must be 1-element, but it has 0 elements: {ONE}"),
    (torch.tensor(-1.0), "=-1.0 is outside [0, "),
    (torch.tensor([math.nan]), "=nan is outside [0, "),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_DTYPE = (
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    "float32",
    32,
    float,
    [DTYPES[0]],
)


def option(
    name: str, value: Any, error: type[Exception], *pieces: str, rules: Any = BOTH, doors: Any = NUMBERS
) -> Refusal:
    """``betas[1]`` is a place in a pair whose other value is good."""
    good = {"betas[0]": ("betas", (value, 0.9)), "betas[1]": ("betas", (0.9, value))}
    return Refusal(name, repr(value), dict([good.get(name, (name, value))]), error, pieces, doors, rules)


OPTIONS = [
    *(
        option(name, value, ValueError, name, f"={value!r} is outside {allowed}: pass ", rules=rules)
        for name, allowed, rules in RANGES
        for value in (-1e-9, -1, -math.inf, math.nan, *ABOVE[allowed])
    ),
    *(
        option(name, value, TypeError, name, f"={value!r} is a {type(value).__name__}; pass a number", rules=rules)
        for name, _, rules in RANGES
        for value in ("0.1", None, True, 1j, [0.1])
    ),
    *(
        option(name, value, ValueError, name, words, rules=rules)
        for name, _, rules in RANGES
        for value, words in OF_TENSORS
    ),
    *(
        option("betas", value, ValueError, "betas=", "not a pair", "pass two decay rates", rules=ADAMP)
        for value in (0.9, (), (0.9,), (0.9, 0.99, 0.999), "no", None, {0.9, 0.99})
    ),
    *(
        option("projection", value, ValueError, f"projection={value!r}", CHOOSE, *map(repr, PROJECTIONS), doors=WORDS)
        for value in ("chanel", "Channel", "", None, 1, False, Decision.CHANNEL, ("channel",), ["auto"])
    ),
    *(
        option("channel_dim", value, TypeError, f"channel_dim={value!r}", "pass the index", "tuple", doors=WORDS)
        for value in ("0", None, 1.0, True, (), (0, 1.0), (0, None), [0, 1], torch.tensor(1))
    ),
    *(
        option("state_dtype", value, TypeError, f"state_dtype={value!r}", *map(str, DTYPES), "None", doors=WORDS)
        for value in NO_DTYPE
    ),
    *(
        option("rounding", value, ValueError, f"rounding={value!r}", CHOOSE, *map(repr, ROUNDINGS), doors=WORDS)
        for value in ("up", "", "Stochastic", None, True, 0, ("nearest",))
    ),
    *(
        option("max_grad_norm", value, ValueError, f"max_grad_norm={value!r} is outside [0, inf]: pass ", doors=WORDS)
        for value in (-1e-9, -1, -math.inf, math.nan)
    ),
    *(
        option("max_grad_norm", value, TypeError, f"max_grad_norm={value!r} is a ", "; pass a number", doors=WORDS)
        for value in ("0.1", True, 1j, [0.1])
    ),
    *(option("max_grad_norm", value, ValueError, "max_grad_norm", words) for value, words in OF_TENSORS),
    *(
        option(
            "max_grad_norm", value, ValueError,
            "max_grad_norm differs between parameter groups (None in group 0", f"{value!r} in group ",
            "set one value in every group", doors=WORDS[1:],
        )
        for value in (1.0, 0, math.inf, torch.tensor(0.5))
    ),
    option("differentiable", True, ValueError, "differentiable=True is not supported", "leave it False"),
]  # fmt: skip

# Parameters that cannot be trained.

PARAMETER = ("parameter", "parameter of a group", "named parameter", "added parameter")


def parameter(kind: str, make: Callable[[], Tensor], error: type[Exception], *pieces: str, **options: Any) -> Refusal:
    return Refusal("parameter", kind, (make, options), error, pieces if options else ("{}", *pieces), PARAMETER)


PARAMETERS = [
    *(
        parameter(
            str(dtype), partial(torch.ones, 2, 3, dtype=dtype), TypeError, f"dtype {dtype}", "torch.float32", remedy
        )
        for dtype, remedy in (
            (torch.int64, "pass a floating"),
            (torch.bool, "pass a floating"),
            (torch.float8_e4m3fn, "pass a floating"),
            (torch.complex64, "torch.view_as_real"),
        )
    ),
    parameter("sparse", lambda: torch.ones(2, 3).to_sparse(), TypeError, "layout torch.sparse_coo", "to_dense()"),
    parameter("meta", lambda: torch.ones(2, 3, device="meta"), TypeError, "meta device", "to_empty()"),
    *(
        parameter(kind, make, ValueError, "share memory", "(2, 3)", strides, "p.contiguous()")
        for kind, make, strides in (
            ("expanded", lambda: torch.ones(1, 3).expand(2, 3), "(0, 1)"),
            ("overlapping", lambda: torch.ones(6).as_strided((2, 3), (1, 1)), "(1, 1)"),
        )
    ),
    *(
        parameter(
            f"{shape}, channel_dim={dim}", partial(torch.randn, shape, dtype=torch.float64), ValueError,
            f"channel_dim={dim}", "{}", *pieces, channel_dim=dim,
        )
        for shape, dim, pieces in (
            ((6, 10), 2, ("of 2 dimensions", "(6, 10)", "from -2 to 1")),
            ((6, 10), -3, ("of 2 dimensions", "(6, 10)", "from -2 to 1")),
            ((4, 3, 2, 2), 4, ("of 4 dimensions", "from -4 to 3")),
            ((6, 10), (0, 2), ("from -2 to 1",)),
            ((6, 10), (0, 0), ("different dimensions",)),
            ((6, 10), (0, -2), ("different dimensions",)),
            ((3, 4, 5), (0, 1, 2, 3), ("from -3 to 2",)),
            ((3, 4, 5), (0, 2), ("(3, 4, 5)", "strides (20, 5, 1)", "dimensions that follow each other")),
            ((3, 4, 5), 1 << 70, ("from -3 to 2",)),
        )
    ),
]  # fmt: skip
PARAMETERS = [
    row._replace(doors=(*PARAMETER, "option in a step", "option in a clipping")) if row.bad[1] else row
    for row in PARAMETERS
]
"""Some fit no parameter with the option that goes along; that may be written into a group too."""

# Tensors that went bad since the last step. One parameter of shape (4, 6) is spoilt.

TENSOR = ("tensor in a step", "tensor in a clipping")


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
TENSORS = [  # a clipping does not look at the state
    Refusal("tensor", kind, spoil, error, pieces, TENSOR[:1] if "state" in kind else TENSOR)
    for kind, (spoil, error, pieces) in BAD.items()
]

PLACES = {
    # place: (groups as lists of dtypes, the bad parameter's label)
    "alone": ([[torch.float64]], "parameter 0 of group 0"),
    "last of its bucket": ([[torch.float64] * 3], "parameter 2 of group 0"),
    "second group, same bucket": ([[torch.float64] * 2, [torch.float64]], "parameter 0 of group 1"),
    "second bucket": ([[torch.float64, torch.float32]], "parameter 1 of group 0"),
    "second group and bucket": ([[torch.float64] * 2, [torch.float32]], "parameter 0 of group 1"),
}

# The limit of a clipping, and state that is loaded.

LARGEST = "pass the largest norm"
LIMITS = [
    Refusal("max_norm", kind, value, error, (words, remedy), ("limit",))
    for kind, value, error, words, remedy in (
        ("negative", -1, ValueError, "max_norm=-1 is outside [0, inf]", LARGEST),
        ("negative, tiny", -1e-9, ValueError, "max_norm=-1e-09 is outside [0, inf]", LARGEST),
        ("-inf", -math.inf, ValueError, "max_norm=-inf is outside [0, inf]", LARGEST),
        ("NaN", math.nan, ValueError, "max_norm=nan is outside [0, inf]", LARGEST),
        ("tensor", torch.tensor(-1.0), ValueError, "max_norm=-1.0 is outside [0, inf]", LARGEST),
        ("two", torch.ones(2), ValueError, "Tensor max_norm must be 1-element, but it has 2 elements", "pass a number"),
        (
            "none",
            torch.ones(0),
            ValueError,
            "Tensor max_norm must be 1-element, but it has 0 elements",
            "pass a number",
        ),
        ("None", None, TypeError, "max_norm=None is a NoneType", "pass a number"),
        ("string", "1.0", TypeError, "max_norm='1.0' is a str", "pass a number"),
        ("bool", True, TypeError, "max_norm=True is a bool", "pass a number"),
        ("complex", 1j, TypeError, "max_norm=1j is a complex", "pass a number"),
        ("list", [1.0], TypeError, "max_norm=[1.0] is a list", "pass a number"),
    )
]

REFUSALS = [*OPTIONS, *PARAMETERS, *TENSORS, *LIMITS]


# The doors.


class Scene(NamedTuple):
    """An attempt that has to fail."""

    attempt: Callable[[], object]
    run: Run | None = None
    """The optimizer that was there before."""
    undo: Callable[[], object] = lambda: None
    label: str = ""


def started(rule: str, backend: str, *groups: Any) -> Run:
    """After two steps, and with gradients for the next one."""
    groups = groups or (parameters((4, 6)), parameters((6, 10), (3,)), parameters((5, 7), dtype=torch.float32))
    run = Run(rule, [{"params": group} for group in groups], backend)
    run.steps(2)
    for p, g in zip(run.params, run.gradients(), strict=True):
        p.grad = g
    return run


def constructor(rule: str, backend: str, refusal: Refusal) -> Scene:
    cls, options = RULES[rule]
    return Scene(lambda: cls(parameters((2, 3)), **options | refusal.bad, backend=backend))


def group_of_the_constructor(rule: str, backend: str, refusal: Refusal) -> Scene:
    cls, options = RULES[rule]
    groups = [{"params": parameters((2, 3))}, {"params": parameters((3, 4)), **refusal.bad}]
    return Scene(lambda: cls(groups, **options, backend=backend))


def add_param_group(rule: str, backend: str, refusal: Refusal) -> Scene:
    run = started(rule, backend)
    return Scene(lambda: run.optimizer.add_param_group({"params": parameters((3, 4)), **refusal.bad}), run)


def load_state_dict(rule: str, backend: str, refusal: Refusal) -> Scene:
    run = started(rule, backend)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["param_groups"][1] |= refusal.bad
    return Scene(lambda: run.optimizer.load_state_dict(saved), run)


def written(run: Run, options: dict[str, Any], attempt: Callable[[], object], label: str = "") -> Scene:
    """Options that are written between two steps into a group among others."""
    group = run.optimizer.param_groups[1]
    good = {name: group[name] for name in options}
    group.update(options)
    return Scene(attempt, run, lambda: group.update(good), label)


def step(rule: str, backend: str, refusal: Refusal) -> Scene:
    run = started(rule, backend)
    return written(run, refusal.bad, run.optimizer.step)


def clip_grad_norm_(rule: str, backend: str, refusal: Refusal) -> Scene:
    run = started(rule, backend)
    return written(run, refusal.bad, lambda: run.optimizer.clip_grad_norm_(1.0))


def untrainable(refusal: Refusal) -> tuple[Any, dict[str, Any]]:
    make, options = refusal.bad
    bad = nn.Parameter(make(), requires_grad=False)
    if bad.is_floating_point() or bad.is_complex():
        bad.requires_grad_()
    else:
        bad.grad = torch.ones_like(bad)
    return bad, options


def in_the_constructor(rule: str, backend: str, options: dict[str, Any], params: Any, label: str) -> Scene:
    cls, given = RULES[rule]
    return Scene(lambda: cls(params, **given | options, backend=backend), label=label)


def bad_parameter(rule: str, backend: str, refusal: Refusal) -> Scene:
    bad, options = untrainable(refusal)
    return in_the_constructor(rule, backend, options, [*parameters((3,)), bad], "parameter 1 of group 0")


def bad_parameter_of_a_group(rule: str, backend: str, refusal: Refusal) -> Scene:
    bad, options = untrainable(refusal)
    groups = [{"params": parameters((3,))}, {"params": [bad]}]
    return in_the_constructor(rule, backend, options, groups, "parameter 0 of group 1")


def bad_named_parameter(rule: str, backend: str, refusal: Refusal) -> Scene:
    bad, options = untrainable(refusal)
    named = [("bias", *parameters((3,))), ("encoder.weight", bad)]
    return in_the_constructor(rule, backend, options, named, "parameter 'encoder.weight'")


def bad_added_parameter(rule: str, backend: str, refusal: Refusal) -> Scene:
    (bad, options), run = untrainable(refusal), started(rule, backend)
    return Scene(
        lambda: run.optimizer.add_param_group({"params": [bad], **options}), run, label="parameter 0 of group 3"
    )


def option_in_a_step(rule: str, backend: str, refusal: Refusal) -> Scene:
    make, options = refusal.bad
    run = started(rule, backend, parameters((4, 6)), [nn.Parameter(make())], parameters((5, 7), dtype=torch.float32))
    return written(run, options, run.optimizer.step, "parameter 0 of group 1")


def option_in_a_clipping(rule: str, backend: str, refusal: Refusal) -> Scene:
    scene = option_in_a_step(rule, backend, refusal)
    return scene._replace(attempt=lambda: scene.run and scene.run.optimizer.clip_grad_norm_(1.0))


def tensor_in_a_step(rule: str, backend: str, refusal: Refusal, place: str) -> Scene:
    dtypes, label = PLACES[place]
    run = started(rule, backend, *([Detached(torch.randn(4, 6, dtype=d)) for d in group] for group in dtypes))
    bad = run.params[-1]
    data, state = bad.data, dict(run.optimizer.state[bad])
    refusal.bad(run, bad)

    def undo() -> None:
        bad.grad = None
        bad.data = data
        run.optimizer.state[bad] = state

    return Scene(run.optimizer.step, run, undo, label)


def tensor_in_a_clipping(rule: str, backend: str, refusal: Refusal, place: str) -> Scene:
    scene = tensor_in_a_step(rule, backend, refusal, place)
    return scene._replace(attempt=lambda: scene.run and scene.run.optimizer.clip_grad_norm_(1.0))


def limit(rule: str, backend: str, refusal: Refusal) -> Scene:
    run = started(rule, backend)
    return Scene(lambda: run.optimizer.clip_grad_norm_(refusal.bad), run)


DOORS: dict[str, Callable[..., Scene]] = {
    "constructor": constructor,
    "group of the constructor": group_of_the_constructor,
    "add_param_group": add_param_group,
    "load_state_dict": load_state_dict,
    "step": step,
    "clip_grad_norm_": clip_grad_norm_,
    "parameter": bad_parameter,
    "parameter of a group": bad_parameter_of_a_group,
    "named parameter": bad_named_parameter,
    "added parameter": bad_added_parameter,
    "option in a step": option_in_a_step,
    "option in a clipping": option_in_a_clipping,
    "tensor in a step": tensor_in_a_step,
    "tensor in a clipping": tensor_in_a_clipping,
    "limit": limit,
}

TRIES = [
    (refusal, door, rule, backend, place)
    for refusal in REFUSALS
    for door in refusal.doors
    for rule in refusal.rules
    for backend in AVAILABLE[: 1 if door in {*AT_THE_START, *PARAMETER} else None]  # none steps there
    for place in (PLACES if door in TENSOR else [None])
]


@pytest.mark.parametrize(
    ("refusal", "door", "rule", "backend", "place"),
    usual(
        [pytest.param(*case, id="-".join(map(str, case))) for case in TRIES],
        [(refusal.subject, refusal.kind, *rest) for refusal, *rest in TRIES],
    ),
)
def test_refused(refusal: Refusal, door: str, rule: str, backend: str, place: str | None) -> None:
    """Nor does failing once change what happens next."""
    scene = DOORS[door](rule, backend, refusal, *([place] if place else []))
    run = scene.run
    if run is not None:
        before, groups, decisions = snapshot(run.optimizer), [*run.optimizer.param_groups], run.optimizer.decisions()
    for _ in range(2):
        with raises(refusal.error, *(piece.replace("{}", scene.label) for piece in refusal.pieces)):
            scene.attempt()
        if run is not None:
            assert_snapshots_equal(snapshot(run.optimizer), before)
            assert all(a is b for a, b in zip(run.optimizer.param_groups, groups, strict=True))
            assert run.optimizer.decisions() == decisions
    scene.undo()
    if run is not None:
        run.check()
        run.steps(3)


@pytest.mark.parametrize(("name", "allowed", "rules"), RANGES)
def test_the_ends_of_the_range(name: str, allowed: str, rules: tuple[str, ...]) -> None:
    """Values at the ends of the range that the messages name are accepted."""
    ends = {OPEN: (0, 0.0, 1e30), UNIT: (0, 1, 0.0, 1.0), BELOW_ONE: (0, 0.0, math.nextafter(1, 0))}[allowed]
    for rule in rules:
        cls, options = RULES[rule]
        for value in (*ends, torch.tensor(0.5)):
            cls(parameters((2, 3)), **options | option(name, value, ValueError).bad)


# Tensors that only a framework makes.


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
    """A mesh of this process alone."""
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


# The first step, and parameters that take no part.


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
