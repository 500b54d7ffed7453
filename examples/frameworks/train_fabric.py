"""AdamP under Lightning Fabric: a tiny convolutional network on random images.

`max_grad_norm` takes the place of `fabric.clip_gradients`, which calls torch's function. `fabric.setup` wraps the
optimizer in a class that passes on what it does not know: `grad_norm`, `projection_report()` and `clip_grad_norm_`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional

import fused_adamp

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

MAX_NORM = 0.5


def build_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    return nn.Sequential(*layers)


def build_data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(4, (4,), generator=generator)) for _ in range(8)
    ]


def train(
    folder: Path, steps: int, max_grad_norm: float | None = MAX_NORM, *, precision: str = "32-true"
) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """Trains up to a number of steps, on from the folder's checkpoint; the norms of the gradients per step."""
    fabric = Fabric(accelerator="cpu", precision=precision)
    model = build_model()
    optimizer = fused_adamp.AdamP(
        model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6, max_grad_norm=max_grad_norm, fused=True
    )
    network, optimizer = fabric.setup(model, optimizer)
    state = {"model": network, "optimizer": optimizer, "step": 0}
    if (folder / "last.ckpt").exists():
        fabric.load(folder / "last.ckpt", state)
    norms = []
    for images, labels in build_data()[state["step"] : steps]:
        fabric.backward(functional.cross_entropy(network(images), labels))
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.grad_norm is not None:
            norms.append(optimizer.grad_norm)
    fabric.save(folder / "last.ckpt", state | {"step": steps})
    return model, optimizer.optimizer, norms


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, norms = train(Path(folder), steps=6, precision="bf16-mixed")
    print("norms before clipping:", ", ".join(f"{norm:.3f}" for norm in norms))
    print(optimizer.projection_report(model))


if __name__ == "__main__":
    main()
