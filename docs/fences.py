"""For mkdocs: a fence may name the package that its code needs, as in ``python timm``: test_docs.py reads that."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["on_page_markdown"]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the language alone at its fences, which is what the Markdown parser knows."""
    return re.sub(r"^```(\w+) \w+$", r"```\1", markdown, flags=re.MULTILINE)
