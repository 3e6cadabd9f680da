"""vLLM as the actor uses it: groups of completions with exact behaviour log-probs, and new weights in flight.

    engine = await RolloutEngine.start(folder, "bfloat16", settings, version="demo/1/0")
    group = await engine.sample(prompt_ids, n=8, max_tokens=256, temperature=1.0)
    await engine.apply_weights(files, "demo/1/1")   # running requests go on under the new weights
    await engine.close()

Every log-prob is the one its token was drawn with: top-p, top-k, penalties and min-tokens are off, and the
distribution is the temperature's (at temperature 0, the unscaled one). Requests that run through an update
keep the keys and values they have; each token's policy version tells which weights drew it. vLLM is imported
by `start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import importlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from aspo.config import ConfigError, EngineConfig
from aspo.errors import AspoError
from aspo.schemas import FloatArray, IntArray, VersionSpan

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

# Spelt out, for importing the plug-in imports vLLM.
_EXTENSION = "aspo_actor.vllm_plugin.AspoWorkerExtension"
_BACKEND = "aspo"

_PROBE_LENGTH = 8
_SHUTDOWN_S = 5.0
_UPDATE_TIMEOUT_S = 300.0
_PROBE_TIMEOUT_S = 120.0


class EngineError(AspoError, RuntimeError):
    """The engine did not start, is dead or hung, or lost its weights; its text is one line."""

    exit_code = 1


class WeightsRefusedError(AspoError, ValueError):
    """Files that are not a complete set of this model's weights; the old weights are still in service."""


@dataclass(frozen=True, eq=False, slots=True)
class Completion:
    """One sampled continuation.

    Shapes: token_ids, logprobs [T], the end-of-sequence token included when it was drawn; log-probs in nats.
    `spans` cover the T tokens; `text` leaves special tokens out.
    """

    token_ids: IntArray
    logprobs: FloatArray
    spans: tuple[VersionSpan, ...]
    finish_reason: Literal["stop", "length"]
    text: str


@dataclass(frozen=True, slots=True)
class UpdateTimings:
    """Seconds of each phase of one weight update; sampling stood still for `pause_s + apply_s`."""

    check_s: float
    pause_s: float
    apply_s: float
    probe_s: float


class RolloutEngine:
    """One vLLM engine in this process's event loop, its model in a process of its own."""

    def __init__(self, client: AsyncLLM, version: str) -> None:
        self._client = client
        self._tokenizer = client.get_tokenizer()
        self._max_model_len: int = client.model_config.max_model_len
        self._vocab_size: int = client.model_config.get_vocab_size()
        self._max_num_seqs: int = client.vllm_config.scheduler_config.max_num_seqs
        self._ids = itertools.count()
        self._running: dict[str, int] = {}
        self._updates = 0
        self._version = version
        self._failure: str | None = None
        self._closed = False
        self._update_lock = asyncio.Lock()
        # Cleared while new weights are on probation: what they sample is not handed out before the probe.
        self._trusted = asyncio.Event()
        self._trusted.set()

    @classmethod
    async def start(
        cls, model: Path | str, dtype: str, settings: EngineConfig, *, version: str, seed: int = 0
    ) -> RolloutEngine:
        """Load the model folder, label its weights `version` and warm up; the event loop stays free.

        Raises `ConfigError` for settings the user must mend and `EngineError` when vLLM does not come up.
        """
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"no model at {folder}: it must be a folder with a config.json")
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "vllm-start")
        try:
            await loop.run_in_executor(thread, _import_vllm)
            client = await loop.run_in_executor(thread, _start_client, folder, dtype, settings, seed)
        finally:
            thread.shutdown(wait=False)
        engine = cls(client, version)
        try:
            await client.update_weight_version(version)
            await engine._warm_up()
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def client(self) -> AsyncLLM:
        """vLLM's own client, for its OpenAI routes."""
        return self._client

    @property
    def version(self) -> str:
        """Label of the weights that sample now."""
        return self._version

    @property
    def healthy(self) -> bool:
        """Whether the engine may sample; once False, it stays so until a new engine is started."""
        return self._failure is None and not self._closed and not self._client.errored

    async def sample(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int,
        max_tokens: int,
        temperature: float,
        seed: int | None = None,
    ) -> list[Completion]:
        """Sample `n` completions of one prompt; returns when all are done, across weight updates.

        With a `seed` the draws repeat under equal weights. Temperature 0 is greedy: one request, returned
        `n` times. Raises `ConfigError` for a request that cannot be served and `EngineError` when the engine
        fails meanwhile.
        """
        if n < 1 or max_tokens < 1:
            raise ConfigError(f"n {n} and max_tokens {max_tokens} must both be at least 1")
        self._validate(prompt_ids, max_tokens, temperature)
        greedy = temperature == 0
        params = _sampling_params(1 if greedy else n, max_tokens, temperature, seed)
        output = await self._generate(prompt_ids, params)
        await self._trusted.wait()
        self._require_healthy()
        completions = [self._completion(sample) for sample in output.outputs]
        return completions * n if greedy else completions

    async def score(self, token_ids: Sequence[int]) -> FloatArray:
        """Log-probs [T-1] of `token_ids[1:]` given what precedes each, at temperature 1, current weights."""
        self._validate(token_ids, 1, 1.0)
        params = _params(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        output = await self._generate(token_ids, params)
        return np.asarray(output.prompt_logprobs.logprobs, dtype=np.float32)

    async def probe(self, timeout_s: float) -> None:
        """Generate one token; if none comes within `timeout_s` seconds, raise `EngineError` and give up.

        An update in progress is waited for first. While running requests fill every slot a token would have
        to queue, so an answer from the loop that steps the model stands in for it.
        """
        async with self._update_lock:
            self._require_healthy()
            try:
                await self._probe(timeout_s)
            except EngineError as error:
                await self._give_up(str(error))
                raise

    async def apply_weights(self, files: Sequence[Path], version: str) -> UpdateTimings:
        """Replace the weights by those in `files` (local, verified safetensors) without dropping a request.

        Raises `WeightsRefusedError`, the old weights still in service, when the files are not a complete set
        of this model's tensors, and `EngineError` for any later failure: the engine is then given up.
        """
        async with self._update_lock:
            self._require_healthy()
            names = [str(Path(file).resolve()) for file in files]
            began = time.perf_counter()
            await self._check(names, version)
            checked = time.perf_counter()
            async with self._probation(version):
                paused, applied = await self._write(names, version)
                await self._probe(_PROBE_TIMEOUT_S)
            return UpdateTimings(
                check_s=checked - began,
                pause_s=paused - checked,
                apply_s=applied - paused,
                probe_s=time.perf_counter() - applied,
            )

    async def close(self) -> None:
        """Stop the engine's process; requests still running raise `EngineError`."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Exception):
            await self._client.abort(list(self._running))
        if self._client.output_handler is not None:
            # Else it reports the process that is about to be stopped as a crash.
            self._client.output_handler.cancel()
        await asyncio.to_thread(self._client.shutdown, _SHUTDOWN_S)

    async def _check(self, names: list[str], version: str) -> None:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                reasons = await self._client.collective_rpc("aspo_check_weights", args=(names,))
        except Exception as error:
            await self._give_up(f"weights {version} could not be checked: {_one_line(error)}")
            raise EngineError(self._failure) from error
        for reason in filter(None, reasons):
            raise WeightsRefusedError(f"weights {version} refused: {reason}")

    @contextlib.asynccontextmanager
    async def _probation(self, version: str) -> AsyncIterator[None]:
        """Hold completions back until the new weights have proved themselves; on an exception give up."""
        self._trusted.clear()
        try:
            async with asyncio.timeout(_UPDATE_TIMEOUT_S):
                yield
        except BaseException as error:
            await self._give_up(f"weights {version} failed: {_one_line(error)}")
            if isinstance(error, Exception):
                raise EngineError(self._failure) from error
            raise
        finally:
            self._trusted.set()

    async def _write(self, names: list[str], version: str) -> tuple[float, float]:
        """Pause, write, label, resume; returns the moments at which sampling stood and could go on."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        # Running requests keep their keys and values; the salt keeps new ones from old prefix blocks.
        await self._client.pause_generation(mode="keep", clear_cache=False)
        paused = time.perf_counter()
        self._updates += 1
        await self._client.start_weight_update()
        await self._client.update_weights(WeightTransferUpdateRequest(update_info={"files": names}))
        await self._client.finish_weight_update(version)
        self._version = version
        await self._client.resume_generation()
        return paused, time.perf_counter()

    async def _probe(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                if sum(self._running.values()) >= self._max_num_seqs:
                    await self._client.get_weight_version()
                    return
                output = await self._generate(self._probe_prompt(), _sampling_params(1, 1, 1.0, None))
                self._completion(output.outputs[0])
        except TimeoutError:
            raise EngineError(f"vLLM generated no token within {timeout_s:g} s; restart the actor") from None

    async def _warm_up(self) -> None:
        """Run every code path once: a very first batch of 4 tokens or fewer crashes vLLM's CPU attention."""
        await self.score(self._probe_prompt())
        await self.sample(self._probe_prompt(), n=2, max_tokens=2, temperature=1.0)
        await self.sample(self._probe_prompt(), n=1, max_tokens=2, temperature=0.0)

    def _probe_prompt(self) -> list[int]:
        length = min(_PROBE_LENGTH, self._max_model_len - 2)
        return [index % self._vocab_size for index in range(length)]

    async def _generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Any:
        """Run one request to its end and return vLLM's `RequestOutput`."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        self._require_healthy()
        request_id = str(next(self._ids))
        # Block hashes carry no weight version: the salt does, by count, for a rollback repeats labels.
        salt = f"{self._updates}:{self._version}"
        prompt = tokens_input(list(prompt_ids), cache_salt=salt)
        self._running[request_id] = params.n
        try:
            async for output in self._client.generate(prompt, params, request_id):
                final = output
        except VLLMClientError as error:
            raise ConfigError(f"vLLM refuses the request: {_one_line(error)}") from error
        except Exception as error:
            raise EngineError(self._failure or f"vLLM failed: {_one_line(error)}") from error
        finally:
            del self._running[request_id]
        if any(sample.finish_reason not in ("stop", "length") for sample in final.outputs):
            raise EngineError(self._failure or "vLLM stopped the request before its end")
        return final

    def _completion(self, sample: Any) -> Completion:
        logprobs = np.asarray(sample.logprobs.logprobs, dtype=np.float32)
        if not np.isfinite(logprobs).all():
            self._failure = f"weights {self._version} give log-probs that are not finite"
            raise EngineError(self._failure)
        return Completion(
            token_ids=np.asarray(sample.token_ids, dtype=np.int32),
            logprobs=logprobs,
            spans=tuple(VersionSpan(s.version, s.end - s.start) for s in sample.weight_versions),
            finish_reason=sample.finish_reason,
            text=self._tokenizer.decode(
                sample.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
        )

    def _validate(self, token_ids: Sequence[int], max_tokens: int, temperature: float) -> None:
        if not token_ids:
            raise ConfigError("the prompt is empty")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            raise ConfigError(
                f"the prompt has token ids outside the model's vocabulary of {self._vocab_size}"
            )
        if len(token_ids) + max_tokens > self._max_model_len:
            raise ConfigError(
                f"a prompt of {len(token_ids)} tokens and max_tokens {max_tokens} exceed the context of "
                f"{self._max_model_len}; raise actor.engine.max_model_len or shorten them"
            )
        if temperature != 0 and not 0.01 <= temperature <= 2.0:
            raise ConfigError(
                f"temperature {temperature} is not 0 or within 0.01 .. 2, all that vLLM samples at"
            )

    def _require_healthy(self) -> None:
        if self.healthy:
            return
        raise EngineError(self._failure or ("the engine is closed" if self._closed else "vLLM's engine died"))

    async def _give_up(self, reason: str) -> None:
        """Mark the engine unhealthy for good and release every waiting request."""
        self._failure = reason
        with contextlib.suppress(Exception):
            await self._client.abort(list(self._running))


def _import_vllm() -> None:
    """Import vLLM, quiet unless its own variables say otherwise; takes some 9 s.

    A call of its own, for vLLM keeps tracebacks from its imports, and with them its importer's locals.
    """
    for name in ("VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    importlib.import_module("vllm.v1.engine.async_llm")


def _start_client(folder: Path, dtype: str, settings: EngineConfig, seed: int) -> AsyncLLM:
    """Bring an engine up in a process of its own; takes some 7 s and the time to read the model."""
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
        raise ConfigError(f"vLLM refuses the settings: {_one_line(error)}") from None
    try:
        if on_cpu:
            variables |= _cpu_environment(settings.cpu_threads, arguments.enforce_eager)
        with _environment(variables):
            return AsyncLLM.from_vllm_config(config, disable_log_stats=arguments.disable_log_stats)
    except Exception as error:
        raise EngineError(f"vLLM did not start: {_one_line(error)}") from error


def _engine_arguments(folder: Path, dtype: str, settings: EngineConfig, seed: int, on_cpu: bool) -> Any:
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
        "worker_extension_cls": _EXTENSION,
        "weight_transfer_config": WeightTransferConfig(backend=_BACKEND),
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


def _sampling_params(n: int, max_tokens: int, temperature: float, seed: int | None) -> SamplingParams:
    return _params(n=n, max_tokens=max_tokens, temperature=temperature, seed=_spread(seed), logprobs=0)


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
    if seed is None:
        return None
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(2))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}..."
