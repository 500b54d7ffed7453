"""Python processes under each plan of the Triton backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fused_adamp.backends import jobs

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PLANS", "under_each_plan"]

PLANS = ("split", "one_pass")
ROOT = Path(__file__).parents[2]


def under_each_plan(
    *arguments: str, interpreted: bool = True, environment: Mapping[str, str] | None = None
) -> dict[str, tuple[int, str]]:
    """Exit status and output of Python with these arguments, per plan. The plans run side by side.

    A process of its own, since Triton reads when it is imported whether kernels are interpreted.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited |= ({"TRITON_INTERPRET": "1"} if interpreted else {}) | dict(environment or {})
    runs = {
        plan: subprocess.Popen(
            [sys.executable, *arguments],
            env=inherited | {jobs.PLAN: plan},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for plan in PLANS
    }
    outputs = {plan: run.communicate()[0] for plan, run in runs.items()}
    return {plan: (run.returncode, outputs[plan]) for plan, run in runs.items()}
