"""The covering arrays that the usual tests are drawn by."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
from covering import covering, usual

PRODUCT = [*product("abc", range(4), (True, False), "xyz", (None, 1.0))]
WITH_GAPS = [case for case in PRODUCT if case[0] != "a" or case[1] < 2]
NO_PRODUCT = [("a", 0, "x"), ("a", 1, "x"), ("b", 1, "y"), ("b", 1, "y"), ("c", 2, "z")]


def pairs(cases: list[Any]) -> set[Any]:
    return {pair for case in cases for pair in combinations(enumerate(case), 2)}


@pytest.mark.parametrize(
    ("cases", "most"), [(PRODUCT, 18), (WITH_GAPS, 18), (NO_PRODUCT, 4), (PRODUCT[:1], 1), ([], 0)]
)
def test_all_pairs_meet_in_few_cases(cases: list[Any], most: int) -> None:
    chosen = covering(cases)
    assert pairs([cases[i] for i in chosen]) == pairs(cases)
    assert len(chosen) <= most
    assert chosen == covering(cases) == sorted({*chosen})


def test_one_factor_is_taken_whole() -> None:
    assert covering([(1,), (2,), (1,), (3,)]) == [0, 1, 3]


def test_what_is_left_out_is_exhaustive() -> None:
    params = usual(["first", "second", pytest.param("third", id="3rd")], [(0, 0), (0, 0), (1, 0)])
    assert [param.id for param in params] == ["first", "second", "3rd"]
    assert [bool(param.marks) for param in params] == [False, True, False]


def test_tests_of_three_factors_are_covered_and_others_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import sys
        sys.path[:0] = [{!r}]
        import pytest
        from covering import leave_to_exhaustive

        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_modifyitems(items):
            leave_to_exhaustive(items)

        @pytest.fixture(params=[1, 2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
        def backend(request):
            return request.param
        """.format(covering.__code__.co_filename.rpartition("/")[0])
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("a", [1, True, 1.0])
        @pytest.mark.parametrize("b", [[], {}, []])
        def test_three(a, b, backend):
            pass

        @pytest.mark.parametrize("a", [1, True, 1.0])
        def test_two(a, backend):
            pass
        """
    )
    pytester.makeini("[pytest]\nmarkers = exhaustive")
    outcomes = pytester.runpytest("-m", "not exhaustive", "-p", "no:xdist").parseoutcomes()
    assert outcomes == {"passed": 9 + 9, "deselected": 27 - 9 + 9 + 3}
