"""Docstrings for the API page, as Markdown and without importing torch: mkdocstrings reads them from the source.

The package's docstrings are reStructuredText where they have tables, formulas and references, and the options of the
optimizers are filled in when the package is imported, from the table in ``fused_adamp/options.py``.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
ON_THE_PAGE = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))


def options(rule: str) -> dict[str, str]:
    """What ``documented`` of ``fused_adamp/options.py`` fills in: the meaning of each option that the rule has."""
    tree = ast.parse((ROOT / "fused_adamp/options.py").read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "OPTIONS"
    )
    assert isinstance(table, ast.Dict)
    found = {}
    for name, option in zip(table.keys, table.values, strict=True):
        assert isinstance(name, ast.Constant)
        assert isinstance(option, ast.Call)
        rules = [node.id for node in option.args[3:] if isinstance(node, ast.Name)]
        if not rules or f"_{rule.upper()}" in rules:
            found[name.value] = ast.literal_eval(option.args[2])
    return found


def markdown(text: str) -> str:
    """Tables, formulas and references of reStructuredText as Markdown."""
    text = re.sub(r"^=+(?: +=+)+\n(?s:.*?)^=+(?: +=+)+\n(?s:.*?)^=+(?: +=+)+$", _table, text, flags=re.MULTILINE)
    text = re.sub(r"^\.\. math::\n((?:(?: {4}.*)?\n)+)", _formula, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", lambda match: convert(match[1]), text)
    text = re.sub(r":[a-z]+:`~?([\w.]+)`", _reference, text)
    return text.replace("\nExample:\n", "\nExamples:\n")  # the section with code, not an admonition


def _table(match: re.Match[str]) -> str:
    rule, *lines = match[0].splitlines()
    spans = [found.span() for found in re.finditer("=+", rule)]
    last = len(spans) - 1
    rows = [
        [line[begin : None if i == last else end].strip() for i, (begin, end) in enumerate(spans)]
        for line in lines
        if not line.startswith("=")
    ]
    rows.insert(1, ["---"] * len(spans))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _formula(match: re.Match[str]) -> str:
    """One formula for each line of an ``aligned`` block."""
    body = re.sub(r"\\(?:begin|end)\{aligned\}", "", match[1]).replace("&", "").replace(r"\dim ", r"\dim\, ")
    lines = [" ".join(line.split()) for line in body.split("\\\\")]
    return "\n".join(convert(line, display="block") for line in lines) + "\n\n"


def _reference(match: re.Match[str]) -> str:
    path = match[1]
    return f"[`{path.rpartition('.')[2]}`][{path}]" if path in ON_THE_PAGE else f"`{path}`"


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = obj.docstring.value
            if "{options}" in text:
                lines = (f"{name}: {meaning}" for name, meaning in options(obj.name).items())
                text = text.replace("{options}", "\n    ".join(line.replace("\n", "\n        ") for line in lines))
            obj.docstring.value = markdown(text)
