"""The documents' blocks that need a framework. tests/package/test_docs.py runs the others, and says how."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["from-timm", "frameworks"])
def test_python_blocks_run(page: str) -> None:
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"^```python *(.*)\n((?s:.*?))^```$", (DOCS / f"{page}.md").read_text(), re.MULTILINE)
    if missing := {need for need, _ in blocks if need and importlib.util.find_spec(need) is None}:
        pytest.skip(f"{', '.join(missing)} is not installed")
    for _, source in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(source, page, "exec"), namespace)
        for line in re.findall(r"^ *print\(.*\)  # (.*)$", source, re.MULTILINE):
            assert line in output.getvalue().splitlines(), f"{page} says {line!r}, printed was {output.getvalue()!r}"
