"""bench/scaling.py against collectives that are counted, in real process groups and as rank 0 of 16,384."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distributed
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fused_adamp
from bench.scaling import (
    MODELS,
    Collective,
    Mesh,
    Weight,
    all_reduce_us,
    collectives,
    first_step,
    llama,
    local_shape,
    markdown,
    table_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed import DeviceMesh

pytestmark = pytest.mark.usefixtures("one_thread")

Call = tuple[str, int, int]
"""An all_reduce: the name of the mesh dimension, its number of ranks, and bytes."""

TINY = {"hidden": 12, "layers": 2, "kv": 3, "ffn": 20, "vocabulary": 11}
"""Sizes for four ranks: some have one row of the vocabulary less than others, and one has no row of kv."""

EVEN = TINY | {"kv": 4, "vocabulary": 16}
"""FSDP2 takes no uneven parts of what tensor parallelism has sharded."""


class Block(nn.Module):
    def __init__(self, hidden: int, kv: int, ffn: int) -> None:
        super().__init__()
        sizes = {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv), "o": (hidden, hidden)}
        for name, (features, out) in (
            sizes | {"gate": (hidden, ffn), "up": (hidden, ffn), "down": (ffn, hidden)}
        ).items():
            setattr(self, name, nn.Linear(features, out, bias=False))
        self.norm, self.norm_ffn = nn.RMSNorm(hidden), nn.RMSNorm(hidden)


class Llama(nn.Module):
    """The parameters alone."""

    def __init__(self, hidden: int, layers: int, kv: int, ffn: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Block(hidden, kv, ffn) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)


PLAN: dict[str, Any] = {
    "embedding": RowwiseParallel,
    **{f"layers.*.{name}": ColwiseParallel for name in ("q", "k", "v", "gate", "up")},
    **{f"layers.*.{name}": RowwiseParallel for name in ("o", "down")},
    **dict.fromkeys(("layers.*.norm", "layers.*.norm_ffn", "norm"), SequenceParallel),
    "head": ColwiseParallel,
}


def sharded(mesh: Mesh, sizes: dict[str, int]) -> tuple[nn.Module, dict[str, dist.ProcessGroup]]:
    """A model as torch lays it out, and the groups of the mesh's dimensions. All its gradients are ones."""
    model = Llama(**sizes)
    if mesh.tensor > 1:
        ranks = distributed.mesh(mesh.shards, mesh.tensor)
        parallelize_module(model, ranks["b"], {name: style() for name, style in PLAN.items()})
        fully_shard(model, mesh=ranks["a"])
        groups = {"shards": ranks.get_group("a"), "tensor": ranks.get_group("b")}
    elif mesh.replicas > 1:
        ranks = distributed.mesh(mesh.replicas, mesh.shards)
        fully_shard(model, mesh=ranks)
        groups = {"replicas": ranks.get_group("a"), "shards": ranks.get_group("b")}
    else:
        ranks = distributed.mesh(mesh.shards)
        fully_shard(model, mesh=ranks)
        groups = {"shards": ranks.get_group()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model, groups


@contextlib.contextmanager
def counted(groups: dict[str, dist.ProcessGroup], *, alike: bool = False) -> Iterator[list[Call]]:
    """Every all_reduce; ``alike``: there is one rank, and the others would send what it sends."""
    calls: list[Call] = []
    names = {group: name for name, group in groups.items()}
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, group: dist.ProcessGroup) -> None:
        calls.append((names[group], group.size(), tensor.nbytes))
        all_reduce(tensor, *args, group=group)
        if alike:
            tensor.mul_(group.size())

    dist.all_reduce = counting
    try:
        yield calls
    finally:
        dist.all_reduce = all_reduce


def tables(optimizer: Any) -> int:
    """The bytes of all tensors on the device that exist for the sake of sharing, without those of the members."""
    found: dict[int, torch.Tensor] = {}

    def walk(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found[id(item)] = item
        elif isinstance(item, (list, tuple)):
            for part in item:
                walk(part)

    exchange = optimizer.exchange
    own = {id(t) for t in (*exchange.members, *(bucket.results for bucket in optimizer.buckets))}
    walk([value for name, value in vars(exchange).items() if name != "buckets"])
    return sum(t.nbytes for i, t in found.items() if i not in own)


def step(mesh: Mesh, sizes: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    """The collectives of three steps on a rank, the last one with clipping; its rank in each group; bytes of tables."""
    model, groups = sharded(mesh, sizes)
    optimizer = fused_adamp.AdamP(model.parameters(), lr=1e-3, backend="reference", **options)
    with distributed.Collectives() as begun, counted(groups) as calls:
        optimizer.step()
        first = calls.copy()
        optimizer.step()
        plain = calls[len(first) :]
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        clipped = calls[len(first) + len(plain) :]
    assert len(begun.names) == len(calls), begun.names
    at = {name: dist.get_group_rank(group, dist.get_rank()) for name, group in groups.items()}
    return {"first": first, "plain": plain, "clipped": clipped, "at": at, "tables": tables(optimizer)}


def predicted(found: Sequence[Collective]) -> list[Call]:
    return [(of.group, of.ranks, of.bytes) for of in found]


@pytest.mark.parametrize(
    ("mesh", "sizes", "options"),
    [
        pytest.param(Mesh(2), TINY, {}, id="FSDP2 over 2"),
        pytest.param(Mesh(4), TINY, {}, id="FSDP2 over 4"),
        pytest.param(Mesh(4), TINY, {"channel_dim": 1}, id="FSDP2 over 4, rows split"),
        pytest.param(Mesh(2, replicas=2), TINY, {}, id="HSDP 2 x 2"),
        pytest.param(Mesh(2, tensor=2), EVEN, {}, id="FSDP2 x TP, 2 x 2"),
        pytest.param(Mesh(2, tensor=2), EVEN, {"channel_dim": 1}, id="FSDP2 x TP, 2 x 2, other rows"),
    ],
)
def test_prediction_is_what_is_counted(mesh: Mesh, sizes: dict[str, int], options: dict[str, Any]) -> None:
    weights = [weight._replace(**options) for weight in llama(**sizes)]
    for rank in distributed.run(mesh.ranks, step, mesh, sizes, options):
        at = [rank["at"].get(name, 0) for name in ("shards", "tensor")]
        expected = predicted(collectives(weights, mesh, *at))
        assert rank["plain"] == expected
        assert rank["clipped"] == 2 * expected
        before = len(rank["first"]) - len(expected)  # by the numbers of the ranks, one order for all
        assert sorted(rank["first"][:before]) == sorted(predicted(first_step(weights, mesh)))
        assert rank["first"][before:] == expected
        assert rank["tables"] == pytest.approx(table_bytes(weights, mesh, *at), rel=0.1)


# One rank of many: the others are alike, so that a sum is a product.


def placements(weight: Weight, mesh: Mesh) -> list[Any]:
    """Those of :func:`sharded`."""
    if mesh.tensor == 1:
        return [Shard(0)]
    if weight.tensor_dim is None:
        return [Shard(0), Replicate()]
    by_rows = weight.tensor_dim == 0
    return [_StridedShard(0, split_factor=mesh.tensor) if by_rows else Shard(0), Shard(weight.tensor_dim)]


@pytest.fixture
def fake_ranks(request: pytest.FixtureRequest) -> Iterator[tuple[Mesh, DeviceMesh]]:
    mesh: Mesh = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.ranks)
    shape = (mesh.shards, mesh.tensor) if mesh.tensor > 1 else (mesh.shards,)
    yield mesh, dist.init_device_mesh("cpu", shape, mesh_dim_names=("shards", "tensor")[: len(shape)])
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("fake_ranks", "layers"),
    [
        (Mesh(16384), 32),
        (Mesh(2048, tensor=8), 2),
    ],  # torch takes long to find its part of two shardings in one dimension
    indirect=["fake_ranks"],
    ids=["FSDP2", "FSDP2 x TP"],
)
def test_prediction_for_16384_ranks(fake_ranks: tuple[Mesh, DeviceMesh], layers: int) -> None:
    """Llama-3 8B, or some of its layers."""
    mesh, ranks = fake_ranks
    weights = list(llama(4096, layers, 1024, 14336, 128256))
    params = []
    for weight in weights:
        whole, here = torch.empty(weight.shape, device="meta"), local_shape(weight, mesh)
        lies = placements(weight, mesh)
        assert compute_local_shape_and_global_offset(whole.shape, ranks, lies)[0] == here
        own = DTensor.from_local(
            torch.ones(here), ranks, lies, run_check=False, shape=whole.shape, stride=whole.stride()
        )
        params.append(nn.Parameter(own))
        params[-1].grad = torch.ones_like(own)
    optimizer = fused_adamp.AdamP(params, backend="reference")
    groups = {name: ranks.get_group(name) for name in ranks.mesh_dim_names or ()}
    optimizer.step()  # after which the ranks agree
    with counted(groups, alike=True) as calls:
        optimizer.step()
    assert calls == predicted(collectives(weights, mesh))


# Output of the command.


@pytest.mark.parametrize("name", MODELS)
def test_shapes_add_up_to_the_published_size(name: str) -> None:
    shapes = [weight.shape for weight in MODELS[name].weights()]
    assert (len(shapes), sum(map(math.prod, shapes))) == (MODELS[name].tensors, MODELS[name].params)


def test_the_page_has_the_table() -> None:
    assert markdown() in (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def test_time_by_hand() -> None:
    """In a node by ring; over 2048 of them by tree, down and up a chain of 8 GPUs in each. Little data: both LL."""
    size = 14_136
    ring = 6.6 + 14 * 0.6 + 1e6 * 2 * size * 7 / 8 / 87.7e9
    tree = 6.8 + 2 * 7 * 0.6 + 2 * 11 * 5.0 + 1e6 * 2 * size / 19.0e9
    assert all_reduce_us(size, 8, 8) == pytest.approx(ring)
    assert all_reduce_us(size, 16384, 8) == pytest.approx(tree)
    assert all_reduce_us(size, 1, 1) == 0
