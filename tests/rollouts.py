"""Rollout groups made by a given policy, so that tests have exact behaviour log-probs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from aspo.config import Config, load_config
from aspo.schemas import SCHEMA_VERSION, RolloutGroup, VersionSpan

CONFIG = """
[run]
name = "{run}"
dir = "{runs}"
[redis]
url = "{redis_url}"
[model]
path = "{model}"
dtype = "float32"
[data]
path = "{data}"
[sampling]
group_size = 4
max_tokens = 6
[learner]
device = "cpu"
threads = 1
port = 0
batch_prompts = 4
mini_batch_prompts = 2
learning_rate = 1e-3
warmup_updates = 0
checkpoint_every = 2
"""


def write_config(folder: Path, *, overrides: Sequence[str] = (), **values: Any) -> Config:
    """Write a small config to `folder/config.toml` and load it."""
    defaults = {
        "run": "test",
        "runs": folder / "runs",
        "redis_url": "redis://127.0.0.1:1/0",
        "data": "none.jsonl",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(CONFIG.format(**{**defaults, **values}))
    return load_config(folder / "config.toml", list(overrides))


def seal(
    payload: bytes, magic: bytes = b"ASPg", version: int = SCHEMA_VERSION, size: int | None = None
) -> bytes:
    """Frame a payload as the codec does, however hostile it is."""
    size = len(payload) if size is None else size
    return struct.pack("<4sIQ16s", magic, version, size, blake3(payload).digest(length=16)) + payload


def make_plain_group(
    spans: Sequence[Sequence[tuple[str, int]]],
    *,
    uid: str = "test:train:0",
    prompt_ids: Sequence[int] = (2, 3),
    rewards: Sequence[float] | None = None,
) -> RolloutGroup:
    """A group of given spans, (version, tokens) by sample, that no policy sampled; rewards alternate."""
    lengths = np.array([sum(length for _, length in sample) for sample in spans], dtype=np.int32)
    return RolloutGroup(
        uid=uid,
        actor="actor",
        purpose="train",
        temperature=1.0,
        prompt_ids=np.array(prompt_ids, dtype=np.int32),
        lengths=lengths,
        token_ids=np.full(lengths.sum(), 4, dtype=np.int32),
        behavior_logprobs=np.full(lengths.sum(), -2.5, dtype=np.float32),
        rewards=np.array(rewards or [i % 2 for i in range(len(spans))], dtype=np.float32),
        failed=np.zeros(len(spans), dtype=bool),
        finish_reasons=("stop",) * len(spans),
        spans=tuple(tuple(VersionSpan(version, length) for version, length in sample) for sample in spans),
    )


@torch.no_grad()
def make_group(
    model: Any,
    *,
    uid: str = "test:train:0",
    version: str = "test/1/0",
    size: int = 4,
    seed: int = 0,
    temperature: float = 1.0,
    rewards: Sequence[float] | None = None,
) -> RolloutGroup:
    """A group of random completions scored by `model` itself; rewards alternate unless given."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(2, 16, size=int(rng.integers(2, 6)))
    lengths = rng.integers(1, 7, size=size)
    tokens, logprobs = [], []
    for length in lengths:
        completion = rng.integers(2, 16, size=length)
        ids = torch.from_numpy(np.concatenate([prompt, completion]))[None]
        scores = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, -1)
        picked = scores[len(prompt) - 1 : -1].gather(-1, torch.from_numpy(completion)[:, None])[:, 0]
        tokens.append(completion)
        logprobs.append(picked.numpy())
    return RolloutGroup(
        uid=uid,
        actor="actor",
        purpose="train",
        temperature=temperature,
        prompt_ids=prompt.astype(np.int32),
        lengths=lengths.astype(np.int32),
        token_ids=np.concatenate(tokens).astype(np.int32),
        behavior_logprobs=np.concatenate(logprobs).astype(np.float32),
        rewards=np.array(rewards if rewards is not None else [i % 2 for i in range(size)], dtype=np.float32),
        failed=np.zeros(size, dtype=bool),
        finish_reasons=("stop",) * size,
        spans=tuple((VersionSpan(version, int(length)),) for length in lengths),
    )
