"""The Trainer of Hugging Face transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import checks
import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed, or does not load", exc_type=ImportError
)
import train_transformers as example  # noqa: E402

import fused_adamp  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


def batches() -> list[dict[str, Tensor]]:
    data = example.build_data()
    return [{key: torch.stack([row[key] for row in data[i : i + 4]]) for key in data[0]} for i in range(0, 48, 4)]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    # The Trainer divides by the number of labels, of which the first in each row predicts nothing.
    return model(**batch, num_items_in_batch=batch["labels"].numel()).loss


def test_values(tmp_path: Path) -> None:
    model, optimizer = checks.check_values(example, tmp_path, batches(), loss_of)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        transposed = any(word in name for word in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert groups[p]["channel_dim"] == (1 if transposed else 0), name
        assert groups[p]["weight_decay"] == (0.1 if p.ndim > 1 else 0.0), name


def test_resume(tmp_path: Path) -> None:
    checks.check_resume(example, tmp_path)


def test_weight_decay_and_learning_rate_come_from_one_place_each(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        str(tmp_path), weight_decay=0.1, learning_rate=1.0, use_cpu=True, report_to="none"
    )
    options = {"lr": 1e-3, "weight_decay": 0.5}
    trainer = transformers.Trainer(
        example.build_model(), arguments, optimizer_cls_and_kwargs=(fused_adamp.AdamP, options)
    )
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0], "that of the arguments"
    assert {group["lr"] for group in groups} == {1e-3}, "that of the optimizer"


def test_the_trainer_takes_no_name_but_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adamp"):
        transformers.TrainingArguments(str(tmp_path), optim="adamp")
