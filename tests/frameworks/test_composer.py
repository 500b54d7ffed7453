"""MosaicML's Composer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import checks
import pytest
import torch

pytest.importorskip(
    "composer", reason="mosaicml is not installed, or does not load beside this torch", exc_type=ImportError
)
import train_composer as example

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model.loss(model(batch), batch)


def test_values(tmp_path: Path) -> None:
    batches = torch.utils.data.DataLoader(example.build_data(), batch_size=4)
    checks.check_values(example, tmp_path, batches, loss_of)


def test_resume(tmp_path: Path) -> None:
    checks.check_resume(example, tmp_path)
