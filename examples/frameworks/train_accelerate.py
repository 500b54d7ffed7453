"""AdamP under Hugging Face accelerate, with accumulated gradients: a tiny convolutional network on random images.

`max_grad_norm` takes the place of `accelerator.clip_grad_norm_`: the optimizer clips within its step, which comes only
where gradients are synchronised. `prepare` wraps the optimizer. What accelerate does not know is behind
`optimizer.optimizer`: `grad_norm`, `projection_report()`, and `clip_grad_norm_` for a clip of your own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

import fused_adamp

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

MAX_NORM = 0.5
ACCUMULATE = 2


def build_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    return nn.Sequential(*layers)


def build_data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(64, 3, 8, 8, generator=generator), torch.randint(4, (64,), generator=generator)
    return list(zip(images, labels, strict=True))


def train(
    folder: Path, steps: int, max_grad_norm: float | None = MAX_NORM
) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """Trains up to a number of steps, on from the folder's checkpoint; the norms of the gradients per step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model = build_model()
    optimizer = fused_adamp.AdamP(
        model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6, max_grad_norm=max_grad_norm, fused=True
    )
    loader = torch.utils.data.DataLoader(build_data(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    first = 0
    if (folder / "step").exists():
        accelerator.load_state(str(folder))
        first = int((folder / "step").read_text())
        loader = accelerator.skip_first_batches(loader, first * ACCUMULATE)

    step, norms = first, []
    for images, labels in loader:
        if step == steps:
            break
        with accelerator.accumulate(model):
            accelerator.backward(functional.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            if optimizer.optimizer.grad_norm is not None:
                norms.append(optimizer.optimizer.grad_norm)
    accelerator.save_state(str(folder))
    (folder / "step").write_text(str(step))
    return accelerator.unwrap_model(model), optimizer.optimizer, norms


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, norms = train(Path(folder), steps=6)
    print("norms before clipping:", ", ".join(f"{norm:.3f}" for norm in norms))
    print(optimizer.projection_report(model))


if __name__ == "__main__":
    main()
