"""AdamP in MosaicML's Composer: a tiny convolutional network on random images.

`max_grad_norm` takes the place of the algorithm `GradientClipping`, which calls torch's function. Composer does not
wrap the optimizer on one device. With `precision="amp_fp16"` its scaler works as GradScaler does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from composer import Callback, ComposerModel, Trainer
from torch import nn
from torch.nn import functional

import fused_adamp

if TYPE_CHECKING:
    from composer import Logger, State
    from torch import Tensor
    from torch.optim import Optimizer

MAX_NORM = 0.5


class Classifier(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
        self.network = nn.Sequential(*layers)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.network(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(outputs, batch[1])


class NormCallback(Callback):
    """Keeps the norms before clipping."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        norm = state.optimizers[0].grad_norm
        if norm is not None:
            self.norms.append(norm)


def build_model() -> nn.Module:
    return Classifier()


def build_data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(32, 3, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator)
    return list(zip(images, labels, strict=True))


def train(
    folder: Path, steps: int, max_grad_norm: float | None = MAX_NORM
) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """Trains up to a number of steps, on from the folder's checkpoint; the norms of the gradients per step."""
    model, callback, last = build_model(), NormCallback(), folder / "last.pt"
    optimizer = fused_adamp.AdamP(
        model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6, max_grad_norm=max_grad_norm, fused=True
    )
    trainer = Trainer(
        model=model,
        optimizers=optimizer,
        train_dataloader=torch.utils.data.DataLoader(build_data(), batch_size=4),
        max_duration=f"{steps}ba",
        callbacks=[callback],
        device="cpu",
        seed=0,
        load_path=str(last) if last.exists() else None,
        progress_bar=False,
    )
    trainer.fit()
    trainer.save_checkpoint(str(last))
    trainer.close()
    return model, optimizer, callback.norms


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, norms = train(Path(folder), steps=6)
    print("norms before clipping:", ", ".join(f"{norm:.3f}" for norm in norms))
    print(optimizer.projection_report(model))


if __name__ == "__main__":
    main()
