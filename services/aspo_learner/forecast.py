"""Whether a run fits its device: predicted before anything is loaded, measured once training is under way.

forecast = MemoryForecast.foresee(config, ranks)      # says what will not fit, and what to change
forecast.compare(updates)                             # after every step; says once what it came to
"""

from __future__ import annotations

import logging
import os
import re
import resource
from pathlib import Path

import torch

from aspo.config import Config, ConfigError, Precision
from aspo_learner.memory import Shape, learner_peak_bytes, shape_of_config, states_bytes
from aspo_learner.ranks import Ranks

log = logging.getLogger(__name__)
_GIB = 2**30


class MemoryForecast:
    """What one process is to take of its device's memory at its peak, in bytes, and what it did take.

    On a CPU that is all of the process; on a GPU what torch has allocated there.
    """

    def __init__(self, predicted: int, device: torch.device) -> None:
        self.predicted, self._device = predicted, device
        self._compared = False

    @classmethod
    def foresee(cls, config: Config, ranks: Ranks) -> MemoryForecast | None:
        """Predict the peak, and warn if it is more than is free; None for a model without a known shape.

        Raises ConfigError if weights, gradients and optimizer alone are more than the device has at all: that
        much is certain, while a batch may be smaller than `micro_batch_tokens`, and memory may come free.
        """
        try:
            shape = shape_of_config(config.model.path)
        except ConfigError:  # no model at all is for the loading to say
            return None
        device, mixed = ranks.device, uses_bf16(config.learner.precision, ranks.device)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
        copies = config.learner.shard_size or ranks.size
        peak = learner_peak_bytes(shape, config, gpus=copies, mixed=mixed)
        states = 0 if config.learner.offload else states_bytes(shape, config, mixed=mixed) // copies
        free, total = memory_of(device)
        where = f"{device} has {total / _GIB:.3g} GiB, {free / _GIB:.3g} of them free"
        if states * here > total:
            raise ConfigError(
                f"weights, gradients and optimizer of {shape.name} take {states * here / _GIB:.3g} GiB; "
                f"{where}; {advice(shape, config, ranks, states_only=True)}"
            )
        if peak * here > free:
            log.warning(
                "training will take about %.3g GiB at its peak; %s; %s",
                peak * here / _GIB,
                where,
                advice(shape, config, ranks, states_only=False),
            )
        return cls(peak + (resident() if device.type == "cpu" else 0), device)

    @property
    def measured(self) -> int:
        """The peak so far, in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def compare(self, updates: int) -> None:
        """Say once what was predicted and measured, after two updates: the first makes AdamW's moments."""
        if self._compared or updates < 2:
            return
        self._compared = True
        log.info(
            "peak memory: %.3g GiB predicted, %.3g GiB so far", self.predicted / _GIB, self.measured / _GIB
        )


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether products are in bf16."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def advice(shape: Shape, config: Config, ranks: Ranks, *, states_only: bool) -> str:
    """What to change so that less is taken: of activations first, then of the states."""
    learner, found = config.learner, []
    if not states_only:
        found.append(f"lower learner.micro_batch_tokens ({learner.micro_batch_tokens})")
        if not learner.activation_checkpointing:
            found.append("set learner.activation_checkpointing")
    if learner.lora is None and ranks.size == 1 and not learner.offload:
        found.append("train adapters by learner.lora")
    if ranks.device.type == "cuda" and not learner.offload and learner.lora is None:
        found.append("set learner.offload")
    if learner.lora is None:
        found.append("spread it over more devices by torchrun")
    return " or ".join(found) or f"take a smaller model than {shape.name}"


def memory_of(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a device; for a CPU those of the machine, or of a container that has fewer."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    known = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    free, total = int(known["MemAvailable"]) * 1024, int(known["MemTotal"]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free, total
    return min(free, max(0, limit - used)), min(total, limit)


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
