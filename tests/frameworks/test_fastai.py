"""fastai."""

from __future__ import annotations

from typing import TYPE_CHECKING

import checks
import pytest
import torch
from torch.nn import functional

pytest.importorskip("fastai.learner", reason="fastai is not installed, or does not load", exc_type=ImportError)
import train_fastai as example

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def test_values(tmp_path: Path) -> None:
    batches = 4 * list(torch.utils.data.DataLoader(example.build_data(), batch_size=4))
    _, optimizer = checks.check_values(example, tmp_path, batches, loss_of)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1), "fit has set both"


def test_resume(tmp_path: Path) -> None:
    checks.check_resume(example, tmp_path)
