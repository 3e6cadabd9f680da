"""What a training step spends its time on: named ranges in a profiler's trace, and seconds if asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch.profiler import record_function


class Phases:
    """Names the parts of a step, one after another.

    with phases("forward"): ...

    Set to a dict, `seconds` gains each part's time, for which a GPU is waited for at both ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] | None = None

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A part of the step."""
        with record_function(f"aspo {name}"):
            if self.seconds is None:
                yield
                return
            began = self._now()
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
