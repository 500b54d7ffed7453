"""What a step of sharded parameters sends, and how long that takes, on 8 to 16,384 GPUs: ``python -m bench.scaling``.

Collectives and bytes follow from shapes and layout alone; tests/sharding/test_scaling.py counts them in real process
groups. The
times are those of a model, for GPUs that no step has been run on. docs/scaling.md has formulas and table (--markdown).
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from bench.report import table_of
from bench.workloads import WORKLOADS, llama_layer
from fused_adamp.batch import ROW_SHARES, SHARES, Sharing
from fused_adamp.sharded.exchange import _RECORD
from fused_adamp.sharded.header import Header
from fused_adamp.sharded.layout import Layout, schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.table import Table

    from bench.workloads import Shape

__all__ = ["MODELS", "Collective", "Mesh", "Model", "Weight", "collectives", "first_step", "llama", "main", "markdown"]

# Models.


class Weight(NamedTuple):
    """A parameter: the dimension that tensor parallelism shards, None if it replicates it; and that of its rows."""

    shape: Shape
    tensor_dim: int | None = None
    channel_dim: int = 0


class Model(NamedTuple):
    """Weights, with the published totals that they are checked against."""

    weights: Callable[[], Iterator[Weight]]
    tensors: int
    params: int


def benchmarked(name: str) -> Model:
    """A model of bench/workloads.py, which is not meant for tensor parallelism."""
    known = WORKLOADS[name]
    return Model(lambda: map(Weight, known.shapes()), known.tensors, known.params)


def gpt2_by_outputs() -> Iterator[Weight]:
    """GPT-2 whose Conv1D weights, (in, out), have a row for every output."""
    shapes = list(WORKLOADS["gpt2"].shapes())
    yield from map(Weight, shapes[:2])  # the embeddings
    yield from (Weight(shape, channel_dim=len(shape) - 1) for shape in shapes[2:])


_PLAN = (0, 0, 0, 1, 0, 0, 1, None, None)
"""Of a decoder layer's weights: q, k, v, gate and up by columns, o and down by rows (of y = x W), norms replicated."""


def llama(hidden: int, layers: int, kv: int, ffn: int, vocabulary: int) -> Iterator[Weight]:
    """Llama with its own head, in the order of Hugging Face transformers. ``kv``: heads' times their dimension."""
    yield Weight((vocabulary, hidden), 0)
    for _ in range(layers):
        yield from map(Weight, llama_layer(hidden, kv, ffn), _PLAN)
    yield Weight((hidden,))
    yield Weight((vocabulary, hidden), 0)


# Totals: torchvision; Hugging Face's config.json and safetensors index. Heads of 128.
MODELS: dict[str, Model] = {
    "ResNet-50": benchmarked("resnet50"),
    "ViT-B/16": benchmarked("vit_b16"),
    "GPT-2": benchmarked("gpt2"),
    "GPT-2, channel_dim=1": benchmarked("gpt2")._replace(weights=gpt2_by_outputs),
    "Llama-3 8B": Model(lambda: llama(4096, 32, 8 * 128, 14336, 128256), 291, 8_030_261_248),
    "Llama-3 70B": Model(lambda: llama(8192, 80, 8 * 128, 28672, 128256), 723, 70_553_706_496),
    "Llama-3 405B": Model(lambda: llama(16384, 126, 8 * 128, 53248, 128256), 1137, 405_853_388_800),
}


# What is sent.


class Mesh(NamedTuple):
    """The ranks: FSDP2's shards, tensor parallel ranks (neighbours in a node), and HSDP's replicas of all that."""

    shards: int
    tensor: int = 1
    replicas: int = 1

    @property
    def ranks(self) -> int:
        return math.prod(self)

    @property
    def name(self) -> str:
        return "FSDP2" + f" x TP {self.tensor}" * (self.tensor > 1) if self.replicas == 1 else f"HSDP of {self.shards}"


class Collective(NamedTuple):
    """An all_reduce over ``ranks`` of the mesh's "shards" or "tensor" dimension, of so many float64."""

    group: str
    ranks: int
    records: int
    rows: int

    @property
    def bytes(self) -> int:
        header = len(Header.of(()).numbers())
        return 8 * (header + self.records * len(_RECORD) + self.rows * len(ROW_SHARES))


def local_shape(weight: Weight, mesh: Mesh, shard: int = 0, tensor: int = 0) -> Shape:
    """What a rank holds. Tensor parallelism comes first, FSDP2 shards dimension 0 of the rest; rank 0 has the most."""

    def part(size: int, ranks: int, index: int) -> int:
        chunk = -(-size // ranks)
        return max(0, min(chunk, size - index * chunk))

    shape = list(weight.shape)
    if weight.tensor_dim is not None:
        shape[weight.tensor_dim] = part(shape[weight.tensor_dim], mesh.tensor, tensor)
    shape[0] = part(shape[0], mesh.shards, shard)
    return tuple(shape)


def layout(weight: Weight, mesh: Mesh) -> Layout:
    """With the names of groups for the groups."""
    rows, cols = [], []
    for group, ranks, dim in (("shards", mesh.shards, 0), ("tensor", mesh.tensor, weight.tensor_dim)):
        if ranks > 1 and dim is not None:
            (rows if len(weight.shape) < 2 or dim == weight.channel_dim else cols).append(group)
    sharing = Sharing.SPLIT if cols else Sharing.SHARED if rows else Sharing.LOCAL
    replicas = ("replicas",) * (mesh.replicas > 1)
    return Layout(sharing, 0, 0, tuple(rows), tuple(cols), None, replicas)


def split_rows(weight: Weight, mesh: Mesh, shard: int = 0, tensor: int = 0) -> int:
    """The rows here whose other elements are elsewhere."""
    split = layout(weight, mesh).sharing is Sharing.SPLIT
    return local_shape(weight, mesh, shard, tensor)[weight.channel_dim] if split else 0


def collectives(weights: Iterable[Weight], mesh: Mesh, shard: int = 0, tensor: int = 0) -> list[Collective]:
    """Those of a step, and of a ``clip_grad_norm_``, as a rank with these coordinates takes part in them."""
    members = [(layout(weight, mesh), split_rows(weight, mesh, shard, tensor)) for weight in weights]
    pending = [(list(of.col_groups), list(of.row_groups), rows) for of, rows in members]
    found = []
    for group in schedule([of for of, _ in members]):
        sent = [(cols or row_groups, bool(cols) * rows) for cols, row_groups, rows in pending]
        sent = [(groups, rows) for groups, rows in sent if group in groups]
        found.append(Collective(group, getattr(mesh, group), len(sent), sum(rows for _, rows in sent)))
        for groups, _ in sent:
            groups.remove(group)
    return found


def first_step(weights: Iterable[Weight], mesh: Mesh) -> list[Collective]:
    """Those that the first step has besides: the ranks make sure that they share the same parameters."""
    layouts = [layout(weight, mesh) for weight in weights]
    groups = {group for of in layouts for group in (*of.row_groups, *of.col_groups, *of.replica_groups)}
    return [Collective(group, getattr(mesh, group), 0, 0) for group in sorted(groups)] * len(groups)


def table_bytes(weights: Iterable[Weight], mesh: Mesh, shard: int = 0, tensor: int = 0) -> int:
    """What shares, verdicts and indices hold on the device between steps, beside the tables of every optimizer."""
    weights = list(weights)
    sent = collectives(weights, mesh, shard, tensor)
    rows = [split_rows(weight, mesh, shard, tensor) for weight in weights]
    members = sum(layout(weight, mesh).sharing is not Sharing.LOCAL for weight in weights)
    # Bucket: needs, shares, verdicts. Exchange: of its piece the place and the owner, the piece; three options, two
    # dimensions, holders, five flags.
    by_member = len(weights) * (1 + 8 * len(SHARES) + 8 * 2) + members * (8 * 3 + 8 * 3 + 8 * 2 + 8 + 5)
    # Bucket: shares, projection. Exchange: place, place among those of all ranks, owner, place in the fold.
    by_row = sum(rows) * (8 * len(ROW_SHARES) + 8 + 8 * 4) + 8 * sum(map(bool, rows))
    return by_member + by_row + 8 * sum(collective.records + collective.rows for collective in sent)


# How long that takes.

NODE = 8
"""GPUs in a node, as in DGX H200."""

NVLINK = 18 * 20.6e9
"""Bytes/s of a GPU in one direction: 18 links as NCCL counts them (src/graph/topo.h); NVIDIA publishes 450e9."""

NETWORK = 50e9
"""Bytes/s of a GPU to other nodes in one direction: a 400 Gb/s adapter for each (DGX H200)."""

MEMORY = 0.9 * 4.8e12
"""Bytes/s of an H200: published, and the part of it that is assumed to be reached."""

CAPACITY = 141e9
"""Bytes of an H200."""

STEP_BYTES = 44
"""Per float32 parameter, AdamP: measure and dot read p, g, m, v; the step reads them again and writes p, m, v."""

CLIPPED_BYTES = 52
"""The same with clipping: p and g once more."""


class Protocol(NamedTuple):
    """An algorithm of NCCL under one of its protocols (LL, LL128, Simple), with the constants of its own cost model.

    They are those of NVIDIA/nccl, src/graph/tuning.cc, at commit b647562. Left out are its corrections for medium sizes
    and for the host's part in rings between nodes.

    Attributes:
        base, in_node, between: latency in us, of the call and of a hop.
        efficiency: the part of the bandwidth that carries data.
        most: bytes/s at most, in one node and between nodes.
    """

    algorithm: str
    base: float
    in_node: float
    between: float
    efficiency: float
    most: tuple[float, float] = (math.inf, math.inf)


LL = (87.7e9, 19.0e9)
PROTOCOLS = (
    Protocol("tree", 6.8, 0.6, 5.0, 0.92 / 3.8, LL),
    Protocol("tree", 14.0, 1.25, 8.5, 0.92 * 120 / 128),
    Protocol("tree", 0.0, 28.0, 28.0, 0.92),
    Protocol("ring", 6.6, 0.6, 2.7, 1 / 4, LL),
    Protocol("ring", 14.0, 1.9, 4.0, 0.92),
    Protocol("ring", 8.4, 3.4, 14.0, 1.0),
)


def sent(size: int, ranks: int, algorithm: str) -> float:
    """Bytes that the busiest rank sends in an all_reduce of ``size`` bytes.

    In a ring every rank sends all parts of the data but one to be added up, and again when they are. Of NCCL's two
    trees each takes half: a rank, a leaf in one of them, sends half up in both, and half down to each of two children.
    """
    return 2 * size * (ranks - 1) / ranks if algorithm == "ring" else 2 * size * (ranks > 1)


def all_reduce_us(size: int, ranks: int, in_node: int) -> float:
    """Microseconds of an all_reduce of ``size`` bytes over ranks of which ``in_node`` share a node; 0 of one rank."""
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // in_node)
    bandwidth = min(NVLINK, NETWORK * in_node) if nodes > 1 else NVLINK

    def time(protocol: Protocol) -> float:
        if protocol.algorithm == "ring":
            between = 2 * nodes * (nodes > 1)
            inside = max(0, 2 * (ranks - 1) - between)
        else:  # down a chain in every node, and a tree of nodes
            between, inside = 2 * (nodes - 1).bit_length(), 2 * (in_node - 1)
        speed = min(bandwidth * protocol.efficiency, protocol.most[nodes > 1])
        latency = protocol.base + inside * protocol.in_node + between * protocol.between
        return latency + 1e6 * sent(size, ranks, protocol.algorithm) / speed

    return min(map(time, PROTOCOLS))


class Cost(NamedTuple):
    """Of a step: what the fullest rank sends, and its microseconds."""

    collectives: list[Collective]
    exchange_us: float
    memory_us: float

    @property
    def packed(self) -> int:
        return sum(collective.bytes for collective in self.collectives)

    @property
    def share(self) -> float:
        return self.exchange_us / (self.exchange_us + self.memory_us)


def cost(weights: Sequence[Weight], mesh: Mesh, *, clip: bool = False) -> Cost:
    once = collectives(weights, mesh)
    in_node = {"shards": min(mesh.shards, max(1, NODE // mesh.tensor)), "tensor": mesh.tensor}
    exchange = sum(all_reduce_us(of.bytes, of.ranks, in_node[of.group]) for of in once)
    held = sum(math.prod(local_shape(weight, mesh)) for weight in weights)
    calls, size = (2, CLIPPED_BYTES) if clip else (1, STEP_BYTES)
    return Cost(once * calls, exchange * calls, 1e6 * size * held / MEMORY)


def fits(params: int, mesh: Mesh) -> bool:
    """Whether float32 weights, gradients and two moments leave half of a GPU's memory to all else."""
    return 16 * params / (mesh.shards * mesh.tensor) <= CAPACITY / 2


# Tables.

RANKS = (8, 128, 2048, 16384)


def meshes(model: str) -> list[list[Mesh | None]]:
    """One row for each layout, an entry for each of RANKS; None where the model does not fit."""
    params = MODELS[model].params
    fewest = next(2**n for n in range(3, 20) if fits(params, Mesh(2**n)))
    rows = [[Mesh(ranks) for ranks in RANKS]]
    if "channel_dim" not in model:
        rows.append([Mesh(min(ranks, fewest), replicas=max(1, ranks // fewest)) for ranks in RANKS])
    if "Llama" in model:
        rows.append([Mesh(ranks // NODE, tensor=NODE) for ranks in RANKS])
    return [[mesh if fits(params, mesh) else None for mesh in row] for row in rows]


def number(n: float, unit: str) -> str:
    """Of bytes or microseconds, in a thousand or a million of them where it is that many."""
    steps = {"B": ("B", "KB", "MB"), "us": ("us", "ms", "s")}[unit]
    i = 0 if n < 1000 else 1 if n < 1e6 else 2
    n /= 1000**i
    return f"{n:.{0 if n >= 100 or not i else 1}f} {steps[i]}"


def percent(share: float) -> str:
    return "<0.1%" if share < 0.001 else ">99%" if share > 0.99 else f"{100 * share:.{0 if share >= 0.1 else 1}f}%"


def markdown(*, clip: bool = False) -> str:
    """The table of docs/scaling.md."""
    heads = [f"{ranks:,} GPUs" for ranks in RANKS]
    lines = ["| | members | packed | " + " | ".join(heads) + " |", "|---|---|---|" + "---|" * len(RANKS)]
    for model in MODELS:
        weights = list(MODELS[model].weights())
        for row in meshes(model):
            costs = [None if mesh is None else cost(weights, mesh, clip=clip) for mesh in row]
            mesh = next(mesh for mesh in reversed(row) if mesh is not None)
            packed = dict.fromkeys(number(of.packed, "B") for of in costs if of is not None)
            cells = ["-" if of is None else f"{number(of.exchange_us, 'us')}, {percent(of.share)}" for of in costs]
            ends = " to ".join([*packed][:: max(1, len(packed) - 1)])
            lines.append(f"| {model}, {mesh.name} | {len(weights)} | {ends} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def details(*, clip: bool = False) -> Table:
    heads = "GPUs", "collectives", "rows", "packed", "ring sends", "tree sends", "tables", "exchange", "memory", "share"
    table = table_of(f"A step of AdamP{' that clips' * clip}, float32", ("model", "layout"), heads)
    for model in MODELS:
        weights = list(MODELS[model].weights())
        for mesh in dict.fromkeys(mesh for row in meshes(model) for mesh in row if mesh is not None):
            found = cost(weights, mesh, clip=clip)
            by = {a: sum(sent(of.bytes, of.ranks, a) for of in found.collectives) for a in ("ring", "tree")}
            table.add_row(
                model,
                mesh.name,
                f"{mesh.ranks:,}",
                " + ".join(f"{of.group} {of.ranks:,}" for of in found.collectives),
                f"{max(of.rows for of in found.collectives):,}",
                *(number(size, "B") for size in (found.packed, by["ring"], by["tree"], table_bytes(weights, mesh))),
                number(found.exchange_us, "us"),
                number(found.memory_us, "us"),
                percent(found.share),
            )
        table.add_section()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="the table of docs/scaling.md")
    parser.add_argument("--clip", action="store_true", help="clip_grad_norm_ before the step")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(clip=arguments.clip), end="")
    else:
        Console(width=200, highlight=False).print(details(clip=arguments.clip))


if __name__ == "__main__":
    main()
