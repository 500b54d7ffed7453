"""The package as it runs where no tensor can be made without naming its device.

With the environment variable FUSED_ADAMP_TEST_DEFAULT_DEVICE=none, tests/conftest.py calls :func:`install`. A default
device of the user's (``torch.set_default_device``) reaches the same calls.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import fused_adamp
from fused_adamp import checkpoint, precision, reference, verify
from fused_adamp.optimizer import ProjectedOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ENVIRONMENT", "install"]

ENVIRONMENT = "FUSED_ADAMP_TEST_DEFAULT_DEVICE"

# Not step, which calls closures and hooks: they are the tests'.
_CALLS = "_step clip_grad_norm_ decisions projection_report add_param_group load_state_dict state_dict __setstate__"
_METHODS: dict[Any, Sequence[str]] = {
    ProjectedOptimizer: _CALLS.split(),
    fused_adamp.AdamP: ["__init__"],
    fused_adamp.SGDP: ["__init__"],
}
_FUNCTIONS = {
    checkpoint: ("to_ours", "check", "export"),
    reference: ("adamp_ref", "sgdp_ref", "decide", "project", "cosine", "cosine_ratio", "rows_first"),
    verify: ("check", "make_gradient", "lay_out"),
    precision: ("split", "join", "noise", "round_stochastically"),
}


class _NoDefaultDevice(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            raise RuntimeError(f"torch.{func.__name__} was called without a device")
        return func(*args, **kwargs)


def _inside(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _NoDefaultDevice():
            return function(*args, **kwargs)

    return wrapper


def install() -> None:
    """Wraps what tests call. To be called before they import it."""
    for owner, names in _METHODS.items():
        for name in names:
            setattr(owner, name, _inside(getattr(owner, name)))
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "fused_adamp"]
    for owner, names in _FUNCTIONS.items():
        for name in names:
            function = getattr(owner, name)
            wrapper = _inside(function)
            for module in modules:
                if getattr(module, name, None) is function:
                    setattr(module, name, wrapper)
