"""The FSDP2 example: one curve of losses on any number of ranks, also if they are killed and others go on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_fsdp2.py"

# Runs the example until its second checkpoint is written but has no name yet.
KILLED = f"""
import os, runpy, sys
from pathlib import Path

rename, saves = Path.rename, []

def rename_once(path, target):
    if path.name == "unfinished":
        saves.append(target)
        if len(saves) == 2:
            os._exit(9)
    return rename(path, target)

Path.rename = rename_once
sys.argv[0] = {str(EXAMPLE)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# In float64 the ranks' sums differ from one rank's by rounding alone, to which eight steps add little: 4e-16 is the
# most that was seen. Where the optimizer leaves out the other ranks' sums, four steps take the loss 1e-5 away.
TOLERANCE = 1e-12


def _train(folder: Path, *options: str, ranks: int = 1, script: Path = EXAMPLE) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    fixed = ["--smoke", "--float64", "--device=cpu", f"--folder={folder}"]
    command = [sys.executable, *torchrun, str(script), *fixed, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _decisions(output: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S+)\.weight +[\dx]+ +(channel|layer|none) ", output, re.MULTILINE))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("ranks", [(2,), pytest.param((2, 3), marks=pytest.mark.exhaustive)], ids=str)
def test_the_losses_depend_neither_on_the_ranks_nor_on_being_killed_in_a_save(
    ranks: tuple[int, ...], tmp_path: Path
) -> None:
    """Two ranks alone are compared in the step that one rank repeats; more ranks with an uninterrupted run."""
    whole, parts, killed = tmp_path / "parts", tmp_path / "parts", tmp_path / "killed.py"
    killed.write_text(KILLED)

    runs, steps, saved = [], [], 0
    if len(ranks) > 1:
        whole = tmp_path / "whole"
        runs.append(_train(whole))
        assert runs[0].returncode == 0, runs[0].stderr
    for count in (*ranks, 1):  # one goes on to the end; more save after two steps, and two later are killed in a save
        run = _train(parts, ranks=count, script=EXAMPLE if count == 1 else killed)
        assert (f"Going on after step {saved} of 8" in run.stdout) == (saved > 0), run.stderr
        assert run.returncode == 0 if count == 1 else (parts / "unfinished" / ".metadata").exists(), run.stderr
        steps += range(saved + 1, 9 if count == 1 else saved + 4)
        saved += 2
    runs.append(run)

    expected = {record["step"]: record for record in _log(whole)}
    records = _log(parts)
    assert [record["step"] for record in records] == steps
    for record in records:
        for name in ("loss", "gradient_norm", *(["validation"] if record["step"] % 2 == 0 else [])):
            assert record[name] == pytest.approx(expected[record["step"]][name], rel=TOLERANCE, abs=0), record
    assert sorted(path.name for path in parts.iterdir()) == ["log.jsonl", "step-00000006", "step-00000008"]

    invariant = {"block1.attention.query", "block1.attention.key", "block2.attention.query"}
    for run in runs:
        assert invariant <= {name for name, decision in _decisions(run.stdout).items() if decision == "layer"}

    if len(ranks) > 1:
        other = _train(parts, "--optimizer=adamw")
        assert other.returncode == 1
        assert "was made with --optimizer adamp, not adamw" in other.stderr
