"""The checks that every example has to pass. An example has these functions:

- ``build_model()``: always the same first weights;
- ``train(folder, steps, max_grad_norm)``: trains up to so many steps within the framework, on from the checkpoint that
  it finds in the folder; returns the model, the fused optimizer without its wrapper and the norms that it logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tolerances import assert_close, assert_identical

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor, nn

    from fused_adamp.optimizer import ProjectedOptimizer

STEPS = 6


def twin(
    optimizer: ProjectedOptimizer, trained: nn.Module, model: nn.Module, *, backend: str | None = "reference"
) -> ProjectedOptimizer:
    """The reference on the parameters of the same names, in the same groups, that does not clip by itself."""
    names = {p: name for name, p in trained.named_parameters()}
    ours = dict(model.named_parameters())
    skipped = {"params", "backend", "max_grad_norm", "fused", "foreach", "initial_lr", "param_names"}
    known = optimizer.defaults.keys() - skipped
    groups = [
        {key: value for key, value in group.items() if key in known}
        | {"params": [ours[names[p]] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return type(optimizer)(groups, backend=backend)


def check_values(
    example: ModuleType, folder: Path, batches: Iterable[Any], loss_of: Callable[[nn.Module, Any], Tensor]
) -> tuple[nn.Module, ProjectedOptimizer]:
    """The framework trains as a plain loop of backward, torch's clip_grad_norm_ and a step of the reference does.

    Norms are those of torch's function, and each is above the limit, so that the clip has something to do. An unclipped
    run ends elsewhere.
    """
    trained, optimizer, norms = example.train(folder / "fused", STEPS)
    assert len(norms) == STEPS, f"{len(norms)} norms were logged in {STEPS} steps"
    assert optimizer.param_groups[0]["max_grad_norm"] == example.MAX_NORM

    model = example.build_model().train()
    reference = twin(optimizer, trained, model)
    steps = 0
    for batch, norm in zip(batches, norms, strict=False):
        loss_of(model, batch).backward()
        expected = torch.nn.utils.clip_grad_norm_(model.parameters(), example.MAX_NORM)
        assert expected > example.MAX_NORM, f"a norm of {expected:.3g} is not clipped to {example.MAX_NORM}"
        assert_close(torch.as_tensor(norm), expected, f"norm of step {steps}")
        reference.step()
        reference.zero_grad()
        steps += 1
    assert steps == STEPS, f"{steps} batches for {STEPS} steps"
    first = dict(example.build_model().named_parameters())
    for (name, p), q in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert_close(p, q, name)
        assert not p.requires_grad or not torch.equal(p, first[name]), f"{name} was not trained"
    backends = {bucket.key.backend.name for bucket in optimizer.buckets}
    assert backends == {"cpu"}, f"the steps were those of {backends}, to compare with the reference"

    unclipped, _, _ = example.train(folder / "unclipped", STEPS, max_grad_norm=None)
    farthest = max(
        (p - q).abs().max().item() for p, q in zip(trained.parameters(), unclipped.parameters(), strict=True)
    )
    assert farthest > 1e-5, f"an unclipped run ends within {farthest:.3g}: the clip did not act"
    return trained, optimizer


def check_resume(example: ModuleType, folder: Path) -> None:
    """A run that was stopped and resumed ends with the bits of one that was not, weights and state."""
    whole, theirs, _ = example.train(folder / "whole", STEPS)
    example.train(folder / "parts", STEPS - 2)
    resumed, ours, norms = example.train(folder / "parts", STEPS)
    assert len(norms) == 2, f"the resumed run took {len(norms)} steps, not 2: it did not load the checkpoint"
    for (name, p), q in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert_identical(p, q, name)
        assert ours.state[p].keys() == theirs.state[q].keys(), name
        for key, value in ours.state[p].items():
            assert_identical(value, theirs.state[q][key], f"{key} of {name}")
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
