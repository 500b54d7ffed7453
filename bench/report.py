"""Tables and targets from the JSON of a benchmark run: ``python -m bench.report out/bench.json [--out DIR]``."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["environment", "main", "marked", "results", "torch_info", "write"]

Row = dict[str, Any]

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
        **environment(run["machine_info"], run["commit_info"], run["datetime"]),
        **next((extra for extra in info if "copy_gbps" in extra), {}),
        "rows": marked([extra for extra in info if "workload" in extra]),
    }


def environment(machine: dict[str, Any], commit: dict[str, Any], datetime: str) -> dict[str, Any]:
    """What is kept of pytest-benchmark's information, with :func:`torch_info` in the machine's."""
    return {
        "device": machine["cpu"]["brand_raw"],
        "cores": machine["cpu"]["count"],
        **{name: machine[name] for name in ("threads", "isa", "huge_pages", "torch")},
        "commit": commit["id"][:7],
        "uncommitted_changes": commit["dirty"],
        "date": datetime[:10],
    }


def torch_info() -> dict[str, Any]:
    """What torch's speed depends on and pytest-benchmark does not ask for."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": _selected("/sys/kernel/mm/transparent_hugepage/enabled"),
    }


def _selected(path: str) -> str | None:
    """The word in brackets of a kernel setting such as ``always [madvise] never``; None where there is no such file."""
    file = Path(path)
    return file.read_text().partition("[")[2].partition("]")[0] if file.exists() else None


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


def judge(target: Target, model: str, case: str, rows: Sequence[Row]) -> str:
    """What was measured, with ``ok``, ``missed`` or, where the measurement was, ``disturbed``; a dash for nothing."""
    wanted = {"workload": model, "case": case, "optimizer": target.optimizer, "clip": target.clip}
    for row in rows:
        if wanted.items() <= row.items() and (measured := target.measure(row, rows)) is not None:
            value, disturbed = measured
            met = value >= target.limit if target.at_least else value <= target.limit
            return f"{measured}{target.unit} {'disturbed' if disturbed else 'ok' if met else 'missed'}"
    return "-"


def table_of(members: Sequence[Row], numbers: Sequence[str]) -> Table:
    """An empty table for the rows of one workload: columns that say what was measured, and these."""
    table = Table(title=f"{members[0]['workload']}: {members[0]['params']:,} parameters")
    for name in ("optimizer", "case", "clip"):
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One per workload, a section per family, in the order of the run."""
    for workload in dict.fromkeys(row["workload"] for row in rows):
        members = [row for row in rows if row["workload"] == workload]
        table = table_of(members, ("ms p50 (p20-p80)", "peer ms", "ratio", "GB/s", "vs clovaai", "extra memory"))
        for peer in PEERS:
            table.add_section()
            for row in (row for row in members if row["peer"] == peer):
                faster = speedup(row, rows)
                table.add_row(
                    f"{row['optimizer']} [dim]{row['backend']}[/]",
                    row["case"],
                    "clip" if row["clip"] else "",
                    f"{row['ms_p50']:.1f} ({row['ms_p20']:.1f}-{row['ms_p80']:.1f})",
                    f"{row['peer_ms_p50']:.1f}",
                    str(ratio(row, rows)),
                    f"{row['gbps']:.1f}",
                    f"{faster}x" if faster else "",
                    f"{row['extra_memory']:.3%}",
                )
        yield table


def target_table(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> Table:
    table = Table(title="Targets")
    for name in ("target", "limit", "model", *CASES):
        table.add_column(name, no_wrap=True)
    for target in targets:
        limit = f"{'>=' if target.at_least else '<='} {target.limit:.2f}{target.unit}"
        for model in target.models:
            table.add_row(target.text, limit, model, *(judge(target, model, case, rows) for case in CASES))
        table.add_section()
    return table


def heading(found: dict[str, Any]) -> str:
    peers = "; ".join(f"{name} for {of}" for (_, name), of in zip(PEERS.items(), _COMPARED, strict=True))
    return (
        f"{machine_line(found)}\n"
        f"ratio: to the peer, stepped in turns with it; median over rounds. Peers: {peers}.\n"
        f"{DISTURBED_LINE}\n"
        "GB/s: of the bytes that a step cannot avoid. extra memory: held beyond the moments, in % of the parameters."
    )


def machine_line(found: dict[str, Any]) -> str:
    copy = f"copy {found['copy_gbps']:.1f} GB/s; " if "copy_gbps" in found else ""
    changes = " with uncommitted changes" if found["uncommitted_changes"] else ""
    return (
        f"{found['device']}, {found['cores']} cores, {found['threads']} threads, {found['isa']}, huge pages "
        f"{found['huge_pages']}; {copy}torch {found['torch']}; {found['date']}, commit {found['commit']}{changes}"
    )


def write(found: dict[str, Any], folder: Path, suffix: str = "") -> Path:
    """Writes ``<device>-<date>-<commit><suffix>.json``."""
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    path = folder / f"{device}-{found['date']}-{found['commit']}{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="folder for <device>-<date>-<commit>.json")
    arguments = parser.parse_args()
    found = results(json.loads(arguments.run.read_text()))
    # As wide as the tables are: a file or a CI log has no terminal to ask.
    console = Console(width=140, highlight=False)
    console.print(heading(found))
    for table in (*tables(found["rows"]), target_table(found["rows"])):
        console.print(table)
    if arguments.out:
        console.print(f"wrote {write(found, arguments.out)}")


if __name__ == "__main__":
    main()
