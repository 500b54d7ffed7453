"""Few cases in place of a full product, so that every two values of different factors still meet in one of them.

Most faults hang on one option or on two of them together. The cases that are left out are marked ``exhaustive``.
"""

from __future__ import annotations

import os
from collections import defaultdict
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

__all__ = ["FULL_PRODUCTS", "covering", "leave_to_exhaustive", "usual"]

FULL_PRODUCTS = "FUSED_ADAMP_FULL_PRODUCTS"
"""Environment variable under which nothing is left out."""


def covering(cases: Sequence[Sequence[Hashable]]) -> list[int]:
    """Indices of cases in which all pairs of values meet that meet in any case.

    A case has one value per factor. The next case is always the first that adds most pairs. With FULL_PRODUCTS in the
    environment, all cases.
    """
    if FULL_PRODUCTS in os.environ:
        return [*range(len(cases))]
    pairs = [frozenset(combinations(enumerate(case), 2)) | {*enumerate(case)} for case in cases]
    missing = set[Any]().union(*pairs)
    gains, chosen = [*map(len, pairs)], []
    while missing:
        best, most = 0, 0
        for i, gain in enumerate(gains):
            if gain > most:  # a gain only ever shrinks, so an old one that is too small needs no counting
                gains[i] = gain = len(pairs[i] & missing)
                if gain > most:
                    best, most = i, gain
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)


def usual(cases: Sequence[Any], factors: Sequence[Sequence[Hashable]]) -> list[Any]:
    """Cases for ``pytest.mark.parametrize``, of which those are exhaustive whose factors others cover."""
    chosen = {*covering(factors)}
    return [
        pytest.param(*values.values, id=values.id, marks=() if i in chosen else pytest.mark.exhaustive)
        for i, values in enumerate(
            case if hasattr(case, "values") else pytest.param(case, id=str(case)) for case in cases
        )
    ]


def _key(value: object) -> Hashable:
    """A key that tells values of one argument apart: True is not 1, and 1 is not 1.0."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def leave_to_exhaustive(items: Iterable[pytest.Item]) -> None:
    """Marks the cases of each test of three factors or more, fixtures among them, that a covering array leaves out."""
    tests = defaultdict[str, list[pytest.Function]](list)
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and not item.get_closest_marker("exhaustive")
        ):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        values = [[_key(value) for value in case.callspec.params.values()] for case in cases]
        varied = [column for column in zip(*values, strict=True) if len({*column}) > 1]
        if len(varied) > 2:
            chosen = {*covering([*zip(*varied, strict=True)])}
            for i, case in enumerate(cases):
                if i not in chosen:
                    case.add_marker(pytest.mark.exhaustive)
