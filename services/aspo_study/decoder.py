"""Batched sampling from a small Qwen3 on a CPU, in little more than half the time that `generate` takes.

The same forward pass as transformers' without its layers of Python, over caches of a fixed size; tests hold
its log-probs to the learner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Choose = Callable[[Tensor], Tensor]  # from log-probs [B, V] to tokens [B]


class Decoder:
    """Completes left-padded prompts with given weights; `config` is the model's."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self._frequencies = 1.0 / config.rope_parameters["rope_theta"] ** half

    @torch.no_grad()
    def complete(
        self,
        weights: Mapping[str, Tensor],
        ids: Tensor,
        mask: Tensor,
        *,
        samples: int,
        max_tokens: int,
        choose: Choose,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs [B * samples, T], until every row has ended; ids and mask are [B, P]."""
        prompts, width = ids.shape
        layers = self._layers(weights, prompts, width + max_tokens)
        seen = torch.zeros(prompts, 1, 1, width + max_tokens)
        seen[..., :width] = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        causal = torch.full((width, width), -torch.inf).triu(1)
        hidden = self._forward(weights, layers, ids, positions, slice(0, width), seen[..., :width] + causal)
        for layer in layers:
            layer.repeat(samples)
        hidden, seen, last = (x.repeat_interleave(samples, 0) for x in (hidden, seen, positions[:, -1:]))
        chosen, logprobs = [], []
        ended = torch.zeros(len(hidden), dtype=torch.bool)
        for place in range(width, width + max_tokens):
            scores = F.linear(hidden, weights["model.embed_tokens.weight"]).log_softmax(-1)
            token = choose(scores)
            chosen.append(token)
            logprobs.append(scores.gather(-1, token[:, None])[:, 0])
            ended |= token == self._config.eos_token_id
            if ended.all():
                break
            last, visible = last + 1, seen[..., : place + 1]
            hidden = self._forward(weights, layers, token[:, None], last, slice(place, place + 1), visible)
        return torch.stack(chosen, dim=1), torch.stack(logprobs, dim=1)

    def _layers(self, weights: Mapping[str, Tensor], rows: int, width: int) -> list[_Layer]:
        count = self._config.num_hidden_layers
        return [_Layer(weights, f"model.layers.{i}.", self._config, rows, width) for i in range(count)]

    def _forward(
        self,
        weights: Mapping[str, Tensor],
        layers: list[_Layer],
        ids: Tensor,
        positions: Tensor,
        span: slice,
        visible: Tensor,
    ) -> Tensor:
        """Hidden states of the last tokens, [B, H]."""
        angles = positions[..., None] * self._frequencies
        turns = torch.cat([angles, angles], dim=-1)[:, None]
        rotation = (turns.cos(), turns.sin())
        hidden = F.embedding(ids, weights["model.embed_tokens.weight"])
        for layer in layers:
            hidden = layer(hidden, rotation, span, visible)
        return self._norm(hidden[:, -1], weights["model.norm.weight"])

    def _norm(self, values: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(values, weight.shape, weight, self._config.rms_norm_eps)


class _Layer:
    """One layer's weights and caches [B, kv_heads, width, D]."""

    def __init__(
        self, weights: Mapping[str, Tensor], prefix: str, config: Any, rows: int, width: int
    ) -> None:
        self._weights = {name.removeprefix(prefix): w for name, w in weights.items() if prefix in name}
        self._eps, self._size = config.rms_norm_eps, config.head_dim
        shape = (rows, config.num_key_value_heads, width, config.head_dim)
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)

    def repeat(self, samples: int) -> None:
        """Let every row be so many."""
        self._keys, self._values = (x.repeat_interleave(samples, 0) for x in (self._keys, self._values))

    def __call__(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], span: slice, visible: Tensor
    ) -> Tensor:
        normed = self._norm(hidden, "input_layernorm.weight")
        query = _rotate(self._norm(self._project(normed, "q"), "self_attn.q_norm.weight"), rotation)
        key = _rotate(self._norm(self._project(normed, "k"), "self_attn.k_norm.weight"), rotation)
        self._keys[:, :, span], self._values[:, :, span] = key, self._project(normed, "v")
        attended = F.scaled_dot_product_attention(
            query,
            self._keys[:, :, : span.stop],
            self._values[:, :, : span.stop],
            attn_mask=visible,
            enable_gqa=True,
        )
        hidden = hidden + self._linear(attended.transpose(1, 2).flatten(2), "self_attn.o_proj.weight")
        normed = self._norm(hidden, "post_attention_layernorm.weight")
        gate = F.silu(self._linear(normed, "mlp.gate_proj.weight"))
        return hidden + self._linear(
            gate * self._linear(normed, "mlp.up_proj.weight"), "mlp.down_proj.weight"
        )

    def _project(self, values: Tensor, which: str) -> Tensor:
        """Heads of the query, key or value, [B, heads, T, D]."""
        flat = self._linear(values, f"self_attn.{which}_proj.weight")
        return flat.view(*flat.shape[:2], -1, self._size).transpose(1, 2)

    def _linear(self, values: Tensor, name: str) -> Tensor:
        return F.linear(values, self._weights[name])

    def _norm(self, values: Tensor, name: str) -> Tensor:
        weight = self._weights[name]
        return F.rms_norm(values, weight.shape, weight, self._eps)


def _rotate(values: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    first, second = values.chunk(2, dim=-1)
    return values * rotation[0] + torch.cat([-second, first], dim=-1) * rotation[1]
