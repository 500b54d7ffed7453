"""TRL's SFTTrainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import checks
import pytest
import torch
from tolerances import assert_identical

pytest.importorskip("trl.trainer.sft_trainer", reason="trl is not installed, or does not load", exc_type=ImportError)
import train_trl as example

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def test_values(tmp_path: Path) -> None:
    model, optimizer = checks.check_values(example, tmp_path, torch.tensor(example.build_data()).split(4), loss_of)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert groups[p]["weight_decay"] == (0.1 if p.ndim > 1 else 0.0), name


def test_resume(tmp_path: Path) -> None:
    checks.check_resume(example, tmp_path)


def test_an_optimizer_that_was_built_before_trains_the_same(tmp_path: Path) -> None:
    model, _, _ = example.train(tmp_path / "named", checks.STEPS)
    other, _, _ = example.train(tmp_path / "built", checks.STEPS, built=True)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_identical(p, q, name)
