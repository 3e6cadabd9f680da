"""vLLM as the actor uses it: groups of completions with exact behaviour log-probs, and new weights in flight.

    engine = await RolloutEngine.start(folder, "bfloat16", settings, version="demo/1/0")
    group = await engine.sample(prompt_ids, n=8, max_tokens=256, temperature=1.0)
    await engine.apply_weights(files, "demo/1/1")   # running requests go on under the new weights
    await engine.apply_patch(patch, "demo/1/1", "demo/1/2")   # the same in milliseconds; see `patch`
    await engine.close()

An update that fails midway damages the engine: sampling stands still and nothing is handed out, until
`apply_weights` has replaced every weight. Requests that the failed weights may have drawn from are dropped.

Every log-prob is the one its token was drawn with: top-p, top-k, penalties and min-tokens are off, and the
distribution is the temperature's (at temperature 0, the unscaled one). Requests that run through an update
keep the keys and values they have; each token's policy version tells which weights drew it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aspo.config import ConfigError, EngineConfig
from aspo.schemas import FloatArray, VersionSpan
from aspo_actor.channel import Channel
from aspo_actor.completion import Completion, UpdateTimings, decode
from aspo_actor.engine_settings import (
    check_request,
    import_vllm,
    one_line,
    sampling_params,
    scoring_params,
    start_client,
)
from aspo_actor.errors import EngineError, NotFiniteError, WeightsRefusedError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

_PROBE_LENGTH = 8
_SHUTDOWN_S = 5.0
_UPDATE_TIMEOUT_S = 300.0


class RolloutEngine:
    """One vLLM engine in this process's event loop, its model in a process of its own."""

    def __init__(self, client: AsyncLLM, version: str) -> None:
        self._client = client
        self.patience_s = 120.0  # for any answer within an update, but for the loading itself
        self._tokenizer = client.get_tokenizer()
        self._max_model_len: int = client.model_config.max_model_len
        self._vocab_size: int = client.model_config.get_vocab_size()
        self._max_num_seqs: int = client.vllm_config.scheduler_config.max_num_seqs
        self._ids = itertools.count()
        self._running: dict[str, int] = {}
        self._guests: set[asyncio.Task[Any]] = set()
        self._updates = 0
        self._version = version
        # Why the engine is given up, or stands still until a complete update.
        self._failure: str | None = None
        self._damage: str | None = None
        self._unpatchable: str | None = None
        self._channel: Channel | None = None
        self._closed = False
        self._update_lock = asyncio.Lock()
        # Cleared while new weights are on probation: what they sample is not handed out before the probe.
        # Requests of an earlier era than the present one are dropped with the weights that drew them.
        self._era = 0
        self._exposed = False
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
            await loop.run_in_executor(thread, import_vllm)
            client = await loop.run_in_executor(thread, start_client, folder, dtype, settings, seed)
        except ConfigError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM did not start: {one_line(error)}") from error
        finally:
            thread.shutdown(wait=False)
        engine = cls(client, version)
        try:
            await client.update_weight_version(version)
            reasons = await client.collective_rpc("aspo_unpatchable")
            engine._unpatchable = next(filter(None, reasons), None)
            engine._channel = await Channel.connect(await client.collective_rpc("aspo_listen"))
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
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers has it."""
        return self._tokenizer

    @property
    def version(self) -> str:
        """Label of the weights that sample now."""
        return self._version

    @property
    def healthy(self) -> bool:
        """Whether the engine may sample."""
        return self._damage is None and self._alive

    @property
    def recoverable(self) -> bool:
        """Whether the engine is damaged and a complete update would mend it; else only a new engine helps."""
        return self._damage is not None and self._alive

    @property
    def failure(self) -> str | None:
        """Why the engine is not healthy, in one line."""
        if self.healthy:
            return None
        ended = "the engine is closed" if self._closed else "vLLM's engine died"
        return self._failure or (self._damage if self._alive else ended)

    @property
    def unpatchable(self) -> str | None:
        """Why this model takes no patches, or None if it does."""
        return self._unpatchable

    @property
    def _alive(self) -> bool:
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
        check_request(self._client, prompt_ids, max_tokens, temperature)
        greedy = temperature == 0
        params = sampling_params(1 if greedy else n, max_tokens, temperature, seed)
        updates, output = self._updates, await self._draw(prompt_ids, params)
        try:
            completions = [self._completion(sample) for sample in output.outputs]
        except NotFiniteError as error:
            await self._distrust(str(error), updates)
            raise
        return completions * n if greedy else completions

    async def score(self, token_ids: Sequence[int]) -> FloatArray:
        """Log-probs [T-1] of `token_ids[1:]` given what precedes each, at temperature 1, current weights."""
        check_request(self._client, token_ids, 1, 1.0)
        params = scoring_params()
        output = await self._draw(token_ids, params)
        return np.asarray(output.prompt_logprobs.logprobs, dtype=np.float32)

    async def probe(self, timeout_s: float) -> None:
        """Generate one token; if none comes within `timeout_s` seconds, raise `EngineError` and give up.

        An update in progress is waited for first. A damaged engine raises too, without being given up. While
        running requests fill every slot a token would have to queue, so an answer from the loop that steps
        the model stands in for it.
        """
        async with self._update_lock:
            self._require_healthy()
            try:
                await self._probe(timeout_s)
            except NotFiniteError as error:
                await self._suspend(str(error))
                raise
            except EngineError as error:
                await self._give_up(str(error))
                raise

    async def apply_weights(self, files: Sequence[Path], version: str) -> UpdateTimings:
        """Replace the weights by those in `files` (local, verified safetensors) without dropping a request.

        Any version will do, older ones too; a damaged engine is mended. Raises `WeightsRefusedError`, the
        engine as it was, when the files are not a complete set of this model's tensors, and `EngineError` for
        any later failure: the engine is then damaged, or given up if it does not answer.
        """
        async with self._update_lock:
            if not self._alive:
                raise EngineError(self.failure)
            names = [str(Path(file).resolve()) for file in files]
            began = time.perf_counter()
            async with self._checking(version), asyncio.timeout(self.patience_s):
                reasons = await self._client.collective_rpc("aspo_check_weights", args=(names,))
            _refuse(version, reasons)
            return await self._replace({"files": names}, version, began)

    async def apply_patch(self, patch: Path, base: str, version: str) -> UpdateTimings:
        """Change weights `base` into `version` by a local file of `patch.write_patch`; drops no request.

        Raises `WeightsRefusedError`, the old weights still in service, when other weights than `base` run,
        the patch does not fit or the model takes none; `EngineError` as `apply_weights`, and when damaged.
        """
        async with self._update_lock:
            self._require_healthy()
            if base != self._version:
                _refuse(version, [f"the patch is to {base} and the engine runs {self._version}"])
            name = str(Path(patch).resolve())
            began = time.perf_counter()
            async with self._checking(version):
                _refuse(version, await self._beside("stage_patch", name))
            return await self._replace({"patch": name}, version, began)

    async def digests(self, names: Sequence[str]) -> dict[str, str]:
        """blake3 of tensors in the engine's memory, by checkpoint name, in the engine's dtype.

        Tensors that no worker holds as a whole, and all of a model that takes no patches, are left out.
        Copies that differ damage the engine: raises `EngineError`.
        """
        async with self._update_lock:
            self._require_healthy()
            try:
                answers = await self._beside("digests", list(names))
            except Exception as error:
                await self._suspend(f"weights {self._version} cannot be read back: {one_line(error)}")
                raise EngineError(self.failure) from error
        found = {name: {answer[name] for answer in answers} - {None} for name in names}
        for name, digests in found.items():
            if len(digests) > 1:
                await self.condemn(f"workers hold different {name}")
                raise EngineError(self.failure)
        return {name: digests.pop() for name, digests in found.items() if digests}

    async def condemn(self, reason: str) -> None:
        """Damage the engine: drop every request and stand still until a complete update."""
        async with self._update_lock:
            self._require_healthy()
            await self._suspend(reason)

    async def close(self) -> None:
        """Stop the engine's process; requests still running raise `EngineError`."""
        if self._closed:
            return
        self._closed = True
        if self._channel is not None:
            self._channel.close()
        await self._abort()
        if self._client.output_handler is not None:
            # Else it reports the process that is about to be stopped as a crash.
            self._client.output_handler.cancel()
        await asyncio.to_thread(self._client.shutdown, _SHUTDOWN_S)

    @contextlib.asynccontextmanager
    async def _checking(self, version: str) -> AsyncIterator[None]:
        """Give the engine up when it fails before the weights are touched."""
        try:
            yield
        except WeightsRefusedError:
            raise
        except Exception as error:
            await self._give_up(f"weights {version} could not be checked: {one_line(error)}")
            raise EngineError(self.failure) from error

    async def _beside(self, call: str, argument: Any) -> list[Any]:
        """Have every worker do something beside the sampling, and return their answers."""
        assert self._channel is not None
        async with asyncio.timeout(self.patience_s):
            return await self._channel.call(call, argument)

    async def _replace(self, update: dict[str, Any], version: str, began: float) -> UpdateTimings:
        checked = time.perf_counter()
        async with self._probation(version):
            paused = await self._write(update, version)
            # In this order: with the probe's request queued, the very next step answers it.
            _, applied = await asyncio.gather(self._probe(self.patience_s), self._resume())
        return UpdateTimings(
            check_s=checked - began,
            pause_s=paused - checked,
            apply_s=applied - paused,
            probe_s=time.perf_counter() - applied,
        )

    @contextlib.asynccontextmanager
    async def _probation(self, version: str) -> AsyncIterator[None]:
        """Hold completions back until the new weights have proved themselves; on an exception stand still."""
        proven, self._exposed = self._version, False
        self._trusted.clear()
        try:
            async with asyncio.timeout(_UPDATE_TIMEOUT_S):
                yield
        except Exception as error:
            self._version = proven
            await self._suspend(f"weights {version} failed: {one_line(error)}", drop=self._exposed)
            raise EngineError(self.failure) from error
        except BaseException as error:
            await self._give_up(f"weights {version} failed: {one_line(error)}")
            raise
        self._damage = None
        self._trusted.set()

    async def _write(self, update: dict[str, Any], version: str) -> float:
        """Pause, write and label; returns the moment at which sampling stood."""
        await self._pause()
        paused = time.perf_counter()
        self._updates += 1
        await self._client.collective_rpc("aspo_update", args=(update,))
        await self._client.update_weight_version(version)
        self._version, self._exposed = version, True
        return paused

    async def _resume(self) -> float:
        await self._client.resume_generation()
        return time.perf_counter()

    async def _pause(self) -> None:
        # Running requests keep their keys and values; the salt keeps new ones from old prefix blocks.
        # `pause_generation` would sleep 20 ms for the sake of the order in which its caller sees outputs.
        async with asyncio.timeout(self.patience_s):
            await self._client.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)

    async def _suspend(self, reason: str, *, drop: bool = True) -> None:
        """Stand still until a complete update, or give up if vLLM does not answer."""
        self._damage = reason
        self._trusted.clear()
        try:
            await self._pause()
        except Exception as error:
            await self._give_up(f"{reason}; and vLLM does not answer: {one_line(error)}")
            return
        # New requests must not find prefix blocks of the weights that failed.
        self._updates += 1
        if drop:
            await self._drop()

    async def _drop(self) -> None:
        """Have every request that runs, or is held back, raise `EngineError`."""
        self._era += 1
        # A pulse: it wakes those that wait, who look at the era.
        self._trusted.set()
        self._trusted.clear()
        await self._abort()

    async def _abort(self) -> None:
        """End every request; guests' may be on their way to vLLM, which does not know them yet."""
        while self._guests:
            self._guests.pop().cancel()
        with contextlib.suppress(Exception):
            await self._client.abort(list(self._running))

    async def _distrust(self, reason: str, updates: int) -> None:
        """Damage the engine, unless an update has replaced the weights meanwhile."""
        async with self._update_lock:
            if self._updates == updates and self.healthy:
                await self._suspend(reason)

    async def _probe(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                if sum(self._running.values()) >= self._max_num_seqs:
                    await self._client.get_weight_version()
                    return
                output = await self._generate(self._probe_prompt(), sampling_params(1, 1, 1.0, None))
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

    @contextlib.asynccontextmanager
    async def drawing(self, requests: Mapping[str, int]) -> AsyncIterator[str]:
        """Have a task's requests on `client`, samples by id, held back and dropped as the engine's own are.

        Gives the cache salt to make them with. Raises `EngineError` when the weights that drew are dropped.
        """
        self._require_healthy()
        era, task = self._era, asyncio.current_task()
        assert task is not None
        self._running.update(requests)
        if requests:
            self._guests.add(task)
        try:
            yield self._salt
        except (Exception, asyncio.CancelledError) as error:
            aborted = bool(requests) and task not in self._guests
            if not aborted or (task.uncancel() and isinstance(error, asyncio.CancelledError)):
                raise  # not by `_abort`, or not by it alone
            # vLLM's routes answer a cancellation as the client's fault: what they say of it does not count.
        finally:
            self._guests.discard(task)
            for request_id in requests:
                del self._running[request_id]
        if era == self._era:
            await self._trusted.wait()
        if era != self._era:
            raise EngineError(self.failure or "the weights that drew this were dropped")
        if not self._alive:
            raise EngineError(self.failure)

    async def _draw(self, prompt_ids: Sequence[int], params: SamplingParams) -> Any:
        """Run one request, and hold back what it gives until the weights that run are trusted."""
        async with self.drawing({}):
            return await self._generate(prompt_ids, params)

    @property
    def _salt(self) -> str:
        # Block hashes carry no weight version: the salt does, by count, for a rollback repeats labels.
        # vLLM's own routes take no slash in it.
        return f"{self._updates}:{self._version}".replace("/", ":")

    async def _generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Any:
        """Run one request to its end and return vLLM's `RequestOutput`."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        request_id = str(next(self._ids))
        prompt = tokens_input(list(prompt_ids), cache_salt=self._salt)
        self._running[request_id] = params.n
        try:
            async for output in self._client.generate(prompt, params, request_id):
                final = output
        except VLLMClientError as error:
            raise ConfigError(f"vLLM refuses the request: {one_line(error)}") from error
        except Exception as error:
            raise EngineError(self._failure or self._damage or f"vLLM failed: {one_line(error)}") from error
        finally:
            del self._running[request_id]
        if any(sample.finish_reason not in ("stop", "length") for sample in final.outputs):
            raise EngineError(self._failure or self._damage or "vLLM stopped the request before its end")
        return final

    def _completion(self, sample: Any) -> Completion:
        logprobs = np.asarray(sample.logprobs.logprobs, dtype=np.float32)
        if not np.isfinite(logprobs).all():
            raise NotFiniteError(f"weights {self._version} give log-probs that are not finite")
        return Completion(
            token_ids=np.asarray(sample.token_ids, dtype=np.int32),
            logprobs=logprobs,
            spans=tuple(VersionSpan(s.version, s.end - s.start) for s in sample.weight_versions),
            finish_reason=sample.finish_reason,
            text=self.text_of(sample.token_ids),
        )

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Decode tokens, special ones left out."""
        return decode(self._tokenizer, token_ids)

    def _require_healthy(self) -> None:
        if not self.healthy:
            raise EngineError(self.failure)

    async def _give_up(self, reason: str) -> None:
        """Mark the engine unhealthy for good and release every waiting request."""
        self._failure = reason
        self._trusted.set()
        await self._abort()


def _refuse(version: str, reasons: Sequence[str | None]) -> None:
    for reason in filter(None, reasons):
        raise WeightsRefusedError(f"weights {version} refused: {reason}")
