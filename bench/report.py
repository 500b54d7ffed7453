"""Tables and targets of a result file, or of pytest-benchmark's: ``python -m bench.report FILE [--out DIR]``."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.harness import Row

__all__ = ["main", "marked", "path_of", "present", "results", "show", "write"]

WIDTH = 160
"""Of the tables: a file or a CI log has no terminal to ask."""

MODELS = ("resnet50", "vit_b16", "gpt2")
SMALL = ("small",)
CASES = ("none", "channel", "layer")
PEERS = {
    "adamw_fused": "torch AdamW(fused=True)",
    "sgd_fused": "torch SGD(momentum=0.9, fused=True)",
    "adamp": "fused_adamp.AdamP in float32",
}
_COMPARED = ("AdamP and Adam", "SGDP and SGD", "AdamP in other storage")
RIVALS = {"adamw_fused": "clovaai.AdamP", "sgd_fused": "clovaai.SGDP"}
"""By peer: the slow original that speed-ups are quoted over."""

DISTURBED = 1.25
"""A peer does the same work in every case. Where its median is this many times its best, something else ran."""
DISTURBED_LINE = f"?: disturbed by other programs: the peer took over {DISTURBED:g} times its best. Measure again."


def results(run: dict[str, Any]) -> dict[str, Any]:
    """What is kept of pytest-benchmark's JSON: the machine, the commit, and one row per measurement."""
    info = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
    return {
        **run["machine_info"]["environment"],
        **next((extra for extra in info if "copy_gbps" in extra), {}),
        "rows": marked([extra for extra in info if "workload" in extra]),
    }


def marked(rows: Sequence[Row]) -> list[Row]:
    """The rows, with whether something else ran while they were measured."""
    return [row | {"disturbed": row["peer_ms_p50"] > DISTURBED * _best_of_peer(row, rows)} for row in rows]


def _best_of_peer(row: Row, rows: Sequence[Row]) -> float:
    """The peer's least median, in ms, on the same workload with or without clipping."""
    same = ("workload", "clip", "peer")
    best: float = min(other["peer_ms_p50"] for other in rows if all(other[key] == row[key] for key in same))
    return best


class Measured(NamedTuple):
    """A number, and whether other programs ran while its time was taken."""

    value: float
    disturbed: bool

    def __str__(self) -> str:
        return f"{'?' if self.disturbed else ''}{self.value:.2f}"


def ratio(row: Row, rows: Sequence[Row]) -> Measured:
    """Time over the peer's: the median over rounds of the ratio of the round's two steps."""
    return Measured(row[f"ratio_to_{row['peer']}"], row["disturbed"])


def speedup(row: Row, rows: Sequence[Row]) -> Measured | None:
    """How many times faster than the original on the same inputs: the quotient of both ratios to their common peer.

    Each was interleaved with that peer, which therefore cancels what the machine did between the two measurements.
    """
    wanted = {key: row[key] for key in ("workload", "case", "clip", "peer")} | {"optimizer": RIVALS.get(row["peer"])}
    if row["optimizer"].partition(" ")[2]:  # other storage, another peer
        return None
    for rival in rows:
        if wanted.items() <= rival.items():
            (theirs, theirs_disturbed), (ours, ours_disturbed) = ratio(rival, rows), ratio(row, rows)
            return Measured(theirs / ours, theirs_disturbed or ours_disturbed)
    return None


def formula_speedup(row: Row, rows: Sequence[Row]) -> Measured | None:
    """How many times faster than the formula in DTensor operations."""
    return Measured(1 / row["ratio_to_formula_p50"], row["disturbed"]) if "ratio_to_formula_p50" in row else None


def extra_percent(row: Row, rows: Sequence[Row]) -> Measured:
    """Memory held between steps beyond the moments, in % of the parameters' bytes. No clock is involved."""
    return Measured(100 * row["extra_memory"], False)


class Target(NamedTuple):
    """A number that the project set itself. ``measure`` gives it for a row, None if the rows do not say."""

    text: str
    optimizer: str
    clip: bool
    measure: Callable[[Row, Sequence[Row]], Measured | None]
    limit: float
    at_least: bool = False
    unit: str = "x"
    models: tuple[str, ...] = MODELS


TARGETS = (
    Target("AdamP / torch AdamW(fused)", "fused_adamp.AdamP", False, ratio, 1.10),
    Target("AdamP / torch AdamW(fused), both clip", "fused_adamp.AdamP", True, ratio, 0.90),
    Target("AdamP, times faster than clovaai's", "fused_adamp.AdamP", False, speedup, 8, at_least=True),
    Target("SGDP / torch SGD(momentum, fused)", "fused_adamp.SGDP", False, ratio, 1.30),
    Target("SGDP / torch SGD(momentum, fused), both clip", "fused_adamp.SGDP", True, ratio, 1.30),
    Target("AdamP with bf16 state / in float32", "fused_adamp.AdamP float32, bf16 state", False, ratio, 1.05),
    Target("AdamP with remainder / in float32", "fused_adamp.AdamP bf16, remainder", False, ratio, 1.05),
    Target("AdamP / torch AdamW(fused), host", "fused_adamp.AdamP", False, ratio, 1 / 3, models=SMALL),
    Target("AdamP, memory beyond the moments", "fused_adamp.AdamP", False, extra_percent, 1, unit="%"),
    Target("SGDP, memory beyond the moments", "fused_adamp.SGDP", False, extra_percent, 1, unit="%"),
)
SHARDED_TARGETS = (
    Target("AdamP / torch AdamW(fused)", "fused_adamp.AdamP", False, ratio, 1.5, models=("gpt2",)),
    Target(
        "AdamP, times faster than its formula", "fused_adamp.AdamP", False, formula_speedup, 10, True, models=("gpt2",)
    ),
    Target(
        "SGDP, times faster than its formula", "fused_adamp.SGDP", False, formula_speedup, 10, True, models=("gpt2",)
    ),
)


def judge(target: Target, model: str, case: str, rows: Sequence[Row]) -> str:
    """What was measured, with ``ok``, ``missed`` or, where the measurement was, ``disturbed``; a dash for nothing."""
    wanted = {"workload": model, "case": case, "optimizer": target.optimizer, "clip": target.clip}
    for row in rows:
        if wanted.items() <= row.items() and (measured := target.measure(row, rows)) is not None:
            value, disturbed = measured
            met = value >= target.limit if target.at_least else value <= target.limit
            return f"{measured}{target.unit} {'disturbed' if disturbed else 'ok' if met else 'missed'}"
    return "-"


def target_table(rows: Sequence[Row], targets: Sequence[Target]) -> Table:
    table = table_of("Targets", ("target", "limit", "model", *CASES), ())
    for target in targets:
        limit = f"{'>=' if target.at_least else '<='} {target.limit:.2f}{target.unit}"
        for model in target.models:
            table.add_row(target.text, limit, model, *(judge(target, model, case, rows) for case in CASES))
        table.add_section()
    return table


# Tables of steps.


def table_of(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: columns of words, then of numbers."""
    table = Table(title=title)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def ms_text(row: Row, digits: int = 1) -> str:
    p20, p50, p80 = (f"{row[f'ms_{percentile}']:.{digits}f}" for percentile in ("p20", "p50", "p80"))
    return f"{p50} ({p20}-{p80})"


def speedup_text(measured: Measured | None) -> str:
    return f"{measured}x" if measured else ""


Column = tuple[str, "Callable[[Row, Sequence[Row]], str]"]
"""The head, and the text for a row; all rows of the run are at hand."""

MS: tuple[Column, ...] = (
    ("ms p50 (p20-p80)", lambda row, rows: ms_text(row)),
    ("peer ms", lambda row, rows: f"{row['peer_ms_p50']:.1f}"),
)
GBPS: Column = ("GB/s", lambda row, rows: f"{row['gbps']:.1f}")
STEP_COLUMNS: tuple[Column, ...] = (
    *MS,
    ("ratio", lambda row, rows: str(ratio(row, rows))),
    GBPS,
    ("vs clovaai", lambda row, rows: speedup_text(speedup(row, rows))),
    ("extra memory", lambda row, rows: f"{row['extra_memory']:.3%}"),
)
SHARDED_COLUMNS: tuple[Column, ...] = (
    *MS,
    ("ratio", lambda row, rows: f"{ratio(row, rows)} ({row['ratio_p20']:.2f}-{row['ratio_p80']:.2f})"),
    ("formula", lambda row, rows: speedup_text(formula_speedup(row, rows))),
    GBPS,
    ("collectives", lambda row, rows: str(row["collectives"])),
    ("sent", lambda row, rows: f"{row['bytes_sent'] / 1e3:.1f} kB"),
    ("share", lambda row, rows: f"{row['collectives_share']:.1%}"),
)


def tables(rows: Sequence[Row], columns: Sequence[Column], section: Sequence[str]) -> Iterator[Table]:
    """One per workload, families one after the other; a section for the rows that have these keys in common."""
    for workload in dict.fromkeys(row["workload"] for row in rows):
        members = [row for row in rows if row["workload"] == workload]
        members.sort(key=lambda row: list(PEERS).index(row["peer"]))
        title = f"{workload}: {members[0]['params']:,} parameters"
        table = table_of(title, ("optimizer", "case", "clip"), [head for head, _ in columns])
        for _, group in itertools.groupby(members, lambda row: [row[key] for key in section]):
            table.add_section()
            for row in group:
                name = f"{row['optimizer']} [dim]{row['backend']}[/]"
                texts = (text(row, rows) for _, text in columns)
                table.add_row(name, row["case"], "clip" if row["clip"] else "", *texts)
        yield table


# Whole reports.


def heading(found: dict[str, Any]) -> str:
    peers = "; ".join(f"{name} for {of}" for (_, name), of in zip(PEERS.items(), _COMPARED, strict=True))
    return (
        f"{machine_line(found)}\n"
        f"ratio: to the peer, stepped in turns with it; median over rounds. Peers: {peers}.\n"
        f"{DISTURBED_LINE}\n"
        "GB/s: of the bytes that a step cannot avoid. extra memory: held beyond the moments, in % of the parameters."
    )


def sharded_heading(found: dict[str, Any]) -> str:
    peers = f"{PEERS['adamw_fused']} and {PEERS['sgd_fused']}"
    return (
        f"{machine_line(found)}\n"
        f"{found['ranks']} ranks over {found['communication']}, FSDP2. ms: of the slowest rank, medians over rounds.\n"
        f"ratio: to {peers}, stepped in turns with it.\n"
        "torch.SGD of parts: fused=True, which DTensors do not have, on each rank's parts as plain tensors.\n"
        f"{DISTURBED_LINE}\n"
        "formula: times faster than the formula in DTensor operations. GB/s: of the bytes that a step cannot avoid.\n"
        "sent: by one rank in a step. share: of the collectives in a step's time, waiting for the other rank included."
    )


def machine_line(found: dict[str, Any]) -> str:
    copy = f"copy {found['copy_gbps']:.1f} GB/s; " if "copy_gbps" in found else ""
    changes = " with uncommitted changes" if found["uncommitted_changes"] else ""
    return (
        f"{found['device']}, {found['cores']} cores, {found['threads']} threads, {found['isa']}, huge pages "
        f"{found['huge_pages']}; {copy}torch {found['torch']}; {found['date']}, commit {found['commit']}{changes}"
    )


def gpu_side(row: Row) -> str:
    backend = row["backend"] if row["plan"] else None
    return " ".join(filter(None, (row["optimizer"], backend, row["plan"], "clip" * row["clip"])))


def gpu_ratio(row: Row) -> float | None:
    """To torch's optimizer, where it can keep such state."""
    return next((row[key] for key in row if key.startswith("ratio_to_")), None)


def gpu_table(found: dict[str, Any]) -> Table:
    def shown(number: float | None, digits: int) -> str:
        return "-" if number is None else f"{number:.{digits}f}"

    numbers = ("ms p50 (p20-p80)", "ratio", "GB/s", "B/param", "DRAM", "host us", "wall ms", "launches")
    title = f"{found['device']}: copy {found['copy_gbps'] or 0:.0f} GB/s"
    table = table_of(title, ("workload", "dtype", "case", "optimizer"), numbers)
    for row in found["rows"]:
        digits = {"gbps": 0, "bytes_per_param": 0, "dram_bytes_per_param": 1, "host_us": 0, "wall_ms": 3, "launches": 0}
        table.add_row(
            row["workload"],
            row["dtype"],
            row["case"],
            gpu_side(row),
            ms_text(row, digits=3),
            shown(gpu_ratio(row), 2),
            *(shown(row[key], places) for key, places in digits.items()),
        )
    return table


def show(found: dict[str, Any], console: Console) -> None:
    """All that a result file has to say; its columns tell which of the three benchmarks it is of."""
    if "triton" in found:
        console.print(gpu_table(found))
        console.print(f"tests: {found['tests'] or 'not run'}")
        for kind, colour in (("left_out", "yellow"), ("failures", "red")):
            for entry in found[kind]:
                text = entry["why"].strip().rpartition("\n")[2]
                console.print(f"[{colour}]{kind.replace('_', ' ')}[/]: {escape(entry['what'])}:", end=" ")
                console.print(text, markup=False)
        return
    if "ranks" in found:
        lines, targets = sharded_heading(found), SHARDED_TARGETS
        steps = tables(found["rows"], SHARDED_COLUMNS, ("peer", "case"))
    else:
        lines, targets, steps = heading(found), TARGETS, tables(found["rows"], STEP_COLUMNS, ("peer",))
    for part in (lines, *steps, target_table(found["rows"], targets)):
        console.print(part)


# Result files.


def path_of(found: dict[str, Any], folder: Path) -> Path:
    """``<device>-<date>-<commit>.json``, with ``-sharded`` before the dot of what several ranks found."""
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    return folder / f"{device}-{found['date']}-{found['commit']}{'-sharded' * ('ranks' in found)}.json"


def write(found: dict[str, Any], path: Path) -> None:
    """Whole or not at all, so that a process that is killed leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(unfinished, path)


def present(found: dict[str, Any], folder: Path | None) -> None:
    """On the screen, and where a folder is given, in a file there."""
    console = Console(width=WIDTH, highlight=False)
    show(found, console)
    if folder:
        path = path_of(found, folder)
        write(found, path)
        console.print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="a result file, or what pytest --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="folder for <device>-<date>-<commit>.json")
    arguments = parser.parse_args()
    found = json.loads(arguments.file.read_text())
    if "benchmarks" in found:
        found = results(found)
    present(found, arguments.out)


if __name__ == "__main__":
    main()
