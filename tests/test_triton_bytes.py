"""The bytes that every plan of the Triton kernels moves, counted access by access, against the ledger.

The interpreter executes each load and store with its addresses and mask, so the count is of what the kernels do, not of
a formula about them. It does not see caches: what a plan finds there on a GPU counts here all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fused_adamp.backends import triton
from fused_adamp.bucket import Need

pytestmark = pytest.mark.skipif(triton.load() is not None, reason=str(triton.load()))

TILE = 1 << triton._LOG_TILE

# docs/architecture.md, "Bytes": float32, per element.
MEASURE = 8  # g p
SQUARE = 4  # g
DOT = 16  # p g m v
UPDATE = 28  # p g m v, and p m v written


class Count(NamedTuple):
    """A step to count: shape, decision of its gradient, options, and what the ledger says of it.

    ``sharing`` and ``needs`` are given where ranks share the parameter: what they ask before the step, whose verdict is
    the decision.
    """

    shape: tuple[int, ...]
    decision: str
    options: dict[str, float | str]
    bytes_per_element: int
    dtype: str = "float32"
    clip: bool = False
    sharing: str = "LOCAL"
    needs: int = 0


COUNTS = {
    "vector": Count((3 * TILE + 5,), "NONE", {}, UPDATE),
    "delta 0": Count((24, 64), "NONE", {"delta": 0.0}, UPDATE),
    "none": Count((96, 64), "NONE", {}, MEASURE + UPDATE),
    "channel": Count((96, 64), "CHANNEL", {}, MEASURE + UPDATE),
    "channel, rows of no whole vectors": Count((40, 147), "CHANNEL", {}, MEASURE + UPDATE),
    "layer in one tile": Count((16, 64), "LAYER", {}, MEASURE + DOT + UPDATE),
    "layer": Count((96, 64), "LAYER", {}, MEASURE + DOT + UPDATE),
    "wide row": Count((2, TILE + 8), "CHANNEL", {}, MEASURE + DOT + UPDATE),
    "row of several tiles": Count((2, 20 * TILE), "CHANNEL", {}, MEASURE + DOT + UPDATE),
    # Fixed: nothing is measured.
    "never": Count((96, 64), "NONE", {"projection": "none"}, UPDATE),
    "always channel": Count((96, 64), "CHANNEL", {"projection": "channel"}, UPDATE),
    "always channel, wide row": Count((2, TILE + 8), "CHANNEL", {"projection": "channel"}, DOT + UPDATE),
    "always layer": Count((96, 64), "LAYER", {"projection": "layer"}, DOT + UPDATE),
    # Clipped: the norm takes a pass of its own, and the step measures what it finds.
    "clip": Count((96, 64), "NONE", {}, SQUARE + MEASURE + UPDATE, clip=True),
    "clip a vector": Count((3 * TILE + 5,), "NONE", {}, SQUARE + UPDATE, clip=True),
    "clip, always channel": Count((96, 64), "CHANNEL", {"projection": "channel"}, SQUARE + UPDATE, clip=True),
    # p g m v and the remainder r, of 2 2 4 4 and 2 bytes: measure p g r, update p g m v r and p m v r written.
    "remainder": Count((96, 64), "NONE", {"rounding": "remainder"}, 6 + 14 + 12, dtype="bfloat16"),
    "float32 state": Count((96, 64), "NONE", {"state_dtype": "float32"}, 4 + 12 + 10, dtype="bfloat16"),
    "bfloat16": Count((96, 64), "NONE", {}, 4 + 8 + 6, dtype="bfloat16"),
    "stochastic": Count((96, 64), "CHANNEL", {"rounding": "stochastic"}, 4 + 8 + 6, dtype="bfloat16"),
    "bfloat16 state": Count((96, 64), "NONE", {"state_dtype": "bfloat16"}, 8 + 12 + 8),
    # Shared: the step takes the verdict, and only the dot of a wide row is left for it to find.
    "test": Count((96, 64), "NONE", {}, MEASURE + UPDATE, sharing="SHARED", needs=Need.TEST),
    "test, channel": Count((40, 147), "CHANNEL", {}, MEASURE + UPDATE, sharing="SHARED", needs=Need.TEST),
    "test and dot": Count((96, 64), "LAYER", {}, DOT + UPDATE, sharing="SHARED", needs=Need.TEST | Need.DOT),
    "dot": Count((2, TILE + 8), "LAYER", {}, DOT + UPDATE, sharing="SHARED", needs=Need.DOT),
    "dot of rows": Count((96, 64), "CHANNEL", {}, DOT + UPDATE, sharing="SPLIT", needs=Need.TEST | Need.DOT),
    "dot of wide rows": Count((2, 20 * TILE), "CHANNEL", {}, DOT + UPDATE, sharing="SPLIT", needs=Need.DOT),
    "norm": Count((3 * TILE + 5,), "NONE", {}, SQUARE + UPDATE, sharing="SHARED", needs=Need.SQUARE),
    "nothing": Count((96, 64), "LAYER", {}, UPDATE, sharing="SPLIT"),
    "wide row, channel": Count((2, 20 * TILE), "CHANNEL", {}, DOT + UPDATE, sharing="SHARED"),
}

_STEP = """
import json, sys
import numpy, pytest, torch
sys.path.insert(0, sys.argv[2])
import fused_adamp
from fused_adamp.reference import Decision
from fused_adamp.sharding import Sharing
from fused_adamp.verify import make_gradient
from test_shares import batch_of, sharded
from triton.runtime import interpreter

counts = json.loads(sys.argv[1])
builder = interpreter.InterpreterBuilder
load, store = builder.create_masked_load, builder.create_masked_store
tensors, moved = [], 0

def count(addresses, mask):
    global moved
    for t in tensors:
        inside = (addresses >= t.data_ptr()) & (addresses < t.data_ptr() + t.nbytes)
        moved += t.itemsize * int((inside & numpy.broadcast_to(mask, inside.shape)).sum())

def counted_load(self, ptrs, mask, *rest):
    count(ptrs.data, mask.data)
    return load(self, ptrs, mask, *rest)

def counted_store(self, ptrs, value, mask, *rest):
    count(ptrs.data, mask.data)
    return store(self, ptrs, value, mask, *rest)

builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
results = {}
for name, (shape, decision, options, _, dtype, clip, sharing, needs) in counts.items():
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype)
    if "state_dtype" in options:
        options["state_dtype"] = getattr(torch, options["state_dtype"])
    p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    p.grad = make_gradient(p.detach().double(), Decision[decision], generator).to(dtype)
    optimizer = fused_adamp.AdamP([p], lr=1e-9, backend="triton", **options)
    optimizer.step()  # makes the state; the weight stays, and with it the decision
    if sharing != "LOCAL":
        with pytest.MonkeyPatch.context() as patch:
            bucket = sharded(patch, optimizer, "triton", [Sharing[sharing]])
        bucket.shared.needs.fill_(needs)
        bucket.shared.verdicts[:, 0] = Decision[decision]
        bucket.shared.verdicts[:, 1] = 0
    state = optimizer.state[p]
    tensors, moved = [p.detach(), p.grad, *(tensor for tensor in state.values() if tensor.shape == p.shape)], 0
    if clip:
        optimizer.clip_grad_norm_(1.0)
    if sharing == "LOCAL":
        optimizer.step()
        made = optimizer.decisions()[p]
    else:
        batch = batch_of(optimizer, bucket)
        bucket.key.backend.measure(batch)
        bucket.key.backend.step(batch)
        made = Decision(bucket.decisions.item())
    results[name] = [moved / p.numel(), made.name]
print(json.dumps(results))
"""


@pytest.mark.parametrize("plan", ["split", "one_pass"])
def test_every_plan_moves_the_bytes_of_the_ledger(plan: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _STEP, json.dumps(COUNTS), str(Path(__file__).parent)],
        env=os.environ | {"TRITON_INTERPRET": "1", triton.PLAN: plan},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    expected = {name: [count.bytes_per_element, count.decision] for name, count in COUNTS.items()}
    assert json.loads(run.stdout) == expected
