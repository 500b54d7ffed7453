"""AdamP in fastai, through its OptimWrapper: a tiny convolutional network on random images.

- `max_grad_norm` takes the place of the callback `GradientClip`, which calls torch's function.
- What fastai does not know is behind `learner.opt.opt`: `grad_norm` and `projection_report()`.
- `wd` of `fit` sets the weight decay of all groups, biases and norms included: OptimWrapper does not look at
  `wd_bn_bias`. A splitter that makes groups helps: `fit(..., wd=None)` leaves theirs alone.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.nn import functional

import fused_adamp

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

MAX_NORM = 0.5


class NormCallback(Callback):
    """Keeps the norms before clipping."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def after_step(self) -> None:
        norm = self.learn.opt.opt.grad_norm
        if norm is not None:
            self.norms.append(norm)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    return nn.Sequential(*layers)


def build_data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
    return list(zip(images, labels, strict=True))


def train(
    folder: Path, steps: int, max_grad_norm: float | None = MAX_NORM
) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """Trains up to a number of steps, on from the folder's checkpoint; the norms of the gradients per step."""
    folder.mkdir(parents=True, exist_ok=True)
    loader = torch.utils.data.DataLoader(build_data(), batch_size=4)  # two steps in an epoch
    callback = NormCallback()
    learner = Learner(
        DataLoaders(loader, loader, device="cpu"),
        build_model(),
        loss_func=functional.cross_entropy,
        opt_func=partial(OptimWrapper, opt=fused_adamp.AdamP, eps=1e-6, max_grad_norm=max_grad_norm, fused=True),
        cbs=[callback],
        path=folder,
        train_bn=False,
    )
    first = 0
    if (folder / "models" / "last.pth").exists():
        learner.load("last", device="cpu")
        first = int((folder / "step").read_text())
    with learner.no_logging():
        learner.remove_cbs(ProgressCallback)
        learner.fit((steps - first) // 2, lr=1e-3, wd=0.1)
    learner.save("last")
    (folder / "step").write_text(str(steps))
    return learner.model, learner.opt.opt, callback.norms


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, norms = train(Path(folder), steps=6)
    print("norms before clipping:", ", ".join(f"{norm:.3f}" for norm in norms))
    print(optimizer.projection_report(model))


if __name__ == "__main__":
    main()
