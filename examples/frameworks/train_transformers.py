"""AdamP in the Trainer of Hugging Face transformers: a tiny GPT-2 on random tokens, clipped and resumable.

Three things to know:

- Weight decay is that of `TrainingArguments`. The Trainer sets it in its groups (none for biases and norms), so that a
  `weight_decay` among the optimizer's arguments is ignored. So is `lr` in `TrainingArguments`: give it here.
- `max_grad_norm` goes to the optimizer, which clips within its step. 0 in `TrainingArguments` switches off the
  Trainer's own clipping, which takes another pass over the gradients (and is 1.0 by default).
- GPT-2's Conv1D stores its weight as (in, out), so that its channels are dimension 1. `GPT2Trainer` says so. Models
  of nn.Linear, such as Llama or BERT, need no subclass: pass the same arguments to `Trainer`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import get_last_checkpoint

import fused_adamp

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

MAX_NORM = 0.5


class GPT2Trainer(Trainer):
    """Names the dimension of the output channels in the weights of Conv1D."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            modules = (self.model if model is None else model).modules()
            transposed = {module.weight for module in modules if isinstance(module, Conv1D)}
            for group in list(optimizer.param_groups):
                if moved := [p for p in group["params"] if p in transposed]:
                    group["params"] = [p for p in group["params"] if p not in transposed]
                    optimizer.add_param_group({**group, "params": moved, "channel_dim": 1})
        return self.optimizer


class NormCallback(TrainerCallback):
    """Keeps the norms before clipping, which the Trainer does not see as it does not clip."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **objects: Any) -> None:
        norm = objects["optimizer"].optimizer.grad_norm  # accelerate has wrapped the optimizer
        if norm is not None:
            self.norms.append(norm)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0))


def build_data() -> list[dict[str, Tensor]]:
    tokens = torch.randint(64, (48, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(
    folder: Path, steps: int, max_grad_norm: float | None = MAX_NORM
) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """Trains up to a number of steps, on from the folder's last checkpoint; the norms of the gradients per step."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",  # for the test; leave it out
        weight_decay=0.1,
        max_grad_norm=0,  # the optimizer clips
        lr_scheduler_type="constant",
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = NormCallback()
    trainer = GPT2Trainer(
        model=build_model(),
        args=arguments,
        train_dataset=build_data(),
        callbacks=[callback],
        optimizer_cls_and_kwargs=(
            fused_adamp.AdamP,
            {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "max_grad_norm": max_grad_norm, "fused": True},
        ),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return trainer.model, trainer.optimizer.optimizer, callback.norms


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, norms = train(Path(folder), steps=6)
    print("norms before clipping:", ", ".join(f"{norm:.3f}" for norm in norms))
    print(optimizer.projection_report(model))


if __name__ == "__main__":
    main()
