"""Lightning's Trainer and Fabric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import checks
import pytest
import torch
from tolerances import assert_close, assert_identical
from torch.nn import functional

pytest.importorskip("lightning", reason="lightning is not installed, or does not load", exc_type=ImportError)
import train_fabric
import train_lightning
from lightning.pytorch.plugins import MixedPrecision

import fused_adamp

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor, nn


def batches(example: ModuleType) -> list[tuple[Tensor, Tensor]]:
    if example is train_fabric:
        return example.build_data()
    return 4 * list(torch.utils.data.DataLoader(example.build_data(), batch_size=4))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return functional.cross_entropy(getattr(model, "network", model)(images), labels)


@pytest.mark.parametrize("example", [train_lightning, train_fabric], ids=lambda module: module.__name__)
def test_values(example: ModuleType, tmp_path: Path) -> None:
    checks.check_values(example, tmp_path, batches(example), loss_of)


@pytest.mark.parametrize("example", [train_lightning, train_fabric], ids=lambda module: module.__name__)
def test_resume(example: ModuleType, tmp_path: Path) -> None:
    checks.check_resume(example, tmp_path)


def mixed(precision: str) -> dict[str, Any]:
    """The trainer's arguments. Without a GPU, 16-mixed has to be asked for by its plugin."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return (
        {"plugins": MixedPrecision("16-mixed", "cpu", scaler)} if precision == "16-mixed" else {"precision": precision}
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_hook_clips_as_the_option_does(precision: str, tmp_path: Path) -> None:
    by_option, _, norms = train_lightning.train(tmp_path / "option", checks.STEPS, **mixed(precision))
    by_hook, optimizer, others = train_lightning.train(
        tmp_path / "hook",
        checks.STEPS,
        max_grad_norm=None,
        amp_scaling=False,
        gradient_clip_val=train_lightning.MAX_NORM,
        **mixed(precision),
    )
    assert len(norms) == len(others) == checks.STEPS
    for norm, other in zip(norms, others, strict=True):
        assert_close(norm, other, "norm")
    assert optimizer.grad_norm is None, "the hook has clipped, not the option"
    for (name, p), q in zip(by_option.named_parameters(), by_hook.parameters(), strict=True):
        assert_close(p, q, name) if precision == "16-mixed" else assert_identical(p, q, name)


def test_mixed_precision_trains_as_a_plain_loop(tmp_path: Path) -> None:
    """With 16-mixed, the option compares the norm of the unscaled gradients with the limit."""
    trained, optimizer, norms = train_lightning.train(tmp_path, checks.STEPS, **mixed("16-mixed"))
    model = train_lightning.build_model()
    reference, scaler = checks.twin(optimizer, trained, model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch, norm in zip(batches(train_lightning), norms, strict=False):
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(reference)
        assert_close(norm, torch.nn.utils.clip_grad_norm_(model.parameters(), train_lightning.MAX_NORM), "norm")
        scaler.step(reference)
        scaler.update()
        reference.zero_grad()
    for (name, p), q in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert_close(p, q, name)


def test_lightnings_own_clipping_refuses_an_optimizer_that_unscales() -> None:
    plugin = mixed("16-mixed")["plugins"]
    fused = fused_adamp.AdamP(torch.nn.Linear(2, 2).parameters(), fused=True)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        plugin.clip_gradients(fused, 1.0)
    plugin.clip_gradients(fused_adamp.AdamP(torch.nn.Linear(2, 2).parameters(), fused=True, amp_scaling=False), 0.0)
