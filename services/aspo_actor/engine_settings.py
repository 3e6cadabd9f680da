"""How the actor sets vLLM up: its arguments, its process's environment and the parameters of requests."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aspo.config import ConfigError, EngineConfig

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

# Spelt out, for importing the plug-in imports vLLM.
EXTENSION = "aspo_actor.vllm_plugin.AspoWorkerExtension"
BACKEND = "aspo"


def import_vllm() -> None:
    """Import vLLM, quiet unless its own variables say otherwise; takes some 9 s.

    A call of its own, for vLLM keeps tracebacks from its imports, and with them its importer's locals.
    """
    for name in ("VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    importlib.import_module("vllm.v1.engine.async_llm")


def start_client(folder: Path, dtype: str, settings: EngineConfig, seed: int) -> AsyncLLM:
    """Bring an engine up in a process of its own; takes some 7 s and the time to read the model.

    Raises `ConfigError` for settings the user must mend, and whatever else vLLM raises.
    """
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    on_cpu = current_platform.is_cpu()
    variables = {"_ASPO_ACTOR_PID": str(os.getpid())} | {
        name: os.environ.get(name, quiet)
        for name, quiet in {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}.items()
    }
    arguments = _engine_arguments(folder, dtype, settings, seed, on_cpu)
    try:
        config = arguments.create_engine_config()
    except ValueError as error:
        raise ConfigError(f"vLLM refuses the settings: {one_line(error)}") from None
    if on_cpu:
        variables |= _cpu_environment(settings.cpu_threads, arguments.enforce_eager)
    with _environment(variables):
        return AsyncLLM.from_vllm_config(config, disable_log_stats=arguments.disable_log_stats)


def _engine_arguments(folder: Path, dtype: str, settings: EngineConfig, seed: int, on_cpu: bool) -> Any:
    """vLLM's arguments; raises `ConfigError` for an extra one that it lacks or that the actor sets."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    own: dict[str, Any] = {
        "model": str(folder),
        "tokenizer": None,
        "skip_tokenizer_init": False,
        "trust_remote_code": False,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": EXTENSION,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
    }
    if on_cpu:
        # Split between steps, the prompt of a request with a seed kills vLLM's CPU runner.
        own["enable_chunked_prefill"] = False
    for name in settings.extra:
        if name in own:
            raise ConfigError(f"actor.engine.extra may not set '{name}'; the actor sets it")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ConfigError(f"actor.engine.extra: vLLM has no argument '{name}'{hint}")
    defaults: dict[str, Any] = {"disable_log_stats": True, "use_tqdm_on_load": False}
    if on_cpu:
        defaults |= _cpu_defaults(settings)
    return AsyncEngineArgs(**(defaults | settings.extra | own))


def _cpu_defaults(settings: EngineConfig) -> dict[str, Any]:
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    defaults: dict[str, Any] = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(settings.cpu_kv_cache_gib * 2**30),
    }
    if settings.tensor_parallel_size == settings.extra.get("pipeline_parallel_size", 1) == 1:
        # vLLM would put a lone CPU worker in a third process; in the engine's own it decodes a third faster.
        defaults["distributed_executor_backend"] = UniProcExecutor
    return defaults


def _cpu_environment(threads: str, eager: bool) -> dict[str, str]:
    """Variables for the engine's process: threads and, when eager, no compiler (4 s for one small kernel)."""
    variables = {"VLLM_CPU_OMP_THREADS_BIND": threads} | ({"TORCHDYNAMO_DISABLE": "1"} if eager else {})
    if threads == "auto":
        # Unpinned, for engines that share a host would all be pinned to the same cores.
        cores = len(os.sched_getaffinity(0))
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        variables |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores - 1)))}
    return variables


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_request(client: AsyncLLM, token_ids: Sequence[int], max_tokens: int, temperature: float) -> None:
    """Raise `ConfigError` for a request that the engine behind `client` cannot serve."""
    max_model_len, vocab_size = client.model_config.max_model_len, client.model_config.get_vocab_size()
    if not token_ids:
        raise ConfigError("the prompt is empty")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise ConfigError(f"the prompt has token ids outside the model's vocabulary of {vocab_size}")
    if len(token_ids) + max_tokens > max_model_len:
        raise ConfigError(
            f"a prompt of {len(token_ids)} tokens and max_tokens {max_tokens} exceed the context of "
            f"{max_model_len}; raise actor.engine.max_model_len or shorten them"
        )
    if temperature != 0 and not 0.01 <= temperature <= 2.0:
        raise ConfigError(f"temperature {temperature} is not 0 or within 0.01 .. 2, all that vLLM samples at")


def sampling_params(n: int, max_tokens: int, temperature: float, seed: int | None) -> SamplingParams:
    """Sample `n` continuations with the log-prob of each token drawn."""
    return _params(n=n, max_tokens=max_tokens, temperature=temperature, seed=_spread(seed), logprobs=0)


def scoring_params() -> SamplingParams:
    """Log-probs of the prompt's tokens."""
    return _params(max_tokens=1, temperature=0.0, prompt_logprobs=0)


def _params(**kwargs: Any) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **kwargs,
        top_p=1.0,
        top_k=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _spread(seed: int | None) -> int | None:
    """Scatter seeds: vLLM gives sample i of a group seed + i, so neighbouring seeds would share samples."""
    return None if seed is None else seed_from(seed)


def seed_from(*numbers: int) -> int:
    """A seed of its own for each combination of numbers, the same every time."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(2))


def one_line(error: BaseException) -> str:
    """An error's text in one line of at most 400 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}..."
