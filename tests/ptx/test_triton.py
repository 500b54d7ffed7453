"""The Triton backend on the host: tables, tiles, refusals; and that Triton's interpreter runs the kernels."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from each_plan import PLANS, under_each_plan

import fused_adamp
from fused_adamp.backends import jobs, tables, triton
from fused_adamp.batch import PROJECTIONS
from fused_adamp.precision import ROUNDINGS
from fused_adamp.reference import Decision

pytestmark = pytest.mark.skipif(triton.load() is not None, reason=str(triton.load()))

TILE = 1 << triton._LOG_TILE

_STEPS = """
import torch
from fused_adamp import AdamP
from fused_adamp.backends import jobs, tables, triton
from fused_adamp.reference import Decision
from fused_adamp.verify import make_gradient
torch.set_num_threads(1)
model = [((2, 40), Decision.CHANNEL), ((3, 9), Decision.LAYER), ((4, 9), Decision.NONE), ((5,), Decision.NONE)]
runs = []
for name in ("triton", "reference"):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape, _ in model]
    for p, (_, decision) in zip(params, model):
        p.grad = make_gradient(p.detach().double(), decision, generator).float()
    optimizer = AdamP(params, lr=1e-3, weight_decay=0.1, backend=name)
    optimizer.step()
    optimizer.clip_grad_norm_(0.5)
    optimizer.step()
    assert [*optimizer.decisions().values()] == [decision for _, decision in model]
    runs.append([p.detach() for p in params])
for p, q in zip(*runs):
    torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
print("stepped", triton.interpreted())
"""


@pytest.fixture(scope="module")
def sessions() -> dict[str, tuple[int, str]]:
    return under_each_plan("-W", "ignore", "-c", _STEPS)


@pytest.mark.parametrize("plan", PLANS)
def test_the_interpreter_steps_small_models(plan: str, sessions: dict[str, tuple[int, str]]) -> None:
    """Users debug kernels in the interpreter. Other tests of tests/ptx check the kernels' results."""
    status, output = sessions[plan]
    assert status == 0, output
    assert output == "stepped True\n"


def test_what_the_kernels_number_themselves_is_numbered_as_here() -> None:
    """All other tables come from the front end's."""
    from fused_adamp.kernels import precision, tables

    assert [getattr(precision, name.upper()).value for name in ROUNDINGS] == list(range(len(ROUNDINGS)))
    fixed = {decision.name: getattr(tables, decision.name).value for decision in Decision}
    fixed |= {"AUTO": tables.AUTO.value, "NONE": tables.NEVER.value}
    assert [fixed[name.upper()] for name in PROJECTIONS] == list(range(len(PROJECTIONS)))  # kernels/decision.py: decide


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5000, 9), (64, 64), (64, 65), (3, 1023), (9, TILE), (9, TILE + 1)])
def test_a_block_of_registers_holds_a_tile(rows: int, cols: int) -> None:
    from fused_adamp.kernels.tables import NARROWEST, WIDTH_STEP

    tile_rows, tile_cols = triton.TritonBackend().geometry(rows, cols)
    assert tile_cols == cols
    assert 1 <= tile_rows <= rows
    widths = [min(1 << log, TILE) for log in range(NARROWEST.value, triton._LOG_TILE + 2, WIDTH_STEP.value)]
    width = next((w for w in widths if w >= cols), None)
    assert tile_rows * (width or cols) <= TILE or tile_rows == 1


def test_very_wide_rows_are_cut_into_tiles() -> None:
    assert triton.TritonBackend().geometry(2, 100_000) == (1, TILE)
    assert triton.TritonBackend().geometry(1, 3 * TILE) == (1, TILE)  # a vector
    assert triton.TritonBackend().geometry(2, 14336) == (1, 14336)


def test_dimensions_merge_where_all_tensors_allow_it() -> None:
    p = torch.empty(4, 6, 5, 5)
    assert tables.collapse([p, p]) == ([150], [[1], [1]])
    last = p.contiguous(memory_format=torch.channels_last)
    assert tables.collapse([last, last]) == ([150], [[1], [1]])
    assert tables.collapse([last, last], any_order=False) == ([6, 25], [[1, 6], [1, 6]])
    assert tables.collapse([p, last]) == ([6, 25], [[25, 1], [1, 6]])
    assert tables.collapse([torch.empty(7), torch.empty(14)[::2]]) == ([7], [[1], [2]])


def test_on_the_cpu_it_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="only with TRITON_INTERPRET=1"):
        fused_adamp.AdamP([p], backend="triton").step()
    assert torch.equal(p.detach(), torch.ones(2, 2))


def test_an_old_triton_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="2.1.0"))
    assert triton.load.__wrapped__() == "Triton 2.1.0 is too old; pip install 'triton>=3.3'"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in triton.load.__wrapped__()


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((10, 0), False)])
def test_an_old_gpu_is_refused(capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = triton._too_old.__wrapped__(0)
    assert (reason is not None) == refused
    assert not refused or "7.5" in reason


def test_a_kernel_that_does_not_launch_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for the kernel")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "_run", fail)
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    optimizer = fused_adamp.AdamP([p], backend="triton")
    for _ in range(2):
        with pytest.raises(MemoryError):
            optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 4))
    assert all(not tensor.any() for tensor in optimizer.state[p].values())


def test_rows_in_many_pieces_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    p = torch.nn.Parameter(torch.ones(2, 6, 6, 6)[:, ::2, ::3, ::2])
    p.grad = torch.ones(2, 3, 2, 3)
    with pytest.raises(ValueError, match=r"at most 2 dimensions after merging; pass p\.contiguous\(\)"):
        fused_adamp.AdamP([p], backend="triton").step()


def test_an_unknown_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(jobs.PLAN, "fastest")
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match="FUSED_ADAMP_PLAN='fastest' is not a plan"):
        fused_adamp.AdamP([p], backend="triton").step()
