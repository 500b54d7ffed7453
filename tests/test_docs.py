"""Documentation that is code runs; numbers and names in it are those of the code."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import fused_adamp.adamp
import fused_adamp.sgdp
from fused_adamp.bucket import Scalars

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", [fused_adamp.adamp, fused_adamp.sgdp])
def test_docstrings(module: object) -> None:
    results = doctest.testmod(module)  # type: ignore[arg-type]
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("page", ["README.md"])
def test_python_blocks_run(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_make_targets_that_the_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md", "bench/README.md", "docs/architecture.md"):
        named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE))
        assert named <= targets, page


def test_the_extension_reads_the_hyperparameters_in_the_same_order() -> None:
    header = (ROOT / "csrc/algorithm.h").read_text()
    fields = re.search(r"struct Scalars \{\s*double ([^;]*);", header)
    assert fields
    assert re.split(r",\s*", fields.group(1)) == list(Scalars._fields)
