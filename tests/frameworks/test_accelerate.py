"""Hugging Face accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import checks
import pytest
import torch
from torch.nn import functional

pytest.importorskip("accelerate", reason="accelerate is not installed, or does not load", exc_type=ImportError)
import train_accelerate as example

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    Batch = list[tuple[Tensor, Tensor]]


def batches() -> list[Batch]:
    """For each step the parts that accelerate accumulates."""
    loader = list(torch.utils.data.DataLoader(example.build_data(), batch_size=4))
    return [loader[i : i + example.ACCUMULATE] for i in range(0, len(loader), example.ACCUMULATE)]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    losses = [functional.cross_entropy(model(images), labels) for images, labels in batch]
    return torch.stack(losses).mean()


def test_values(tmp_path: Path) -> None:
    checks.check_values(example, tmp_path, batches(), loss_of)


def test_resume(tmp_path: Path) -> None:
    checks.check_resume(example, tmp_path)
