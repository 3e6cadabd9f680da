"""Conversations between the model and an environment, token by token.

    conversations = Conversations(engine, host, replies, config.environment)
    completions = await conversations.hold(task)        # one for each of the task's group

A completion is all that was said after the prompt. Each turn of the model keeps the log-probs and versions
it was sampled with, so weights may change at any time; an environment's tokens have log-prob 0 and are told
apart by `runs`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from aspo.config import Config, EnvironmentConfig
from aspo.schemas import FinishReason, FloatArray, Task, VersionSpan
from aspo_actor.completion import Completion
from aspo_actor.engine import RolloutEngine
from aspo_actor.engine_settings import seed_from
from aspo_actor.environments.host import Answer, EnvironmentHost, Opening, text_of, unpack
from aspo_actor.environments.replies import Replies


class Conversations:
    """Has the engine and an environment talk, any number of conversations at once."""

    def __init__(
        self, engine: RolloutEngine, host: EnvironmentHost, replies: Replies, config: EnvironmentConfig
    ) -> None:
        self._engine, self._host, self._replies, self._config = engine, host, replies, config

    async def hold(self, task: Task) -> list[Completion]:
        """Hold a conversation for each sample of the group; raises what the engine raises."""
        opening = Opening(self._engine.text_of(task.prompt_ids), task.reward_inputs)
        jobs = [asyncio.create_task(self._hold(task, opening, number)) for number in range(task.group_size)]
        try:
            return await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()

    async def _hold(self, task: Task, opening: Opening, number: int) -> Completion:
        talk = _Talk(task, self._config)
        while True:
            turn = await self._say(talk, number)
            talk.add_turn(turn)
            if turn.finish_reason == "length":
                return talk.completion("length")
            answer = await self._host.answer(opening, talk.state, turn.text)
            if answer is None:
                return talk.completion("stop", failed=True)
            talk.state = answer.state
            if answer.done or talk.turns == self._config.max_turns:
                return talk.completion("stop")
            reply = self._encode(answer)
            if reply is None:
                return talk.completion("stop", failed=True)
            if not talk.has_room(reply):
                return talk.completion("length")
            talk.add_reply(reply, text_of(answer.reply))

    def _encode(self, answer: Answer) -> list[int] | None:
        """A reply's tokens; None, counted, if there are none."""
        try:
            reply = self._replies.encode(answer.reply)
        except Exception as error:  # a chat template may refuse what the environment says in any way
            self._host.blame(f"its reply cannot be encoded: {error}")
            return None
        if not reply:
            self._host.blame("its reply has no tokens")
        return reply or None

    async def _say(self, talk: _Talk, number: int) -> Completion:
        """The model's next turn."""
        task = talk.task
        [turn] = await self._engine.sample(
            talk.token_ids,
            n=1,
            max_tokens=talk.room,
            temperature=task.temperature,
            seed=None if task.seed is None else seed_from(task.seed % 2**64, number, talk.turns),
        )
        return turn


async def sample_task(
    engine: RolloutEngine, conversations: Conversations | None, task: Task
) -> list[Completion]:
    """A task's completions: conversations where there is an environment, else single turns."""
    if conversations is not None:
        return await conversations.hold(task)
    return await engine.sample(
        task.prompt_ids,
        n=task.group_size,
        max_tokens=task.max_tokens,
        temperature=task.temperature,
        seed=task.seed,
    )


@contextlib.contextmanager
def hosting(config: EnvironmentConfig) -> Iterator[EnvironmentHost | None]:
    """The processes of an environment, which load it meanwhile; None where there is none."""
    if config.function is None:
        yield None
        return
    with EnvironmentHost(config) as host:
        yield host


async def conversations_with(
    host: EnvironmentHost | None, engine: RolloutEngine, config: Config
) -> Conversations | None:
    """Conversations with the environment once it is loaded; None without one. Raises as its `check` does."""
    if host is None:
        return None
    await host.check()
    replies = Replies(engine.tokenizer, config.data, config.environment.role)
    return Conversations(engine, host, replies, config.environment)


class _Talk:
    """What has been said so far, and how many tokens of either may follow."""

    def __init__(self, task: Task, config: EnvironmentConfig) -> None:
        self.task = task
        self.state: bytes | None = None
        self.token_ids = list(task.prompt_ids)
        self.room, self._room_for_replies = task.max_tokens, config.max_tokens
        self._logprobs: list[FloatArray] = []
        self._spans: list[VersionSpan] = []
        self._runs: list[int] = []
        self._texts: list[str] = []

    @property
    def turns(self) -> int:
        """How many the model has had."""
        return (len(self._runs) + 1) // 2

    def add_turn(self, turn: Completion) -> None:
        self.room -= len(turn.token_ids)
        self._add(turn.token_ids.tolist(), turn.logprobs, turn.spans, turn.text)

    def has_room(self, reply: Sequence[int]) -> bool:
        """Whether a reply fits, and something of the model's after it."""
        return self.room > 0 and len(reply) <= self._room_for_replies

    def add_reply(self, reply: Sequence[int], text: str) -> None:
        self._room_for_replies -= len(reply)
        span = VersionSpan(self._spans[-1].version, len(reply))
        self._add(reply, np.zeros(len(reply), dtype=np.float32), [span], text)

    def completion(self, reason: FinishReason, *, failed: bool = False) -> Completion:
        """All that was said, which the model ended."""
        return Completion(
            token_ids=np.array(self.token_ids[len(self.task.prompt_ids) :], dtype=np.int32),
            logprobs=np.concatenate(self._logprobs),
            spans=tuple(self._spans),
            finish_reason=reason,
            text=self._texts[-1],
            runs=tuple(self._runs),
            turns=tuple(self._texts),
            state=unpack(self.state),
            failed=failed,
        )

    def _add(
        self, token_ids: Sequence[int], logprobs: FloatArray, spans: Sequence[VersionSpan], text: str
    ) -> None:
        self.token_ids += token_ids
        self._logprobs.append(logprobs)
        self._runs.append(len(token_ids))
        self._texts.append(text)
        for span in spans:
            if self._spans and self._spans[-1].version == span.version:
                span = VersionSpan(span.version, self._spans.pop().length + span.length)
            self._spans.append(span)
