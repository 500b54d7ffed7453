"""AdamP in torchtitan: an OptimizersContainer for it, and a tiny Llama 3 on random tokens in a loop as torchtitan's.

torchtitan's own `build_optimizers` knows Adam and AdamW by name. A TrainSpec with `build_adamp` has AdamP:

    from torchtitan.models.llama3 import get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec

    spec = dataclasses.replace(get_train_spec(), build_optimizers_fn=build_adamp)
    register_train_spec("llama3_adamp", spec)  # then model.name = "llama3_adamp"

`train.py` clips with a function of its own that knows of pipelines, and it works with AdamP as it is. It takes two more
passes over the gradients. A loop of your own can clip within the step: `max_grad_norm`, without pipeline parallelism.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler as LRSchedulerConfig
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

import fused_adamp

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

MAX_NORM = 0.5


class AdamPContainer(OptimizersContainer):
    """One AdamP per part of the model, of which there are several only in a pipeline."""

    def __init__(
        self, model_parts: list[nn.Module], config: OptimizerConfig, max_grad_norm: float | None = None
    ) -> None:
        if max_grad_norm is not None and len(model_parts) > 1:
            raise ValueError(
                f"max_grad_norm={max_grad_norm} with {len(model_parts)} model parts: each part's optimizer would clip "
                "by its own norm; pass None and clip with torchtitan's clip_grad_norm_"
            )
        options = {
            "lr": config.lr,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "fused": config.implementation == "fused",
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(model_parts, fused_adamp.AdamP, options)


def build_adamp(
    model_parts: list[nn.Module], optimizer_config: OptimizerConfig, parallel_dims: Any, ft_manager: Any = None
) -> OptimizersContainer:
    """For TrainSpec. torchtitan clips before the step, with `training.max_norm`."""
    if optimizer_config.early_step_in_backward or (ft_manager is not None and ft_manager.enabled):
        raise NotImplementedError("AdamPContainer has no steps within backward and no torchft")
    return AdamPContainer(model_parts, optimizer_config)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    model = Transformer(TransformerModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=16))
    with torch.no_grad():
        model.init_weights()
    return model


def build_data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (4, 17), generator=generator) for _ in range(8)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(
    folder: Path, steps: int, max_grad_norm: float | None = MAX_NORM
) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """Trains up to a number of steps, on from the folder's checkpoint; the norms of the gradients per step."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = build_model()
    optimizers = AdamPContainer([model], OptimizerConfig(name="AdamP", lr=1e-3, eps=1e-6), max_grad_norm)
    constant = LRSchedulerConfig(warmup_steps=0, decay_ratio=0.1)  # until 90% of the steps
    schedulers = build_lr_schedulers(optimizers, constant, training_steps=1000)
    first = 0
    if folder.exists():
        first = max(int(path.name) for path in folder.iterdir())
        state = {"model": get_model_state_dict(model), "optimizer": optimizers, "lr_scheduler": schedulers}
        dcp.load(state, checkpoint_id=folder / str(first))
        set_model_state_dict(model, state["model"])
    norms = []
    for tokens in build_data()[first:steps]:
        optimizers.zero_grad()
        loss_of(model, tokens).backward()
        optimizers.step()
        schedulers.step()
        norms += [optimizer.grad_norm for optimizer in optimizers if optimizer.grad_norm is not None]
    state = {"model": get_model_state_dict(model), "optimizer": optimizers, "lr_scheduler": schedulers}
    dcp.save(state, checkpoint_id=folder / str(steps))
    return model, optimizers.optimizers[0], norms


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, norms = train(Path(folder) / "checkpoints", steps=6)
    print("norms before clipping:", ", ".join(f"{norm:.3f}" for norm in norms))
    print(optimizer.projection_report(model))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
