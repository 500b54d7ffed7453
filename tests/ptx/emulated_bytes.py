"""The bytes that compiled kernels of every plan move, access by access, against the ledger; and the sectors.

The emulator executes each load and store with its addresses, so the count is of what a GPU executes, not of a formula
about it. It does not see caches: what a plan finds there on a GPU counts here all the same. See emulated_steps.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from emulator import Traffic
from harness import BACKEND
from models import PLAN, TILE, exhaustive
from test_shares import batch_of, sharded
from torch.nn import Parameter

from fused_adamp import AdamP
from fused_adamp.backends.triton import _WARPS
from fused_adamp.batch import Need, Sharing
from fused_adamp.reference import Decision
from fused_adamp.verify import make_gradient

if TYPE_CHECKING:
    from harness import Harness

# docs/architecture.md, "Bytes": float32, per element.
MEASURE = 8  # g p
SQUARE = 4  # g
DOT = 16  # p g m v
UPDATE = 28  # p g m v, and p m v written
VECTOR = 8
"""Elements: what a vector has more than a multiple of them, each warp loads."""
SECTOR = 32
"""Bytes of memory that move together."""


class Count(NamedTuple):
    """A step to count: shape, decision of its gradient, options, and what the ledger says of it.

    ``sharing`` and ``needs`` are given where ranks share the parameter: what they ask before the step, whose verdict is
    the decision. ``end`` are bytes per element that are loaded at the end of a vector. ``load_use`` and ``store_use``
    are the least parts of the sectors that are used.
    """

    shape: tuple[int, ...]
    decision: str
    options: dict[str, float | str]
    bytes_per_element: int
    dtype: str = "float32"
    clip: bool = False
    sharing: str = "LOCAL"
    needs: int = 0
    end: int = 0
    load_use: float = 1.0
    store_use: float = 1.0


# 32 lanes load 128 bytes that start within a sector. The next load finds the last sector in the first-level cache.
FLAT: dict[str, Any] = {"load_use": 0.8, "store_use": 0.8}
END: dict[str, Any] = {"load_use": 0.99, "store_use": 0.99}
# Eight elements a thread, for the sake of the weights: state in float32 is loaded in two pieces, each of half sectors.
HALVES: dict[str, Any] = {"load_use": 2 / 3}


COUNTS = {
    "vector": Count((3 * TILE + 5,), "NONE", {}, UPDATE, end=16, **END),
    "delta 0": Count((24, 64), "NONE", {"delta": 0.0}, UPDATE),
    "none": Count((96, 64), "NONE", {}, MEASURE + UPDATE),
    "channel": Count((96, 64), "CHANNEL", {}, MEASURE + UPDATE),
    "channel, rows of no whole vectors": Count((40, 147), "CHANNEL", {}, MEASURE + UPDATE, **FLAT),
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
    "clip a vector": Count((3 * TILE + 5,), "NONE", {}, SQUARE + UPDATE, clip=True, end=20, **END),
    "clip, always channel": Count((96, 64), "CHANNEL", {"projection": "channel"}, SQUARE + UPDATE, clip=True),
    # p g m v and the remainder r, of 2 2 4 4 and 2 bytes: measure p g r, update p g m v r and p m v r written.
    "remainder": Count((96, 64), "NONE", {"rounding": "remainder"}, 6 + 14 + 12, dtype="bfloat16"),
    "float32 state": Count((96, 64), "NONE", {"state_dtype": "float32"}, 4 + 12 + 10, dtype="bfloat16", **HALVES),
    "bfloat16": Count((96, 64), "NONE", {}, 4 + 8 + 6, dtype="bfloat16"),
    "stochastic": Count((96, 64), "CHANNEL", {"rounding": "stochastic"}, 4 + 8 + 6, dtype="bfloat16"),
    "bfloat16 state": Count((96, 64), "NONE", {"state_dtype": "bfloat16"}, 8 + 12 + 8),
    # Shared: the step takes the verdict, and only the dot of a wide row is left for it to find.
    "test": Count((96, 64), "NONE", {}, MEASURE + UPDATE, sharing="SHARED", needs=Need.TEST),
    "test, channel": Count((40, 147), "CHANNEL", {}, MEASURE + UPDATE, sharing="SHARED", needs=Need.TEST, **FLAT),
    "test and dot": Count((96, 64), "LAYER", {}, DOT + UPDATE, sharing="SHARED", needs=Need.TEST | Need.DOT),
    "dot": Count((2, TILE + 8), "LAYER", {}, DOT + UPDATE, sharing="SHARED", needs=Need.DOT),
    "dot of rows": Count((96, 64), "CHANNEL", {}, DOT + UPDATE, sharing="SPLIT", needs=Need.TEST | Need.DOT),
    "dot of wide rows": Count((2, 20 * TILE), "CHANNEL", {}, DOT + UPDATE, sharing="SPLIT", needs=Need.DOT),
    "norm": Count((3 * TILE + 5,), "NONE", {}, SQUARE + UPDATE, sharing="SHARED", needs=Need.SQUARE, end=20, **END),
    "nothing": Count((96, 64), "LAYER", {}, UPDATE, sharing="SPLIT"),
    "wide row, channel": Count((2, 20 * TILE), "CHANNEL", {}, DOT + UPDATE, sharing="SHARED"),
}


def measured(harness: Harness, count: Count) -> tuple[Traffic, Decision, int]:
    """The step's traffic of weight, gradient and state in bytes; the decision; and the number of elements."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, count.dtype)
    options = {
        name: getattr(torch, str(value)) if name == "state_dtype" else value for name, value in count.options.items()
    }
    p = Parameter(torch.randn(count.shape, generator=generator).to(dtype))
    p.grad = make_gradient(p.detach().double(), Decision[count.decision], generator).to(dtype)
    optimizer = AdamP([p], lr=1e-9, backend=BACKEND, **options)  # type: ignore[arg-type]
    optimizer.step()  # makes the state; the weight stays, and with it the decision
    sharing = Sharing[count.sharing]
    harness.schedule = harness.schedule._replace(traffic=True)
    harness.traffic.clear()
    if sharing is Sharing.LOCAL:
        if count.clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        made = optimizer.decisions()[p]
    else:
        bucket = sharded(optimizer, BACKEND, [sharing])
        assert bucket.shared is not None
        bucket.shared.needs.fill_(count.needs)
        bucket.shared.verdicts[:, 0] = Decision[count.decision]
        bucket.shared.verdicts[:, 1] = 0
        batch = batch_of(optimizer, bucket)
        bucket.key.backend.measure(batch)
        bucket.key.backend.step(batch)
        made = Decision(int(bucket.decisions.item()))
    moved = Traffic()
    for name in ("p", "g", "remainder", "exp_avg", "exp_avg_sq"):
        moved = moved.plus(harness.traffic.get(f"{name}[0]", Traffic()))
    return moved, made, p.numel()


USUAL_UNDER = dict.fromkeys(("channel, rows of no whole vectors", "bfloat16", "remainder"), "one_pass")
USUAL_UNDER |= {"stochastic": "split"}
USUAL_UNDER |= {name: "split" for name, count in COUNTS.items() if count.sharing != "LOCAL"}
"""By name, the plan under which a step is counted without being asked for; else under both. Compiling takes time."""
USUAL_UNDER |= dict.fromkeys(("float32 state", "bfloat16 state", "test, channel"), "")


def table() -> list[Any]:
    usual = {name for name in COUNTS if USUAL_UNDER.get(name, PLAN) == PLAN}
    return [pytest.param(name, marks=() if name in usual else exhaustive) for name in COUNTS]


def ledger(count: Count, elements: int) -> int:
    """The bytes of a step.

    The CUDA C++ kernels keep the updates of a row on chip, of wide rows too, and read the weight again. No warp loads
    what another one has at the end of a vector.
    """
    by_rows = count.decision == "CHANNEL" and count.sharing != "SPLIT" and count.shape[1] < 20 * TILE
    if BACKEND != "cuda":
        return elements * count.bytes_per_element + (_WARPS - 1) * (elements % VECTOR) * count.end
    again = getattr(torch, count.dtype).itemsize - (DOT if count.shape[-1] > TILE else 0)
    return elements * (count.bytes_per_element + (again if by_rows else 0))


@pytest.mark.parametrize("name", table())
def test_a_step_moves_the_bytes_of_the_ledger(name: str, emulated: Harness) -> None:
    count = COUNTS[name]
    moved, decision, elements = measured(emulated, count)
    assert decision.name == count.decision
    assert moved.loaded + moved.stored == ledger(count, elements)
    for bytes_, sectors, use in (
        (moved.loaded, moved.load_sectors, count.load_use),
        (moved.stored, moved.store_sectors, count.store_use),
    ):
        assert use * SECTOR * sectors <= bytes_ <= SECTOR * sectors, f"{bytes_} bytes in {sectors} sectors"
