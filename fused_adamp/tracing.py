"""Questions that a step asks while Dynamo traces it. Only the traced step imports this, as it imports torch._dynamo."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator

from fused_adamp.sharded.dtensor import is_distributed
from fused_adamp.torch_compile import OPTIMIZERS

__all__ = ["eager_step", "needs_eager", "tensor_options"]

# assume_constant_result: Dynamo does not trace the function but calls it, and guards on nothing that it reads.

eager_step = torch.compiler.disable(  # type: ignore[no-untyped-call]
    lambda optimizer: optimizer._step(),
    reason="fused_adamp: hyperparameters or state were changed before step() in the same graph, or parameters share "
    "memory or are DTensors, or a gradient has another dtype than its weight; this step runs outside the graph",
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def needs_eager(handle: str) -> bool:
    """Whether a step inside the graph would be wrong.

    Dynamo writes changes of dicts and lists back after the graph has run, too late for the operator. Inductor copies
    written tensors that share memory, all of it for each (torch 2.11: wrongly). An operator cannot declare the
    placements of its DTensors. And Dynamo rejects tensors whose gradient has another dtype.
    """
    optimizer = OPTIMIZERS[handle]
    groups, state = optimizer.param_groups, optimizer.state
    params = [p for group in groups for p in group["params"]]
    if any(is_distributed(p) or (p.grad is not None and p.grad.dtype != p.dtype) for p in params):
        return True
    effects = InstructionTranslator.current_tx().output.side_effects
    containers = [groups, *groups, *(group["params"] for group in groups), state, *state.values()]
    traced = [effects.id_to_variable[id(c)] for c in containers if id(c) in effects.id_to_variable]
    storages = [p.untyped_storage().data_ptr() for p in params if p.numel()]
    return len(set(storages)) < len(storages) or any(map(effects.is_modified, traced))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def tensor_options(handle: str) -> list[tuple[int, str]]:
    """Group index and name of each hyperparameter that is a tensor, which the graph may change."""
    groups = OPTIMIZERS[handle].param_groups
    return [(i, name) for i, group in enumerate(groups) for name, value in group.items() if isinstance(value, Tensor)]


eager_clip = torch.compiler.disable(  # type: ignore[no-untyped-call]
    lambda optimizer, *arguments: optimizer._clip_grad_norm(*arguments),
    reason="fused_adamp: it leaves its result on the optimizer",
)
