"""Real process groups for tests: worker processes over gloo, which wait for tasks as long as the test session lives."""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory import KINDS, RULES, gradient

from fused_adamp.backends import available
from fused_adamp.reference import cosine, rows_first
from fused_adamp.sharded.dtensor import local
from fused_adamp.sharded.flat_slice import FlatSlice, mark_slice
from fused_adamp.sharded.placement import placement_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from torch.distributed import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

    from fused_adamp.reference import Decision

_START = 120.0
"""Seconds that processes have to import torch and to meet, on a busy machine."""

_GRACE = 5.0
"""Seconds that the other ranks have to finish a task when one has failed in it."""

_ENDED, _LATE = "has ended", "has not returned in time"

_pools: dict[int, _Pool] = {}


def run(ranks: int, task: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Calls a module's function ``task(*args)`` on every rank of a process group. Returns the results, rank by rank.

    Raises:
        AssertionError: with the trace of every rank that failed or did not return in time. If one did not, the
            processes are ended, and the next task gets new ones.
    """
    if ranks not in _pools:
        _pools[ranks] = _Pool(ranks)
    replies = _pools[ranks].run(pickle.dumps((task, args)), timeout)
    failures = [f"rank {rank}: {reply}" for rank, (well, reply) in enumerate(replies) if not well]
    if any(not well and reply in (_ENDED, _LATE) for well, reply in replies):
        _pools.pop(ranks).end()
    if failures:
        raise AssertionError("\n".join(failures))
    return [reply for _, reply in replies]


@functools.cache
def _forkserver() -> Any:
    """Forks workers from a process that has imported what they need and has started no thread.

    torch takes seconds to import, and its compiler, which every optimizer loads, as long again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed", "torch._dynamo"])
    # Python 3.11 looks for the modules without this process's sys.path, and passes over those that it does not find.
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"  # is read when Triton is imported
    with mock.patch.dict(os.environ, variables):
        forkserver.ensure_running()
    return context


class _Pool:
    def __init__(self, ranks: int) -> None:
        context = _forkserver()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipes = [context.Pipe() for _ in range(ranks)]
        self._processes = [
            context.Process(target=_serve, args=(rank, ranks, self._store.port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        self._connections = [ours for ours, _ in pipes]
        self._slack = _START

    def run(self, work: bytes, timeout: float) -> list[tuple[bool, Any]]:
        replies: dict[Connection, tuple[bool, Any]] = {}
        end, self._slack = time.monotonic() + timeout + self._slack, 0.0
        for connection in self._connections:
            try:
                connection.send_bytes(work)
            except BrokenPipeError:
                replies[connection] = False, _ENDED
        while len(replies) < len(self._connections):
            ready = wait([c for c in self._connections if c not in replies], max(end - time.monotonic(), 0))
            if not ready:
                break
            for connection in ready:
                assert not isinstance(connection, int)
                replies[connection] = _receive(connection)
                if not replies[connection][0]:
                    end = min(end, time.monotonic() + _GRACE)
        return [replies.get(connection, (False, _LATE)) for connection in self._connections]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()


def _receive(connection: Any) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())  # type: ignore[no-any-return]
    except EOFError:
        return False, _ENDED


def _serve(rank: int, ranks: int, port: int, connection: Connection) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted session ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Tensor parallel layers wrapped by FSDP2 give this warning. No code writes to their outputs.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=False)
    limit = datetime.timedelta(seconds=_START)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    while True:
        work = connection.recv_bytes()
        torch.manual_seed(0)
        try:
            task, args = pickle.loads(work)
            reply = True, task(*args)
        except BaseException:
            reply = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(reply))


def _end_with_parent() -> None:
    """Even from within a collective, and without taking gloo apart, which waits for the other ranks."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers call this"
    parent.join()
    os._exit(0)


_meshes: dict[Any, DeviceMesh] = {}


def mesh(*shape: int, device: str = "cpu") -> DeviceMesh:
    """All ranks as a mesh of this shape with dimensions "a", "b"; the same one every time, with its process groups."""
    if (device, shape) not in _meshes:
        _meshes[device, shape] = dist.init_device_mesh(device, shape, mesh_dim_names=("a", "b")[: len(shape)])
    return _meshes[device, shape]


class Collectives(TorchDispatchMode):
    """Notes the name of every collective that begins while it is entered, torch.distributed's and DTensor's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # and comes again as what it does to its local tensors
        if func.namespace in {"c10d", "_c10d_functional", "_dtensor"} and "wait_tensor" not in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


# Models in several layouts.

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "even": {
        "matrix": (8, 12),
        "conv": (4, 4, 3, 1),
        "gain": (8,),
        "bias": (4,),
        "embedding": (12, 4),
        "scalar": (),
        "wide": (4, 160),
    },
    "uneven": {
        "matrix": (7, 5),
        "conv": (5, 5, 3, 1),
        "gain": (7,),
        "bias": (5,),
        "embedding": (11, 7),
        "scalar": (),
        "wide": (5, 240),
    },
    "empty": {
        "row": (1, 7),
        "conv": (3, 3, 2, 2),
        "gain": (1,),
        "bias": (3,),
        "embedding": (6, 3),
        "scalar": (),
        "wide": (3, 300),
    },
}
"""Shapes by how dims 0 and 1 are sharded: evenly; unevenly; so that some ranks have empty shards.

Each rank's rows of the wide matrix are long enough for the CPU backend to guess the verdict.
"""

RANKS = {"even": 2, "uneven": 3, "empty": 4}
"""In a mesh of one dimension; two dimensions are 2 x 2."""


def backends() -> list[str]:
    """Those that run here, the fastest first. Triton, which is slow in its interpreter, has tests of its own."""
    return [backend.name for backend in available(torch.device("cpu")) if backend.name != "triton"]


LAYOUTS = ("DDP", "FSDP2", "HSDP", "TP column", "TP row", "FSDP2 x TP")

MIXED = ("replicated", "crossed", "two meshes")
"""Further layouts: see :func:`_places`."""

FLAT = "flat"
"""All parameters one after the other in a buffer, of which each rank has as much as any other."""


def ranks_of(layout: str, sharing: str) -> int:
    return 4 if layout in {"HSDP", "FSDP2 x TP", *MIXED} else RANKS[sharing]


def _places(layout: str, weight: Tensor, number: int) -> tuple[DeviceMesh, list[Placement]] | None:
    """Where a parameter lies before FSDP2 takes it, by its number; None: it is whole."""
    first, second = Shard(0), Shard(1) if weight.ndim > 1 else Replicate()
    if layout in {"TP column", "TP row"}:
        return mesh(dist.get_world_size(), device=weight.device.type), [first if layout == "TP column" else second]
    if layout == "FSDP2 x TP":
        return mesh(2, 2)["b"], [(second, first)[number % 2]]  # FSDP2 refuses parameters of which it has nothing
    if layout == "replicated":
        return mesh(dist.get_world_size()), [Replicate()]
    if layout == "crossed":  # one's rows are another's columns
        return mesh(2, 2), [(first, second), (second, first)][number % 2]
    if layout == "two meshes" and number % 3 < 2:
        return ((mesh(4), [first]), (mesh(2, 2), [Replicate(), second]))[number % 3]
    return None


class Given(nn.Module):
    """Parameters whose gradients are given: they are what it is called with, the same on all ranks."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight))

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        terms = [full((p * laid_out(grads[name], p)).sum()) for name, p in self.named_parameters()]
        return torch.stack(terms).sum()


def full(t: Tensor, like: Tensor | None = None) -> Tensor:
    """The whole of a tensor that lies as another."""
    if like is not None and isinstance(flat := placement_of(like), FlatSlice):
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, t.detach())
        return torch.cat(parts).reshape(flat.whole)
    if not isinstance(t, DTensor):
        return t
    return t.int().full_tensor().short() if t.dtype is torch.int16 else t.full_tensor()  # gloo knows no int16


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """A tensor that all ranks have, laid out as another."""
    if isinstance(flat := placement_of(like), FlatSlice):
        return t.flatten()[flat.begin : flat.end]
    if not isinstance(like, DTensor):
        return t
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def sliced(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's slices of the flat buffer, marked."""
    size = -(-sum(weight.numel() for weight in weights.values()) // dist.get_world_size())
    begin, parts = -size * dist.get_rank(), {}
    for name, weight in weights.items():
        first, last = (min(max(bound, 0), weight.numel()) for bound in (-begin, size - begin))
        parts[name] = nn.Parameter(weight.flatten()[first:last].clone())
        mark_slice(parts[name], weight.shape, first)
        begin += weight.numel()
    return parts


def build(layout: str, weights: dict[str, Tensor]) -> nn.Module:
    """A module with these parameters: "whole" on each rank, or in one of :data:`LAYOUTS`, :data:`MIXED` or FLAT."""
    if layout == FLAT:
        return Given(sliced(weights))
    parts = {name: weight.clone() for name, weight in weights.items()}
    for number, (name, weight) in enumerate(weights.items()):
        places = _places(layout, weight, number) if weight.ndim else None
        if places is not None:
            parts[name] = distribute_tensor(weight, *places, src_data_rank=None)
    module = Given(parts)
    if layout == "DDP":
        return DistributedDataParallel(module)
    if layout in {"FSDP2", "HSDP", "FSDP2 x TP"}:
        over = mesh(dist.get_world_size()) if layout == "FSDP2" else mesh(2, 2)
        numbers = {p for p in module.parameters() if p.ndim == 0}  # which it refuses
        fully_shard(module, mesh=over["a"] if layout == "FSDP2 x TP" else over, ignored_params=numbers)
    return module


class Run:
    """An optimizer of parameters in some layout, in two groups that differ."""

    def __init__(self, layout: str, weights: dict[str, Tensor], rule: str, **options: Any) -> None:
        self.module = build(layout, weights)
        self.params = {name.removeprefix("module."): p for name, p in self.module.named_parameters()}
        cls, defaults = RULES[rule]
        named = list(self.params.items())
        groups = [{"params": named[::2]}, {"params": named[1::2], "lr": 0.02, "weight_decay": 0.3, "wd_ratio": 0.5}]
        self.optimizer = cls(groups, **{**defaults, **options})

    def backward(self, grads: dict[str, Tensor]) -> None:
        """Gives the parameters these gradients, which all ranks have, by way of autograd and the layout's hooks."""
        self.optimizer.zero_grad()
        self.module(grads).backward()

    def give(self, grads: dict[str, Tensor]) -> None:
        """The same without, which is faster."""
        for name, p in self.params.items():
            p.grad = laid_out(grads[name], p)

    def advance(self, max_norm: float | None = None, **clipping: Any) -> float:
        """Clips, if there is a norm to clip to, and steps. Returns the norm before."""
        norm = math.nan if max_norm is None else self.optimizer.clip_grad_norm_(max_norm, **clipping).item()
        self.optimizer.step()
        return norm

    def decisions(self) -> dict[str, Decision]:
        found = self.optimizer.decisions()
        return {name: found[p] for name, p in self.params.items() if p in found}

    def weights(self) -> dict[str, Tensor]:
        return self._whole({name: (p, p) for name, p in self.params.items()})

    def values(self) -> dict[str, Tensor]:
        """All that a step moves, as it is laid out; of slices the whole."""
        found = {name: (p, p) for name, p in self.params.items()}
        for name, p in self.params.items():
            found |= {f"{key} of {name}": (t, p) for key, t in self.optimizer.state[p].items()}
        return self._whole(found)

    @staticmethod
    def _whole(found: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Each tensor, beside the parameter that it belongs to. Slices are gathered, all of them at once."""
        flat = {name: placement_of(p) for name, (t, p) in found.items() if t.shape == p.shape}
        slices = {name: place for name, place in flat.items() if isinstance(place, FlatSlice)}
        values = {name: t.detach().clone() for name, (t, _) in found.items()}
        if slices:
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, {name: values[name] for name in slices})
            for name, place in slices.items():
                values[name] = torch.cat([rank[name] for rank in ranks]).reshape(place.whole)
        return values


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def far_gradients(run: Run, count: int) -> dict[str, Tensor]:
    """Random gradients of a run that has whole parameters, each far from the threshold of the cosine test.

    As ``count`` goes up, every parameter takes all decisions in turn that its shape allows.
    """
    torch.manual_seed(count)
    grads = {}
    for number, (name, p) in enumerate(run.params.items()):
        (group,) = (group for group in run.optimizer.param_groups if any(p is member for member in group["params"]))
        kind, elements = KINDS[(number + count) % len(KINDS)], torch.arange(p.numel()).reshape(p.shape)
        order = rows_first(elements, group["channel_dim"], copy=True)
        weight = p.detach().double().flatten()[order]
        by_rows = gradient(weight, kind)
        grads[name] = torch.empty_like(p, requires_grad=False)
        grads[name].view(-1)[order.flatten()] = by_rows.flatten().to(p.dtype)
        for rows in (len(weight), 1) if p.ndim > 1 else ():
            x, y = by_rows.reshape(rows, -1), weight.reshape(rows, -1)
            ratio = cosine(x, y, group["eps"]).max() * math.sqrt(x.size(1)) / 0.1
            assert not 0.9 < ratio < 1.1, f"{name} is at the threshold: {ratio}"
    return grads


class Record(NamedTuple):
    """A run in one process: what it began with, got, and came to."""

    weights: dict[str, Tensor]
    grads: list[dict[str, Tensor]]
    norms: list[float]
    decisions: list[dict[str, Decision]]
    values: dict[str, Tensor]


def record(sharing: str, rule: str, steps: int, seed: int, max_norm: float | None = None, **options: Any) -> Record:
    weights = random_weights(SHAPES[sharing], seed)
    run, grads, norms, decisions = Run("whole", weights, rule, **options), [], [], []
    for step in range(steps):
        grads.append(far_gradients(run, 1000 * seed + step))
        run.give(grads[-1])
        norms.append(run.advance(max_norm))
        decisions.append(run.decisions())
    return Record(weights, grads, norms, decisions, run.values())


def assert_within(actual: dict[str, Tensor], expected: dict[str, Tensor], allowed: float = 1e-12) -> None:
    """Every tensor, or what this rank has of it, within so much of its largest value; NaN is not."""
    assert actual.keys() == expected.keys()
    for name, b in expected.items():
        a = actual[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{name}: {a.dtype} {a.shape}, not {b.dtype} {b.shape}"
        if isinstance(b, DTensor) != isinstance(a, DTensor):
            b = laid_out(b, a) if isinstance(a, DTensor) else full(b)
        a, b = local(a), local(b)
        error = (a - b).abs().max().item() if b.numel() else 0.0
        size = local(expected[name]).abs().max().item() if b.numel() else 0.0
        assert error <= allowed * size, f"{name}: off by {error:.3g} of {size:.3g}"


class Pair:
    """On every rank, one run in a layout beside one that has all of it."""

    def __init__(
        self, layout: str, rule: str, sharing: str, dtype: torch.dtype = torch.float64, **options: Any
    ) -> None:
        weights = {name: w.to(dtype) for name, w in random_weights(SHAPES[sharing], 0).items()}
        self.sharded, self.whole = (Run(which, weights, rule, **options) for which in (layout, "whole"))
        self.another = functools.partial(Pair, layout, rule, sharing, dtype, **options)
        self.count = 0

    def __iter__(self) -> Iterator[Run]:
        return iter((self.sharded, self.whole))

    def give(self) -> None:
        """Both the same gradients, random ones."""
        grads = far_gradients(self.whole, self.count)
        self.count += 1
        for run in self:
            run.give(grads)

    def advance(self, max_norm: float | None = None, **clipping: Any) -> None:
        norms = [run.advance(max_norm, **clipping) for run in self]
        assert max_norm is None or abs(norms[0] - norms[1]) <= 1e-12 * norms[1], f"norms {norms}"
        self.check()

    def steps(self, count: int, max_norm: float | None = None) -> None:
        for _ in range(count):
            self.give()
            self.advance(max_norm)

    def check(self) -> None:
        decisions, values = ([of(run) for run in self] for of in (Run.decisions, Run.values))
        assert decisions[0] == decisions[1]
        assert_within(*values)


@contextlib.contextmanager
def named(case: str) -> Iterator[None]:
    """Names the case that failed, for tasks with many cases."""
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error


def holds(p: Tensor, last: bool) -> bool:
    """Whether this rank is among those that hold the first, or the last, part of a sharded parameter."""
    if isinstance(flat := placement_of(p), FlatSlice):
        return flat.begin < flat.end and (flat.end == math.prod(flat.whole) if last else flat.begin == 0)
    if not isinstance(p, DTensor):
        return False
    mesh, place = p.device_mesh, p.device_mesh.get_coordinate()
    shared = [dim for dim, placement in enumerate(p.placements) if not placement.is_replicate()]
    return bool(shared) and all(place[dim] == (mesh.size(dim) - 1 if last else 0) for dim in shared)
