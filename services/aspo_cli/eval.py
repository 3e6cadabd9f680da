"""`aspo eval`: measures a version, a model folder or the live policy on the held-out sets of a config.

A version is pulled and sampled by a vLLM engine of this command's own, which no training notices. The live
policy is sampled by the actors that run, over `/v1/completions`, as their guests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from aspo.config import Config, ConfigError, EvalSet, describe_validation_error, load_config
from aspo.errors import AspoError
from aspo.schemas import Task
from aspo.tls import client_context
from aspo_actor.completion import Completion, decode
from aspo_actor.engine import RolloutEngine
from aspo_actor.engine_settings import seed_from
from aspo_actor.environments.conversation import Conversations, conversations_with, hosting, sample_task
from aspo_actor.rewards.calls import Answers
from aspo_actor.rewards.scorer import Scorer
from aspo_cli.ask import ask, require_url
from aspo_cli.eval_report import Report, SetResult, require_writable, write_report
from aspo_cli.pull import pull_version, scratch_folder
from aspo_cli.status import fetch_status
from aspo_learner.data import HeldOut, Prompt, load_held_out, room_for_prompts
from aspo_learner.estimates import final_answer
from aspo_learner.policy import load_tokenizer

_UNKNOWN_LENGTH = 2**31 - 1
_PER_ACTOR = 8  # requests under way at each; what is more than it takes waits there
_TRIES = 6


class ActorsError(AspoError, RuntimeError):
    """An actor does not answer; the text says what to do."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to evaluate, as the options say; None leaves it to the config."""

    version: str | None = None
    model: Path | None = None
    live: bool = False
    actors: Sequence[str] = ()
    k: int | None = None
    temperature: float | None = None
    limit: int | None = None
    out: Path | None = None
    learner: str | None = None
    token: str | None = None


class Sampler(Protocol):
    """Draws completions of a prompt; `versions` are those that gave them so far."""

    versions: set[str]
    at_once: int

    async def draw(self, prompt: Prompt, chosen: EvalSet, max_tokens: int, seed: int) -> list[Completion]:
        """`chosen.k` completions."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that it takes to have sets answered; `how` is who answers."""

    how: str
    sampler: Sampler
    sets: list[HeldOut]
    tokenizer: Any


class EngineSampler:
    """An engine of our own, which talks with the environment where there is one."""

    def __init__(self, engine: RolloutEngine, conversations: Conversations | None, config: Config) -> None:
        self._engine, self.versions = engine, {engine.version}
        self._conversations = conversations
        self.at_once = config.actor.engine.max_num_seqs

    async def draw(self, prompt: Prompt, chosen: EvalSet, max_tokens: int, seed: int) -> list[Completion]:
        """`chosen.k` completions."""
        task = Task(
            uid="eval",
            index=prompt.row,
            purpose="eval",
            prompt_ids=prompt.token_ids,
            group_size=chosen.k,
            max_tokens=max_tokens,
            temperature=chosen.temperature,
            reward_inputs=prompt.reward_inputs,
            seed=seed if chosen.temperature else None,
        )
        return await sample_task(self._engine, self._conversations, task)


class ActorSampler:
    """The actors that run, in turn."""

    def __init__(
        self, session: aiohttp.ClientSession, urls: Sequence[str], model: str, tokenizer: Any
    ) -> None:
        self._session, self._model, self._tokenizer = session, model, tokenizer
        self._urls = itertools.cycle(urls)
        self._places = asyncio.Semaphore(_PER_ACTOR * len(urls))
        self.versions: set[str] = set()
        self.at_once = 2 * _PER_ACTOR * len(urls)

    async def draw(self, prompt: Prompt, chosen: EvalSet, max_tokens: int, seed: int) -> list[Completion]:
        """`chosen.k` completions, each a request: actors bound how many come at once."""
        fields = {
            "model": self._model,
            "prompt": prompt.token_ids,
            "max_tokens": max_tokens,
            "temperature": chosen.temperature,
            "return_token_ids": True,
        }
        seeds = [seed_from(seed, number) for number in range(chosen.k)]
        return list(await asyncio.gather(*(self._complete(fields | {"seed": one}) for one in seeds)))

    async def _complete(self, fields: dict[str, Any]) -> Completion:
        async with self._places:
            for attempt in range(_TRIES):
                url = next(self._urls)
                try:
                    answer = await _post(self._session, f"{url}/v1/completions", fields)
                except (aiohttp.ClientError, TimeoutError, _Busy) as error:
                    reason = f"{url}: {error or type(error).__name__}"
                    await asyncio.sleep(2**attempt / 4)
                    continue
                self.versions |= set(answer["system_fingerprint"].split(".."))
                return self._completion(answer["choices"][0])
        raise ActorsError(f"no actor answers ({reason}); see `aspo status`, or leave out --live")

    def _completion(self, choice: dict[str, Any]) -> Completion:
        """What an evaluation needs of an answer: its tokens and its text."""
        token_ids = np.array(choice["token_ids"], dtype=np.int32)
        logprobs = np.zeros(len(token_ids), dtype=np.float32)
        text = decode(self._tokenizer, token_ids)
        return Completion(token_ids, logprobs, (), choice["finish_reason"], text)


class _Busy(Exception):
    """An actor that may answer later."""


async def _post(session: aiohttp.ClientSession, url: str, fields: dict[str, Any]) -> dict[str, Any]:
    async with session.post(url, json=fields) as response:
        answer: dict[str, Any] = await response.json()
        if response.status in (429, 503):
            raise _Busy(answer["error"]["message"])
        if response.status != 200:
            error = answer.get("error", {})
            raise ConfigError(f"{url}: {error.get('message', response.status)}; {error.get('hint', '')}")
        return answer


def run_eval(path: Path, overrides: list[str], wanted: Wanted, *, as_json: bool) -> None:
    """Evaluate, write results to a folder and print them."""
    config = _with_options(load_config(path, overrides), wanted)
    if not config.eval.chosen:
        raise ConfigError("the config has no held-out set; set eval.path or eval.sets")
    require_writable(wanted.out or config.run.path / "evaluations")
    # Reward functions named in the config may lie in the folder the command is run from.
    sys.path.insert(0, os.getcwd())
    with scratch_folder("aspo-eval-") as scratch:
        if wanted.live or wanted.actors:
            make = _actors(config, wanted)
        else:
            make = _engine(config, wanted, *_fetched(config, wanted, scratch))
        report = asyncio.run(_evaluate(config, make))
    folder = wanted.out or config.run.path / "evaluations" / _folder_name(report.versions)
    write_report(report, folder, as_json=as_json)


def _with_options(config: Config, wanted: Wanted) -> Config:
    """The config with k and temperature of all sets replaced, where options say so."""
    given = {"k": wanted.k, "temperature": wanted.temperature}
    changed = {name: value for name, value in given.items() if value is not None}
    try:
        sets = [EvalSet.model_validate(one.model_dump() | changed) for one in config.eval.chosen]
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error)) from None
    return config.model_copy(update={"eval": config.eval.model_copy(update={"path": None, "sets": sets})})


def _fetched(config: Config, wanted: Wanted, scratch: Path) -> tuple[Path, str]:
    """The folder of what is to be evaluated, and what it is called."""
    if wanted.model is not None:
        if not (wanted.model / "config.json").is_file():
            raise ConfigError(f"no model at {wanted.model}: it must be a folder with a config.json")
        return wanted.model, str(wanted.model)
    learner = wanted.learner or config.actor.learner_url
    version = wanted.version or ask(learner, "/v1/weights", wanted.token, expect={"live"})["live"]
    return pull_version(learner, wanted.token, version, scratch / "model"), str(version)


async def _evaluate(config: Config, make: contextlib.AbstractAsyncContextManager[_Prepared]) -> Report:
    began = time.monotonic()
    with Scorer(config.reward, config.data.reward_columns) as scorer:
        async with make as prepared:
            results = await _measure(config, prepared, scorer)
    seconds = round(time.monotonic() - began, 1)
    versions = sorted(prepared.sampler.versions, key=lambda name: (len(name), name))  # 9 before 10
    return Report(config.run.name, versions, prepared.how, results, seconds)


@contextlib.asynccontextmanager
async def _engine(config: Config, wanted: Wanted, folder: Path, version: str) -> AsyncIterator[_Prepared]:
    """An engine of our own on a model folder."""
    tokenizer = load_tokenizer(str(folder))
    length = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    sets = _load(config, wanted, tokenizer, length or _UNKNOWN_LENGTH)
    engine = await RolloutEngine.start(folder, config.model.dtype, config.actor.engine, version=version)
    try:
        with hosting(config.environment) as host:
            conversations = await conversations_with(host, engine, config)
            yield _Prepared("engine", EngineSampler(engine, conversations, config), sets, tokenizer)
    finally:
        await engine.close()


@contextlib.asynccontextmanager
async def _actors(config: Config, wanted: Wanted) -> AsyncIterator[_Prepared]:
    """The actors named, or those that the learner knows."""
    if config.environment.function is not None:
        raise ConfigError(
            "running actors are asked for single turns, without the environment; leave out --live"
        )
    urls = [url.rstrip("/") for url in wanted.actors]
    for url in urls:
        require_url(url)
    if not urls:
        status = fetch_status(wanted.learner or config.actor.learner_url, wanted.token)
        urls = [actor["url"] for actor in status["actors"] if actor["state"] == "sampling"]
    if not urls:
        raise ActorsError("the learner knows of no actor that samples; start one, or leave out --live")
    headers = {"Authorization": f"Bearer {wanted.token}"} if wanted.token else {}
    connector = aiohttp.TCPConnector(ssl=client_context(config.actor.tls_ca) or True)
    timeout = aiohttp.ClientTimeout(total=None, connect=10)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
        length = await _context_of(session, urls[0])
        tokenizer = load_tokenizer(config.model.path)
        sets = _load(config, wanted, tokenizer, length)
        yield _Prepared("actors", ActorSampler(session, urls, config.run.name, tokenizer), sets, tokenizer)


async def _context_of(session: aiohttp.ClientSession, url: str) -> int:
    try:
        async with session.get(f"{url}/v1/models") as response:
            models = await response.json()
            return int(models["data"][0]["max_model_len"])
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ActorsError(f"no actor answers at {url} ({error}); see `aspo status`") from None
    except (KeyError, ValueError):
        raise ConfigError(f"{url} answered {response.status}; pass an actor's URL, and --token") from None


def _load(config: Config, wanted: Wanted, tokenizer: Any, length: int) -> list[HeldOut]:
    sets = load_held_out(config, tokenizer, room=room_for_prompts(config, length))
    return [HeldOut(one.chosen, one.prompts[: wanted.limit]) for one in sets]


async def _measure(config: Config, prepared: _Prepared, scorer: Scorer) -> list[SetResult]:
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for held_out in prepared.sets:
            bar = progress.add_task(held_out.chosen.label, total=len(held_out.prompts))
            judge = _Judge(config, prepared, scorer, functools.partial(progress.advance, bar))
            results.append(await judge.all_of(held_out))
    return results


@dataclass(frozen=True, slots=True)
class _Judge:
    """Has prompts answered and the answers scored."""

    config: Config
    prepared: _Prepared
    scorer: Scorer
    advance: Callable[[], None]

    async def all_of(self, held_out: HeldOut) -> SetResult:
        """Answers to all prompts of a set."""
        places = asyncio.Semaphore(max(1, self.prepared.sampler.at_once // held_out.chosen.k))

        async def one(prompt: Prompt) -> dict[str, Any]:
            async with places:
                return await self._one(prompt, held_out.chosen)

        jobs = [asyncio.create_task(one(prompt)) for prompt in held_out.prompts]
        try:
            rows = await asyncio.gather(*jobs)
        finally:
            for job in jobs:  # where one has failed, the others are in vain
                job.cancel()
        return SetResult.of(held_out.chosen, rows, self.config.eval.right_above)

    async def _one(self, prompt: Prompt, chosen: EvalSet) -> dict[str, Any]:
        """What is kept of one prompt: its row, texts, the answers that vote, rewards, lengths."""
        longest, seed = self.config.sampling.max_tokens, seed_from(self.config.run.seed, prompt.row)
        drawn = await self.prepared.sampler.draw(prompt, chosen, longest, seed)
        texts = [completion.text for completion in drawn]
        asked = decode(self.prepared.tokenizer, prompt.token_ids)
        scores = await self.scorer.score(Answers.of(asked, drawn, longest, prompt.reward_inputs))
        self.advance()
        return {
            "row": prompt.row,
            "rewards": scores.rewards.tolist(),
            "failed": scores.failed.tolist(),
            "tokens": [len(completion.model_tokens) for completion in drawn],
            "answers": [final_answer(text, self.config.eval.answer_pattern) for text in texts],
            "completions": texts,
        }


def _folder_name(versions: Sequence[str]) -> str:
    """A folder's name for what was evaluated: epoch-step, or the way to the model's folder."""
    parts = [part for part in versions[-1].split("/") if part]
    if len(parts) == 3 and parts[2].isdecimal():
        return "-".join(parts[-2:])
    return "-".join(part for part in parts if part not in (".", ".."))
