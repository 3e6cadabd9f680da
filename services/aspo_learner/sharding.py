"""A module's weights spread over the ranks by FSDP2, and tensors between one rank and all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from aspo_learner.ranks import Ranks


def shard(
    root: nn.Module, layers: Iterable[nn.Module], ranks: Ranks, *, bf16: bool, offload: bool, trained: bool
) -> None:
    """Spread a module's parameters over the ranks, by layers; its forward and backward gather them.

    With `bf16` the layers are gathered in it; what lies outside of them, embedding and head, stays in fp32 as
    on one device, for the head sums its own gradient. Gradients are summed over the ranks, in fp32. With
    `offload` weights, gradients and so the optimizer's state lie in the CPU's memory.
    """
    assert ranks.mesh is not None
    policy: OffloadPolicy = OffloadPolicy()
    if offload:
        policy = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    # Not the inputs: between the layers, sums stay in fp32 as they do under autocast.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(
            layer, mesh=ranks.mesh, mp_policy=half if bf16 else MixedPrecisionPolicy(), offload_policy=policy
        )
    # Gathered once for forward and backward, unless there is no backward to free it again.
    fully_shard(root, mesh=ranks.mesh, reshard_after_forward=None if trained else True, offload_policy=policy)
    for module in _sharded(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # neither gloo nor a sum of its own knows a mean


def sum_over_copies(root: nn.Module, wanted: bool) -> None:
    """Whether the next backward sums gradients over copies of the weights too, where there are several."""
    for module in _sharded(root):
        module.set_requires_all_reduce(wanted, recurse=False)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the ranks, whole; to be called by all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, content: Tensor | None) -> None:
    """Write rank 0's content into a tensor that may be spread over the ranks; the others need give none."""
    if not isinstance(parameter, DTensor):
        assert content is not None
        parameter.copy_(content)
        return
    mesh = parameter.device_mesh
    if content is None:
        content = torch.empty(parameter.shape, dtype=parameter.dtype, device=mesh.device_type)
    content = content.to(mesh.device_type, parameter.dtype)
    parameter.to_local().copy_(distribute_tensor(content, mesh, parameter.placements).to_local())


def _sharded(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]
