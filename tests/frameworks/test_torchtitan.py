"""torchtitan."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import checks
import pytest
import torch
import torch.distributed as dist
from tolerances import assert_close

pytest.importorskip(
    "torchtitan.components.optimizer", reason="torchtitan is not installed, or does not load", exc_type=ImportError
)
if not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)
import train_torchtitan as example
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.models.llama3 import get_train_spec

import fused_adamp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_values(tmp_path: Path) -> None:
    checks.check_values(example, tmp_path, example.build_data(), example.loss_of)


def test_resume(tmp_path: Path) -> None:
    checks.check_resume(example, tmp_path)


def test_a_train_spec_has_it_and_torchtitans_clip_works() -> None:
    spec = dataclasses.replace(get_train_spec(), build_optimizers_fn=example.build_adamp)
    model, other = example.build_model(), example.build_model()
    config = OptimizerConfig(name="AdamP", lr=1e-3, eps=1e-6)
    theirs = spec.build_optimizers_fn([model], config, None)
    ours = example.AdamPContainer([other], config, example.MAX_NORM)
    assert [type(optimizer) for optimizer in theirs] == [fused_adamp.AdamP]
    for tokens in example.build_data()[:3]:
        example.loss_of(model, tokens).backward()
        example.loss_of(other, tokens).backward()
        norm = clip_grad_norm_(model.parameters(), example.MAX_NORM)
        for container in (theirs, ours):
            container.step()
            container.zero_grad()
        assert_close(ours.optimizers[0].grad_norm, norm, "norm")
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(p, q, name)


def test_parts_of_a_pipeline_are_not_clipped_one_by_one() -> None:
    parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    config = OptimizerConfig(name="AdamP")
    assert len(example.AdamPContainer(parts, config)) == 2
    with pytest.raises(ValueError, match="by its own norm"):
        example.AdamPContainer(parts, config, 1.0)
