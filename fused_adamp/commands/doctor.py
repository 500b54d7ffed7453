"""``python -m fused_adamp doctor``: what runs here and why."""

from __future__ import annotations

import json
import os
import platform
import warnings
from typing import Any

import torch

import fused_adamp
from fused_adamp.backends import BACKENDS, ENVIRONMENT, choose, cuda
from fused_adamp.backends.cpu import load
from fused_adamp.commands import devices

__all__ = ["doctor"]


def doctor(*, as_json: bool = False) -> int:
    """Prints versions, devices and, per device, which backend would run and why the others would not.

    Returns 1 if the environment forces a backend that a device does not have, else 0.
    """
    found = _facts()
    print(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))
    return int(any(device["problem"] for device in found["devices"]))


def _facts() -> dict[str, Any]:
    missing = load()
    return {
        "fused_adamp": fused_adamp.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": {"instructions": None if missing else torch.ops.fused_adamp.instruction_set(), "missing": missing},
        "cuda": cuda.versions(),
        "environment": {ENVIRONMENT: os.environ.get(ENVIRONMENT)},
        "devices": [_device(device) for device in devices()],
    }


def _device(device: torch.device) -> dict[str, Any]:
    """``default`` is the backend that runs if no option names one; ``problem`` says why there is none."""
    default, problem = None, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the reference is slow; the reasons are below
            default = choose(device, backend=None, fused=None, foreach=None).name
    except RuntimeError as error:
        problem = str(error)
    return {
        "device": str(device),
        "name": _name(device),
        "default": default,
        "problem": problem,
        "backends": {backend.name: {"unavailable": backend.unavailable(device)} for backend in BACKENDS},
    }


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return platform.machine()
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def _lines(found: dict[str, Any]) -> list[str]:
    extension, nvrtc = found["extension"], found["cuda"]
    driver = f"the driver loads code of CUDA {nvrtc['driver']}" if nvrtc["driver"] else "no driver is loaded"
    lines = [
        f"fused_adamp  {found['fused_adamp']}",
        f"torch        {found['torch']}, {found['threads']} threads",
        f"python       {found['python']} on {found['platform']}",
        f"extension    {extension['missing'] or 'loaded, runs ' + extension['instructions'] + ' instructions'}",
    ]
    lines.append(f"nvrtc        {nvrtc['missing'] or nvrtc['nvrtc'] + ', ' + driver}")
    for device in found["devices"]:
        lines += ["", f"{device['device']} ({device['name']})"]
        for name, backend in device["backends"].items():
            runs = "runs by default" if name == device["default"] else f"runs with backend={name!r}"
            lines.append(f"  {name:<10} {backend['unavailable'] or runs}")
        lines += [f"  {device['problem']}"] if device["problem"] else []
    forced = found["environment"][ENVIRONMENT]
    now = f"it is {forced!r} now" if forced else "it is not set"
    return [*lines, "", f"The environment variable {ENVIRONMENT} forces a backend by name; {now}."]
