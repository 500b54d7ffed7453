"""The commands of ``python -m fused_adamp``, one module each; here is what they share."""

from __future__ import annotations

import sys
from time import monotonic

import torch

__all__ = ["Progress", "RefusedError", "devices", "in_words"]


class RefusedError(Exception):
    """What the user asked for cannot be done. The message is one line and says why and what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def in_words(seconds: float) -> str:
    """A duration to two digits."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


class Progress:
    """A line on stderr that says how far a command is: overwritten on a terminal, else a new one every ten seconds."""

    EVERY = 10.0

    def __init__(self) -> None:
        self._terminal, self._shown = sys.stderr.isatty(), monotonic()

    def show(self, text: str) -> None:
        if self._terminal:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        elif monotonic() - self._shown >= self.EVERY:
            self._shown = monotonic()
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
