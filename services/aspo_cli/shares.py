"""Who gets which GPUs, or how many threads, where learner and actors share one machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from aspo.config import Config, ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class Shares:
    """Environment variables for the learner and for each actor, and the split in words."""

    learner: dict[str, str]
    actors: list[dict[str, str]]
    words: str


def split_machine(config: Config, actors: int, ranks: int = 1) -> Shares:
    """Split this machine's GPUs, or where it has none its cores; raises ConfigError if there are too few."""
    gpus = visible_gpus()
    return split_gpus(gpus, config, actors, ranks) if gpus else split_cores(usable_cores(), actors, ranks)


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, else all that the driver lists; none without a driver."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True)  # torch would take 3 s
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def split_gpus(gpus: list[str], config: Config, actors: int, ranks: int = 1) -> Shares:
    """A GPU for each rank of the learner, if not on a CPU; then for each actor what its engine takes."""
    device, engine = config.learner.device, config.actor.engine
    if device.startswith("cuda:"):
        raise ConfigError(f"learner.device is {device}, and the learner gets GPUs of its own; set it to cuda")
    own = 0 if device == "cpu" else ranks
    each = engine.tensor_parallel_size * engine.data_parallel_size
    each *= int(engine.extra.get("pipeline_parallel_size", 1))
    needed = own + actors * each
    if needed > len(gpus):
        raise ConfigError(
            f"{own} GPUs for the learner and {each} for each of {actors} actors make {needed}, and there are "
            f"{len(gpus)}; lower --actors, --ranks or actor.engine's parallel sizes, or set {VISIBLE}= to "
            "run on CPUs"
        )
    starts = range(own, needed, each)
    of_actors = [",".join(gpus[start : start + each]) for start in starts]
    words = "; ".join(
        [
            f"learner on GPUs {','.join(gpus[:own])}" if own else "learner on the CPU",
            f"actors on GPUs {' '.join(of_actors)}",
        ]
    )
    return Shares(
        {VISIBLE: ",".join(gpus[:own])},
        [{VISIBLE: names} for names in of_actors],
        words,
    )


def split_cores(cores: int, actors: int, ranks: int = 1) -> Shares:
    """Half of the cores, in threads, for the learner and the rest for the actors, at least one a process.

    Nobody is pinned: learner and actors wait for each other, and an idle core is anybody's. A number of
    threads that was set from outside is kept.
    """
    if os.environ.get(THREADS):
        threads = os.environ[THREADS]
        return Shares({}, [{} for _ in range(actors)], f"{threads} threads each, as {THREADS} says")
    own = max(1, cores // 2)
    each = max(1, (cores - own) // max(1, actors))
    return Shares(
        {THREADS: str(max(1, own // ranks))},
        [{THREADS: str(each)} for _ in range(actors)],
        f"learner on {own} of {cores} cores, {each} for each actor",
    )
