"""AdamP in TRL's SFTTrainer: a tiny Llama on random tokens, clipped and resumable.

TRL's trainers are Trainers of transformers, and `train_transformers.py` says what holds for them. SFTTrainer and
RewardTrainer take `optimizer_cls_and_kwargs`. Others, such as DPOTrainer and GRPOTrainer, take only `optimizers`: see
`adamp_of` in this file. Llama's layers are nn.Linear, so that no option names the channels' dimension.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import fused_adamp

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

MAX_NORM = 0.5


class NormCallback(TrainerCallback):
    """Keeps the norms before clipping, which the trainer does not see as it does not clip."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def on_optimizer_step(self, args: SFTConfig, state: Any, control: Any, **objects: Any) -> None:
        norm = objects["optimizer"].optimizer.grad_norm  # accelerate has wrapped the optimizer
        if norm is not None:
            self.norms.append(norm)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The data are tokens already, but TRL asks for a tokenizer."""
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(64)}, unk_token="word3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="word0", eos_token="word1", pad_token="word2", unk_token="word3"
    )


def build_data() -> list[list[int]]:
    return torch.randint(4, 64, (48, 16), generator=torch.Generator().manual_seed(1)).tolist()


def adamp_of(model: nn.Module, weight_decay: float, **options: Any) -> Optimizer:
    """For trainers that take only `optimizers=(adamp_of(model, ...), None)`. Not for sharded models."""
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return fused_adamp.AdamP(groups, **options)


def train(
    folder: Path, steps: int, max_grad_norm: float | None = MAX_NORM, *, built: bool = False
) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """Trains up to a number of steps, on from the folder's last checkpoint; the norms of the gradients per step."""
    arguments = SFTConfig(
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
        bf16=False,
        disable_tqdm=True,
    )
    model, callback = build_model(), NormCallback()
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "max_grad_norm": max_grad_norm, "fused": True}
    optimizer: dict[str, Any] = {"optimizer_cls_and_kwargs": (fused_adamp.AdamP, options)}
    if built:
        optimizer = {"optimizers": (adamp_of(model, arguments.weight_decay, **options), None)}
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": build_data()}),
        processing_class=build_tokenizer(),
        callbacks=[callback],
        **optimizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    return trainer.model, trainer.optimizer.optimizer, callback.norms


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, norms = train(Path(folder), steps=6)
    print("norms before clipping:", ", ".join(f"{norm:.3f}" for norm in norms))
    print(optimizer.projection_report(model))


if __name__ == "__main__":
    main()
