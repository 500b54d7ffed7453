"""Everything that needs a GPU, in one command and within its minutes: build, GPU tests, benchmark, DRAM traffic.

    python -m bench.gpu [--quick] [--dry-run] [--out bench/results] [--minutes 9] [--commit HASH]

Needs torch, Triton and rich; no network and no installation. What is not there (cuda-core, a compiler, pytest, ncu,
matplotlib, clovaai's adamp, pytorch_optimizer, flashoptim) is left out and named. ``--quick`` takes one model in
float32 and the smallest tests, in four minutes. ``--dry-run`` runs the same code on a CPU, on a few small tensors in
Triton's interpreter, and writes into a temporary folder: what it times means nothing.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.markup import escape

import fused_adamp
from bench import harness, report
from bench.harness import ADAM, ROOT, SGD, Contestant, Dtypes, Family, Row, Side, making, seconds
from bench.workloads import WORKLOADS, gradient
from fused_adamp.backends import BACKENDS, jobs
from fused_adamp.backends import cuda as cuda_backend
from fused_adamp.backends import triton as triton_backend
from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["main"]

RUNS: dict[str, Any] = {"triton": triton_backend._Run, "cuda": cuda_backend._Run}
"""By backend, the class of its launches."""
MODELS = ("resnet50", "vit_b16", "gpt2", "llama_1b", "llama_8b_layer")
QUICK_MODELS = ("gpt2",)
RIVALS_MODELS = ("resnet50", "gpt2", "dry_run")
"""The rivals' steps take some thirty launches per tensor: two models show what is to be shown."""


class Rival(NamedTuple):
    """An optimizer of another package, timed where that is installed: its class, its name in the tables."""

    package: str
    optimizer: str
    name: str
    backend: str
    arguments: dict[str, Any]


RIVALS = (
    Rival("adamp", "AdamP", "clovaai.AdamP", "forloop", {}),
    Rival("pytorch_optimizer", "AdamP", "pytorch_optimizer.AdamP", "foreach", {"foreach": True}),
    # Not AdamP, but another AdamW in Triton. Told to keep weights and state in float32, as the others do here.
    Rival("flashoptim", "FlashAdamW", "flashoptim.AdamW", "triton", {"quantize": False, "master_weight_bits": None}),
)
PROFILED = (("vit_b16", "fp32"), ("llama_8b_layer", "fp32"), ("vit_b16", "bf16"))
"""Workload and dtype whose DRAM traffic ncu counts, as far as time allows: it takes about half a minute for each."""

WARMUP = 3
ROUNDS = 30
HOST_ROUNDS = 10
FLUSH_BYTES = 256 << 20
"""Written, and as many read, before every timed step: several times the largest L2."""

BUILD_SHARE, TESTS_SHARE, PROFILE_SHARE = 0.2, 0.45, 0.15
"""Of all minutes, at most; the benchmark takes what the build and the tests leave, less what the profile needs."""
GROUP_SECONDS = 20.0
"""The least time in which the optimizers of one group are set up, compiled and measured."""
GRACE_SECONDS = 30.0
"""For a command whose time ran out to end by itself, at most: pytest-xdist alone waits 10 s for its processes."""
QUICK_TESTS = "(equals_the_reference and float32 and contiguous) or small_model or runs or clipped"
"""pytest's expression for the tests of a quick run."""
FAILED_TESTS = 20
"""As many of them, at most, are in the results with the end of their tracebacks; the log has all."""

console = Console(width=report.WIDTH, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="the same on the CPU, on a few small tensors")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results"),
        help="folder for <device>-<date>-<commit>.json, .png and -tests.log",
    )
    parser.add_argument("--quick", action="store_true", help="one model in float32 and the smallest tests")
    parser.add_argument("--minutes", type=float, help="after which the rest is left out (default: 9, quick 4)")
    parser.add_argument("--commit", help="what is measured, where there is no git repository to ask")
    parser.add_argument("--steps-only", nargs=4, help=argparse.SUPPRESS)  # what runs under ncu: see dram_bytes
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    elif not torch.cuda.is_available():
        console.print("no CUDA device: nothing was measured. --dry-run tries the command itself, on the CPU.")
        return 1
    # Only an installation puts kernels/ inside the package (pyproject.toml, package-dir).
    if find_spec("fused_adamp.kernels") is None:
        fused_adamp.__path__.append(str(ROOT))
    machine = Cpu() if arguments.dry_run else Cuda()
    if arguments.steps_only:
        step_each(machine, *arguments.steps_only)
        return 0
    out = Path(tempfile.mkdtemp(prefix="bench-gpu-")) if arguments.dry_run else arguments.out
    minutes = arguments.minutes or (4 if arguments.quick else 9)
    return Session(machine, minutes, out, arguments.commit, quick=arguments.quick).run()


# The two machines.


class Cuda:
    """Where steps run and what clock times them.

    Attributes:
        copied: bytes of the tensor that is copied to see what the memory can do.
    """

    dry = False
    rounds = ROUNDS
    copied = 1 << 30

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._written, self._read = torch.zeros(2, FLUSH_BYTES // 4, device=self.device)
        self._sum = torch.empty((), device=self.device)

    def describe(self) -> dict[str, Any]:
        return {"device": torch.cuda.get_device_name(self.device), "cuda": torch.version.cuda or torch.version.hip}

    def _cool(self) -> None:
        """Leaves in L2 nothing of use, and nothing to be written back while a clock runs: hence the reading."""
        self._written.zero_()
        torch.sum(self._read, dim=0, out=self._sum)

    def milliseconds(self, step: Callable[[], object], host_us: float) -> float:
        """Of one step on the device, from a cold cache; ``host_us`` is about what the call takes on the host."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cool()
        # The device sleeps, at about 2000 cycles a microsecond, until the host has queued the whole step: what is timed
        # is the device alone. At most 50 ms: an optimizer that takes longer is bound by the host anyway.
        torch.cuda._sleep(int(2000 * min(1.5 * host_us + 50, 50_000)))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def host_and_wall(self, step: Callable[[], object]) -> tuple[float, float]:
        """Seconds until the call returns, and until the device is done too; it was idle at the start."""
        self._cool()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        return returned - start, time.perf_counter() - start


class Cpu:
    """In place of :class:`Cuda` in a dry run."""

    dry = True
    rounds = 1
    copied = 1 << 22
    device = torch.device("cpu")

    def describe(self) -> dict[str, Any]:
        return {"device": "dry run", "cuda": None}

    def milliseconds(self, step: Callable[[], object], host_us: float) -> float:
        return 1e3 * self.host_and_wall(step)[1]

    def host_and_wall(self, step: Callable[[], object]) -> tuple[float, float]:
        return (seconds(step),) * 2


Machine = Cuda | Cpu


# What is measured.


# Those that torch's optimizers have no match for come last: time may run out.
DTYPES = {
    "fp32": Dtypes(torch.float32),
    "bf16_fp32_state": Dtypes(torch.bfloat16, torch.float32),
    "bf16": Dtypes(torch.bfloat16),
    "bf16_remainder": Dtypes(torch.bfloat16, torch.float32, "remainder"),
    "bf16_stochastic": Dtypes(torch.bfloat16, None, "stochastic"),
}


class Field(NamedTuple):
    """Ours and torch's optimizer that are compared, what both are given, and the decisions they are timed with."""

    family: Family
    ours: str
    peer: str
    options: dict[str, float]
    cases: tuple[Decision, ...]


FIELDS = (
    Field(ADAM, "AdamP", "AdamW", {}, (Decision.NONE, Decision.CHANNEL)),
    Field(SGD, "SGDP", "SGD", {"momentum": 0.9}, (Decision.NONE,)),
)


class PlannedSide(Side):
    """A side on the device that may be told its plan.

    Attributes:
        plan: None for what is not ours.
        params: N(0, 1), the same on every side.
    """

    def __init__(
        self, contestant: Contestant, plan: str | None, shapes: Sequence[tuple[int, ...]], device: torch.device
    ) -> None:
        self.plan = plan
        self._generator = torch.Generator(device).manual_seed(0)
        weights = (torch.randn(shape, generator=self._generator, device=device) for shape in shapes)
        super().__init__(contestant, [w.to(contestant.dtypes.weights).requires_grad_() for w in weights])

    def __str__(self) -> str:
        return f"{super().__str__()} {self.plan or ''}"

    @property
    def ours(self) -> bool:
        return self.plan is not None

    def set_gradients(self, case: Decision) -> None:
        """In place where there are some, so that no address changes."""
        self._generator.manual_seed(1)
        for p in self.params:
            grad = gradient(p.detach(), case, self._generator)
            if p.grad is None:
                p.grad = grad
            else:
                p.grad.copy_(grad)

    def force_plan(self) -> None:
        """To be called before each step: the backend looks whenever it plans, which it does in the first step."""
        os.environ[jobs.PLAN] = self.plan or ""

    def bytes_per_param(self, clip: bool) -> int | None:
        """None where they were not counted: of rivals."""
        if not self.ours and self.contestant.backend != "fused":
            return None
        passes = (1 if self.ours else 3) * clip
        moments = self.contestant.family.moments
        return self.contestant.dtypes.bytes_per_param(moments, split=self.plan == "split", clip_passes=passes)


def backends_on(device: torch.device) -> list[str]:
    """Our backends that run on the device."""
    return [backend.name for backend in BACKENDS if backend.name in RUNS and backend.unavailable(device) is None]


def sides_of(
    field: Field, workload: str, name: str, device: torch.device, backends: Sequence[str]
) -> Iterator[PlannedSide]:
    """The peer first, where it can keep such state, then ours by each backend under both plans."""
    dtypes, shapes = DTYPES[name], list(WORKLOADS[workload].shapes())
    if dtypes.state is None:  # torch's fused optimizers keep state in the weights' dtype only
        peer = making(getattr(torch.optim, field.peer), **field.options, fused=True)
        contestant = Contestant(f"torch.{field.peer}", "fused", field.family, peer, dtypes=dtypes)
        yield PlannedSide(contestant, None, shapes, device)
    for backend in backends:
        ours = making(getattr(fused_adamp, field.ours), **field.options, **dtypes.options, backend=backend)
        contestant = Contestant(
            f"fused_adamp.{field.ours}", backend, field.family, ours, clip=harness.our_clip, dtypes=dtypes
        )
        for plan in ("one_pass", "split"):
            yield PlannedSide(contestant, plan, shapes, device)


class Session:
    """One run of the command, from build to plots.

    Attributes:
        found: the results, complete as far as they go at any time, so that they can be written when time runs out.
    """

    def __init__(self, machine: Machine, minutes: float, out: Path, commit: str | None, *, quick: bool = False) -> None:
        self.machine = machine
        self.quick = quick
        self.backends = backends_on(machine.device)
        self._seconds = 60 * minutes
        self._begin = time.monotonic()
        self._writing = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []
        self.found: dict[str, Any] = {
            **machine.describe(),
            "triton": _version("triton"),
            "python": sys.version.split()[0],
            **harness.provenance(commit),
            "copy_gbps": None,
            "build": None,
            "tests": None,
            "profile": None,
            "fastest": [],
            "left_out": [],
            "failures": [],
            "rows": [],
        }
        self._path = report.path_of(self.found, out)
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        console.print(
            f"{self.found['device']}, torch {self.found['torch']} with CUDA {self.found['cuda']}, "
            f"Triton {self.found['triton']}, {self._seconds / 60:g} minutes"
        )
        # A kernel that never ends cannot be interrupted from Python: what was found until then is written all the same.
        watchdog = threading.Timer(self._seconds, self._give_up)
        watchdog.daemon = True
        watchdog.start()
        for stage in (self.build, self.test, self.benchmark, *([] if self.quick else [self.profile])):
            self.say(f"[bold]{stage.__name__}")
            try:
                stage()
            except Exception as error:
                self.fail(stage.__name__, error)
            self.write()
        watchdog.cancel()
        try:
            self.plot(self._path.with_suffix(".png"))
        except Exception as error:
            self.fail("plot", error)
        self.write()
        self.summary()
        return int(bool(self.found["failures"]))

    # Time and bookkeeping.

    def left(self) -> float:
        return self._begin + self._seconds - time.monotonic()

    def say(self, text: str) -> None:
        console.print(f"[dim]{time.monotonic() - self._begin:6.1f} s[/]  {text}")

    def fail(self, what: str, error: BaseException | str) -> None:
        if isinstance(error, BaseException):
            console.print("".join(traceback.format_exception(error)), markup=False)
        self.found["failures"].append({"what": what, "why": str(error)[-2000:]})
        self.say(f"[red]FAILED[/] {escape(what)}")

    def leave_out(self, what: str, why: str) -> None:
        self.found["left_out"].append({"what": what, "why": why})
        self.say(f"[yellow]left out[/] {escape(f'{what}: {why}')}")

    def write(self) -> None:
        with self._writing:
            report.write(self.found, self._path)

    def _give_up(self) -> None:
        self.fail("time", f"not done after {self._seconds:.0f} s: something hangs; the rest is left out")
        for child in self._children:
            _end(child)
        self.write()
        console.print(f"wrote {self._path}")
        os._exit(1)

    def call(
        self, command: Sequence[str], seconds: float, log: Path | None = None, **environment: str
    ) -> tuple[int | None, str]:
        """Exit status, None if time ran out, and output of a command that runs in a process group of its own.

        The output goes into a file, ``log`` where it is to be kept, since a pipe ends only with the last process that
        holds it.
        """
        with log.open("w+", errors="replace") if log else tempfile.TemporaryFile("w+", errors="replace") as output:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._children.append(child)
            try:
                status: int | None = child.wait(timeout=max(seconds, 1))
            except subprocess.TimeoutExpired:
                status = None
                child.send_signal(signal.SIGINT)  # pytest reports what it has
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=min(GRACE_SECONDS, max(self.left() / 2, 1)))
            finally:
                _end(child)
                self._children.remove(child)
            output.seek(0)
            return status, output.read()

    # The stages.

    def build(self) -> None:
        """The C++ extension, in place. Nothing on a GPU needs it, so that without it the rest is as good."""
        command = [sys.executable, "setup.py", *(["--name"] if self.machine.dry else ["build_ext", "--inplace"])]
        limit = min(BUILD_SHARE * self._seconds, self.left())
        status, output = self.call(command, limit, FUSED_ADAMP_REQUIRE_EXTENSION="1")
        self.found["build"] = {"built": status == 0 and not self.machine.dry}
        if self.machine.dry and status != 0:
            self.fail("build", output)
        elif self.machine.dry:
            self.leave_out("build of the C++ extension", "a dry run leaves the checkout as it is")
        elif status != 0:
            self.found["build"]["why"] = output[-2000:] if status is not None else f"took over {limit:.0f} s"
            self.leave_out("C++ extension", self.found["build"]["why"].strip().rpartition("\n")[2])

    def test(self) -> None:
        if find_spec("pytest") is None:
            self.leave_out("tests", "pytest is missing")
            return
        # Where pytest-xdist is: most of the time is the compiler's, on the host.
        processes = min(12, os.cpu_count() or 1)
        parallel = ["-p", "xdist", "-n", str(processes), "--dist", "loadgroup"] if find_spec("xdist") else []
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "tests.xml"
            # Warnings are the machine's own, of versions that nobody chose. A stack names a test that hangs; and once a
            # kernel has broken a process's CUDA context, every later test in that process fails.
            options = ["-q", "-W", "default", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", "--maxfail=50"]
            options += ["-k", QUICK_TESTS] if self.quick else []
            command = [sys.executable, "-m", "pytest", "tests/gpu", *options, *parallel, f"--junit-xml={report}"]
            limit = min(TESTS_SHARE * self._seconds, self.left())
            log = self._path.with_name(f"{self._path.stem}-tests.log")
            status, output = self.call(command, limit, log, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
            suites = list(ElementTree.parse(report).iter("testsuite")) if report.exists() else []
        console.print(output[-3000:].rstrip(), markup=False)
        failed = 0
        if suites:
            total, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped"))
            failed = sum(int(suite.get(name, 0)) for suite in suites for name in ("failures", "errors"))
            self.found["tests"] = {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
        cases = (case for suite in suites for case in suite.iter("testcase"))
        broken = ((case, part) for case in cases for part in case if part.tag in ("failure", "error"))
        for case, part in islice(broken, FAILED_TESTS):
            self.fail(case.get("name", "a test"), f"{part.get('message', '')[:400]}\n{(part.text or '')[-1500:]}")
        if status is None:
            self.leave_out("the rest of the tests", f"they took over {limit:.0f} s")
        # Without a GPU the whole module is skipped, which to pytest is as if there were no tests.
        passed = status in ((0, 5, None) if self.machine.dry else (0, None))
        if failed or not suites or not passed:
            self.fail("tests", output)

    def benchmark(self) -> None:
        def clock(step: Callable[[], object]) -> float:
            return 1e-3 * self.machine.milliseconds(step, 20)

        self.found["copy_gbps"] = harness.copy_gbps(clock, self.machine.copied, self.machine.device)
        self.say(f"copy {self.found['copy_gbps']:.0f} GB/s")
        for rival in RIVALS:
            if find_spec(rival.package) is None:
                self.leave_out(rival.package, "it is missing")
        for backend in BACKENDS:
            if backend.name in RUNS and (reason := backend.unavailable(self.machine.device)):
                self.leave_out(f"backend {backend.name}", reason)
        profiles = not self.quick and not self.machine.dry and shutil.which("ncu")
        reserve = PROFILE_SHARE * self._seconds if profiles else 0
        for name in ["fp32"] if self.quick else DTYPES:
            for workload in ("dry_run",) if self.machine.dry else QUICK_MODELS if self.quick else MODELS:
                for field in FIELDS[: 1 if self.quick or self._brief(name) else None]:
                    what = f"{workload} {name} {field.ours}"
                    if self.left() - reserve < GROUP_SECONDS:
                        self.leave_out(what, "no time left")
                        continue
                    self._measured(what, field, workload, name)
                    self.found["fastest"] = fastest(self.found["rows"])
                    self.write()
                    gc.collect()
                    if self.machine.device.type == "cuda":
                        torch.cuda.empty_cache()

    def _brief(self, dtypes: str) -> bool:
        """Whether one row a plan will do: the interpreter takes a third of a second for each step."""
        return self.machine.dry and dtypes != "fp32"

    def _rivals(self, field: Field, workload: str) -> Iterator[PlannedSide]:
        """The rivals that are here and can step."""
        for rival in RIVALS:
            if find_spec(rival.package) is None:
                continue
            try:
                optimizer = getattr(import_module(rival.package), rival.optimizer)
                make = making(optimizer, **field.options, **rival.arguments)
                contestant = Contestant(rival.name, rival.backend, field.family, make)
                side = PlannedSide(contestant, None, list(WORKLOADS[workload].shapes()), self.machine.device)
                side.set_gradients(Decision.NONE)
                side.step(clip=False)
            except Exception as error:
                self.leave_out(rival.name, f"{type(error).__name__}: {error}")
            else:
                yield side

    def _measured(self, what: str, field: Field, workload: str, dtypes: str) -> None:
        """The rows of a group, or why there are none."""
        try:
            sides = list(sides_of(field, workload, dtypes, self.machine.device, self.backends))
            if field.ours == "AdamP" and workload in RIVALS_MODELS and dtypes == "fp32":
                sides += self._rivals(field, workload)
            for case in field.cases[: 1 if self._brief(dtypes) else None]:
                for side in sides:
                    side.set_gradients(case)
                rows = []
                # What clipping costs does not depend on the case.
                for clip in (False, True) if case is Decision.NONE and not self._brief(dtypes) else (False,):
                    about = {"workload": workload, "dtype": dtypes, "case": case.name.lower()}
                    for row in race(self.machine, sides, clip):
                        rows.append(about | row)
                        self.say(f"{workload} {dtypes} {about['case']} {_line(row, field)}")
                for side in sides:
                    if side.ours:
                        side.check_decisions(case)
                self.found["rows"] += rows
        except torch.cuda.OutOfMemoryError:
            self.leave_out(what, "out of GPU memory")
        except Exception as error:
            self.fail(what, error)

    def profile(self) -> None:
        """DRAM traffic as ncu counts it, into the rows it belongs to."""
        ncu = shutil.which("ncu")
        if self.machine.dry:
            status, output = self.call(_steps_only("dry_run", "fp32", "AdamP", "triton", dry=True), self.left())
            if status != 0:
                self.fail("profile", output)
            self.leave_out("DRAM traffic", "a dry run has no GPU")
        elif ncu is None:
            self.leave_out("DRAM traffic", "ncu is not on PATH")
        else:
            metrics = "dram__bytes_read.sum,dram__bytes_write.sum"
            # Clocks are the machine's business, and no time is measured here. As in any step, a kernel finds in L2 what
            # the one before has left there.
            options = ["--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"]
            options += ["--csv", "--print-units", "base"]
            for workload, dtype in PROFILED:
                for field, backend in product(FIELDS, self.backends):
                    what = f"DRAM traffic of {workload} {dtype} {field.ours} {backend}"
                    if self.left() < 2 * GROUP_SECONDS:
                        self.leave_out(what, "no time left")
                        continue
                    command = [ncu, "--metrics", metrics, *options, *_steps_only(workload, dtype, field.ours, backend)]
                    status, output = self.call(command, self.left() - GROUP_SECONDS)
                    counted = dram_bytes(output) if status == 0 else {}
                    if not counted:
                        self.leave_out(
                            what, f"ncu failed: {output.strip()[-300:]}" if status is not None else "no time left"
                        )
                        if status is not None:
                            return  # nor will it the next time
                    self._put(workload, dtype, field, backend, counted)

    def _put(self, workload: str, dtype: str, field: Field, backend: str, counted: dict[str | None, float]) -> None:
        wanted = {"workload": workload, "dtype": dtype, "case": "none", "clip": False}
        names = {f"fused_adamp.{field.ours}", f"torch.{field.peer}"}
        for row in self.found["rows"]:
            if row["backend"] not in (backend, "fused"):
                continue
            if wanted.items() <= row.items() and row["optimizer"] in names and row["plan"] in counted:
                row["dram_bytes_per_param"] = counted[row["plan"]] / row["params"]
                self.found["profile"] = "ncu"
                traffic = f"{row['dram_bytes_per_param']:.2f} bytes per parameter"
                self.say(f"{workload} {dtype} {report.gpu_side(row)}: {traffic} through DRAM")

    # What is shown.

    def plot(self, path: Path) -> None:
        """Ratios to the peer and bandwidth, of the rows without clipping whose case is none."""
        if find_spec("matplotlib") is None:
            self.leave_out("plots", "matplotlib is missing")
            return
        rows = [row for row in self.found["rows"] if row["plan"] and row["case"] == "none" and not row["clip"]]
        if not rows:
            self.leave_out("plots", "there are no rows")
            return
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        figure, (ratios, bandwidth) = pyplot.subplots(2, 1, figsize=(10, 8), sharex=True, layout="constrained")
        groups = list(dict.fromkeys((row["workload"], row["dtype"]) for row in rows))
        series = list(dict.fromkeys(map(report.gpu_side, rows)))
        width = 0.8 / len(series)
        for number, label in enumerate(series):
            mine = {(row["workload"], row["dtype"]): row for row in rows if report.gpu_side(row) == label}
            at = [groups.index(group) + width * (number + 0.5) - 0.4 for group in mine]
            ratios.bar(at, [report.gpu_ratio(row) or float("nan") for row in mine.values()], width, label=label)
            bandwidth.bar(at, [row["gbps"] for row in mine.values()], width, label=label)
        ratios.axhline(1, color="black", linewidth=1)
        ratios.set_ylabel("GPU time / torch's fused optimizer")
        ratios.legend()
        bandwidth.axhline(self.found["copy_gbps"], color="black", linewidth=1, linestyle="--", label="copy")
        bandwidth.set_ylabel("GB/s of the bytes that the plan moves")
        bandwidth.set_xticks(range(len(groups)), [f"{workload}\n{dtype}" for workload, dtype in groups])
        figure.suptitle(
            f"{self.found['device']}, torch {self.found['torch']}, {self.found['date']} {self.found['commit']}"
        )
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def summary(self) -> None:
        report.show(self.found, console)
        console.print(f"wrote {self._path}; {time.monotonic() - self._begin:.0f} s")


# Measuring.


def race(machine: Machine, sides: Sequence[PlannedSide], clip: bool) -> list[Row]:
    """One row per side, the peer's first if there is one."""
    for side in sides:
        for _ in range(1 if machine.dry else WARMUP):
            side.force_plan()
            side.step(clip)
    host: list[list[tuple[float, float]]] = []
    for side in sides:
        side.force_plan()
        rounds = range(1 if machine.dry else HOST_ROUNDS)
        host.append([machine.host_and_wall(partial(side.step, clip)) for _ in rounds])
    host_us = [1e6 * statistics.median(called for called, _ in times) for times in host]

    def clock(side: PlannedSide, about: float) -> float:
        side.force_plan()
        return machine.milliseconds(partial(side.step, clip), about)

    clocks = [partial(clock, side, about) for side, about in zip(sides, host_us, strict=True)]
    ms = harness.in_turns(clocks, machine.rounds)
    rows = []
    for i, side in enumerate(sides):
        row = harness.measured(side, clip, ms[i], side.bytes_per_param(clip))
        row |= {
            "plan": side.plan,
            "host_us": host_us[i],
            "wall_ms": 1e3 * statistics.median(done for _, done in host[i]),
            "dram_bytes_per_param": None,
            "launches": _launches(side, clip) if side.ours else None,
        }
        if i and sides[0].contestant.backend == "fused":
            row[side.contestant.family.ratio] = statistics.median(harness.ratios(ms[i], ms[0]))
        rows.append(row)
    return rows


def _launches(side: PlannedSide, clip: bool) -> int:
    """Kernels of ours that one step launches."""
    launched = 0

    def counting(run: Any) -> None:
        nonlocal launched
        launched += 1
        start(run)

    runs = RUNS[side.contestant.backend]
    start = runs.start
    side.force_plan()
    with mock.patch.object(runs, "start", counting):
        side.step(clip)
    return launched


def fastest(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of ours, the fastest backend and plan for each model, its number of elements, and dtype: the default there."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row["workload"], row["dtype"], row["optimizer"], row["case"], row["clip"]
        if row["plan"] and (key not in found or row["ms_p50"] < found[key]["ms_p50"]):
            found[key] = row
    names = "workload", "params", "dtype", "optimizer", "case", "clip", "backend", "plan", "ms_p50"
    return [{name: row[name] for name in names} for row in found.values()]


# DRAM traffic: this module again, under ncu.


def _steps_only(workload: str, dtypes: str, ours: str, backend: str, dry: bool = False) -> list[str]:
    dry_run = ["--dry-run"] if dry else []
    return [sys.executable, "-m", "bench.gpu", *dry_run, "--steps-only", workload, dtypes, ours, backend]


def step_each(machine: Machine, workload: str, dtypes: str, ours: str, backend: str) -> None:
    """Steps torch's optimizer and ours under both plans of a backend; ncu looks at the last step of each."""
    (field,) = (field for field in FIELDS if field.ours == ours)
    sides = list(sides_of(field, workload, dtypes, machine.device, [backend]))
    sides = [side for side in sides if side.contestant.backend in (backend, "fused")]
    for side in sides:
        side.set_gradients(Decision.NONE)
        side.force_plan()
        side.step(clip=False)
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for side in sides:
        side.force_plan()
        side.step(clip=False)
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def dram_bytes(output: str) -> dict[str | None, float]:
    """Bytes read and written per plan, under None those of torch's optimizer, from what ncu printed as CSV."""
    plans = dict.fromkeys(("measure_kernel", "dot_kernel", "update_kernel"), "split")
    plans["one_pass_kernel"] = "one_pass"
    counted: dict[str | None, float] = {}
    lines = [line for line in output.splitlines() if line.startswith('"')]
    for row in csv.DictReader(lines):
        if row["Metric Name"].startswith("dram__bytes_"):
            if row["Metric Unit"] != "byte":
                raise ValueError(f"ncu counts in {row['Metric Unit']!r}, not in bytes")
            plan = plans.get(row["Kernel Name"].partition("(")[0])
            counted[plan] = counted.get(plan, 0.0) + float(row["Metric Value"].replace(",", ""))
    return counted


# Odds and ends.


def _line(row: Row, field: Field) -> str:
    ratio = f", {row[field.family.ratio]:.2f} x {field.peer}" if field.family.ratio in row else ""
    return f"{report.gpu_side(row)}: {row['ms_p50']:.3f} ms{ratio}"


def _version(package: str) -> str | None:
    return __import__(package).__version__ if find_spec(package) else None


def _end(child: subprocess.Popen[bytes]) -> None:
    """The process and what it started, which may outlive it. What hangs in the driver does not end even then."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=1)


if __name__ == "__main__":
    sys.exit(main())
