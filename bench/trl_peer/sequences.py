"""The step benchmark's model and rollout groups, in memory for ours and as files for TRL's half."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aspo.schemas import RolloutGroup, VersionSpan

VOCABULARY = 4096
PAD_ID, EOS_ID = 0, 1
SHORTEST, LONGEST, MEDIAN, SIGMA = 8, 512, 128, 0.8  # completion tokens, log-normal
PROMPT_TOKENS = (16, 64)
VERSION = "bench/1/0"


def save_model(folder: Path) -> None:
    """Write a Qwen3 of 5 M parameters, random weights, with a tokenizer of made-up words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": PAD_ID, "<eos>": EOS_ID} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    ).save_pretrained(folder)


def make_groups(model_folder: Path, groups: int, size: int, seed: int) -> list[RolloutGroup]:
    """Random completions of log-normal lengths, the model's own log-probs, both rewards in each group."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(seed)
    return [_make_group(model, rng, f"bench-{number}", size) for number in range(groups)]


def _make_group(model: Any, rng: np.random.Generator, uid: str, size: int) -> RolloutGroup:
    prompt = rng.integers(2, VOCABULARY, rng.integers(*PROMPT_TOKENS, endpoint=True), dtype=np.int32)
    drawn = rng.lognormal(np.log(MEDIAN), SIGMA, size)
    lengths = np.clip(drawn, SHORTEST, LONGEST).astype(np.int32)
    completions = [rng.integers(2, VOCABULARY, length, dtype=np.int32) for length in lengths]
    for completion in completions:
        completion[-1] = EOS_ID
    rewards = rng.permutation(np.arange(size) % 2).astype(np.float32)
    return RolloutGroup(
        uid=uid,
        actor="bench",
        purpose="train",
        temperature=1.0,
        prompt_ids=prompt,
        lengths=lengths,
        token_ids=np.concatenate(completions),
        behavior_logprobs=np.concatenate([_logprobs(model, prompt, c) for c in completions]),
        rewards=rewards,
        failed=np.zeros(size, dtype=bool),
        finish_reasons=("stop",) * size,
        spans=tuple((VersionSpan(VERSION, int(length)),) for length in lengths),
    )


@torch.no_grad()
def _logprobs(model: Any, prompt: NDArray[np.int32], completion: NDArray[np.int32]) -> NDArray[np.float32]:
    """The model's log-prob of each token of a completion, in nats."""
    tokens = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
    logits = model(input_ids=tokens, logits_to_keep=len(completion) + 1).logits[0, :-1]
    targets = tokens[0, -len(completion) :, None]
    logprobs: NDArray[np.float32] = logits.log_softmax(-1).gather(-1, targets)[:, 0].numpy()
    return logprobs


def save_groups(groups: Sequence[RolloutGroup], path: Path) -> None:
    """Write what TRL's half reads: flat arrays, and the lengths to cut them by."""
    np.savez(
        path,
        prompt_lengths=[len(group.prompt_ids) for group in groups],
        prompt_ids=np.concatenate([group.prompt_ids for group in groups]),
        lengths=np.concatenate([group.lengths for group in groups]),
        token_ids=np.concatenate([group.token_ids for group in groups]),
        behavior_logprobs=np.concatenate([group.behavior_logprobs for group in groups]),
        rewards=np.concatenate([group.rewards for group in groups]),
    )


def tokens_in(groups: Sequence[RolloutGroup]) -> int:
    """Real tokens, prompts counted once for each completion."""
    return sum(len(group.prompt_ids) * len(group) + len(group.token_ids) for group in groups)


def padded_width(groups: Sequence[RolloutGroup]) -> int:
    """Tokens of a row as TRL pads it: the longest prompt and the longest completion of all the groups."""
    return max(len(group.prompt_ids) for group in groups) + int(max(group.lengths.max() for group in groups))
