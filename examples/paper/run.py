"""Runs the claims of the AdamP paper in small and writes a page of what came out.

    python examples/paper/run.py             # all of it, about 30 minutes on two cores; writes to out/paper
    python examples/paper/run.py --quick     # the same with few and short runs, two minutes; writes to out/paper-quick
    python examples/paper/run.py --record    # what examples/paper/results lacks, and docs/paper.md

A run that is finished is recorded at once, in a file for each task. The same command, given again, goes on from there,
so that an interrupt loses only the runs under way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

try:
    import adamp  # noqa: F401  # digits.py, which the tasks use, needs it
    import lemma
    import report
    import torch
    import toy
    import training
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from tasks import TASKS, cpu_name
    from training import FULL, QUICK, Plan, Record, Run, Task, train

    import fused_adamp
    from fused_adamp.backends import choose
except ModuleNotFoundError as error:
    sys.exit(
        f"{error.name} is missing: run `make paper`, or `pip install . && pip install --group demo` in the checkout"
    )

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
STUDIES: dict[str, Callable[..., dict[str, Any]]] = {"lemma": lemma.measure, "toy": toy.measure}


def work(name: str, plan: Plan, run: Run) -> Record:
    """One training run, in a process of its own."""
    start = time.perf_counter()
    return {**train(TASKS[name], plan, run), "seconds": round(time.perf_counter() - start, 2)}


def start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it and ends the workers
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A parent that was killed cannot end its workers, and they would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def carry_out(
    tasks: list[Task],
    plan: Plan,
    records: dict[str, dict[Run, Record]],
    executor: Executor,
    workers: int,
    on_record: Callable[[Task, Run], None],
) -> None:
    """Trains what the records lack, ``workers`` runs at a time, and calls ``on_record`` after each."""
    under_way: dict[Future[Record], tuple[Task, Run]] = {}
    while True:
        started = {(task.name, run) for task, run in under_way.values()}
        waiting = [(task, run) for task in tasks for run in training.still_to_do(task, plan, records[task.name])]
        startable = [(task, run) for task, run in waiting if (task.name, run) not in started]
        for task, run in startable[: workers - len(under_way)]:
            under_way[executor.submit(work, task.name, plan, run)] = task, run
        if not under_way:
            return
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            task, run = under_way.pop(future)
            records[task.name][run] = future.result()
            on_record(task, run)


def run_all(names: list[str], plan: Plan, folder: Path, workers: int, fresh: bool, console: Console) -> None:
    tasks = [TASKS[name] for name in names if name in TASKS]
    records = {task.name: {} if fresh else training.load_records(folder, task, plan) for task in tasks}
    environment = {
        "cpu": cpu_name(),
        "workers": workers,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_adamp": fused_adamp.__version__,
        "backend": choose(torch.device("cpu"), backend=None, fused=None, foreach=None).name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)

        def show() -> None:
            total = sum(training.runs_in_all(task, plan, records[task.name]) for task in tasks)
            progress.update(bar, total=total, completed=sum(map(len, records.values())))

        def on_record(task: Task, run: Run) -> None:
            training.save_records(folder, task, plan, records[task.name], environment)
            metrics = records[task.name][run]["metrics"]
            progress.update(bar, description=task.name)
            show()
            result = "diverged" if metrics is None else f"{metrics[task.metrics[0].key]:.4g}"
            console.print(f"{task.name:9}  {run.optimizer:5}  lr {run.lr:<8g} seed {run.seed:<3}  {result}")

        for name in names:
            if name in STUDIES and (fresh or not training.read_json(folder / f"{name}.json")):
                progress.update(bar, description=name)
                short = {"steps": 300} if name == "lemma" and plan is QUICK else {}
                training.write_json(folder / f"{name}.json", STUDIES[name](**short))
                console.print(f"{name} measured")
        show()
        spawn = multiprocessing.get_context("spawn")  # a fork could copy a lock that a thread of torch holds
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker) as executor:
            try:
                carry_out(tasks, plan, records, executor, workers, on_record)
            except BaseException:
                for process in multiprocessing.active_children():
                    process.terminate()
                raise


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*STUDIES, *TASKS]
    parser.add_argument("--quick", action="store_true", help="few and short runs, into a folder of their own")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--fresh", action="store_true", help="run again what is recorded")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report")
    parser.add_argument("--workers", type=int, choices=range(1, 65), default=2, metavar="N", help="default: 2")
    parser.add_argument("--record", action="store_true", help="records in examples/paper/results, report in docs")
    parser.add_argument("--out", type=Path, help="folder for records and report (out/paper, or out/paper-quick)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    plan = QUICK if args.quick else FULL
    out = args.out or ROOT / "out" / ("paper-quick" if args.quick else "paper")
    results, pages = (ROOT / "examples/paper/results", ROOT / "docs") if args.record else (out, out)
    # A log file has no width of its own, and the usual 80 columns would break the lines.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    torch.set_num_threads(1)
    try:
        if not args.report:
            run_all(args.only, plan, results, args.workers, args.fresh, console)
        console.print(f"Report: {report.write_report(results, pages, plan)}", soft_wrap=True)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: finished runs are in {results}, and the same command goes on from there")
    except OSError as error:
        sys.exit(f"{error.filename or results}: {error.strerror or error}")


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
