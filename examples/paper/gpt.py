"""A small GPT on the bytes of Python's standard library, with the norms that today's large models have."""

from __future__ import annotations

import sysconfig
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Norms = Literal["pre", "qk", "sandwich"]
"""Where a block has norms: before attention and MLP alone; on queries and keys too; and on both parts' outputs too."""

NORMS: tuple[Norms, ...] = get_args(Norms)
NORMALIZED: dict[str, tuple[str, ...]] = {
    "pre": (),
    "qk": ("query", "key"),
    "sandwich": ("query", "key", "value", "out", "down"),
}
"""The weights, by :func:`kind_of`, that are scale-invariant: a norm behind them takes their length out again."""

HELD_OUT = 10  # one file of so many is for validation


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, heads: int, norms: Norms) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        per_head = nn.Identity if norms == "pre" else nn.RMSNorm
        self.query_norm, self.key_norm = per_head(width // heads), per_head(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        projected = (linear(x) for linear in (self.query, self.key, self.value))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected)
        q, k = rotate(self.query_norm(q)), rotate(self.key_norm(k))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: turns pairs of the last dimension by angles that grow along the one before it."""
    frequencies = torch.logspace(0, -3, x.size(3) // 2)
    angles = torch.outer(torch.arange(x.size(2)), frequencies)
    a, b = x.chunk(2, dim=3)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=3)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, norms: Norms) -> None:
        super().__init__()
        up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.attention_norm, self.attention = nn.RMSNorm(width), Attention(width, heads, norms)
        self.mlp_norm, self.mlp = nn.RMSNorm(width), nn.Sequential(OrderedDict(up=up, gelu=nn.GELU(), down=down))
        after = nn.RMSNorm if norms == "sandwich" else nn.Identity
        self.attention_out_norm, self.mlp_out_norm = after(width), after(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x)))
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))


def build_gpt(width: int, depth: int, heads: int, norms: Norms) -> nn.Sequential:
    """From bytes ``(batch, time)`` to the logits of the bytes that follow, ``(batch, time, 256)``."""
    blocks = {f"block{i}": Block(width, heads, norms) for i in range(1, depth + 1)}
    head = OrderedDict(norm=nn.RMSNorm(width), head=nn.Linear(width, 256, bias=False))
    return nn.Sequential(OrderedDict(embedding=nn.Embedding(256, width), **blocks, **head))


def kind_of(name: str) -> str:
    """The role of a weight: ``block1.attention.query.weight`` is a query."""
    return name.split(".")[-2]


@cache
def sources() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library's modules: those to train on, and those of every tenth file, held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise FileNotFoundError("no sources of the standard library here: install Python with its sources")
    parts: tuple[list[bytes], list[bytes]] = [], []
    for n, file in enumerate(files):
        parts[n % HELD_OUT == 0].append(file.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out


def batch_of(text: Tensor, size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of a text: bytes ``(size, context)``, and the bytes that follow each of them."""
    starts = torch.randint(len(text) - context - 1, (size, 1), generator=generator)
    window = text[starts + torch.arange(context + 1)].long()
    return window[:, :-1], window[:, 1:]
