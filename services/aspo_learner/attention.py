"""Attention over packed sequences, each of which sees itself alone.

Registered with transformers as `aspo_packed`, for every model that takes its attention from there:

    model.set_attn_implementation("aspo_packed")
    model(input_ids, position_ids=..., packing=Packing.of([3, 5], device))      # [1, 8] tokens

On a GPU, in half precision, that is torch's variable-length flash attention; else sequences of similar length
are padded for the attention alone and go through torch's fused kernel together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "aspo_packed"
_SIMILAR = 0.75  # a bucket's shortest sequence is at least so much of its longest
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False, slots=True)
class Bucket:
    """Sequences of similar length, next to each other in the pack.

    `tokens` is their part of the pack; `index` [b * width] the place in it of every padded token (any at
    padding), and `place` [n] of every real one among the padded; both None where all are of one length.
    """

    tokens: slice
    width: int
    index: Tensor | None
    place: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class Packing:
    """Where the sequences of a pack begin, `offsets` int32 [S + 1]; the longest; buckets of similar ones."""

    offsets: Tensor
    longest: int
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Describe sequences of these lengths, packed in this order."""
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(offsets, max(lengths), tuple(_buckets(lengths, device)))


def _buckets(lengths: Sequence[int], device: torch.device) -> Iterator[Bucket]:
    start, chosen = 0, list[int]()
    for length in lengths:
        similar = [*chosen, length]
        if chosen and min(similar) < _SIMILAR * max(similar):
            yield _bucket(start, chosen, device)
            start, similar = start + sum(chosen), [length]
        chosen = similar
    if chosen:
        yield _bucket(start, chosen, device)


def _bucket(start: int, lengths: Sequence[int], device: torch.device) -> Bucket:
    width, tokens = max(lengths), slice(start, start + sum(lengths))
    if len(set(lengths)) == 1:
        return Bucket(tokens, width, None, None)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    index = (real.flatten().cumsum(0) - 1) * real.flatten()
    place = real.flatten().nonzero().squeeze(1)
    return Bucket(tokens, width, index.to(device), place.to(device))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a pack; without `packing`, within each row.

    Shapes: query [1, heads, L, D]; key and value [1, kv_heads, L, D]; result [1, L, heads, D].
    """
    if packing is None:
        rows = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return rows[0], None
    if query.device.type == "cuda" and query.dtype in _HALF:
        return _varlen(query, key, value, packing, scaling, sliding_window).unsqueeze(0), None
    parts = [_padded(query, key, value, bucket, scaling, sliding_window) for bucket in packing.buckets]
    return torch.cat(parts).unsqueeze(0), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    found: Any = varlen_attn(
        q,
        k,
        v,
        packing.offsets,
        packing.offsets,
        packing.longest,
        packing.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    attended: Tensor = found
    return attended


def _padded(
    query: Tensor, key: Tensor, value: Tensor, bucket: Bucket, scaling: float | None, window: int | None
) -> Tensor:
    """Attention of one bucket; [n, heads, D]. Padding comes last, so that no real token sees it."""
    mask = None
    if window is not None and window < bucket.width:
        mask = _band(bucket.width, window, query.device)
    q, k, v = (_pad(tensor, bucket) for tensor in (query, key, value))
    padded = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    flat = padded.transpose(1, 2).flatten(0, 1)
    return flat if bucket.place is None else flat[bucket.place]


def _pad(tensor: Tensor, bucket: Bucket) -> Tensor:
    """Lay a bucket's part of [1, heads, L, D] out as [b, heads, width, D]."""
    flat = tensor[0, :, bucket.tokens].transpose(0, 1)
    if bucket.index is not None:
        flat = flat[bucket.index]
    return flat.view(-1, bucket.width, *flat.shape[1:]).transpose(1, 2)


def _band(width: int, window: int, device: torch.device) -> Tensor:
    position = torch.arange(width, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(PACKED, packed_attention)
