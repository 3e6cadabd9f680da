"""Packed sequences against the same ones alone: values, gradients, isolation; and even micro-batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from aspo.config import ConfigError, ModelConfig
from aspo_learner.attention import PACKED, Packing
from aspo_learner.batching import equal_parts
from aspo_learner.policy import Policy
from models import save_model

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL),
    "llama": LlamaConfig(**SMALL),
    "window": MistralConfig(**SMALL, sliding_window=4),
}
LENGTHS = (9, 9, 8, 5, 5, 1, 12, 2)


def gradients(model: torch.nn.Module, hidden: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    loss = (hidden * torch.randn_like(hidden)).sum()
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack_is_as_its_sequences_alone(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float64).base_model.eval()
    sequences = [torch.randint(0, 100, (length,)) for length in LENGTHS]
    alone = torch.cat([model(one[None], use_cache=False).last_hidden_state[0] for one in sequences])
    expected = gradients(model, alone)
    model.set_attn_implementation(PACKED)
    packed = model(
        torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        packing=Packing.of(LENGTHS, CPU),
        use_cache=False,
    ).last_hidden_state[0]
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-12)
    for found, right in zip(gradients(model, packed), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def test_padding_is_for_sequences_of_similar_length_only() -> None:
    packing = Packing.of((12, 12, 9, 8, 2, 2), CPU)
    assert [bucket.tokens for bucket in packing.buckets] == [slice(0, 33), slice(33, 41), slice(41, 45)]
    assert packing.buckets[2].index is None, "sequences of one length need no padding"
    assert packing.offsets.tolist() == [0, 12, 24, 33, 41, 43, 45]


def test_a_model_that_keeps_a_running_state_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", hidden_size=32, layers=1)
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(ConfigError, match="use a model of another architecture"):
        Policy(ModelConfig(path=str(folder)), CPU)


def test_a_published_config_does_not_name_our_attention(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", hidden_size=32, layers=1)
    files = Policy(ModelConfig(path=str(folder)), CPU).published_files()
    assert PACKED.encode() not in files["config.json"]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=50), st.integers(10, 200))
def test_parts_hold_everything_once_and_are_even(lengths: list[int], budget: int) -> None:
    parts = equal_parts(lengths, budget)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in part) for part in parts]
    assert all(size <= budget or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    least = -(-sum(lengths) // budget)
    if len(parts) == least > 1:
        assert max(sizes) <= sum(lengths) / least + max(lengths)
    if max(lengths) <= budget:
        assert len(parts) <= 2 * least, "no more than twice the fewest there could be"
