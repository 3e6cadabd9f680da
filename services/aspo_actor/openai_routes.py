"""`/v1/completions`, `/v1/chat/completions` and `/v1/models` on the live policy, for OpenAI's clients.

A field that is not listed here is refused rather than passed over. How requests reach vLLM is in `guests`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from aspo.http import ApiError, Scope, disconnected, require

VERSION_HEADER = "aspo-version"
_MOST_LOGPROBS = 5  # a token; they are put into words in the loop that feeds the engine
_MOST_STOPS = 16  # each is looked for after every token, in the same loop
_Text = Annotated[str, Field(min_length=1)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
_ManyTokenIds = Annotated[list[_TokenIds], Field(min_length=1)]
_Stops = Annotated[list[_Text], Field(max_length=_MOST_STOPS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class StreamOptions(BaseModel):
    """What a stream holds besides the tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="End with the number of tokens.")


class Asked(BaseModel):
    """Fields of both routes; `n` completions of each prompt, drawn from the policy as it is trained."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(..., description="The run's name, as in `GET /v1/models`.")
    n: int = Field(1, ge=1, le=1024)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    frequency_penalty: _Penalty = 0.0
    presence_penalty: _Penalty = 0.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Text | _Stops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Not looked at.")
    return_token_ids: bool = Field(False, description="vLLM's: `prompt_token_ids` and `token_ids`, too.")

    @property
    def samples(self) -> int:
        """How many completions it asks for."""
        return self.n


class CompletionAsked(Asked):
    """A request for completions of texts or token ids."""

    prompt: _Text | _TokenIds | Annotated[list[_Text], Field(min_length=1)] | _ManyTokenIds
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)
    echo: bool = Field(False, description="Give the prompt, too; with `max_tokens` 0 nothing else.")

    @property
    def prompts(self) -> int:
        """How many prompts it has."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return len(self.prompt) if several else 1

    @property
    def samples(self) -> int:
        """How many completions it asks for."""
        return self.n * self.prompts


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatAsked(Asked):
    """A request for answers in a chat, which the tokenizer's template renders."""

    messages: list[Message] = Field(..., min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="Unset: `sampling.max_tokens` of the run.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same; it wins.")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=_MOST_LOGPROBS)


class Host(Protocol):
    """Who answers; called from the HTTP thread. Raises `ApiError`."""

    def models(self) -> dict[str, Any]: ...

    async def answer(self, asked: Asked) -> tuple[str, str]:
        """The answer's JSON and the versions that gave it."""

    def stream(self, asked: Asked) -> AsyncGenerator[str]:
        """The answer as server-sent events."""

    @property
    def version(self) -> str: ...


def openai_routes(find_host: Callable[[], Host | None]) -> APIRouter:
    """Make the routes; while `find_host` gives None, they answer 503."""
    router = APIRouter(tags=["openai"], dependencies=[require(Scope.READER)])

    def host() -> Host:
        found = find_host()
        if found is None:
            raise ApiError(503, "not_ready", "no engine samples yet", "ask again once /readyz answers 200")
        return found

    @router.get("/v1/models")
    def models() -> dict[str, Any]:
        """The run's name, and the version that runs."""
        return host().models()

    @router.post("/v1/completions", responses=_STREAMS)
    async def completions(asked: CompletionAsked, request: Request) -> Response:
        """Complete texts or token ids; `system_fingerprint` names the policy's version."""
        return await _respond(host(), asked, request)

    @router.post("/v1/chat/completions", responses=_STREAMS)
    async def chat(asked: ChatAsked, request: Request) -> Response:
        """Answer in a chat; `system_fingerprint` names the policy's version."""
        return await _respond(host(), asked, request)

    return router


async def _respond(host: Host, asked: Asked, request: Request) -> Response:
    if not asked.stream:
        body, versions = await _unless_gone(host.answer(asked), request)
        return Response(body, media_type="application/json", headers={VERSION_HEADER: versions})
    chunks = host.stream(asked)
    # The first one here, so that a refusal has its status.
    first = await _unless_gone(anext(chunks), request)
    headers = {VERSION_HEADER: host.version}
    return StreamingResponse(_chained(first, chunks), media_type="text/event-stream", headers=headers)


async def _chained(first: str, others: AsyncGenerator[str]) -> AsyncIterator[str]:
    async with contextlib.aclosing(others):
        yield first
        async for chunk in others:
            yield chunk


async def _unless_gone(work: Any, request: Request) -> Any:
    """Wait for `work`, and give it up when the client hangs up: its completions would go on for nobody."""
    working, waiting = asyncio.ensure_future(work), asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "gone", "the client has hung up")
        return working.result()
    finally:
        working.cancel()
        waiting.cancel()
