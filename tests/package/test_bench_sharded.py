"""``python -m bench.sharded``: two ranks, every contestant, on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive  # `make bench-smoke` runs the same command
def test_the_smoke_run_writes_what_it_measured(tmp_path: Path) -> None:
    """It fails by itself where our steps and the formula's differ, or where a decision is another than asked for."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.sharded", "--smoke", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*-sharded.json")
    found = json.loads(path.read_text())
    assert (found["ranks"], found["threads"]) == (2, 1)
    rows = {(row["optimizer"], row["case"], row["clip"]): row for row in found["rows"]}
    for case in ("none", "channel", "layer"):
        for name in ("AdamP", "SGDP"):
            ours, formula = rows[f"fused_adamp.{name}", case, False], rows[f"{name}'s formula", case, False]
            assert ours["collectives"] == 1
            assert ours["collectives"] < formula["collectives"]
            assert 0 < ours["bytes_sent"] < 1000
            assert 0 < ours["collectives_share"] < 1
            assert ours["ratio_to_formula_p20"] <= ours["ratio_to_formula_p50"] <= ours["ratio_to_formula_p80"]
            assert rows[f"fused_adamp.{name}", case, True]["collectives"] == 2
        assert rows["torch.AdamW", case, False]["collectives"] == 0
        assert rows["torch.AdamW", case, True]["collectives"] == 1
