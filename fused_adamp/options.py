"""The table of all options of AdamP and SGDP: default, allowed values, meaning, and the optimizers that have it.

The constructors' signatures are written out, for readers and editors; a test compares their defaults with these.
Checks, docstrings and checkpoints read this table. A new option is an entry here and a parameter of the constructors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from fused_adamp.backends import check_name
from fused_adamp.batch import FLOATING, PROJECTIONS
from fused_adamp.fake import has_numbers
from fused_adamp.precision import ROUNDINGS

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "MAX_NORM",
    "OPTIONS",
    "Option",
    "Range",
    "check_options",
    "chosen",
    "documented",
    "listed",
    "max_grad_norm_of",
    "options_of",
]


class Allowed(Protocol):
    """The allowed values of an option."""

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError with the option's name, the value, what is allowed and a remedy."""


class Range(NamedTuple):
    """Numbers from ``low`` up to ``high``, itself allowed if ``closed``; also as 1-element tensors."""

    low: float
    high: float
    closed: bool
    remedy: str
    on_device: bool = False
    """Whether a tensor may lie on another device than the CPU. It is not read then."""

    def check(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"Tensor {name} must be 1-element, but it has {value.numel()} elements: pass a number or a "
                    "1-element tensor"
                )
            if not has_numbers(value):
                return
            if value.device.type != "cpu":
                if not self.on_device:
                    raise TypeError(f"{name} is a tensor on {value.device}; pass a number or a tensor on the CPU")
                return
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a number or a 1-element tensor")
        # Written so that NaN fails.
        if not (self.low <= float(value) < self.high or (self.closed and value == self.high)):
            end = "]" if self.closed else ")"
            raise ValueError(f"{name}={value!r} is outside [{self.low:g}, {self.high:g}{end}: {self.remedy}")


class OrNone(NamedTuple):
    """What another class allows, or None."""

    allowed: Allowed

    def check(self, name: str, value: Any) -> None:
        if value is not None:
            self.allowed.check(name, value)


class Pair(NamedTuple):
    """Two numbers of a range."""

    each: Range

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) != 2:
            raise ValueError(f"{name}={value!r} is not a pair: pass two decay rates, such as (0.9, 0.999)")
        for i, number in enumerate(value):
            self.each.check(f"{name}[{i}]", number)


class Choice(NamedTuple):
    """One of some words."""

    words: tuple[str, ...]

    def check(self, name: str, value: Any) -> None:
        if value not in self.words:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, self.words))}")


class Flag:
    """Anything that is true or false, as in torch.optim; None where that is the default."""

    def check(self, name: str, value: Any) -> None:
        pass


class Unsupported(NamedTuple):
    """False alone: torch.optim has the option, and this package does not."""

    reason: str

    def check(self, name: str, value: Any) -> None:
        if value:
            raise ValueError(f"{name}={value!r} is not supported: {self.reason}")


class StateDtype:
    """A dtype of parameters, or None."""

    def check(self, name: str, value: Any) -> None:
        if value not in (None, *FLOATING):
            raise TypeError(
                f"{name}={value!r} is no dtype for moments: choose one of {listed(FLOATING)}, or None for the "
                "parameter's own"
            )


class Dimensions:
    """The index of a dimension, or a tuple of several."""

    def check(self, name: str, value: Any) -> None:
        if not all(type(d) is int for d in (value if isinstance(value, tuple) else (value,))) or value == ():
            raise TypeError(
                f"{name}={value!r} is no dimension: pass the index of the output channels' dimension, or a tuple of "
                "several whose indices together are the channels"
            )


class BackendName:
    """A backend, or None."""

    def check(self, name: str, value: Any) -> None:
        if value is not None:
            check_name(value, name)


class Option(NamedTuple):
    """One option of a parameter group.

    Attributes:
        default: the constructors' default.
        allowed: the allowed values.
        meaning: the text for the docstrings; lines after the first are indented there.
        rules: the optimizers that have it.
        machine: whether it depends on the machine and not on the rule, so that loading a state_dict does not change it.
    """

    default: Any
    allowed: Allowed
    meaning: str
    rules: tuple[str, ...] = ("AdamP", "SGDP")
    machine: bool = False


_ADAMP, _SGDP = ("AdamP",), ("SGDP",)
_BETA = Range(0, 1, False, "pass a decay rate of at least 0 and below 1", on_device=True)
_DIFFERENTIABLE = (
    "the step writes weights and state in place, outside autograd; leave it False, or differentiate through a copy of "
    "fused_adamp.adamp_ref or sgdp_ref"
)

MAX_NORM = Range(0, math.inf, True, "pass the largest norm that gradients may have", on_device=True)
"""The argument of clip_grad_norm_, and the option ``max_grad_norm``."""

OPTIONS: dict[str, Option] = {
    "lr": Option(
        1e-3,
        Range(0, math.inf, False, "pass a finite learning rate of at least 0", on_device=True),
        "learning rate, at least 0; a number or a 1-element tensor.",
    ),
    "betas": Option((0.9, 0.999), Pair(_BETA), "decay rates, each in [0, 1).", _ADAMP),
    "momentum": Option(
        0,
        Range(0, 1, False, "pass a decay rate of at least 0 and below 1: at 1, decay is infinite"),
        """in [0, 1). Pass a value such as 0.9: at 0, the default as in the authors' package, there is almost nothing
for the projection to remove. 1 would divide the decay by zero.""",
        _SGDP,
    ),
    "dampening": Option(0, Range(0, 1, True, "pass the part of the gradient to leave out"), "in [0, 1].", _SGDP),
    "eps": Option(1e-8, Range(0, math.inf, False, "pass a small number of at least 0, such as 1e-8"), "at least 0."),
    "weight_decay": Option(0, Range(0, math.inf, False, "pass a finite coefficient of at least 0"), "at least 0."),
    "delta": Option(
        0.1,
        Range(0, math.inf, False, "pass a threshold of at least 0, such as 0.1; 0 never projects"),
        "at least 0; 0 never projects.",
    ),
    "wd_ratio": Option(
        0.1, Range(0, 1, True, "pass the part of the weight decay that projected weights keep"), "in [0, 1]."
    ),
    "nesterov": Option(False, Flag(), "Nesterov momentum, as in the authors' code."),
    "foreach": Option(None, Flag(), "True takes the unfused reference path."),
    "maximize": Option(False, Flag(), "ascend instead of descend."),
    "capturable": Option(
        False,
        Flag(),
        """on a GPU, the step can be captured in a CUDA graph; pass ``lr`` as a tensor on it to change it
between replays. Nothing else differs, and the CPU ignores it.""",
    ),
    "differentiable": Option(
        False, Unsupported(_DIFFERENTIABLE), "not supported; present so that the error can say so."
    ),
    "fused": Option(
        None,
        Flag(),
        "None takes the fastest backend there is, True requires a fused one, False takes the reference path.",
    ),
    "projection": Option(
        "auto",
        Choice(PROJECTIONS),
        '"auto" (the paper\'s test), or "channel", "layer" or "none": always project in that view, untested.',
    ),
    "channel_dim": Option(
        0,
        Dimensions(),
        """the dimension whose indices are the output channels: 1 for transposed convolutions; a tuple merges
several, such as (0, 1) for the stacked matrices of experts. Vectors have none.""",
    ),
    "state_dtype": Option(
        None,
        StateDtype(),
        "dtype of the moments; None takes the weight's (float32 with a remainder) or a loaded state's.",
    ),
    "rounding": Option(
        "nearest",
        Choice(ROUNDINGS),
        """how bfloat16 is written: "nearest"; "stochastic", up or down by chance but right on average; or
"remainder", which keeps the other 16 bits of the float32 weight in the state and so loses nothing.""",
    ),
    "amp_scaling": Option(
        None,
        Flag(),
        """True lets the step unscale gradients as it reads them, when GradScaler is used. With False,
GradScaler unscales them before the step. None follows torch.optim: True where ``fused=True``, else False.""",
        machine=True,
    ),
    "max_grad_norm": Option(
        None,
        OrNone(MAX_NORM),
        """every step clips the norm of all gradients taken together to it, as ``clip_grad_norm_`` does, and
leaves the norm in ``grad_norm``. At least 0, a number or a 1-element tensor, the same in all groups; None does not
clip.""",
    ),
    "project_buffer": Option(
        False,
        Flag(),
        """project the stored momentum too wherever the update is projected (no effect with nesterov). The
paper's algorithm does not; clovaai/AdamP 0.3.0 does. For reproducing results of that code.""",
        _SGDP,
    ),
    "backend": Option(None, BackendName(), "force one by name; see ``python -m fused_adamp doctor``.", machine=True),
}


def options_of(rule: str) -> dict[str, Option]:
    """The options that AdamP or SGDP has."""
    return {name: option for name, option in OPTIONS.items() if rule in option.rules}


def chosen(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options among a constructor's arguments, in their order."""
    return {name: value for name, value in arguments.items() if name in OPTIONS}


def documented(docstring: str | None, rule: str) -> str | None:
    """The docstring with ``{options}`` replaced by the "Args:" lines of the rule's options."""
    if docstring is None:  # python -OO
        return None
    lines = [f"{name}: {option.meaning}".replace("\n", "\n    ") for name, option in options_of(rule).items()]
    return docstring.replace("{options}", "\n".join(lines).replace("\n", "\n        "))


def check_options(group: dict[str, Any], options: dict[str, Option]) -> None:
    """Raises ValueError or TypeError unless a parameter group's options are allowed, each and together."""
    for name, option in options.items():
        option.allowed.check(name, group[name])
    if group["fused"] and group["foreach"]:
        raise ValueError("fused=True and foreach=True exclude each other: pass at most one of them as True")


def max_grad_norm_of(groups: Sequence[dict[str, Any]]) -> Any:
    """The ``max_grad_norm`` of the parameter groups. Tensors on a device are read only if groups have different ones.

    Raises:
        ValueError, TypeError: it is not allowed, or groups have different values.
    """
    first, *others = [group["max_grad_norm"] for group in groups] or [None]
    for value in (first, *(other for other in others if other is not first)):
        OPTIONS["max_grad_norm"].allowed.check("max_grad_norm", value)
    if not all(_equal(first, other) for other in others):
        values = ", ".join(f"{group['max_grad_norm']!r} in group {number}" for number, group in enumerate(groups))
        raise ValueError(
            f"max_grad_norm differs between parameter groups ({values}), but the norm is that of all groups together: "
            "set one value in every group, or None in every group"
        )
    return first


def _equal(a: Any, b: Any) -> bool:
    if a is b or a is None or b is None:
        return a is b
    return not (has_numbers(a) and has_numbers(b)) or float(a) == float(b)


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
