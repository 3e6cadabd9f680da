"""Environments: replies encoded alone, whose tokens are whose, and what happens when one fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from aspo.codec import decode_group, encode_group
from aspo.config import ConfigError, DataConfig, EnvironmentConfig, RewardConfig
from aspo.queue import RolloutReader, TaskQueue
from aspo.schemas import Task, VersionSpan
from aspo_actor.completion import Completion
from aspo_actor.environments import verifiers
from aspo_actor.environments.arithmetic import ArithmeticFault, calculate
from aspo_actor.environments.calculator import Calculator
from aspo_actor.environments.conversation import Conversations
from aspo_actor.environments.host import EnvironmentHost
from aspo_actor.environments.replies import Replies
from aspo_actor.errors import EngineError
from aspo_actor.rewards.scorer import Scorer
from aspo_actor.worker import Worker
from models import char_tokenizer
from rollouts import write_config

EOS = 1
TOKENIZER = char_tokenizer("0123456789+=*<>abcdefghijklmnopqrstuvwxyz ")
CALCULATOR = {
    "function": "aspo_actor.environments.calculator:Calculator",
    "options": {"pattern": "<(.*)>", "reply": "={}", "error": "no"},
    "concurrency": 1,
}


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text)["input_ids"]
    return found


class ScriptedEngine:
    """Says a script's next line each time it is asked, every time as a newer version; keeps the prompts."""

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)
        self.prompts: list[list[int]] = []
        self.healthy, self.recoverable = True, False

    def text_of(self, token_ids: Sequence[int]) -> str:
        return str(TOKENIZER.decode(token_ids, skip_special_tokens=True))

    async def sample(
        self, prompt_ids: Sequence[int], *, n: int, max_tokens: int, **options: Any
    ) -> list[Completion]:
        assert n == 1
        await asyncio.sleep(0)
        self.prompts.append(list(prompt_ids))
        line = self._lines[min(len(self.prompts), len(self._lines)) - 1]
        tokens = [*ids(line), EOS][:max_tokens]
        ended = tokens[-1] == EOS
        return [
            Completion(
                token_ids=np.array(tokens, np.int32),
                logprobs=np.full(len(tokens), -float(len(self.prompts)), np.float32),
                spans=(VersionSpan(f"test/1/{len(self.prompts)}", len(tokens)),),
                finish_reason="stop" if ended else "length",
                text=line[: len(tokens) - ended],
            )
        ]


def make_task(group_size: int = 1, **changes: Any) -> Task:
    fields: dict[str, Any] = {
        "uid": "test:train:0",
        "index": 0,
        "purpose": "train",
        "prompt_ids": ids("6*7="),
        "max_tokens": 40,
        "temperature": 1.0,
        "reward_inputs": {"answer": "42"},
    }
    return Task(group_size=group_size, **(fields | changes))


def conversations(engine: Any, host: EnvironmentHost, **settings: Any) -> Conversations:
    config = EnvironmentConfig(**(CALCULATOR | settings))
    replies = Replies(TOKENIZER, DataConfig(path="none.jsonl"), config.role)
    return Conversations(engine, host, replies, config)


@pytest.fixture(scope="module")
def calculator() -> Iterator[EnvironmentHost]:
    with EnvironmentHost(EnvironmentConfig(**CALCULATOR)) as host:
        yield host


async def test_a_turn_goes_on_from_the_very_tokens_before_it(calculator: EnvironmentHost) -> None:
    engine = ScriptedEngine("a<6*7>", "b<8+9**9**9>", "42")
    [found] = await conversations(engine, calculator).hold(make_task())
    assert found.turns == ("a<6*7>", "=42", "b<8+9**9**9>", "no", "42")
    said = [*ids("a<6*7>"), EOS, *ids("=42"), *ids("b<8+9**9**9>"), EOS, *ids("no"), *ids("42"), EOS]
    assert found.token_ids.tolist() == said
    assert found.runs == (7, 3, 13, 2, 3)
    assert engine.prompts == [ids("6*7="), ids("6*7=") + said[:10], ids("6*7=") + said[:25]]
    assert found.logprobs.tolist() == [-1.0] * 7 + [0.0] * 3 + [-2.0] * 13 + [0.0] * 2 + [-3.0] * 3
    assert [(span.version, span.length) for span in found.spans] == [
        ("test/1/1", 10),
        ("test/1/2", 15),
        ("test/1/3", 3),
    ]
    assert found.model_tokens.tolist() == said[:7] + said[10:23] + said[25:]
    assert found.state == {"calls": 2}
    assert (found.text, found.finish_reason, found.failed) == ("42", "stop", False)


@pytest.mark.parametrize(
    ("lines", "task", "settings", "turns", "reason"),
    [
        (["42"], {}, {}, ("42",), "stop"),
        (["<1+1>"], {}, {"max_turns": 2}, ("<1+1>", "=2", "<1+1>"), "stop"),
        (["<1+1>"], {"max_tokens": 9}, {}, ("<1+1>", "=2", "<1+"), "length"),
        (["<1+1>"], {"max_tokens": 6}, {}, ("<1+1>",), "length"),
        (["<1+1>", "2"], {}, {"max_tokens": 1}, ("<1+1>",), "length"),
        (["<1+1>", "2"], {}, {"max_tokens": 2}, ("<1+1>", "=2", "2"), "stop"),
        (["<1+1>"], {}, {"max_tokens": 5}, ("<1+1>", "=2", "<1+1>", "=2", "<1+1>"), "length"),
    ],
    ids=["at once", "turns", "mid-turn", "no token left", "no reply fits", "it just fits", "replies"],
)
async def test_a_conversation_ends_by_itself_or_at_a_limit(
    calculator: EnvironmentHost,
    lines: Sequence[str],
    task: dict[str, Any],
    settings: dict[str, Any],
    turns: Sequence[str],
    reason: str,
) -> None:
    talk = conversations(ScriptedEngine(*lines), calculator, **settings)
    [found] = await talk.hold(make_task(**task))
    assert (found.turns, found.finish_reason, found.failed) == (turns, reason, False)
    assert sum(found.runs) == len(found.token_ids)


@pytest.fixture(scope="module")
def difficult() -> Iterator[EnvironmentHost]:
    config = EnvironmentConfig(function="difficulties:Difficult", timeout_s=0.5, concurrency=1)
    with EnvironmentHost(config) as host:
        yield host


async def test_an_environment_that_fails_costs_its_own_conversation(difficult: EnvironmentHost) -> None:
    faults = ["raise", "hang", "exit", "cancel", "die", "none", "silent", "object", "large", "long"]
    faults += ["foreign", "huge", "messages"]
    before = difficult.failures
    talks = [conversations(ScriptedEngine(line), difficult).hold(make_task()) for line in [*faults, "well"]]
    *failed, well = [found for [found] in await asyncio.gather(*talks)]
    assert [found.failed for found in failed] == [True] * len(faults)
    assert [found.text for found in failed] == faults
    assert difficult.failures - before == len(faults)
    assert not well.failed
    assert well.state == {"answer": "42", "score": 0.5}


async def test_an_engine_that_fails_ends_the_whole_group(calculator: EnvironmentHost) -> None:
    class Failing(ScriptedEngine):
        cancelled = 0

        async def sample(self, *prompt: Any, **options: Any) -> list[Completion]:
            if len(self.prompts) == 2:
                raise EngineError("the weights that drew this were dropped")
            self.prompts.append([])
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            raise AssertionError

    engine = Failing()
    with pytest.raises(EngineError, match="dropped"):
        await conversations(engine, calculator).hold(make_task(3))
    await asyncio.sleep(0)
    assert engine.cancelled == 2


async def test_a_drain_hands_back_what_is_in_the_middle_of_a_conversation(
    calculator: EnvironmentHost, client: redis.Redis, run: str, redis_url: str, tmp_path: Path
) -> None:
    class Stuck(ScriptedEngine):
        """Does not come to the end of the second turn."""

        second = asyncio.Event()

        async def sample(self, prompt_ids: Sequence[int], **options: Any) -> list[Completion]:
            if self.prompts:
                self.second.set()
                await asyncio.Event().wait()
            return await super().sample(prompt_ids, **options)

    queue, engine = TaskQueue(client, run), Stuck("<6*7>")
    queue.put([make_task(uid=f"{run}:train:0")])
    config = write_config(tmp_path, model="m", run=run, redis_url=redis_url)
    talk = conversations(engine, calculator)
    worker = Worker(config, "actor", client, engine, None, None, conversations=talk)  # type: ignore[arg-type]
    working = asyncio.create_task(worker.run())
    async with asyncio.timeout(60):
        await engine.second.wait()
    await worker.drain(0.05)
    await working
    assert RolloutReader(client, run).read(count=1) == []
    assert [claim.task.index for claim in queue.claim("other", count=2)] == [0]


async def test_a_group_with_a_failed_conversation_is_stored(
    difficult: EnvironmentHost, client: redis.Redis, run: str, redis_url: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path, model="m", run=run, redis_url=redis_url)
    engine = ScriptedEngine("well", "raise", "well")
    reward = RewardConfig(
        function="aspo_actor.rewards:environment_score", failed_score=-1.0, concurrency=1, timeout_s=60
    )
    TaskQueue(client, run).put([make_task(3, uid=f"{run}:train:0")])
    with Scorer(reward, ["answer"]) as scorer:
        worker = Worker(
            config,
            "actor",
            client,
            engine,  # type: ignore[arg-type]
            scorer,
            None,  # type: ignore[arg-type]
            conversations=conversations(engine, difficult),
        )
        working = asyncio.create_task(worker.run())
        async with asyncio.timeout(60):
            while not worker.groups:  # noqa: ASYNC110 - the worker announces nothing
                await asyncio.sleep(0.01)
        await worker.drain(5)
        await working
        assert scorer.failures == 0
    [delivery] = RolloutReader(client, run).read(count=2)
    group = decode_group(delivery.payload)
    assert group.rewards.tolist() == [0.5, -1.0, 0.5]
    assert group.failed.tolist() == [False, True, False]
    assert group.turns == ((5,), (6,), (5,))
    assert encode_group(group) == delivery.payload


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"function": "no_such_module:Env"}, "environment.function 'no_such_module:Env': No module named"),
        ({"options": {"colour": "red"}}, "does not take environment.options: got an unexpected keyword"),
    ],
)
def test_an_environment_that_cannot_work_is_refused_at_the_start(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        EnvironmentHost(EnvironmentConfig(**(CALCULATOR | settings)))


@pytest.mark.parametrize(
    ("options", "loading_s", "words"),
    [({}, 60.0, "RuntimeError: no data"), ({"seconds": 60.0}, 1.0, "does not load within 1 s")],
)
async def test_an_environment_that_does_not_load_is_refused_before_it_is_needed(
    options: dict[str, float], loading_s: float, words: str
) -> None:
    config = EnvironmentConfig(
        function="difficulties:Unloadable", options=options, loading_s=loading_s, concurrency=1
    )
    with EnvironmentHost(config) as host, pytest.raises(ConfigError, match=words):
        await host.check()


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("found", ["0.1.14", None])
def test_a_release_of_verifiers_that_is_not_known_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    def version(package: str) -> str:
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(verifiers, "version", version)
    with pytest.raises(ValueError, match=f"needs verifiers 0.1.10, and {found or 'none'} is .* pip install"):
        verifiers.load("any", "{}")


def test_a_chat_template_gives_what_stands_between_two_answers() -> None:
    tokenizer = char_tokenizer("<>abcdefghijklmnopqrstuvwxyz-\n1")
    tokenizer.chat_template = TEMPLATE
    replies = Replies(tokenizer, DataConfig(path="none.jsonl"), "tool")
    for reply in ("1", [{"role": "tool", "content": "1"}]):
        text = tokenizer.decode(replies.encode(reply)).replace(" ", "")
        assert text == "\n<tool>1<eos>\n<assistant>", "the model has drawn the <eos> of its own turn"
    plain = Replies(tokenizer, DataConfig(path="none.jsonl", chat_template=False), "tool")
    assert plain.encode("1") == tokenizer("1")["input_ids"]
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}a{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match="does not show what the model said"):
        Replies(tokenizer, DataConfig(path="none.jsonl"), "user")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+3*4", "14"),
        (" -(2 + 3) ", "-5"),
        ("7//2", "3"),
        ("7/2", "3.5"),
        ("-7 % 3", "2"),
        ("2**-1", "0.5"),
        ("2**10", "1024"),
        ("1/3", "0.333333333333"),
        ("1E3", "1000"),
        ("-" * 200 + "1", "1"),
        ("9" * 256, "9" * 256),
    ],
)
def test_arithmetic_is_worked_out(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("9**9**9", "too large"),
        ("2**4096", "too large"),
        ("10**10000000000", "too large"),
        ("10**1000/3", "too large"),
        ("1e308*10", "too large"),
        ("1e400", "too large"),
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("(-8)**0.5", "not a real number"),
        ("1" * 257, "too long"),
        ("(" * 250 + "1", "not arithmetic"),
        *(
            (text, "not arithmetic")
            for text in ("", ".", "1 2", "07", "(1,2)", "1_0", "e", "1..real", "1+\n1")
        ),
        *(
            (text, "not arithmetic")
            for text in ("__import__('os')", "1 if 1 else 2", "a", "True", "x:=1", "'a'*9")
        ),
    ],
)
def test_what_is_no_small_arithmetic_is_refused(expression: str, reason: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ArithmeticFault, match=reason):
        calculate(expression)
    assert time.perf_counter() - began < 1.0


def test_the_calculator_answers_the_last_call() -> None:
    environment = Calculator()
    state = environment.reset("what is it?", answer=3)
    step = environment.step(state, "<calculator>1+1</calculator> or\n<calculator>\n2+2</calculator>")
    assert (step.reply, step.done, step.state) == ("4", False, {"calls": 1})
    step = environment.step(step.state, "<calculator>2+</calculator>")
    assert step.reply == "error: the expression is not arithmetic"
    assert environment.step(step.state, "It is 4.").done
