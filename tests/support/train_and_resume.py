"""Trains a small network for 20 steps and goes on from a checkpoint of the 10th, in float32 and bfloat16.

    python tests/support/train_and_resume.py first | second

``first`` takes ten steps and saves a checkpoint in the current folder. ``second``, in another process, takes all
twenty, and the last ten once more from the checkpoint: losses, weights and state are the same bit for bit. Only torch
and the package are needed.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from fused_adamp import SGDP, AdamP

HALF = 10
STATE = {"AdamP": 3, "SGDP": 1}
"""Tensors of state for each parameter."""


def train(steps: int, dtype: torch.dtype, name: str, checkpoint: str | None = None) -> dict[str, Any]:
    """Trains up to this step, from a checkpoint if there is one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).to(dtype)
    x, y = torch.randn(16, 3, 8, 8, dtype=dtype), torch.arange(16) % 5
    parameters = model.parameters()
    optimizer = AdamP(parameters, lr=0.003) if name == "AdamP" else SGDP(parameters, lr=0.02, momentum=0.9)
    if checkpoint:
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for _ in range(HALF if checkpoint else 0, steps):
        loss = nn.functional.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested dicts."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for part in tree.values() for t in tensors(part)] if isinstance(tree, dict) else []


def main(half: str) -> None:
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("AdamP", "SGDP"):
            case = f"{name}-{str(dtype).removeprefix('torch.')}"
            if half == "first":
                torch.save(train(HALF, dtype, name), f"{case}.pt")
                continue
            whole, resumed = train(2 * HALF, dtype, name), train(2 * HALF, dtype, name, f"{case}.pt")
            losses = whole["losses"]
            print(f"{case}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
            assert losses[-1] < losses[0] / 2, f"{case} does not learn: {losses}"
            assert losses[HALF:] == resumed["losses"], f"{case}: other losses after the checkpoint"
            pairs = [*zip(tensors(whole), tensors(resumed), strict=True)]
            assert len(pairs) == 4 * (1 + STATE[name]), f"{case}: {len(pairs)} weights and tensors of state"
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs), f"{case}: other weights or state"


if __name__ == "__main__":
    main(sys.argv[1])
