"""Numbers that the ranks sum together with the sums of the cosine test: failures, and a hash of their options."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed import ProcessGroup

    from fused_adamp.sharded.layout import Layout

__all__ = ["DIGEST", "Header", "compare_headers", "in_order"]

DIGEST = 8
"""Bytes of the hash in a header."""


class Header(NamedTuple):
    """Numbers that are summed over the ranks along with the other sums.

    Attributes:
        ranks: 1 from each rank.
        failed: 1 from a rank that cannot take this step.
        moved: 1 from a rank whose parameters, or their layouts, have changed since the last step.
        stale: 1 from a rank whose gradients have changed since they were measured for clipping.
        found_inf: GradScaler's.
        digest: a hash of everything that must be the same on all ranks: its bytes, then their squares.
    """

    ranks: float
    failed: float
    moved: float
    stale: float
    found_inf: float
    digest: tuple[float, ...]

    @classmethod
    def of(cls, lines: Iterable[str], *, failed: bool = False, moved: bool = False, stale: bool = False) -> Header:
        digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=DIGEST).digest()
        return cls(1.0, failed, moved, stale, 0.0, (*map(float, digest), *(float(byte * byte) for byte in digest)))

    @classmethod
    def read(cls, numbers: Sequence[float]) -> Header:
        ranks, failed, moved, stale, found_inf, *digest = numbers
        return cls(ranks, failed, moved, stale, found_inf, tuple(digest))

    def numbers(self) -> list[float]:
        return [*self[:5], *self.digest]

    def check_failure(self) -> None:
        """Raises RuntimeError if a rank has failed."""
        if self.failed:
            raise RuntimeError(
                "another rank that shares parameters with this one has failed in this step: see its error there. The "
                "step is not complete on any rank; go on from the last checkpoint"
            )

    @property
    def agreed(self) -> bool:
        """Whether all ranks sent the same digest: only then the mean of the squares is the square of the mean."""
        sums, squares = self.digest[:DIGEST], self.digest[DIGEST:]
        return all(self.ranks * square == total * total for total, square in zip(sums, squares, strict=True))


def compare_headers(layouts: Iterable[Layout], header: Header) -> Header:
    """Sums headers over all groups, without other sums. A rank's header may be counted more than once.

    One round per group, so that news reaches ranks that share no group. Groups of replicas are included.
    """
    groups = in_order(layouts, replicas=True)
    numbers = torch.tensor(header.numbers(), dtype=torch.float64, device="cpu")
    for group in groups * len(groups):
        on = numbers.to(group.bound_device_id or ("cuda" if dist.get_backend(group) == "nccl" else "cpu"))
        dist.all_reduce(on, group=group)
        numbers = on.cpu()
    return Header.read(numbers.tolist())


def in_order(layouts: Iterable[Layout], *, replicas: bool = False) -> list[ProcessGroup]:
    """The layouts' process groups, in the same order on all ranks, so that no ranks wait for each other in a circle."""
    layouts = list(layouts)
    groups = {group for layout in layouts for group in (*layout.row_groups, *layout.col_groups)}
    if replicas:
        groups |= {group for layout in layouts for group in layout.replica_groups if layout.sharing}
    return sorted(groups, key=lambda group: (dist.get_process_group_ranks(group), group.group_name))
