"""AdamP in timm: registered by name, with timm's own groups, layer decay and scheduler. A tiny ViT on random images.

Three things to know:

- The name has no underscore. timm takes what stands behind the last one as the name, so that "fused_adamp" would give
  timm's own AdamP, without a word.
- Pass the model, not its parameters: timm then groups as for its own optimizers. It leaves out of the decay what
  `model.no_weight_decay()` lists, and with `layer_decay` sets each group's `lr_scale`. Checkpoints of timm's "adamp"
  load.
- `lr_scale` acts through timm's schedulers alone. "constant" is the one that changes nothing else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from timm.models import resume_checkpoint
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2
from torch.nn import functional

import fused_adamp

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

MAX_NORM = 0.5

# The defaults are those that timm's factory has for "adamp" and "sgdp".
default_registry.register(
    OptimInfo("fusedadamp", fused_adamp.AdamP, has_betas=True, defaults={"wd_ratio": 0.01, "nesterov": True})
)
default_registry.register(OptimInfo("fusedsgdp", fused_adamp.SGDP, has_momentum=True, defaults={"nesterov": True}))


def build_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)


def build_data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(4, (4,), generator=generator)) for _ in range(8)
    ]


def build_optimizer(model: nn.Module, max_grad_norm: float | None = MAX_NORM) -> Optimizer:
    options = {"eps": 1e-6, "max_grad_norm": max_grad_norm, "fused": True}  # in place of timm's --clip-grad
    return create_optimizer_v2(model, "fusedadamp", lr=1e-3, weight_decay=0.05, layer_decay=0.75, **options)


def train(
    folder: Path, steps: int, max_grad_norm: float | None = MAX_NORM
) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """Trains up to a number of steps, on from the folder's checkpoint; the norms of the gradients per step."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model()
    optimizer = build_optimizer(model, max_grad_norm)
    scheduler, _ = create_scheduler_v2(optimizer, sched="constant", step_on_epochs=False, updates_per_epoch=8)
    last, first = folder / "last.pth", 0
    if last.exists():
        first = resume_checkpoint(model, str(last), optimizer)
    scheduler.step_update(first)
    norms = []
    for step, (images, labels) in enumerate(build_data()[first:steps], first + 1):
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.grad_norm is not None:
            norms.append(optimizer.grad_norm)
        scheduler.step_update(step)
    torch.save({"epoch": steps, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, last)
    return model, optimizer, norms


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, norms = train(Path(folder), steps=6)
    print("norms before clipping:", ", ".join(f"{norm:.3f}" for norm in norms))
    print(optimizer.projection_report(model))


if __name__ == "__main__":
    main()
