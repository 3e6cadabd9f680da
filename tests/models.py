"""Tiny models and tokenizers that tests write to a folder and load by path, as a user would."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ALPHABET = "0123456789+=\n "
PAD, EOS = "<pad>", "<eos>"


def char_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, after `<pad>` (id 0) and `<eos>` (id 1)."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *alphabet])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def tiny_qwen3(
    *,
    seed: int = 0,
    tied: bool = True,
    hidden_size: int = 128,
    layers: int = 4,
    vocab_size: int = 16,
    init_scale: float = 0.2,
) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 in fp32, the same for the same arguments.

    Weights are drawn wider than usual (`init_scale`), so that distributions are far from uniform and a wrong
    weight shows up in the log-probs. Head size 32; one key-value head for every two query heads.
    """
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=init_scale,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float().eval()


def save_model(
    folder: Path, *, seed: int = 0, tied: bool = True, dtype: torch.dtype = torch.float32, **shape: int
) -> Path:
    """Write a tiny model and its tokenizer to `folder` and return the folder."""
    tiny_qwen3(seed=seed, tied=tied, **shape).to(dtype).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder
