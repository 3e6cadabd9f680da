"""The hello: what a learner asks of its actors, compared before an actor works and for as long as it does.

    say(fence, run, hello)                      # learner, once its first version is there to be fetched
    mine = own_hello(config, manifest.files)    # actor
    require_equal(mine, heard(client, run))     # HelloError for skew; None: no learner has spoken yet

It goes by Redis, which every actor reaches, those too that take their weights from a relay. What comes with
each task (sampling) or each version (model config) is not in it: there is nothing to disagree on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import redis
from blake3 import blake3

from aspo.config import Config
from aspo.errors import AspoError
from aspo.fence import Fence
from aspo.schemas import Hello
from aspo.weights import adapters
from aspo.weights.manifest import BlobRef, config_digest

_SETTINGS = (
    "model.dtype",
    "data.reward_columns",
    "reward.function",
    "reward.failed_score",
    "canary.enabled",
    "actor.engine.max_model_len",  # by it the learner chooses its prompts
)
# Newer ones, which most runs leave.
_SETTINGS_IF_SET = (
    *("reward.parts", "reward.options", "reward.style"),
    *(f"environment.{name}" for name in ("function", "options", "max_turns", "max_tokens", "role")),
)
_NO_VOCABULARY = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    adapters.CONFIG,
)


class HelloError(AspoError, ValueError):
    """Actor and learner do not fit together; the text says in what, and what to do."""


def own_hello(config: Config, files: Mapping[str, BlobRef]) -> Hello:
    """What a process has to say of itself, given the files that come with its weights."""
    vocabulary = {
        name: ref
        for name, ref in files.items()
        if name not in _NO_VOCABULARY and not name.endswith(".safetensors")  # the base of adapters
    }
    values, changed = config.model_dump(mode="json"), config.model_dump(mode="json", exclude_defaults=True)
    settings = {name: _look_up(values, name) for name in _SETTINGS}
    for name in _SETTINGS_IF_SET:
        if (value := _look_up(changed, name)) is not None:
            settings[name] = value
    return Hello(tokenizer=config_digest(vocabulary), settings=settings)


def _look_up(values: dict[str, Any], name: str) -> Any:
    """The value of `section.key`, None if there is none."""
    value: Any = values
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def file_refs(files: Mapping[str, bytes]) -> dict[str, BlobRef]:
    """Name files by their digests, as a manifest does."""
    return {name: BlobRef(blake3(data).hexdigest(), len(data)) for name, data in files.items()}


def say(fence: Fence, run: str, hello: Hello) -> None:
    """Leave the learner's hello for all actors of the run; raises `FencedError` for a learner replaced."""
    fence.execute(lambda pipeline: pipeline.set(_key(run), msgspec.json.encode(hello)))


def heard(client: redis.Redis, run: str) -> Hello | None:
    """The learner's hello, None before the first; raises `HelloError` for one that makes no sense here."""
    data = client.get(_key(run))
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=Hello)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise HelloError(
            f"the learner of run {run!r} says hello in a way that this actor cannot read; run the same "
            "release of aspo on both sides"
        ) from None


def require_equal(mine: Hello, learners: Hello) -> None:
    """Raise `HelloError` if an actor's hello is not the learner's."""
    if mine.schema != learners.schema:
        raise HelloError(
            f"this actor writes schema version {mine.schema}, the learner reads {learners.schema}; "
            "run the same release of aspo on both sides"
        )
    for name in sorted(mine.settings.keys() | learners.settings.keys()):
        here, there = mine.settings.get(name), learners.settings.get(name)
        if here != there:
            raise HelloError(
                f"{name} is {here!r} here and {there!r} at the learner; start both from the same settings"
            )
    if mine.tokenizer != learners.tokenizer:
        raise HelloError(
            "the tokenizer that came with the weights is not the learner's; start the actor again, and if "
            "it is refused again, mend actor.learner_url: a relay there follows another learner"
        )


def _key(run: str) -> str:
    return f"aspo:{run}:hello"
