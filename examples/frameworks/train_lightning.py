"""AdamP in Lightning's Trainer, also with mixed precision: a tiny convolutional network on random images.

There are two ways to clip. Both are within the optimizer's step.

- `max_grad_norm` of the optimizer, and no `gradient_clip_val` of the Trainer. This one is right at any precision.
- `gradient_clip_val` of the Trainer, and a `configure_gradient_clipping` that hands it to the optimizer, as below. With
  16-mixed the gradients are scaled at that moment, so pass `amp_scaling=False` to the optimizer: the scaler then
  unscales them before. Lightning's own clipping refuses optimizers that unscale by themselves, as `fused=True` makes
  them do.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import nn
from torch.nn import functional

import fused_adamp

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

MAX_NORM = 0.5


def build_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    return nn.Sequential(*layers)


def build_data() -> list[tuple[Tensor, Tensor]]:
    """Two steps in an epoch. Lightning resumes exactly between epochs: it does not know where in one a loader was."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
    return list(zip(images, labels, strict=True))


class Classifier(lightning.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.network, self.options, self.norms = build_network(), options, []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> Optimizer:
        return fused_adamp.AdamP(self.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6, fused=True, **self.options)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Only for `gradient_clip_val`: with `max_grad_norm` the module needs no such method."""
        if gradient_clip_val is not None:
            self.norms.append(optimizer.clip_grad_norm_(gradient_clip_val))

    def on_train_batch_end(self, *_: Any) -> None:
        norm = self.optimizers().optimizer.grad_norm
        if norm is not None:
            self.norms.append(norm)


def build_model() -> nn.Module:
    return Classifier()


def train(
    folder: Path, steps: int, max_grad_norm: float | None = MAX_NORM, *, amp_scaling: bool | None = None, **trainer: Any
) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """Trains up to a number of steps, on from the folder's checkpoint; the norms of the gradients per step."""
    model = Classifier(max_grad_norm=max_grad_norm, amp_scaling=amp_scaling)
    last = folder / "last.ckpt"
    runner = lightning.Trainer(
        accelerator="cpu",
        max_epochs=steps // 2,
        default_root_dir=folder,
        enable_checkpointing=False,  # for the test, which saves at the end
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about workers
        loader = torch.utils.data.DataLoader(build_data(), batch_size=4)
        runner.fit(model, loader, ckpt_path=last if last.exists() else None)
    runner.save_checkpoint(last)
    return model, model.optimizers().optimizer, model.norms


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, norms = train(Path(folder), steps=6, precision="bf16-mixed")
    print("norms before clipping:", ", ".join(f"{norm:.3f}" for norm in norms))
    print(optimizer.projection_report(model))


if __name__ == "__main__":
    main()
