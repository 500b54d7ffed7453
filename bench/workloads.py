"""The parameters of the benchmarked models, and gradients that make the cosine test decide as asked.

Shapes are generated from the architectures, in the order of ``model.parameters()``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["WORKLOADS", "Workload", "expected_decision", "gradient", "tensors"]

Shape = tuple[int, ...]


class Workload(NamedTuple):
    """A model's parameters, with the published totals that the generated shapes are checked against."""

    shapes: Callable[[], Iterator[Shape]]
    tensors: int
    params: int


def resnet50() -> Iterator[Shape]:
    """ResNet-50 with 1000 classes, as in torchvision."""
    yield from conv_bn(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from conv_bn(width, channels, 1)
            yield from conv_bn(width, width, 3)
            yield from conv_bn(4 * width, width, 1)
            if block == 0:
                yield from conv_bn(4 * width, channels, 1)
            channels = 4 * width
    yield from linear(1000, channels)


def vit_b16() -> Iterator[Shape]:
    """ViT-B/16 for 224 x 224 images with 1000 classes, as in torchvision."""
    hidden, patches = 768, (224 // 16) ** 2
    yield (1, 1, hidden)  # class token
    yield from ((hidden, 3, 16, 16), (hidden,))  # patches to vectors
    yield (1, patches + 1, hidden)  # positions
    for _ in range(12):
        yield from layer_norm(hidden)
        yield from linear(3 * hidden, hidden)
        yield from linear(hidden, hidden)
        yield from layer_norm(hidden)
        yield from linear(4 * hidden, hidden)
        yield from linear(hidden, 4 * hidden)
    yield from layer_norm(hidden)
    yield from linear(1000, hidden)


def gpt2() -> Iterator[Shape]:
    """GPT-2 (124M) with tied head, as in Hugging Face transformers: Conv1D weights are (in, out)."""

    def conv1d(features_in: int, features_out: int) -> Iterator[Shape]:
        yield from ((features_in, features_out), (features_out,))

    hidden = 768
    yield from ((50257, hidden), (1024, hidden))  # tokens, positions
    for _ in range(12):
        yield from layer_norm(hidden)
        yield from conv1d(hidden, 3 * hidden)
        yield from conv1d(hidden, hidden)
        yield from layer_norm(hidden)
        yield from conv1d(hidden, 4 * hidden)
        yield from conv1d(4 * hidden, hidden)
    yield from layer_norm(hidden)


def llama_1b() -> Iterator[Shape]:
    """Llama-3.2-1B with tied head, as in Hugging Face transformers."""
    hidden = 2048
    yield (128256, hidden)
    for _ in range(16):
        yield from llama_layer(hidden, 512, 8192)
    yield (hidden,)


def llama_8b_layer() -> Iterator[Shape]:
    """One decoder layer of Llama-3-8B."""
    yield from llama_layer(4096, 1024, 14336)


def gaussians() -> Iterator[Shape]:
    """3D Gaussian splatting, a scene of a million: centres, scales, rotations, opacities, spherical harmonics."""
    yield from ((1_000_000, columns) for columns in (3, 3, 4, 1))
    yield (1_000_000, 16, 3)


def mobilenet_v2() -> Iterator[Shape]:
    """MobileNetV2 with 1000 classes, as in torchvision: its depthwise filters are rows of 9."""
    yield from conv_bn(32, 3, 3)
    channels = 32
    for expansion, out, blocks in (1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1):
        for _ in range(blocks):
            hidden = expansion * channels
            if expansion > 1:
                yield from conv_bn(hidden, channels, 1)
            yield from conv_bn(hidden, 1, 3)
            yield from conv_bn(out, hidden, 1)
            channels = out
    yield from conv_bn(1280, channels, 1)
    yield from linear(1000, 1280)


def small() -> Iterator[Shape]:
    """Two hundred small tensors: what a step costs before it computes anything."""
    yield from ((64,), (8, 8)) * 100


def tiny() -> Iterator[Shape]:
    """Shapes that are awkward rather than large, for smoke runs: one element wide or high, prime, 1-D and 0-D."""
    yield from ((7, 1), (1, 7), (), (1,), (5, 3, 3, 3), (31,), (3, 1009), (257, 33), (2, 8193))


def dry_run() -> Iterator[Shape]:
    """What Triton's interpreter has time for: several rows a tile, a vector, a scalar, rows wider than a block."""
    yield from ((33, 65), (31,), (), (4, 3, 3, 3), (2, 2050))


def conv_bn(out: int, channels: int, kernel: int) -> Iterator[Shape]:
    yield from ((out, channels, kernel, kernel), (out,), (out,))


def linear(out: int, features: int) -> Iterator[Shape]:
    yield from ((out, features), (out,))


def layer_norm(features: int) -> Iterator[Shape]:
    yield from ((features,), (features,))


def llama_layer(hidden: int, kv: int, ffn: int) -> Iterator[Shape]:
    yield from ((hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden))  # q k v o
    yield from ((ffn, hidden), (ffn, hidden), (hidden, ffn))  # gate up down
    yield from ((hidden,), (hidden,))


WORKLOADS: dict[str, Workload] = {
    "small": Workload(small, 200, 12_800),
    "tiny": Workload(tiny, 9, 28_076),
    "dry_run": Workload(dry_run, 5, 6_385),
    "resnet50": Workload(resnet50, 161, 25_557_032),
    "vit_b16": Workload(vit_b16, 152, 86_567_656),
    "gpt2": Workload(gpt2, 148, 124_439_808),
    "gaussians": Workload(gaussians, 5, 59_000_000),
    "mobilenet_v2": Workload(mobilenet_v2, 158, 3_504_872),
    "llama_1b": Workload(llama_1b, 146, 1_235_814_400),
    "llama_8b_layer": Workload(llama_8b_layer, 9, 218_112_000),
}


@lru_cache(maxsize=1)  # the contestants of one workload and case follow each other
def tensors(workload: str, case: Decision) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients, float32 on the CPU, for which every tensor is decided as ``case`` where it can be.

    Weights are N(0, 1), so that a run's steps are small beside them; gradients are about 1e-2. Clone before writing.

    Args:
        workload: a key of :data:`WORKLOADS`.
        case: CHANNEL: each gradient row is orthogonal to its weight row. LAYER: only their whole tensors are. NONE:
            each gradient row has a cosine of about 0.9; random gradients would pass the layer test 8% of the time.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in WORKLOADS[workload].shapes()]
    return weights, [gradient(p, case, generator) for p in weights]


def expected_decision(p: Tensor, case: Decision) -> Decision:
    """What the cosine test says of a weight under ``case``; a tensor of one row has no separate layer view."""
    if p.ndim < 2:
        return Decision.NONE
    if case is Decision.LAYER and p.size(0) == 1:
        return Decision.CHANNEL
    return case


def gradient(p: Tensor, case: Decision, generator: torch.Generator) -> Tensor:
    """A gradient for which a weight on any device, in any dtype, is decided as ``case``: see :func:`tensors`."""
    g = torch.randn(p.shape, generator=generator, device=p.device).to(p.dtype)
    if p.ndim >= 2 and case is Decision.NONE:
        g = p + 0.5 * g
    elif p.ndim >= 2 and case is Decision.CHANNEL:
        # Orthogonal without rounding: each pair of a row's elements turned by 90 degrees.
        rows, even = p.flatten(1), p[0].numel() // 2 * 2
        turned = torch.zeros_like(rows)
        turned[:, 0:even:2] = rows[:, 1:even:2]
        turned[:, 1:even:2] = -rows[:, 0:even:2]
        g = turned.view_as(p)
    elif p.ndim >= 2:
        # Rows along +w and -w in turn: no row is orthogonal, and half of the layer's dot product cancels beforehand.
        signs = 1 - 2 * (torch.arange(p.size(0), device=p.device) % 2)
        aligned, w = (signs.view(-1, *[1] * (p.ndim - 1)) * p + 0.5 * g).double(), p.double()
        # Without its part along the weight, in float64: the cosine left over is that of rounding once.
        g = (aligned - w * ((aligned * w).sum() / w.square().sum())).to(p.dtype)
    return g * 2**-7
