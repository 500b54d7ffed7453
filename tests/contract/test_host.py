"""The host's passes over tensors: one table of cases for the functions in Python and the compiled ones."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_adamp import AdamP, host
from fused_adamp.batch import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable

COMPILED = host.compiled()


@pytest.fixture(
    params=[
        "Python",
        pytest.param("compiled", marks=pytest.mark.skipif(COMPILED is None, reason="the extension is not built")),
    ],
    autouse=True,
)
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "compiled", lambda: None if request.param == "Python" else COMPILED)


# Where tensors lie.


class Case(NamedTuple):
    change: Callable[[list[Tensor]], object]
    """Changes a list of two tensors, ``aligned(8, 8)`` and ``aligned(5)``."""
    expected: str
    """"same", "moved" or "changed"."""


def aligned(*shape: int, offset: int = 0) -> Tensor:
    """Zeros that begin ``offset`` elements after an address that is a multiple of 64."""
    numel = torch.Size(shape).numel()
    flat = torch.zeros(numel + offset + 16)
    start = -flat.data_ptr() // 4 % 16
    return flat[start + offset :][:numel].view(shape)


def put(tensors: list[Tensor], t: Tensor, index: int = 0) -> None:
    tensors[index] = t


def set_data(tensors: list[Tensor], t: Tensor) -> None:
    tensors[0].data = t


def resized(size: int) -> Tensor:
    t = torch.zeros(8, 8)
    t.untyped_storage().resize_(size)
    return t


CASES = {
    "nothing": Case(lambda ts: None, "same"),
    "values": Case(lambda ts: ts[0].fill_(3.0), "same"),
    "another tensor in the same place": Case(lambda ts: put(ts, ts[0].view(8, 8)), "same"),
    "a parameter in the same place": Case(lambda ts: put(ts, nn.Parameter(ts[0])), "same"),
    "another tensor": Case(lambda ts: put(ts, aligned(8, 8)), "moved"),
    "both of them": Case(lambda ts: ts.__setitem__(slice(None), [aligned(8, 8), aligned(5)]), "moved"),
    "other data": Case(lambda ts: set_data(ts, aligned(8, 8)), "moved"),
    "a part of a larger tensor": Case(lambda ts: put(ts, aligned(3, 8, 8)[1]), "moved"),
    "two that change places": Case(lambda ts: ts.reverse(), "changed"),
    "another alignment": Case(lambda ts: put(ts, aligned(8, 8, offset=1)), "changed"),
    "another alignment of data": Case(lambda ts: set_data(ts, aligned(8, 8, offset=2)), "changed"),
    "transposed": Case(lambda ts: put(ts, aligned(8, 8).t()), "changed"),
    "transposed in the same place": Case(lambda ts: put(ts, ts[0].t()), "changed"),
    "transposed data": Case(lambda ts: set_data(ts, ts[0].t()), "changed"),
    "transposed in place": Case(lambda ts: ts[0].t_(), "changed"),
    "another shape in the same place": Case(lambda ts: put(ts, ts[0].view(4, 16)), "changed"),
    "one more dimension": Case(lambda ts: put(ts, ts[0].view(8, 8, 1)), "changed"),
    "fewer rows in the same place": Case(lambda ts: put(ts, ts[0][:7]), "changed"),
    "another dtype in the same place": Case(lambda ts: put(ts, ts[0].view(torch.int32)), "changed"),
    "another dtype": Case(lambda ts: put(ts, torch.zeros(8, 8, dtype=torch.bfloat16)), "changed"),
    "data of another dtype": Case(lambda ts: set_data(ts, torch.zeros(8, 8, dtype=torch.float64)), "changed"),
    "a freed storage": Case(lambda ts: set_data(ts, resized(0)), "changed"),
    "a storage that is too small": Case(lambda ts: set_data(ts, resized(16)), "changed"),
    "another tensor with a freed storage": Case(lambda ts: put(ts, resized(0)), "changed"),
    "no gradient": Case(lambda ts: put(ts, ABSENT), "changed"),
    "one tensor more": Case(lambda ts: ts.append(aligned(5)), "changed"),
    "one tensor less": Case(lambda ts: ts.pop(), "changed"),
    "a sparse tensor": Case(lambda ts: put(ts, torch.eye(8).to_sparse()), "changed"),
    "a tensor without data": Case(lambda ts: put(ts, FakeTensorMode().from_tensor(torch.zeros(8, 8))), "changed"),
    "a tensor on the meta device": Case(lambda ts: put(ts, torch.zeros(8, 8, device="meta")), "changed"),
}
IN_PLACE = ("transposed in place", "transposed data")
"""Changes of a tensor's layout at its address. They do not happen to settled tensors."""
WITHOUT_ADDRESS = (
    *("a freed storage", "another tensor with a freed storage"),
    *("a sparse tensor", "a tensor without data", "a tensor on the meta device"),
)


def look(old: host.Marks, tensors: list[Tensor], **options: Any) -> tuple[str, host.Marks]:
    new = host.marks(old, tensors, **options)
    if new is old:
        return "same", new
    return ("moved" if new.layout is old.layout else "changed"), new


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", CASES)
def test_marks_say_what_has_changed(name: str) -> None:
    for settled in (False, True)[: 1 if name in IN_PLACE else 2]:
        tensors = [aligned(8, 8), aligned(5)]
        kept = [*tensors]  # so that nothing else gets their memory
        old = host.marks(None, tensors, settled=settled)
        assert look(old, tensors, settled=settled)[0] == "same"
        CASES[name].change(tensors)
        found, new = look(old, tensors, settled=settled)
        assert found == CASES[name].expected, settled
        if name not in WITHOUT_ADDRESS:
            addresses = torch.frombuffer(new.addresses, dtype=torch.int64).tolist()
            assert addresses == [t.data_ptr() for t in tensors]
            assert look(new, tensors, settled=settled)[0] == "same"
        else:
            assert look(new, tensors, settled=settled)[0] == "changed", "nothing is known of such tensors"
        del kept


def test_marks_of_the_past_are_not_changed_by_later_ones() -> None:
    tensors = [aligned(8, 8), aligned(5)]
    first = host.marks(None, tensors)
    before = bytes(first.addresses)
    others = [aligned(8, 8), aligned(5)]
    second = host.marks(first, others)
    assert bytes(first.addresses) == before != bytes(second.addresses)
    assert look(second, tensors)[0] == "moved"


@pytest.mark.parametrize("settled", [False, True])
def test_marks_keep_no_tensor(settled: bool) -> None:
    tensors = [aligned(8, 8), aligned(5)]
    marks = host.marks(host.marks(None, tensors, settled=settled), tensors, settled=settled)
    gone = list(map(weakref.ref, tensors))
    del tensors
    gc.collect()
    assert [its() for its in gone] == [None, None]
    assert len(bytes(marks.addresses)) == 16


# Gradients and state.


def parameters(count: int) -> list[Tensor]:
    params: list[Tensor] = [nn.Parameter(torch.zeros(2, 2)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(2, 2)
    return params


@pytest.mark.parametrize("missing", [(), (0,), (1, 2), (0, 1, 2)])
def test_gradients_are_looked_up(missing: tuple[int, ...]) -> None:
    params = parameters(3)
    for i in missing:
        params[i].grad = None
    grads, count = host.gradients(params)
    assert count == 3 - len(missing)
    assert all(g is (ABSENT if i in missing else params[i].grad) for i, g in enumerate(grads))
    members = ["a", "b", "c"]
    found = host.present(members, grads)
    assert found == [member for i, member in enumerate(members) if i not in missing]
    assert (found is members) == (not missing)


ORDERS = {
    "the members' order": [0, 1, 2, 3],
    "another order": [3, 1, 0, 2],
    "reversed": [3, 2, 1, 0],
    "between others'": [4, 0, 5, 1, 2, 6, 3, 7],
    "between others', in another order": [4, 2, 5, 1, 0, 6, 3, 7],
}


@pytest.mark.parametrize("kind", [dict, defaultdict, UserDict])
@pytest.mark.parametrize("entries", [dict, UserDict])
@pytest.mark.parametrize("absent", [(), (1,)])
@pytest.mark.parametrize("order", ORDERS)
def test_state_is_looked_up_in_any_order(order: str, absent: tuple[int, ...], kind: Any, entries: Any) -> None:
    params = parameters(8)
    state = {params[i]: entries({"step": 10 + i, "exp_avg": 20 + i, "other": None}) for i in ORDERS[order]}
    given: Any = defaultdict(dict, state) if kind is defaultdict else kind(state)
    for i in absent:
        params[i].grad = None
    grads, _ = host.gradients(params[:4])
    found = host.entries(params[:4], grads, given, ("exp_avg", "step"))
    assert found is not None
    assert all(a is ABSENT if i in absent else a == 20 + i for i, a in enumerate(found[0]))
    assert all(a is ABSENT if i in absent else a == 10 + i for i, a in enumerate(found[1]))
    assert len(given) == len(ORDERS[order])


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("lacks", ["the parameter", "an entry", "everything"])
def test_missing_state_is_noticed(lacks: str, kind: Any) -> None:
    params = parameters(3)
    state: Any = defaultdict(dict, {p: {"step": 1, "exp_avg": 2} for p in params})
    if lacks == "everything":
        state.clear()
    elif lacks == "the parameter":
        del state[params[1]]
    else:
        state[params[1]] = kind({"exp_avg": 2})
    before = len(state)
    grads, _ = host.gradients(params)
    assert host.entries(params, grads, state, ("exp_avg", "step")) is None
    assert len(state) == before, "looking does not create entries"
    params[1].grad = None
    grads, _ = host.gradients(params)
    assert (host.entries(params, grads, state, ("exp_avg", "step")) is None) == (lacks == "everything")
    assert host.entries(params, grads, state, ()) == []


def test_lists_of_objects() -> None:
    a, b = torch.zeros(2), nn.Parameter(torch.zeros(2))
    assert host.are_same([a, b], [a, b])
    assert not host.are_same([a, b], [b, a])
    assert not host.are_same([a], [a, b])
    assert not host.are_same([a], [a.view(2)])
    assert host.are_same([], [])
    assert host.are_tensors([a, b])
    assert host.are_tensors([])
    assert not host.are_tensors([a, 1.0])


# Steps.


class Launched:
    """A launch that does nothing."""

    def start(self) -> None:
        pass


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Lets the Triton backend take tensors on the CPU, without launches. The list gets each tensor that is uploaded."""
    from fused_adamp.backends import tables, triton

    if triton.load() is not None:
        pytest.skip(str(triton.load()))
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    monkeypatch.setattr(triton, "_not_interpretable", lambda: None)
    monkeypatch.setattr(triton, "_run", lambda *_: Launched())
    found: list[Tensor] = []
    upload = tables.Tables.upload

    def noted(self: Any, target: Tensor, source: Tensor) -> None:
        found.append(target)
        upload(self, target, source)

    monkeypatch.setattr(tables.Tables, "upload", noted)
    return found


def replace_gradients(optimizer: Any, params: list[Tensor]) -> None:
    for p in params:
        p.grad = aligned(*p.shape)


def replace_moment(optimizer: Any, params: list[Tensor], t: Tensor) -> None:
    optimizer.state[params[0]]["exp_avg"] = t


def set_moment(optimizer: Any, params: list[Tensor], t: Tensor) -> None:
    optimizer.state[params[0]]["exp_avg"].data = t


def set_gradient(optimizer: Any, params: list[Tensor], g: Tensor | None) -> None:
    params[0].grad = g


def set_weight(optimizer: Any, params: list[Tensor], t: Tensor) -> None:
    params[0].data = t


def swap_parameters(optimizer: Any, params: list[Tensor]) -> None:
    new = nn.Parameter(aligned(*params[0].shape))
    new.grad, optimizer.state[new] = params[0].grad, optimizer.state.pop(params[0])
    optimizer.param_groups[0]["params"][0] = params[0] = new


def resize_and_restore(optimizer: Any, params: list[Tensor]) -> None:
    """As offloading tools do; the memory may be another then."""
    storage = optimizer.state[params[0]]["exp_avg"].untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)


STEPS: dict[str, tuple[Callable[[Any, list[Tensor]], object], set[str]]] = {
    "nothing": (lambda o, ps: None, set()),
    "gradients are zeroed": (lambda o, ps: o.zero_grad(set_to_none=False), set()),
    "all gradients are replaced": (replace_gradients, {"addresses"}),
    "a gradient is replaced": (lambda o, ps: set_gradient(o, ps, aligned(8, 8)), {"addresses"}),
    "a gradient is transposed": (
        lambda o, ps: set_gradient(o, ps, aligned(8, 8).t()),
        {"addresses", "strides", "jobs"},
    ),
    "a gradient is not aligned": (lambda o, ps: set_gradient(o, ps, aligned(8, 8, offset=1)), {"addresses", "jobs"}),
    "a gradient is missing": (lambda o, ps: set_gradient(o, ps, None), {"addresses", "jobs"}),
    "a moment is replaced": (lambda o, ps: replace_moment(o, ps, aligned(8, 8)), {"addresses"}),
    "a moment is transposed": (
        lambda o, ps: replace_moment(o, ps, aligned(8, 8).t()),
        {"addresses", "strides", "jobs"},
    ),
    "a moment has other data": (lambda o, ps: set_moment(o, ps, aligned(8, 8)), {"addresses"}),
    "a weight has other data": (lambda o, ps: set_weight(o, ps, aligned(8, 8)), {"addresses"}),
    "a weight is not aligned": (lambda o, ps: set_weight(o, ps, aligned(8, 8, offset=3)), {"addresses", "jobs"}),
    "a step count is replaced": (lambda o, ps: o.state[ps[0]].update(step=aligned()), {"addresses"}),
    "the learning rate changes": (lambda o, ps: o.param_groups[0].update(lr=0.5), {"scalars"}),
    "the learning rate is an integer": (lambda o, ps: o.param_groups[0].update(lr=2), {"scalars"}),
}
"""Changes between two steps, and the tables that are uploaded after it."""
AGAIN: dict[str, Callable[[Any, list[Tensor]], object]] = {
    "a parameter is swapped": swap_parameters,
    "a storage is freed and restored": resize_and_restore,
    "a state_dict is loaded": lambda o, ps: o.load_state_dict(o.state_dict()),
}
"""Changes that may or may not take memory elsewhere."""


def assert_uploaded(optimizer: Any) -> None:
    """The tables on the device say where the tensors are now."""
    (bucket,) = optimizer.buckets
    addresses = dict(
        zip(("p", "g", "m", "v", "r", "step", "seed"), bucket.scratch.eager.addresses.T.tolist(), strict=True)
    )
    for i, p in enumerate(bucket.params):
        if p.grad is None:
            continue
        state = optimizer.state[p]
        tensors = {"p": p, "g": p.grad, "m": state["exp_avg"], "v": state["exp_avg_sq"], "step": state["step"]}
        for role, t in tensors.items():
            assert addresses[role][i] == t.data_ptr(), role
        assert addresses["r"][i] == addresses["seed"][i] == 0
    scalars = torch.tensor([optimizer.scalars(group) for group in optimizer.param_groups], dtype=torch.float64)
    assert torch.equal(bucket.scratch.eager.scalars, scalars)


@pytest.mark.parametrize("change", [*STEPS, *AGAIN])
def test_tables_on_the_device_follow_the_tensors(change: str, uploads: list[Tensor]) -> None:
    params: list[Tensor] = [nn.Parameter(aligned(8, 8)), nn.Parameter(aligned(4, 8))]
    replace_gradients(None, params)
    optimizer: Any = AdamP(params, lr=0.1, backend="triton")
    optimizer.step()
    for p in params:
        optimizer.state[p].update({key: aligned(*t.shape) for key, t in optimizer.state[p].items()})
    optimizer.step()
    assert_uploaded(optimizer)
    uploads.clear()
    kept = [*params, *(p.grad for p in params), *(t for p in params for t in optimizer.state[p].values())]
    change_it, expected = STEPS[change] if change in STEPS else (AGAIN[change], None)
    change_it(optimizer, params)
    optimizer.step()
    assert_uploaded(optimizer)
    tables = optimizer.buckets[0].scratch.eager
    named = {name: getattr(tables, name).data_ptr() for name in ("addresses", "strides", "scalars", "table")}
    names = {next((n for n, address in named.items() if address == t.data_ptr()), "jobs") for t in uploads}
    assert expected is None or names == expected
    uploads.clear()
    optimizer.step()
    assert not uploads, "nothing has changed"
    assert_uploaded(optimizer)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert_uploaded(optimizer)
    del kept


@pytest.mark.parametrize("role", ["gradient", "weight", "exp_avg"])
def test_freed_storage_is_refused_after_steps(role: str, uploads: list[Tensor]) -> None:
    params: list[Tensor] = [nn.Parameter(aligned(8, 8)), nn.Parameter(aligned(4, 8))]
    replace_gradients(None, params)
    optimizer: Any = AdamP(params, lr=0.1, backend="triton")
    optimizer.step()
    tensors = {"gradient": params[1].grad, "weight": params[1], **optimizer.state[params[1]]}
    storage = tensors[role].untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    for _ in range(2):
        with pytest.raises(ValueError, match="holds 0 bytes"):
            optimizer.step()
    storage.resize_(size)
    optimizer.step()
    assert_uploaded(optimizer)


def test_steps_are_the_same_whoever_looks(backend: str) -> None:
    """With gradients that move, go and come back, and state that is replaced."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 8)) for _ in range(3)]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    optimizers: list[Any] = [AdamP(ps, lr=0.1, backend=backend) for ps in (params, copies)]
    chosen = host.compiled
    for number in range(8):
        for i, (p, q) in enumerate(zip(params, copies, strict=True)):
            p.grad = None if (number + i) % 5 == 4 else torch.randn(6, 8)
            q.grad = None if p.grad is None else p.grad.clone()
        if number == 3:
            for optimizer in optimizers:
                state = next(iter(optimizer.state.values()))
                state["exp_avg"] = state["exp_avg"].clone().t().contiguous().t()
        if number == 5:
            for optimizer in optimizers:
                optimizer.clip_grad_norm_(0.1)
        optimizers[0].step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "compiled", lambda: None if chosen() else COMPILED)
            optimizers[1].step()
        for p, q in zip(params, copies, strict=True):
            assert torch.equal(p, q)
