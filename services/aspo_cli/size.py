"""`aspo size`: what a model of some size takes of GPUs, memory, network and Redis.

    estimate(shape_of("7B"), config, actors=4, gpu_bytes=80 * 2**30)

The formulas stand in docs/deploy.md, with a table that they have made.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aspo.config import Config, ConfigError, load_config
from aspo_learner.memory import (
    MOMENTS,
    TILES,
    Shape,
    adapter_parameters,
    gathered_bytes,
    kept_bytes,
    learner_peak_bytes,
    shape_of_config,
    states_bytes,
)

USABLE = 0.9  # of a GPU's memory, for learner and actors alike
RESERVED = 2 * 2**30  # of an actor's GPU for vLLM's own: activations, graphs, the context
PUBLISHED = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of a snapshot, by the measurements in docs/benchmarks.md, which a test compares.
DELTA_FIRST, DELTA_LATER = 0.0212, 0.0062
WIRE_BYTES = 8.13  # of Redis per completion token
_NOMINAL = re.compile(r"(\d+(?:\.\d+)?)\s*([BMbm])")


# Published dense models, by which a mere number of parameters is given a shape.
KNOWN = (
    Shape("Qwen3-0.6B", 596_049_920, 28, 1024, 3072, 2048, 1024, 151_936, tied=True),
    Shape("Qwen3-1.7B", 1_720_574_976, 28, 2048, 6144, 2048, 1024, 151_936, tied=True),
    Shape("Qwen3-4B", 4_022_468_096, 36, 2560, 9728, 4096, 1024, 151_936, tied=True),
    Shape("Qwen3-8B", 8_190_735_360, 36, 4096, 12288, 4096, 1024, 151_936),
    Shape("Qwen3-14B", 14_768_307_200, 40, 5120, 17408, 5120, 1024, 151_936),
    Shape("Qwen3-32B", 32_762_123_264, 64, 5120, 25600, 8192, 1024, 151_936),
    Shape("Llama-3-70B", 70_553_706_496, 80, 8192, 28672, 8192, 1024, 128_256),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes but for the counts; of the learner, each of its GPUs, one actor, and the run.

    `learner_tokens` are those of a micro-batch: what is configured, or as many as fit; `actor_sequences`
    likewise.
    """

    model: str
    parameters: int
    learner_states: int
    learner_tokens: int
    learner_activations: int
    learner_gpus: int
    learner_gpu_peak: int
    learner_host: int
    learner_disk: int
    actor_weights: int
    actor_kv_per_token: int
    actor_gpus: int
    actor_sequences: int
    gpus: int
    snapshot: int
    delta_first: int
    delta: int
    weights_per_second: int
    redis: int


def shape_of(model: str) -> Shape:
    """The shape of a folder or hub name, or the likely one of a size such as `7B`; raises ConfigError."""
    nominal = _NOMINAL.fullmatch(model.strip())
    if nominal is None:
        return shape_of_config(model)
    count = int(float(nominal[1]) * {"b": 10**9, "m": 10**6}[nominal[2].lower()])
    if not count:
        raise ConfigError(f"{model} is no size of a model; write 7B, a model folder or a hub name")
    nearest = min(KNOWN, key=lambda known: abs(math.log(known.parameters / count)))
    return replace(nearest, name=f"{model}, shaped as {nearest.name}", parameters=count)


def fit_learner(shape: Shape, config: Config, least_tokens: int, room: int) -> tuple[int, int]:
    """The fewest GPUs, a power of two, on which one sequence can be trained on, and the tokens that then fit.

    Raises ConfigError if what every GPU holds is too much.
    """
    lora = config.learner.lora is not None
    if not lora and TILES + gathered_bytes(shape) + kept_bytes(shape, config, least_tokens) >= room:
        raise ConfigError(
            f"the activations of {least_tokens} tokens, embedding and head do not fit a GPU; name "
            "larger ones by --gpu-gib, set learner.activation_checkpointing, or lower --prompt-tokens and "
            "sampling.max_tokens"
        )
    gpus = 1
    while learner_peak_bytes(shape, config, tokens=least_tokens, gpus=gpus) > room:
        if lora:
            raise ConfigError(
                "learner.lora trains on one GPU, which these would not fit; name larger ones by --gpu-gib, "
                "set learner.activation_checkpointing, or unset learner.lora"
            )
        gpus *= 2
    left = room - learner_peak_bytes(shape, config, tokens=0, gpus=gpus)
    fitting = left // kept_bytes(shape, config, 1)
    return gpus, max(least_tokens, min(config.learner.micro_batch_tokens, fitting))


def estimate(
    shape: Shape,
    config: Config,
    *,
    actors: int,
    gpu_bytes: int,
    prompt_tokens: int = 512,
    step_seconds: float = 60.0,
) -> Estimate:
    """All figures of one model; raises ConfigError for GPUs that are too small for any number of them."""
    published = shape.parameters * PUBLISHED[config.model.dtype]
    room, longest = int(USABLE * gpu_bytes), prompt_tokens + config.longest_completion
    learner_gpus, tokens = fit_learner(shape, config, longest, room)
    kv = 2 * shape.layers * shape.key * PUBLISHED[config.model.dtype]
    actor_gpus, fitting = _fit_actor(published, kv * longest, room - RESERVED)
    trained, base, first, later = shape.parameters, 0, DELTA_FIRST, DELTA_LATER
    if config.learner.lora is not None:  # adapters alone are sent, and nearly all of them move
        trained, base, first, later = adapter_parameters(shape, config.learner.lora), published, 1.0, 1.0
    sent = trained * PUBLISHED[config.model.dtype]
    delta = int(later * sent)
    return Estimate(
        model=shape.name,
        parameters=shape.parameters,
        learner_states=states_bytes(shape, config),
        learner_tokens=tokens,
        learner_activations=kept_bytes(shape, config, tokens),
        learner_gpus=learner_gpus,
        learner_gpu_peak=learner_peak_bytes(shape, config, tokens=tokens, gpus=learner_gpus),
        learner_host=base + 2 * sent + MOMENTS * trained,
        learner_disk=(config.learner.keep_checkpoints + 1) * 12 * trained + 2 * base + 3 * sent,
        actor_weights=published,
        actor_kv_per_token=kv,
        actor_gpus=actor_gpus,
        actor_sequences=min(fitting, config.actor.engine.max_num_seqs),
        gpus=learner_gpus + actors * actor_gpus,
        snapshot=sent,
        delta_first=int(first * sent),
        delta=delta,
        weights_per_second=int(delta * actors / step_seconds),
        redis=redis_bytes(config),
    )


def _fit_actor(weights: int, sequence: int, room: int) -> tuple[int, int]:
    """The fewest GPUs, a power of two, for the weights and one sequence, and the sequences that then fit."""
    gpus = 1
    while gpus * room < weights + sequence:
        gpus *= 2
    return gpus, (gpus * room - weights) // sequence


def redis_bytes(config: Config) -> int:
    """The rollouts that may lie in Redis at once: those asked for, and those not yet in a checkpoint."""
    learner = config.learner
    groups = (learner.max_staleness + 1 + learner.checkpoint_every) * learner.batch_prompts
    return int(groups * config.sampling.group_size * config.longest_completion * WIRE_BYTES)


def run_size(
    model: str,
    path: Path | None,
    overrides: list[str],
    *,
    as_json: bool,
    gpu_gib: float,
    **options: Any,
) -> None:
    """Print what a model takes, under a run's settings or the defaults."""
    config = load_settings(path, overrides)
    found = estimate(shape_of(model), config, gpu_bytes=int(gpu_gib * 2**30), **options)
    console = Console()
    if as_json:
        console.print_json(data=asdict(found))
        return
    console.print(_table(found, config, gpu_gib, options))


def load_settings(path: Path | None, overrides: list[str]) -> Config:
    """The settings of a file, or the defaults, under overrides."""
    if path is not None:
        return load_config(path, overrides)
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "aspo.toml"
        empty.write_text('[model]\npath = "-"\n[data]\npath = "-"\n')
        return load_config(empty, overrides)


def _table(found: Estimate, config: Config, gpu_gib: float, options: dict[str, Any]) -> Table:
    learner, engine = config.learner, config.actor.engine
    rows = {
        "parameters": f"{found.parameters:,}",
        "learner: states": f"{_gib(found.learner_states)} (fp32 weights, gradients, AdamW)",
        "learner: activations": f"{_gib(found.learner_activations)} of {found.learner_tokens} tokens; "
        f"micro_batch_tokens is {learner.micro_batch_tokens}",
        "learner: GPUs": f"{found.learner_gpus} of {gpu_gib:g} GiB, of each {_gib(found.learner_gpu_peak)}",
        "learner: host memory, disk": f"{_gib(found.learner_host)}, {_gib(found.learner_disk)}",
        "actor: weights": _gib(found.actor_weights),
        "actor: GPUs": f"{found.actor_gpus}",
        "actor: KV cache": f"{found.actor_kv_per_token / 1024:.0f} KiB a token; room for "
        f"{found.actor_sequences} of {engine.max_num_seqs} sequences",
        "GPUs in all": f"{found.gpus}; actors: {options['actors']}",
        "weights: snapshot": _gib(found.snapshot),
        "weights: a step's delta": f"{_gib(found.delta)} (first steps {_gib(found.delta_first)})",
        "weights: learner sends": f"{found.weights_per_second * 8 / 1e6:.0f} Mbit/s, steps of "
        f"{options['step_seconds']:g} s",
        "Redis": f"{_gib(found.redis)} of rollouts; give it twice that",
    }
    table = Table(title=found.model, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _gib(size: int) -> str:
    """Bytes in GiB, smaller ones in MiB."""
    number, unit = (size / 2**30, "GiB") if size >= 2**30 else (size / 2**20, "MiB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
