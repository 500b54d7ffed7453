"""C++ reads the tables of fused_adamp/batch.py by structs of its own: column for column the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fused_adamp.backends import cuda, device
from fused_adamp.backends.jobs import PREPARE_BLOCK, STAGES, TICKETS
from fused_adamp.backends.tables import ADDRESSES, COEFFICIENTS, COUNTERS, FINDINGS, INNER, LAYOUTS, PARTS, STRIDES
from fused_adamp.batch import COLUMNS, FLOATING, PROJECTIONS, RESULTS, ROW_SHARES, SHARES, Need, Scalars, Sharing
from fused_adamp.reference import Decision

CSRC = Path(__file__).parents[2] / "csrc"
STRUCTS = {
    ("tables.h", "TableRow"): COLUMNS,
    ("algorithm.h", "Scalars"): Scalars._fields,
    ("tables.h", "Shares"): (*SHARES[:2], "sums"),
    ("tables.h", "Results"): RESULTS,
    ("algorithm.h", "ViewSums"): ("sums", ROW_SHARES[-1]),
    ("algorithm.h", "Sums"): ROW_SHARES[:-1],
    ("algorithm.h", "Corrections"): COEFFICIENTS,
    ("device_tables.h", "DeviceTableRow"): ("all_tiles", "row_segments"),
    ("device_tables.h", "Addresses"): ADDRESSES,
    ("device_tables.h", "Findings"): FINDINGS,
    ("device_tables.h", "Counters"): COUNTERS,
    ("device_tables.h", "Parts"): PARTS,
    ("device_tables.h", "Tickets"): TICKETS,
}
"""Fields of structs, by file and name, in the order in which they lie."""

ENUMS = {
    ("tables.h", "Sharing"): {member.name.lower(): int(member) for member in Sharing},
    ("algorithm.h", "Decision"): {member.name.lower(): int(member) for member in Decision},
    ("algorithm.h", "Projection"): {name.replace("auto", "automatic"): i for i, name in enumerate(PROJECTIONS)},
    ("device_tables.h", "Stage"): {name: i for i, name in enumerate(STAGES)},
    ("tables.h", "Need"): {f"need_{member.name}".lower(): int(member) for member in Need},
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
        found += [name.split()[-1].lstrip("*") for name in names if name.strip()]
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


def test_what_the_cuda_kernels_number_themselves_is_numbered_as_here() -> None:
    tables, kernels = ((CSRC / name).read_text() for name in ("device_tables.h", "cuda_spec.h"))
    assert f"prepare_block = {PREPARE_BLOCK};" in tables
    assert re.findall(r"step\[(\d)\]\[(\d)\]", tables) == [("5", str(1 + INNER))]
    assert STRIDES == 1 + 5 * (1 + INNER)
    assert "_LAYOUT is 0 (aligned), 1 (flat) or 2 (strided)" in kernels
    assert LAYOUTS == ("aligned", "flat", "strided")
    assert f"threads = {cuda._THREADS}," in kernels


def test_the_cuda_kernels_take_the_arguments_that_the_host_gives() -> None:
    kernels = (CSRC / "cuda_step.cu").read_text().replace("\\\n", "\n")
    listed = re.search(r"#define FUSED_ADAMP_ARGUMENTS(.*?)#define", kernels, re.DOTALL)
    assert listed is not None
    names = [argument.split()[-1].lstrip("*") for argument in listed[1].split(",")]
    assert names == list(device.ARGUMENTS[:-2])
    assert "one_pass_kernel(FUSED_ADAMP_ARGUMENTS, int32_t n_jobs, int32_t n_blocks)" in kernels
    assert device.ARGUMENTS[-2:] == ("n_jobs", "n_blocks")
