"""C++ reads the tables of fused_adamp/batch.py by structs of its own: column for column the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fused_adamp.batch import COLUMNS, FLOATING, PROJECTIONS, ROW_SHARES, SHARES, Need, Scalars, Sharing
from fused_adamp.reference import Decision

CSRC = Path(__file__).parents[2] / "csrc"
STRUCTS = {
    ("bucket.h", "TableRow"): COLUMNS,
    ("algorithm.h", "Scalars"): Scalars._fields,
    ("bucket.h", "Shares"): (*SHARES[:2], "sums"),
    ("cpu_kernels.h", "ViewSums"): ("sums", ROW_SHARES[-1]),
    ("algorithm.h", "Sums"): ROW_SHARES[:-1],
}
"""Fields of structs, by file and name, in the order in which they lie."""

ENUMS = {
    ("bucket.h", "Sharing"): {member.name.lower(): int(member) for member in Sharing},
    ("algorithm.h", "Decision"): {member.name.lower(): int(member) for member in Decision},
    ("algorithm.h", "Projection"): {name.replace("auto", "automatic"): i for i, name in enumerate(PROJECTIONS)},
    ("cpu_kernels.h", "Need"): {f"need_{member.name}".lower(): int(member) for member in Need},
}
STORAGE = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}


def body(file: str, kind: str, name: str) -> str:
    """The text between the braces of a struct or enum, without comments and functions."""
    text = re.sub(r"//.*", "", (CSRC / file).read_text())
    begin = re.search(rf"{kind} (?:class )?{name}\b[^;{{]*{{", text)
    assert begin is not None, f"{file} has no {kind} {name}"
    depth, end = 1, begin.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[begin.end() : end - 1]


def fields(text: str) -> list[str]:
    """The names of a struct's data members."""
    found = []
    for line in re.sub(r"[\w ]+\([^)]*\)[\w ]*\{[^{}]*\}", "", text).split(";"):
        names = re.sub(r"\{[^}]*\}|=[^,]*", "", line).split(",")
        found += [name.split()[-1] for name in names if name.strip()]
    return found


@pytest.mark.parametrize(("place", "columns"), STRUCTS.items(), ids=lambda value: value[1])
def test_structs_have_the_columns(place: tuple[str, str], columns: tuple[str, ...]) -> None:
    assert fields(body(place[0], "struct", place[1])) == list(columns)


@pytest.mark.parametrize(("place", "members"), ENUMS.items(), ids=lambda value: value[1] if len(value) == 2 else "")
def test_enums_have_the_values(place: tuple[str, str], members: dict[str, int]) -> None:
    found = re.findall(r"(\w+) = (\d+)", body(place[0], "enum", place[1]))
    assert {name: int(value) for name, value in found} == members


def test_storage_types_have_the_numbers_of_the_dtypes() -> None:
    names = [name.strip() for name in body("cpu_kernels.h", "enum", "StorageType").split(",")]
    assert names == [*(f"storage_{STORAGE[str(dtype).removeprefix('torch.')]}" for dtype in FLOATING), "storage_count"]
