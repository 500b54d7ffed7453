"""The backends, and the one place that chooses between them.

Every backend walks the same buckets and gives the same numbers to rounding; the reference is the one that needs nothing
but torch. ``backend=`` in the constructor or the environment variable ``FUSED_ADAMP_BACKEND`` forces one by name.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from fused_adamp.backends.cpu import CpuBackend
from fused_adamp.backends.cuda import CudaBackend
from fused_adamp.backends.reference import ReferenceBackend
from fused_adamp.backends.triton import TritonBackend

if TYPE_CHECKING:
    import torch

    from fused_adamp.batch import Backend

__all__ = ["BACKENDS", "ENVIRONMENT", "available", "check_name", "choose"]

ENVIRONMENT = "FUSED_ADAMP_BACKEND"


BACKENDS: tuple[Backend, ...] = (CpuBackend(), TritonBackend(), CudaBackend(), ReferenceBackend())
"""Fastest first; the reference runs wherever torch does."""

_warned: set[str] = set()


def choose(device: torch.device, *, backend: str | None, fused: bool | None, foreach: bool | None) -> Backend:
    """The fastest backend for ``device``, or the one that the arguments or the environment force.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: a forced backend cannot run here; the message says why and what to do.
    """
    environment = os.environ.get(ENVIRONMENT)
    if environment:
        check_name(environment, f"the environment variable {ENVIRONMENT}")
    forced = backend or environment or ("reference" if fused is False or foreach else None)
    reasons: list[str] = []
    for candidate in BACKENDS:
        if forced not in (None, candidate.name):
            continue
        reason = candidate.unavailable(device)
        if fused and not candidate.fused:
            reason = reason or "it is not fused"
        if reason is None:
            if not candidate.fused and forced is None:
                _warn_once(device, reasons)
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    wish = f"backend={forced!r}" if forced else "fused=True"
    raise RuntimeError(f"{wish} cannot run on device {str(device)!r}: {'; '.join(reasons)}")


def check_name(name: str, source: str) -> None:
    """Raises ValueError for a name that no backend has."""
    if all(name != candidate.name for candidate in BACKENDS):
        names = ", ".join(repr(candidate.name) for candidate in BACKENDS)
        raise ValueError(f"{source}={name!r} is not a backend: choose one of {names}, or leave it out")


def available(device: torch.device) -> list[Backend]:
    """The backends that run on ``device`` here, fastest first."""
    return [b for b in BACKENDS if b.unavailable(device) is None]


def _warn_once(device: torch.device, reasons: list[str]) -> None:
    message = (
        f"fused_adamp uses the slow reference path on device {device.type!r} ({'; '.join(reasons)}). "
        "`python -m fused_adamp doctor` says what is missing; fused=False accepts the reference path silently."
    )
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
