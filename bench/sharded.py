"""Steps of sharded parameters: AdamP and SGDP on FSDP2's DTensors beside torch's optimizers and the plain formula.

    python -m bench.sharded [--workload gpt2] [--rounds 15] [--smoke] [--out bench/results]

Starts two ranks on this machine, of one thread each, which talk by gloo. Everybody steps in turns, from a barrier.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import cosine_similarity
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness, report
from bench.contestants import CONTESTANTS
from bench.harness import ADAM, LR, SGD, Contestant, Row, making, ratios, seconds, spread
from bench.workloads import WORKLOADS, tensors
from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import DeviceMesh

__all__ = ["main"]

RANKS = 2
PATIENCE = datetime.timedelta(minutes=5)
"""For a rank that does not come to a collective."""

ROUNDS = 15
SMOKE_ROUNDS = 2
COUNTED = 3
"""Steps whose collectives are counted and timed, apart from the timed rounds."""

CHECKED_LR = 0.1
"""Of a step that is compared: so large that a projection or a decay left out would show."""


# The formula, as one who has DTensors and torch's operations would have to write it.


class Formula(Optimizer):
    """AdamP (algorithm 2 of arXiv:2006.08217) and SGDP (algorithm 1), one DTensor operation after the other.

    clovaai's own code (adamp 0.3.0, torch 2.13) steps a DTensor whose rows pass the test. Of any other matrix it looks
    at the layer next, and fails:

    - ``x.view(1, -1)`` where the ranks' parts are not equally large, as of GPT-2's 50257 rows on two ranks: "Cannot
      flatten unevenly sharded tensor";
    - else ``F.cosine_similarity(...).abs_()``: "in-place operations that require placement changes are not supported".
      Each rank holds a part of the sum, and abs_ needs the whole of it. So would ``norm(...).add_(eps)`` later on.

    Hence for the layer sums over dimensions in place of views, and nothing in place but on tensors laid out as the
    parameter. DTensor then finds out by itself that a sum is not complete on any rank, and adds it up over them, one
    number at a time.

    Attributes:
        norm: what is fastest in torch. In float32 it adds one square after the other, and is off by 1e-3 on the 19
            million elements of an embedding.
    """

    norm = staticmethod(torch.linalg.vector_norm)

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.step_tensor(p, p.grad, self.state[p], group["lr"], group["weight_decay"])

    def step_tensor(self, w: Tensor, g: Tensor, state: dict[str, Any], lr: float, weight_decay: float) -> None:
        raise NotImplementedError

    def projected(self, u: Tensor, w: Tensor, g: Tensor, weight_decay: float) -> tuple[Tensor, float]:
        """The update and the weight decay, projected and scaled down if the rows, or else the layer, pass the test."""
        delta, wd_ratio, eps = 0.1, 0.1, 1e-8
        if w.ndim < 2:
            return u, weight_decay
        rows, everything = tuple(range(1, w.ndim)), tuple(range(w.ndim))
        for dims, cosine_of in ((rows, self.row_cosines), (everything, self.layer_cosine)):
            size = math.prod(w.size(d) for d in dims)
            if cosine_of(w, g, eps).abs().max() < delta / math.sqrt(size):
                n = w / (self.norm(w, dim=dims, keepdim=True) + eps)
                return u - n * (n * u).sum(dims, keepdim=True), weight_decay * wd_ratio
        return u, weight_decay

    def row_cosines(self, w: Tensor, g: Tensor, eps: float) -> Tensor:
        """As the official code has it."""
        return cosine_similarity(w.flatten(1), g.flatten(1), dim=1, eps=eps)

    def layer_cosine(self, w: Tensor, g: Tensor, eps: float) -> Tensor:
        dims = tuple(range(w.ndim))
        w_norm, g_norm = (self.norm(x, dim=dims).clamp(min=eps) for x in (w, g))
        return (w * g).sum(dims) / (w_norm * g_norm)


class AdamPFormula(Formula):
    def step_tensor(self, w: Tensor, g: Tensor, state: dict[str, Any], lr: float, weight_decay: float) -> None:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        if not state:
            state.update(step=0, m=torch.zeros_like(w), v=torch.zeros_like(w))
        state["step"] += 1
        m = state["m"].mul_(beta1).add_(g, alpha=1 - beta1)
        v = state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        u = m / (v.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(eps))
        u, decay = self.projected(u, w, g, weight_decay)
        w.mul_(1 - lr * decay)
        w.add_(u, alpha=-lr / (1 - beta1 ** state["step"]))


class SGDPFormula(Formula):
    def step_tensor(self, w: Tensor, g: Tensor, state: dict[str, Any], lr: float, weight_decay: float) -> None:
        momentum = 0.9
        if not state:
            state["b"] = torch.zeros_like(w)
        b = state["b"].mul_(momentum).add_(g)
        u, decay = self.projected(b, w, g, weight_decay)
        w.mul_(1 - lr * decay / (1 - momentum))
        w.add_(u, alpha=-lr)


def sgd_of_parts(params: list[Tensor]) -> Optimizer:
    """On plain tensors, a rank's parts of the DTensors: "_fused_sgd_ does not have a sharding strategy registered"."""
    parts = []
    for p in params:
        part = p.to_local().detach()
        part.grad = p.grad.to_local()
        parts.append(part)
    return CONTESTANTS["sgd_fused"].make(parts)


FIELDS = (
    (
        CONTESTANTS["adamw_fused"],
        CONTESTANTS["adamp"],
        Contestant("AdamP's formula", "DTensor", ADAM, making(AdamPFormula)),
        CONTESTANTS["clovaai_adamp"]._replace(cases=(Decision.CHANNEL,)),
    ),
    (
        Contestant("torch.SGD of parts", "fused", SGD, sgd_of_parts),
        CONTESTANTS["sgdp"],
        Contestant("SGDP's formula", "DTensor", SGD, making(SGDPFormula)),
        Contestant("torch.SGD", "foreach", SGD, making(torch.optim.SGD, momentum=0.9, foreach=True), tuple(Decision)),
    ),
)
"""Who steps in turns: torch's fused optimizer, against which all are measured; ours; its formula; and others."""


# On each rank.


class Side(harness.Side):
    """With FSDP2's parameters; the gradients lie as they do."""

    def __init__(
        self, contestant: Contestant, weights: Sequence[Tensor], grads: Sequence[Tensor], mesh: DeviceMesh
    ) -> None:
        params: list[Any] = fsdp2(weights, mesh)
        for p, g in zip(params, grads, strict=True):
            p.grad = distribute_tensor(g, mesh, p.placements, src_data_rank=None).clone()
        super().__init__(contestant, params)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def checked_step(self) -> list[Tensor]:
        """The weights on this rank after a large step, which is taken back.

        In the step before, whose lr is 0, the gradient is along the weight, so that momentum has a part that only the
        projection takes out.
        """
        parts = [p.to_local().detach() for p in self.params]
        before = [part.clone() for part in parts]
        grads = [p.grad for p in self.params]
        self.set_lr(0)
        for p in self.params:
            p.grad = 1e-2 * p.detach()
        self.optimizer.step()
        self.set_lr(CHECKED_LR)
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.optimizer.step()
        self.set_lr(LR)
        after = [part.clone() for part in parts]
        for part, old in zip(parts, before, strict=True):
            part.copy_(old)
        return after


def fsdp2(weights: Sequence[Tensor], mesh: DeviceMesh) -> list[DTensor]:
    """Parameters as FSDP2 lays them out, gathered module by module: GPT-2's embeddings, its layers, the last norm."""
    parts = [weights[:2], *(weights[i : i + 12] for i in range(2, len(weights), 12))]
    params: list[Any] = []
    for part in parts:
        module = nn.ParameterList(map(nn.Parameter, part))
        fully_shard(module, mesh=mesh)
        params += module.parameters()
    return params


class Traffic(TorchDispatchMode):
    """Counts, weighs and times the collectives of what runs under it.

    Attributes:
        collectives: how many.
        sent: bytes of the tensors that are handed over. With two ranks an all_reduce sends as many.
        seconds: from the call until the result is there, waiting for the other rank included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives, self.sent, self.seconds = 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # and comes again as what it does to what is here
        if func.namespace not in {"c10d", "_c10d_functional"} or "wait" in func.__name__ or "wrap" in func.__name__:
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            out[-1].wait()
        else:
            out = torch.ops._c10d_functional.wait_tensor(out)
        self.seconds += time.perf_counter() - start
        self.collectives += 1
        self.sent += sum(t.nbytes for t in (args[0] if isinstance(args[0], (list, tuple)) else args[:1]))
        return out


class Run:
    """One side's steps, with or without clipping.

    Attributes:
        by_rank: seconds of the timed rounds on every rank, after :meth:`gather`.
        slowest: of each round the slowest rank's: the others wait for it before they can go on.
        collectives, sent: of one step, as in :class:`Traffic`.
        share: of the collectives in the time of a step, over the ranks on average.
    """

    def __init__(self, side: Side, clip: bool) -> None:
        self.side, self.clip = side, clip
        self.by_rank: list[list[float]] = []
        self.slowest: list[float] = []
        self.collectives, self.sent, self.share = 0, 0, 0.0

    def step(self) -> None:
        self.side.step(self.clip)

    def gather(self, own: list[float]) -> None:
        """What only the ranks together can tell, and the traffic, in steps that are not timed: to count slows them.

        Args:
            own: seconds of the timed rounds on this rank.
        """
        self.by_rank = gathered(own)
        self.slowest = [max(ranks) for ranks in zip(*self.by_rank, strict=True)]
        shares = []
        for _ in range(COUNTED):
            dist.barrier()
            with Traffic() as traffic:
                whole = seconds(self.step)
            shares.append(statistics.mean(gathered(traffic.seconds / whole)))
        self.collectives, self.sent, self.share = traffic.collectives, traffic.sent, statistics.median(shares)


def from_barrier(step: Callable[[], object]) -> float:
    """Seconds of a step that all ranks begin together."""
    dist.barrier()
    return seconds(step)


def gathered(mine: Any) -> list[Any]:
    """What each rank has."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def measure(workload: str, case: Decision, field: Sequence[Contestant], rounds: int, mesh: DeviceMesh) -> list[Row]:
    """A row for each contestant of a field; and for the first two, torch's and ours, another one with clipping."""
    weights, grads = inputs(workload, case)
    peer, ours, formula = (Side(contestant, weights, grads, mesh) for contestant in field[:3])
    others = [Side(contestant, weights, grads, mesh) for contestant in field[3:] if case in contestant.cases]
    check(ours, formula, case)
    runs = [Run(side, clip=False) for side in (peer, ours, formula, *others)]
    runs += [Run(side, clip=True) for side in (peer, ours)]
    for run in runs:  # makes the state, and finds its memory
        run.step()
    timed = harness.in_turns([partial(from_barrier, run.step) for run in runs], rounds)
    for run, own in zip(runs, timed, strict=True):
        run.gather(own)
    ours.check_decisions(case)
    times = {(run.side, run.clip): run.slowest for run in runs}
    return [row(run, times[peer, run.clip], times.get((formula, run.clip)), workload, case) for run in runs]


def inputs(workload: str, case: Decision) -> tuple[list[Tensor], list[Tensor]]:
    """Those that every rank has a part of: FSDP2 takes no scalars, and the formula no maximum of nothing."""
    weights, grads = tensors(workload, case)
    shared = [i for i, w in enumerate(weights) if w.ndim and w.size(0) >= RANKS]
    return [weights[i] for i in shared], [grads[i] for i in shared]


def check(ours: Side, formula: Side, case: Decision) -> None:
    """Both have to step alike, once the formula's norms are exact."""
    formula.optimizer.norm = lambda x, dim, keepdim=False: x.square().sum(dim, keepdim=keepdim).sqrt()
    steps = zip(ours.params, ours.checked_step(), formula.checked_step(), strict=True)
    del formula.optimizer.norm
    for p, by_us, by_formula in steps:
        torch.testing.assert_close(
            by_us, by_formula, rtol=1e-5, atol=1e-6, msg=lambda text, p=p: f"{tuple(p.shape)}, {case.name}: {text}"
        )


def row(run: Run, peer: Sequence[float], formula: Sequence[float] | None, workload: str, case: Decision) -> Row:
    """What is kept of a run. ``peer`` and ``formula`` have theirs of the same rounds."""
    contestant = run.side.contestant
    ms, peer_ms = ([1e3 * s for s in times] for times in (run.slowest, peer))
    return {
        "workload": workload,
        "dtype": "float32",
        "case": case.name.lower(),
        **harness.measured(run.side, run.clip, ms, harness.unavoidable(contestant, run.clip)),
        "ms_p50_of_ranks": [1e3 * statistics.median(times) for times in run.by_rank],
        **harness.against_peer(contestant.family, ms, peer_ms),
        **spread("ratio", ratios(ms, peer_ms)),
        **(spread("ratio_to_formula", ratios(run.slowest, formula)) if formula else {}),
        "collectives": run.collectives,
        "bytes_sent": run.sent,
        "collectives_share": run.share,
    }


def join(rank: int, folder: str, workload: str, rounds: int) -> None:
    """One rank's part of the benchmark, from start to end; the first one writes ``found.json``."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=PATIENCE)
    mesh = init_device_mesh("cpu", (RANKS,))
    console = Console(quiet=rank > 0, highlight=False)
    copy = sum(gathered(harness.copy_gbps(from_barrier)))  # all ranks at once
    gc.disable()  # no collection while a clock runs
    rows: list[Row] = []
    for case in Decision:
        for field in FIELDS:
            console.print(f"[dim]{workload}, {case.name.lower()}: {field[1].optimizer}")
            rows += measure(workload, case, field, rounds, mesh)
            gc.collect()  # modules and their parameters refer to each other
    if rank == 0:
        found = harness.environment(pytest_benchmark_generate_machine_info()["cpu"])
        found |= {"ranks": RANKS, "communication": "gloo", "copy_gbps": copy, "rows": report.marked(rows)}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sharded", description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", choices=list(WORKLOADS), help="model whose parameters to step (default: gpt2)")
    parser.add_argument("--rounds", type=int, help=f"timed rounds, 2 or more (default: {ROUNDS})")
    parser.add_argument("--smoke", action="store_true", help=f"workload tiny, {SMOKE_ROUNDS} rounds: does it all run?")
    parser.add_argument("--out", type=Path, help="folder for <device>-<date>-<commit>-sharded.json")
    arguments = parser.parse_args()
    workload = arguments.workload or ("tiny" if arguments.smoke else "gpt2")
    rounds = arguments.rounds or (SMOKE_ROUNDS if arguments.smoke else ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(join, (folder, workload, rounds), nprocs=RANKS)
        found = json.loads(Path(folder, "found.json").read_text())
    report.present(found, arguments.out)


if __name__ == "__main__":
    main()
