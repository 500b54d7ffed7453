"""timm: by name, with the groups and checkpoints of timm's own optimizers."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checks
import pytest
import torch
from tolerances import assert_close
from torch.nn import functional

timm = pytest.importorskip("timm", reason="timm is not installed, or does not load", exc_type=ImportError)
import train_timm as example  # noqa: E402
from timm.optim import create_optimizer_v2, param_groups_weight_decay  # noqa: E402

import fused_adamp  # noqa: E402
from fused_adamp import checkpoint  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor, nn


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def test_values(tmp_path: Path) -> None:
    _, optimizer = checks.check_values(example, tmp_path, example.build_data(), loss_of)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {0.75**i for i in range(4)}, "two blocks, what is before them and what is behind"
    assert all(group["lr"] == pytest.approx(1e-3 * group["lr_scale"]) for group in optimizer.param_groups)


def test_resume(tmp_path: Path) -> None:
    checks.check_resume(example, tmp_path)


def described(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[list[str], float, float | None]]:
    names = {p: name for name, p in model.named_parameters()}
    return [([names[p] for p in g["params"]], g["weight_decay"], g.get("lr_scale")) for g in groups]


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize(("ours", "theirs"), [("fusedadamp", "adamp"), ("fusedsgdp", "sgdp")])
def test_groups_values_and_checkpoints_are_those_of_timm(ours: str, theirs: str, layer_decay: float | None) -> None:
    """Two steps of timm's, one more on each side from timm's checkpoint, and one of timm's from ours."""
    # In float64, as the biases of the keys have no gradient but rounding, which AdamP makes a step of.
    models = [example.build_model().double() for _ in range(2)]
    options = {"lr": 1e-3, "weight_decay": 0.05, "layer_decay": layer_decay, "eps": 1e-6}
    mine = create_optimizer_v2(models[0], ours, **options)
    other = create_optimizer_v2(models[1], theirs, **options)
    assert isinstance(mine, fused_adamp.AdamP | fused_adamp.SGDP)
    assert described(models[0], mine.param_groups) == described(models[1], other.param_groups)
    for step, batch in enumerate(example.build_data()[:4]):
        for model, optimizer in zip(models, (mine, other), strict=True):
            optimizer.zero_grad()
            loss_of(model, (batch[0].double(), batch[1])).backward()
            optimizer.step()
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert_close(p, q, f"{name} after step {step}")
        if step == 1:
            mine.load_state_dict(other.state_dict())
        if step == 2:
            # torch.optim does not copy what it loads, and both go on.
            other.load_state_dict(deepcopy(checkpoint.export(mine.state_dict(), "timm")))


def test_the_recipes_for_groups_give_those_of_timm() -> None:
    """docs/from-timm.md: the class token and the position embedding have three dimensions and do not decay."""
    page = (Path(__file__).parents[2] / "docs" / "from-timm.md").read_text()
    without_timm, with_timm = re.findall(r"^(listed = (?:.*\n)*?groups = .*\n)", page, re.MULTILINE)
    model = example.build_model()
    theirs = described(model, create_optimizer_v2(model, "adamp", weight_decay=0.05).param_groups)
    assert [len(names) for names, _, _ in theirs] == [22, 10]
    for recipe in (without_timm, with_timm):
        namespace = {"model": model, "param_groups_weight_decay": param_groups_weight_decay}
        exec(recipe, namespace)
        assert described(model, namespace["groups"]) == theirs


def test_a_name_with_an_underscore_is_timms_own() -> None:
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), "fused_adamp", lr=1e-3)
    assert type(optimizer) is timm.optim.AdamP
