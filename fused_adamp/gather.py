"""Parameter groups to buckets, and buckets to one step's batches.

:func:`gather` runs in every step. It looks up every gradient and state, and asks whether the buckets still fit. Where
they do not, :func:`fill_buckets` makes new ones. A parameter without state gets it here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fused_adamp.backends import choose
from fused_adamp.batch import ABSENT, FLOATING, Batch, BucketKey
from fused_adamp.bucket import Bucket, fits, new_state, place_of
from fused_adamp.fake import has_numbers
from fused_adamp.host import are_same, are_tensors, entries, gradients, marks_of
from fused_adamp.options import check_options
from fused_adamp.sharded.dtensor import copy, local, local_gradient
from fused_adamp.sharded.exchange import Exchange
from fused_adamp.sharded.flat_slice import refuse_flat_buffers
from fused_adamp.sharded.placement import generation, placement_of
from fused_adamp.tensors import promoted, span_of
from fused_adamp.validate import Label, check_channel_dim, check_member, check_parameter, check_state, labels

if TYPE_CHECKING:
    from collections.abc import Collection

    from fused_adamp.batch import Backend, Members
    from fused_adamp.memory import Owner

__all__ = ["bucket_key", "fill_buckets", "gather", "in_order", "refit", "rounds_of", "state_dtype_of", "takes_part"]


def gather(owner: Owner, *, make_state: bool = True) -> list[Batch]:
    """This step's batches, one per bucket with a gradient. Makes missing buckets and state; writes no weight.

    Without ``make_state``, a batch of a bucket that lacks state has no state.
    """
    memory = owner._memory
    params = list(chain.from_iterable(group["params"] for group in owner.param_groups))
    groups = [(len(group["params"]), *_bucket_options(owner, group)) for group in owner.param_groups]
    if not (
        groups == memory.seen_groups
        and generation() == memory.seen_generation
        and are_same(params, memory.seen_params)
        and all(p.grad is None for p in memory.unbucketed)
    ):
        fill_buckets(owner)
        memory.seen_params, memory.seen_groups, memory.seen_generation = params, groups, generation()
    try:
        batches = [_batch(owner, bucket, make_state) for bucket in memory.buckets]
    except (RuntimeError, IndexError):  # a tensor that has no such rows: say which
        for bucket in memory.buckets:
            _check_tensors(owner, bucket)
        raise
    return [batch for batch in batches if batch is not None]


def refit(owner: Owner, batches: list[Batch]) -> list[Batch]:
    """Returns the batches, gathered again with new buckets if a tensor no longer fits the table of its bucket.

    Raises:
        ValueError, TypeError: a tensor cannot be stepped at all.
    """
    stale = [batch for batch in batches if batch.bucket.key.backend.first_stale(batch) >= 0]
    if not stale:
        return batches
    for batch in stale:
        _check_tensors(owner, batch.bucket)
    fill_buckets(owner, without=[batch.bucket for batch in stale])
    return gather(owner, make_state=all(batch.has_state for batch in batches))


def _batch(owner: Owner, bucket: Bucket, make_state: bool) -> Batch | None:
    """The bucket's tensors in this step; None if no member has a gradient."""
    params, key, state, filled = bucket.params, bucket.key, owner.state, owner._memory.filled
    if bucket.distributed or bucket.shared is not None:
        found = [filled[p] if p in filled else local_gradient(p) for p in params]
        grads, count = [ABSENT if g is None else g for g in found], sum(g is not None for g in found)
    else:
        grads, count = gradients(params)
    if not count:
        return None
    names = bucket.names
    lists = entries(params, grads, state, names)
    if lists is None:
        if make_state:
            _make_state(owner)
            return _batch(owner, bucket, make_state)
        for p in params:
            check_state(p, state.get(p), key, Label(owner.param_groups, p))
    tensors = dict(zip(names, lists or (), strict=False))
    for name in names[len(key.storage) :] if tensors else ():
        if not are_tensors(tensors[name]):  # a number, as in old checkpoints
            for p, number in zip(params, tensors[name], strict=True):
                if not isinstance(number, Tensor):
                    state[p][name] = torch.tensor(number, dtype=key.counters[name], device="cpu")
            return _batch(owner, bucket, make_state)
    if bucket.distributed:
        params = list(map(local, params))
        tensors |= {name: [local(t) for t in tensors[name]] for name in key.storage.keys() & tensors}
    if not bucket.has_own_tensors:
        params, grads = bucket.parts(params), bucket.parts(grads, copy=True)
        tensors |= {name: bucket.parts(tensors[name]) for name in key.storage.keys() & tensors}
    if bucket.has_pieces:
        # In the second pass of a step, for missing gradients, the other members may have been counted already.
        uncounted = filled or bucket.index
        tensors |= {name: bucket.counts(name, tensors[name], uncounted) for name in key.counters.keys() & tensors}
    return Batch(
        bucket,
        params,
        grads,
        [tensors[name] for name in key.moments if tensors],
        tensors.get("step", []),
        tensors.get("rounding_seed", []),
        tensors.get("remainder", []),
        owner.param_groups,
        owner,
        notes={},
    )


def _check_tensors(owner: Owner, bucket: Members) -> None:
    """Raises the error of the first member whose parameter, gradient or state cannot be stepped."""
    for p in bucket.index:
        if p.grad is not None:
            check_member(p, bucket.key, owner.state.get(p, {}), Label(owner.param_groups, p))


# State.


@torch.inference_mode(False)  # what is made here lasts longer
@torch.no_grad()
def _make_state(owner: Owner) -> None:
    """Adds missing state to every parameter with a gradient. On an error nothing is added."""
    memory = owner._memory
    stepped = [(b, p) for b in memory.buckets for p in b.index if p.grad is not None or p in memory.filled]
    for bucket, p in stepped:
        check_state(p, owner.state.get(p), bucket.key, Label(owner.param_groups, p))
    groups = [owner.param_groups[bucket.groups[bucket.index[p]]] for bucket, p in stepped]
    made = [_fitted_state(owner, bucket.key, p, group) for (bucket, p), group in zip(stepped, groups, strict=True)]
    for (_, p), new in zip(stepped, made, strict=True):
        owner.state[p].update(new)


def _fitted_state(owner: Owner, key: BucketKey, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The entries that a parameter's state lacks, and copies of entries that cannot be used where they lie.

    An entry cannot be used if no backend takes it. A moment cannot be used either if it has another dtype than the
    group's ``state_dtype``, where that is not None.
    """
    state, fitted = owner.state.get(p, {}), {}
    for name in (*key.counters, *key.storage):
        wanted = group["state_dtype"] if name in key.moments else None
        old = state.get(name)
        if old is not None and fits(key, name, old, p) and wanted in (None, old.dtype):
            continue
        new = fitted[name] = new_state(key, name, p)
        if old is not None:
            old = old if isinstance(old, Tensor) else torch.full((), old, dtype=new.dtype, device="cpu")
            copy(old.reshape(new.shape), new)
        elif name == "rounding_seed":
            new.fill_(_new_seed(p, Label(owner.param_groups, p)))
    return fitted


def _new_seed(p: Tensor, label: Label) -> int:
    """A seed from torch's default generator; for a parameter that ranks share, from its name."""
    if placement_of(p).is_shared:
        return int.from_bytes(hashlib.blake2b(str(label).encode(), digest_size=8).digest(), "little") >> 2
    return int(torch.randint(1 << 62, (), device="cpu"))


# Buckets.


@torch.inference_mode(False)  # what is made here lasts longer
@torch.no_grad()
def fill_buckets(owner: Owner, without: Collection[Any] = ()) -> None:
    """Puts every parameter that trains into a bucket: its old one if that still fits, else a new one.

    State that fits is not copied. On an error nothing changes. No parameter stays in a bucket of ``without``.
    """
    memory, state, param_groups = owner._memory, owner.state, owner.param_groups
    keys = _bucket_keys(owner, without)
    group_of = {p: i for i, group in enumerate(param_groups) for p in group["params"]}
    kept, places = _kept_buckets(owner, keys, without)
    bucketed = {p for bucket in kept for p in bucket.params} | {p for _, _, p in places}
    members: dict[BucketKey, list[Tensor]] = {}
    for p, key in keys.items():
        if p not in bucketed:
            members.setdefault(key, []).append(p)
    made = [Bucket(key, params) for key, params in members.items()]
    for bucket in made:
        for p, layout in zip(bucket.params, bucket.layouts, strict=True):
            if bucket.key.rounding == "stochastic" and layout.numbers is None:
                raise TypeError(
                    f'{Label(param_groups, p)} is sharded so that rounding="stochastic" cannot number its elements: '
                    'shard it by its first or second dimension, or take rounding="remainder"'
                )
    fitted = [
        (p, bucket.key, _fitted_state(owner, bucket.key, p, param_groups[group_of[p]]))
        for bucket, p in [*((bucket, p) for bucket in made for p in bucket.index), *((b, p) for b, _, p in places)]
        if state.get(p)
    ]
    for bucket, index, p in places:
        bucket.replace(index, p)
    for p, key, new in fitted:
        state[p].update(new)
        if key.rounding != "remainder":  # it belongs to a weight that moves without it from now on
            state[p].pop("remainder", None)
    memory.buckets = kept + made
    memory.rounds = None
    memory.has_fakes = not all(map(has_numbers, group_of))
    memory.unbucketed = [p for p in group_of if p not in keys and has_numbers(p)]
    for bucket in memory.buckets:
        bucket.set_groups([group_of[p] for p in bucket.params])
    shared = any(bucket.shared is not None for bucket in memory.buckets)
    memory.exchange = Exchange(memory.buckets, labels(param_groups)) if shared else None


def _kept_buckets(
    owner: Owner, keys: dict[Tensor, BucketKey], without: Collection[Any]
) -> tuple[list[Bucket], list[tuple[Bucket, int, Tensor]]]:
    """The old buckets that stay, and the replacements of their members that are gone.

    A replacement is (bucket, index of the member, new parameter).
    """
    old = [bucket for bucket in owner._memory.buckets if bucket not in without and bucket.fits_placements]
    members = {p for bucket in old for p in bucket.params if keys.get(p) == bucket.key}
    new: dict[Any, list[Tensor]] = {}
    for p, key in keys.items():
        if p not in members:
            check_state(p, owner.state.get(p), key, Label(owner.param_groups, p))
            if (place := place_of(p, key)) is not None:
                new.setdefault((key, place), []).append(p)
    kept, places = [], []
    for bucket in old:
        gone = [i for i, p in enumerate(bucket.params) if keys.get(p) != bucket.key]
        of = bucket.places if gone else []
        wanted = [(bucket.key, of[i]) for i in gone]
        if all(len(new.get(place, ())) >= count for place, count in Counter(wanted).items()):
            kept.append(bucket)
            places += [(bucket, i, new[place].pop()) for i, place in zip(gone, wanted, strict=True)]
    return kept, places


def _bucket_keys(owner: Owner, without: Collection[Any]) -> dict[Tensor, BucketKey]:
    """The bucket key of every parameter that trains or has state. Checks those that are in no other bucket yet."""
    keys: dict[Tensor, BucketKey] = {}
    known = {p for bucket in owner._memory.buckets if bucket not in without for p in bucket.index}
    for group in owner.param_groups:
        check_options(group, owner.options)
        members = [p for p in group["params"] if takes_part(owner, p) and has_numbers(p)]
        for p in members:
            label = Label(owner.param_groups, p)
            if p not in known:
                check_parameter(p, label)
            check_channel_dim(p, group["channel_dim"], label)
        backends = {
            device: choose(device, backend=group["backend"], fused=group["fused"], foreach=group["foreach"])
            for device in {p.device for p in members}
        }
        keys |= {p: bucket_key(owner, p, group, backends[p.device]) for p in members}
    refuse_flat_buffers(keys, owner._memory.buckets, lambda p: Label(owner.param_groups, p))
    return keys


def takes_part(owner: Owner, p: Tensor) -> bool:
    """Whether a step may use the parameter: not if it is lazy, or frozen and without gradient and state."""
    return (p.requires_grad or p.grad is not None or bool(owner.state.get(p))) and not is_lazy(p)


def bucket_key(owner: Owner, p: Tensor, group: dict[str, Any], backend: Backend) -> BucketKey:
    """The key of the bucket that a parameter of this group belongs to."""
    moments, channel_dim, state_dtype, rounding, _ = _bucket_options(owner, group)
    if rounding == "remainder" and p.dtype != torch.bfloat16:
        rounding = "nearest"
    if state_dtype is None:
        state_dtype = _dtype_there(owner, p, moments) or _default_state_dtype(p, rounding)
    if rounding == "stochastic" and torch.bfloat16 not in (p.dtype, state_dtype):
        rounding = "nearest"
    channel_dim = 0 if p.ndim < 2 else channel_dim
    return BucketKey(backend, p.device, p.dtype, moments, state_dtype, rounding, channel_dim, owner.adaptive)


def _bucket_options(owner: Owner, group: dict[str, Any]) -> tuple[Any, ...]:
    """The options of a group that choose a parameter's bucket; and the projection, to notice its change."""
    return owner.moments(group), *(group[n] for n in ("channel_dim", "state_dtype", "rounding", "projection"))


def _dtype_there(owner: Owner, p: Tensor, moments: tuple[str, ...]) -> torch.dtype | None:
    """The dtype of the parameter's existing moments; None if it has none."""
    there = (owner.state[p].get(name) for name in moments if p in owner.state)
    return next((t.dtype for t in there if isinstance(t, Tensor) and t.dtype in FLOATING), None)


def _default_state_dtype(p: Tensor, rounding: str) -> torch.dtype:
    return torch.float32 if rounding == "remainder" and p.dtype == torch.bfloat16 else p.dtype


def state_dtype_of(owner: Owner, group: dict[str, Any], state: dict[Any, Any]) -> torch.dtype | None:
    """The ``state_dtype`` for a group that has None, from loaded state; None if its moments have the default dtype."""
    moments = [
        (p, state[p][name]) for p in group["params"] for name in owner.moments(group) if name in state.get(p, {})
    ]
    usual = all(moment.dtype == _default_state_dtype(p, group["rounding"]) for p, moment in moments)
    return None if usual else promoted([moment.dtype for _, moment in moments])


# Parameters that share memory.


def in_order(owner: Owner, batches: list[Batch]) -> list[Batch]:
    """The batches, split so that parameters that share memory are in different ones, in the order of their steps."""
    rounds = rounds_of(owner, batches)
    if not rounds:
        return batches
    parts = [batch.only(members) for of in rounds for batch, members in zip(batches, of, strict=True)]
    return [part for part in parts if any(g is not ABSENT for g in part.grads)]


def rounds_of(owner: Owner, batches: list[Batch]) -> list[list[set[int]]]:
    """Rounds, each a set of member indices per batch, in which no parameters share memory; empty if none share any.

    Parameters that share memory are stepped in the order of the parameter groups, as in torch.optim. The result is
    cached as long as no weight moves.
    """
    memory = owner._memory
    weights = [marks_of(batch, "p", batch.params) for batch in batches]
    if memory.rounds is None or not are_same(weights, memory.seen_weights):
        place = {p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in owner.param_groups))}
        places = [[place[p] for p in batch.bucket.params] for batch in batches]
        memory.rounds = _find_rounds([batch.params for batch in batches], places)
        memory.seen_weights = weights
    return memory.rounds


def _find_rounds(params: list[list[Tensor]], places: list[list[int]]) -> list[list[set[int]]]:
    """The rounds of :func:`rounds_of`, from the members' parameters, batch by batch.

    ``places`` are the parameters' indices in the order of the parameter groups. Parameters whose address ranges overlap
    form a cluster. Each parameter of a cluster is in another round.
    """
    spans = sorted(
        (*span_of(p), place, batch, i)
        for batch, (of, where) in enumerate(zip(params, places, strict=True))
        for i, (p, place) in enumerate(zip(of, where, strict=True))
        if p.numel()
    )
    clusters: list[list[tuple[int, int, int]]] = []
    reach = -1
    for begin, end, place, batch, i in spans:
        if begin >= reach:
            clusters.append([])
        clusters[-1].append((place, batch, i))
        reach = max(reach, end)
    if len({place for cluster in clusters for place, *_ in cluster}) == len(clusters):
        return []
    first = [set(range(len(of))) for of in params]
    rounds = [first]
    for cluster in clusters:
        order = sorted({place for place, *_ in cluster})
        for place, batch, i in cluster:
            turn = order.index(place)
            while len(rounds) <= turn:
                rounds.append([set() for _ in params])
            if turn:
                first[batch].remove(i)
                rounds[turn][batch].add(i)
    return rounds
