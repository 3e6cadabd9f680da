"""Guests: requests of OpenAI clients, run by vLLM's own serving classes on the engine that samples rollouts.

They are answered in the engine's event loop, whichever thread asks. Few of their completions are in flight at
once (`actor.guest_samples`), first come, first served, so that rollouts do not wait for strangers; a request
lives and falls with the weights as a rollout does.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from aspo.config import Config
from aspo.http import ApiError
from aspo_actor.engine import RolloutEngine
from aspo_actor.engine_settings import one_line
from aspo_actor.errors import EngineError
from aspo_actor.openai_routes import Asked, ChatAsked, CompletionAsked

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

_MAX_WAITING = 256  # requests; more are told to come again
_DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class _Serving:
    """vLLM's answers to the two kinds of request."""

    completion: OpenAIServingCompletion
    chat: OpenAIServingChat


class Guests:
    """Answers OpenAI requests with an engine; make it in the engine's event loop."""

    def __init__(self, engine: RolloutEngine, config: Config) -> None:
        self._engine, self._config = engine, config
        self._loop = asyncio.get_running_loop()
        self._most = config.actor.guest_samples
        self._places, self._line = asyncio.Semaphore(self._most), asyncio.Lock()
        self._waiting = 0
        self._made: _Serving | None = None
        self._since = int(time.time())

    @property
    def version(self) -> str:
        """The version that runs now."""
        return self._engine.version

    def models(self) -> dict[str, Any]:
        """The answer of `GET /v1/models`: one model, named for the run."""
        length = self._engine.client.model_config.max_model_len
        model = {"id": self._config.run.name, "object": "model", "created": self._since, "owned_by": "aspo"}
        return {"object": "list", "data": [model | {"root": self.version, "max_model_len": length}]}

    async def answer(self, asked: Asked) -> tuple[str, str]:
        """The answer's JSON and the versions that gave it; raises `ApiError`."""
        job = asyncio.run_coroutine_threadsafe(self._answer(asked), self._loop)
        return await asyncio.wrap_future(job)

    async def stream(self, asked: Asked) -> AsyncGenerator[str]:
        """The answer as server-sent events; raises `ApiError` before the first."""
        chunks: asyncio.Queue[str | None] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def put(chunk: str | None) -> None:
            here.call_soon_threadsafe(chunks.put_nowait, chunk)

        job = asyncio.run_coroutine_threadsafe(self._stream(asked, put), self._loop)
        job.add_done_callback(lambda _: put(None))
        try:
            while (chunk := await chunks.get()) is not None:
                yield chunk
            job.result()
        finally:
            job.cancel()

    async def _answer(self, asked: Asked) -> tuple[str, str]:
        async with self._hosted(asked) as (began, request):
            found = await self._create(asked, request)
        found.system_fingerprint = self._since_version(began)
        return found.model_dump_json(), found.system_fingerprint

    async def _stream(self, asked: Asked, put: Callable[[str], None]) -> None:
        sent = False
        try:
            async with self._hosted(asked) as (began, request):
                async for chunk in await self._create(asked, request):
                    if chunk != _DONE:
                        put(self._signed(chunk, began))
                        sent = True
        except ApiError as error:
            if not sent:
                raise
            # Its status has gone out already.
            put(f"data: {json.dumps({'error': {'code': error.code, 'message': error.detail}})}\n\n")
        put(_DONE)

    @contextlib.asynccontextmanager
    async def _hosted(self, asked: Asked) -> AsyncIterator[tuple[str, dict[str, str]]]:
        """Wait for a turn; gives the version that begins, and the id and the cache salt of the request."""
        request_id = uuid4().hex
        if isinstance(asked, CompletionAsked):
            names = [f"cmpl-{request_id}-{i}" for i in range(asked.prompts)]  # as vLLM composes them
        else:
            names = [f"chatcmpl-{request_id}"]
        async with self._turn(asked.samples):
            try:
                async with self._engine.drawing(dict.fromkeys(names, asked.n)) as salt:
                    yield self.version, {"request_id": request_id, "cache_salt": salt}
            except EngineError as error:
                raise ApiError(503, "engine", str(error), "ask again once /readyz answers 200") from None

    @contextlib.asynccontextmanager
    async def _turn(self, samples: int) -> AsyncIterator[None]:
        if samples > self._most:
            raise ApiError(
                400,
                "too_many",
                f"{samples} completions are more than the {self._most} that guests have at once",
                "ask for fewer in a request, or raise actor.guest_samples",
            )
        if self._waiting >= _MAX_WAITING:
            raise ApiError(429, "busy", f"{self._waiting} requests are waiting", "ask again in a while")
        taken = 0
        self._waiting += 1
        try:
            try:
                async with self._line:
                    while taken < samples:
                        await self._places.acquire()
                        taken += 1
            finally:
                self._waiting -= 1
            yield
        finally:
            for _ in range(taken):
                self._places.release()

    async def _create(self, asked: Asked, request: dict[str, str]) -> Any:
        """Have vLLM answer: a response, or the chunks of a stream; raises `ApiError`."""
        serving = await self._serving()
        fields = asked.model_dump(exclude_unset=True) | request | _as_trained(asked)
        try:
            if isinstance(asked, ChatAsked):
                found = await serving.chat.create_chat_completion(self._chat_request(asked, fields))
            else:
                found = await serving.completion.create_completion(_completion_request(fields))
        except Exception as error:
            raise _refusal(error) from error
        if hasattr(found, "error"):
            raise ApiError(found.error.code, "refused", found.error.message, "see /docs for the fields")
        return found

    def _chat_request(self, asked: ChatAsked, fields: dict[str, Any]) -> Any:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        if asked.max_tokens is None and asked.max_completion_tokens is None:
            fields["max_completion_tokens"] = self._config.sampling.max_tokens
        return ChatCompletionRequest(**fields)

    async def _serving(self) -> _Serving:
        """vLLM's serving classes, made at the first request: importing them takes 2 s."""
        if self._made is None:
            await asyncio.to_thread(_import_serving)
            self._made = self._made or _make_serving(self._engine, self._config)
        return self._made

    def _signed(self, chunk: str, began: str) -> str:
        """A chunk of a stream with the versions so far."""
        event = json.loads(chunk.removeprefix("data: "))
        return f"data: {json.dumps(event | {'system_fingerprint': self._since_version(began)})}\n\n"

    def _since_version(self, began: str) -> str:
        return began if began == self.version else f"{began}..{self.version}"


def _as_trained(asked: Asked) -> dict[str, Any]:
    """Sampling as rollouts are, where the request does not say: not by the model's generation_config.json."""
    return {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0, "min_p": 0.0}


def _completion_request(fields: dict[str, Any]) -> Any:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return CompletionRequest(**fields)


def _import_serving() -> None:
    for name in ("chat_completion.serving", "completion.serving"):
        importlib.import_module(f"vllm.entrypoints.openai.{name}")


def _make_serving(engine: RolloutEngine, config: Config) -> _Serving:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.renderers.online_renderer import OnlineRenderer

    client = engine.client
    path = BaseModelPath(name=config.run.name, model_path=client.model_config.model)
    models = OpenAIServingModels(client, [path])
    template: dict[str, Any] = {
        "request_logger": None,
        "chat_template": None,
        "chat_template_content_format": "auto",
        "default_chat_template_kwargs": config.data.chat_template_options,
    }
    renderer = OnlineRenderer(client.model_config, client.renderer, **template)
    return _Serving(
        OpenAIServingCompletion(client, models, online_renderer=renderer, request_logger=None),
        OpenAIServingChat(client, models, "assistant", online_renderer=renderer, **template),
    )


def _refusal(error: Exception) -> ApiError:
    """How vLLM's own server would answer an exception."""
    from vllm.entrypoints.serve import create_error_response

    if isinstance(error, ApiError):
        return error
    status = int(create_error_response(error).error.code)
    if status < 500:
        return ApiError(status, "refused", one_line(error), "see /docs for the fields")
    return ApiError(503, "engine", f"vLLM failed: {one_line(error)}", "see the actor's log")
