"""Trains a small GPT on the sources of Python's standard library, sharded over any number of ranks by FSDP2.

    torchrun --nproc-per-node 2 examples/train_fsdp2.py    # two ranks: on two GPUs, or on the CPU where there is none
    python examples/train_fsdp2.py                         # one

Each rank keeps its part of the weights, the gradients and the optimizer's moments, and learns from its part of each
batch. AdamP and SGDP decide together with the other ranks which weights to project. So a run is the same on any number
of ranks, up to rounding. Look at these numbers:

- validation, the loss in bits per byte of files that are not trained on: 8 is knowing nothing, 4.78 knowing how often
  each byte occurs. The defaults end at 2.30 (with the library of Python 3.11), after about a minute on two CPU cores;
  `--optimizer adamw` ends at 2.32 and sgdp at 2.50;
- the table at the end. Queries and keys are normalized head by head (QK-norm), which makes their weights
  scale-invariant: AdamP and SGDP notice and project them, each as a whole (`layer`);
- a run that was killed, even in the middle of writing a checkpoint, goes on from the last complete one when the same
  command is given again, on the same or another number of ranks. All machines need to see the same `--folder`.
  `--fresh` starts over.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from torch import Tensor, nn
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn import functional

    import fused_adamp
except ModuleNotFoundError as error:
    sys.exit(
        f"{error.name} is missing: run `make train`, or `pip install . && pip install --group demo` in the checkout"
    )

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_NORM = 1.0  # of the gradients
WARMUP = 0.1  # part of the steps in which the learning rate rises; after that it falls along a cosine
FLOOR = 0.1  # where it ends, as part of its peak
VALIDATION = 16  # batches
REPORTED = 8  # parameters in the table at the end
KEPT = 2  # checkpoints
SHOWN = "loss {loss:.3f}  validation {validation:.3f}  norm {gradient_norm:.3f}  {tokens_per_second:,.0f} tok/s"
BITS = 1 / math.log(2)  # in a nat, the unit of cross_entropy

# A run's losses depend on these. A run cannot be resumed with other values.
SETTINGS = ("optimizer", "steps", "batch", "context", "width", "depth", "heads", "seed", "float64")


class Recipe(NamedTuple):
    build: Callable[..., torch.optim.Optimizer]
    lr: float
    weight_decay: float


ADAM, SGD = {"betas": (0.9, 0.99)}, {"momentum": 0.9, "nesterov": True}
RECIPES = {
    "adamp": Recipe(partial(fused_adamp.AdamP, **ADAM, max_grad_norm=MAX_NORM), 6e-3, 0.1),
    "sgdp": Recipe(partial(fused_adamp.SGDP, **SGD, max_grad_norm=MAX_NORM), 0.5, 1e-4),
    "adamw": Recipe(partial(torch.optim.AdamW, **ADAM, fused=True), 6e-3, 0.1),
}


class Attention(nn.Module):
    """Causal self-attention with rotary positions; queries and keys are normalized head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # Not one matrix for all three: only the query's and the key's are scale-invariant, each as a whole.
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.query_norm, self.key_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        projected = (linear(x) for linear in (self.query, self.key, self.value))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected)
        q, k = rotate(self.query_norm(q)), rotate(self.key_norm(k))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: turns pairs of the last dimension by angles that grow along the one before it."""
    frequencies = torch.logspace(0, -3, x.size(3) // 2, device=x.device)
    angles = torch.outer(torch.arange(x.size(2), device=x.device), frequencies)
    a, b = x.chunk(2, dim=3)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=3)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(width), Attention(width, heads)
        up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.mlp_norm, self.mlp = nn.RMSNorm(width), nn.Sequential(up, nn.GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def build_network(width: int, depth: int, heads: int) -> nn.Sequential:
    """From bytes ``(batch, time)`` to the logits of the bytes that follow, ``(batch, time, 256)``."""
    blocks = {f"block{i}": Block(width, heads) for i in range(1, depth + 1)}
    head = OrderedDict(norm=nn.RMSNorm(width), head=nn.Linear(width, 256, bias=False))
    return nn.Sequential(OrderedDict(embedding=nn.Embedding(256, width), **blocks, **head))


def shard(network: nn.Sequential, device: torch.device) -> None:
    """FSDP2 gathers a block's weights just before they are needed, and those outside the blocks as one more block."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in network:
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """To be called after sharding, which replaces the parameters. Vectors (the gains of the norms) do not decay."""
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return recipe.build(groups, lr=recipe.lr)


class Text(NamedTuple):
    """Bytes ``(length,)``, uint8."""

    train: Tensor
    validation: Tensor


def load_text(device: torch.device) -> Text:
    """The library's sources but for its tests, in order of their names; every tenth file is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = sorted(path for path in root.rglob("*.py") if others.isdisjoint(path.relative_to(root).parts))
    parts = bytearray(), bytearray()
    for i, path in enumerate(files):
        parts[i % 10 == 9].extend(path.read_bytes())
    return Text(*(torch.frombuffer(part, dtype=torch.uint8).to(device) for part in parts))


def guessing(text: Text) -> float:
    """Bits per byte of guessing the validation text by how often each byte is in the training text."""
    counts = torch.bincount(text.train, minlength=256).double() + 1
    return -(counts / counts.sum()).log2()[text.validation.long()].mean().item()


def loss_on_share(network: nn.Module, text: Tensor, starts: Tensor, context: int) -> Tensor:
    """This rank's summand of the mean loss over the windows of text that begin at ``starts``.

    Each rank takes a share of the windows. Shares may differ by one window, so any number of ranks will do, up to one
    rank per window.
    """
    share = starts.tensor_split(dist.get_world_size())[dist.get_rank()]
    windows = text[(share[:, None] + torch.arange(context + 1)).to(text.device)].long()
    logits = network(windows[:, :-1])
    total = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    return total / (len(starts) * context)


def sum_over_ranks(x: Tensor) -> float:
    """Waits for the device."""
    x = x.detach().clone()
    dist.all_reduce(x)
    return x.item()


@torch.no_grad()
def validate(network: nn.Module, text: Tensor, batch: int, context: int) -> float:
    """The mean loss over windows spread evenly over the text, in bits per byte."""
    windows = VALIDATION * batch
    starts = torch.arange(windows) * (len(text) - context) // windows
    losses = [loss_on_share(network, text, part, context) for part in starts.split(batch)]
    return sum_over_ranks(torch.stack(losses).mean()) * BITS


def schedule(step: int, steps: int) -> float:
    """The learning rate as part of its peak. It depends on the step alone: there is nothing to save."""
    warmup = max(1, round(WARMUP * steps))
    if step <= warmup:
        return step / warmup
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def clipped_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Clips over all ranks and steps; returns the norm before clipping."""
    if isinstance(optimizer, (fused_adamp.AdamP, fused_adamp.SGDP)):  # built with max_grad_norm
        optimizer.step()
        assert optimizer.grad_norm is not None
        return optimizer.grad_norm
    norm = nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
    optimizer.step()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def checkpoints(folder: Path) -> list[Path]:
    """Those that are complete, the oldest first."""
    return sorted(folder.glob("step-*"))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS}


def save(args: argparse.Namespace, step: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint gets its name when it is complete: whoever is killed on the way leaves the one before it."""
    unfinished = args.folder / "unfinished"
    weights, moments = get_state_dict(network, optimizer)
    dcp.save({"network": weights, "optimizer": moments}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:  # which comes here when all ranks have written
        (unfinished / "settings.json").write_text(json.dumps(settings(args), indent=2) + "\n")
        unfinished.rename(args.folder / f"step-{step:08}")
        for old in checkpoints(args.folder)[:-KEPT]:
            shutil.rmtree(old)


def resume(args: argparse.Namespace, checkpoint: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads a checkpoint, made on any number of ranks, and returns its step."""
    saved = json.loads((checkpoint / "settings.json").read_text())
    changed = [f"--{name} {saved[name]}, not {value}" for name, value in settings(args).items() if value != saved[name]]
    if changed:
        sys.exit(f"{checkpoint} was made with {', '.join(changed)}: pass that, or --fresh, or another --folder")
    weights, moments = get_state_dict(network, optimizer)
    dcp.load({"network": weights, "optimizer": moments}, checkpoint_id=checkpoint)
    set_state_dict(network, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(checkpoint.name.removeprefix("step-"))


def join_ranks(name: str | None) -> torch.device:
    """Meets the other ranks that torchrun started; there are none if it was not torchrun. Returns this one's device."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    here, neighbours = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if neighbours > gpus:
            sys.exit(f"{neighbours} ranks on a machine with {gpus} GPUs: start fewer, or pass --device cpu")
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--optimizer", choices=RECIPES, default="adamp", help="default adamp")
    add("--steps", type=positive, default=300, help="optimizer steps (default 300)")
    add("--batch", type=positive, default=16, help="windows of text in a step, over all ranks (default 16)")
    add("--context", type=positive, default=128, help="bytes in a window (default 128)")
    add("--width", type=positive, default=128, help="of the network (default 128)")
    add("--depth", type=positive, default=4, help="blocks (default 4)")
    add("--heads", type=positive, default=4, help="attention heads in a block (default 4)")
    add("--seed", type=int, default=0, help="of the first weights and the order of the text (default 0)")
    add("--float64", action="store_true", help="train in double precision")
    add("--device", choices=["cpu", "cuda"], help="default cuda where there is a GPU")
    add("--folder", type=Path, default=Path("out/train_fsdp2"), help="of checkpoints and log (default out/train_fsdp2)")
    add(
        "--save-every", type=positive, default=50, help="steps between checkpoints, each with a validation (default 50)"
    )
    add("--log-every", type=positive, default=10, help="steps between lines of the log (default 10)")
    add("--fresh", action="store_true", help="start over, removing the folder's checkpoints and log")
    add("--smoke", action="store_true", help="a few steps of a tiny network; other options still count")
    if parser.parse_args().smoke:
        parser.set_defaults(steps=8, batch=6, context=16, width=32, depth=2, heads=2, save_every=2, log_every=1)
    return parser.parse_args()


def open_folder(folder: Path, *, fresh: bool) -> Path | None:
    """Makes the folder and removes what is of no use; the last checkpoint in it, the same for all ranks."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
        if fresh:
            (folder / "log.jsonl").unlink(missing_ok=True)
            for path in checkpoints(folder):
                shutil.rmtree(path)
    dist.barrier()
    return max(checkpoints(folder), default=None)


def train(
    args: argparse.Namespace,
    text: Text,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int,
    console: Console,
) -> None:
    """Takes the steps after ``first``, and every now and then shows how it goes and adds a line to log.jsonl.

    Steps that are taken again after a run was killed are in the log again; the last line counts.
    """
    tokens = args.batch * args.context  # in a step
    shown = {"validation": validate(network, text.validation, args.batch, args.context)}
    rates = []  # tokens per second, leaving out validations and checkpoints
    columns = MofNCompleteColumn(), BarColumn(8), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, disable=console.quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=args.steps, completed=first)
        begin, started = first, time.perf_counter()
        for step in range(first + 1, args.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = RECIPES[args.optimizer].lr * schedule(step, args.steps)
            order = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            starts = torch.randint(len(text.train) - args.context, (args.batch,), generator=order)
            loss = loss_on_share(network, text.train, starts, args.context)
            (loss * dist.get_world_size()).backward()  # FSDP2 takes the mean over the ranks, this makes it the sum
            norm = clipped_step(network, optimizer)
            optimizer.zero_grad()
            progress.advance(task)

            saving = step % args.save_every == 0 or step == args.steps
            if not saving and step % args.log_every != 0:
                continue
            record = {"step": step, "loss": sum_over_ranks(loss) * BITS, "gradient_norm": norm.item()}
            record["tokens_per_second"] = (step - begin) * tokens / (time.perf_counter() - started)
            rates.append(record["tokens_per_second"])
            if saving:
                record["validation"] = validate(network, text.validation, args.batch, args.context)
                save(args, step, network, optimizer)
            shown |= record
            line = SHOWN.format(**shown)
            progress.update(task, description=line)
            if saving:
                console.print(f"step {step:{len(str(args.steps))}}  {line}")
            if dist.get_rank() == 0:
                with (args.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
            begin, started = step, time.perf_counter()
    if rates:
        speed, bits = median(rates), shown["validation"]
        console.print(f"{speed:,.0f} tokens per second (median), validation loss {bits:.3f} bits per byte")


def main() -> None:
    args = parse_arguments()
    device = join_ranks(args.device)
    ranks = dist.get_world_size()
    if args.batch < ranks:
        sys.exit(f"--batch {args.batch} is too small for {ranks} ranks: pass at least {ranks}")
    torch.set_default_dtype(torch.float64 if args.float64 else torch.float32)
    console = Console(quiet=dist.get_rank() > 0, highlight=False, soft_wrap=True)

    text = load_text(device)
    torch.manual_seed(args.seed)  # the same for all ranks, of which each will keep its part of the same weights
    network = build_network(args.width, args.depth, args.heads).to(device)
    shard(network, device)
    optimizer = build_optimizer(network, RECIPES[args.optimizer])
    console.print(
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {device.type}, {args.optimizer}, "
        f"{sum(p.numel() for p in network.parameters()):,} weights, {len(text.train):,} bytes of text; "
        f"guessing takes {guessing(text):.2f} bits per byte"
    )
    checkpoint = open_folder(args.folder, fresh=args.fresh)
    first = resume(args, checkpoint, network, optimizer) if checkpoint else 0
    if checkpoint:
        console.print(f"Going on after step {first} of {args.steps}, from {checkpoint}; --fresh starts over")
    train(args, text, network, optimizer, first, console)
    if first < args.steps and isinstance(optimizer, (fused_adamp.AdamP, fused_adamp.SGDP)):
        report = optimizer.projection_report(network)
        console.print("\n".join(str(report).splitlines()[: 1 + REPORTED]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
