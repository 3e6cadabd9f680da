"""Live weights in a vLLM model: where they lie, and on a CPU how they are packed to stay writable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from aspo_actor.checkpoint import TensorSpec
from aspo_actor.packing import PackedLinear
from aspo_actor.placement import Block, Copy, Placement, matrix_shape


class PackedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """Packs a linear layer so that its weight stays writable, or as vLLM does where that cannot be."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight that was loaded and drop the plain one."""
        if _pack_layer(layer):
            layer.weight = torch.nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)
        else:
            super().process_weights_after_loading(layer)


class PackedHeadMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """The same for an output head, which keeps its plain weight: it may be the embedding's."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight that was loaded."""
        if not _pack_layer(layer):
            super().process_weights_after_loading(layer)


class PlainEmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding that is no head: vLLM would pack a copy of it too, which nothing uses."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Have whoever multiplies by it use the weight itself."""
        layer.cpu_linear = linear


def make_packed(model: torch.nn.Module) -> None:
    """Have the model's unquantised linear layers and heads packed here from the next load on."""
    has_head = any(isinstance(module, ParallelLMHead) for module in model.modules())
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if type(method) is UnquantizedLinearMethod and not getattr(module, "_cpu_skip_gemm_dispatch", False):
            module.quant_method = PackedLinearMethod()
        elif type(method) is UnquantizedEmbeddingMethod:
            # Without a head of its own a model multiplies by its embedding.
            if isinstance(module, ParallelLMHead) or not has_head:
                module.quant_method = PackedHeadMethod()
            else:
                module.quant_method = PlainEmbeddingMethod()
                # At once, for a rank without a row of the vocabulary loads nothing.
                module.quant_method.process_weights_after_loading(module)


def repack_heads(model: torch.nn.Module) -> None:
    """Pack the output head anew: on a CPU it is a packed copy, which a reload of a tied head leaves old."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def why_unplaceable(model: torch.nn.Module, vllm_config: Any, device: torch.device) -> str | None:
    """Why it is not worth learning where the weights of a model lie, or None."""
    if device.type == "cpu" and not vllm_config.model_config.enforce_eager:
        return "on a CPU it needs enforce_eager"
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method) not in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            return f"{name} is a {type(module).__name__} with {type(method).__name__}"
    return None


def place(
    model: torch.nn.Module, specs: Mapping[str, TensorSpec], copies: Mapping[str, Iterable[Copy]]
) -> dict[str, Placement]:
    """Find the live blocks of every checkpoint tensor, given what was copied where.

    Raises `ValueError` when a parameter is not in memory as it was loaded, or a copy of it out of reach.
    """
    packed = _packed_blocks(model)
    owners: dict[tuple[int, tuple[int, int]], str] = {}
    placements: dict[str, Placement] = {}
    for name, spec in specs.items():
        blocks: list[Block] = []
        dtypes: set[torch.dtype] = set()
        for copy in copies.get(name, ()):
            live = getattr(copy.parameter.module, copy.parameter.name)
            found = _live_blocks(copy, live, packed)
            if not found or owners.setdefault((found[0].memory.data_ptr(), copy.target), name) != name:
                raise ValueError(f"{name} has no memory of its own in {copy.parameter.name}")
            blocks += [block.cut(copy, matrix_shape(spec.shape)) for block in found]
            dtypes.add(live.dtype)
        if len(dtypes) > 1:
            raise ValueError(f"{name} has copies of several dtypes")
        placements[name] = Placement(spec.shape, next(iter(dtypes), torch.float32), tuple(blocks))
    return placements


def _packed_blocks(model: torch.nn.Module) -> list[tuple[torch.nn.Module, Block]]:
    blocks: list[tuple[torch.nn.Module, Block]] = []
    for name, module in model.named_modules():
        multiply = getattr(module, "cpu_linear", linear)
        if isinstance(multiply, PackedLinear):
            blocks.append((module, multiply.block))
        elif multiply is not linear:
            raise ValueError(f"{name} is packed in a way that is not understood")
    return blocks


def _live_blocks(copy: Copy, live: Tensor, packed: list[tuple[torch.nn.Module, Block]]) -> list[Block]:
    """The blocks that hold a parameter as it was loaded: its own, and what was packed of it."""
    blocks = [Block.plain(live)] if live.numel() == math.prod(copy.shape) else []
    for module, block in packed:
        weight: Any = module.weight
        own = module is copy.parameter.module and copy.parameter.name == "weight"
        if own or (weight.numel() and weight.data_ptr() == live.data_ptr()):
            blocks.append(block)
    return blocks


def _pack_layer(layer: Any) -> bool:
    if layer.weight.is_meta or layer.weight.ndim != 2:
        return False
    try:
        layer.cpu_linear = PackedLinear(layer.weight.detach())
    except RuntimeError:
        return False
    return True
