"""Memory beyond the moments, and over time."""

from __future__ import annotations

import gc
import resource
import sys

import pytest
import torch

import fused_adamp
from bench.workloads import WORKLOADS
from fused_adamp.gather import fill_buckets


@pytest.mark.parametrize("workload", ["resnet50", "vit_b16", "gpt2"])
@pytest.mark.parametrize("optimizer", [fused_adamp.AdamP, fused_adamp.SGDP])
def test_beyond_the_moments_less_than_one_percent_of_the_parameters(workload: str, optimizer: type) -> None:
    """Everything the bucket allocates, and the extension's scratch of one step by its own formula."""
    params = [torch.nn.Parameter(torch.empty(shape)) for shape in WORKLOADS[workload].shapes()]
    options = {"momentum": 0.9} if optimizer is fused_adamp.SGDP else {}
    opt = optimizer(params, **options, backend="cpu")
    fill_buckets(opt)
    (bucket,) = opt.buckets
    size = sum(p.nbytes for p in params)
    tables = sum(t.nbytes for t in (bucket.table, bucket.decisions, bucket.results, bucket.scratch.sums))
    addresses = len(params) * len(bucket.key.storage | bucket.key.counters) * 8
    threads, rows = torch.get_num_threads(), sum(p.size(0) for p in params if p.ndim >= 2)
    scratch = threads * 32768 * 4 * 3 + rows * 4
    assert tables + addresses + scratch < 0.01 * size


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_steps_take_no_memory_that_does_not_come_back(count: int, backend: str) -> None:
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 9), (8,), (4, 2, 3, 3))]
    optimizer = fused_adamp.AdamP(params, lr=1e-4, backend=backend)

    def steps(count: int) -> tuple[int, int, int]:
        for i in range(count):
            for p in params:
                p.grad = torch.ones_like(p) if i % 7 or p.ndim > 1 else None
            optimizer.step()
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return tensors, sys.getallocatedblocks(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    tensors, blocks, kilobytes = steps(count // 5)
    tensors_later, blocks_later, kilobytes_later = steps(count)
    assert tensors_later == tensors
    assert blocks_later - blocks < count // 2, "Python holds more objects"
    assert kilobytes_later - kilobytes < 1024
