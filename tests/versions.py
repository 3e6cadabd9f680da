"""Versions of a small state that move as training does: most elements stay, some take a step."""

from __future__ import annotations

import torch

from aspo.schemas import PolicyVersion
from aspo.weights.client import Mirror, WeightClient

FILES = {"config.json": b"{}", "tokenizer.json": b"{ }"}
SHAPES = {"embed": (64, 32), "norm": (32,), "scalar": (), "proj": (128, 64)}


def version(step: int, epoch: int = 1) -> PolicyVersion:
    """Name a version of the run `r`."""
    return PolicyVersion(epoch=epoch, step=step, run="r")


def tensors(step: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state after `step` small updates of a random start."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for _ in range(step):
        for tensor in state.values():
            tensor += 1e-4 * torch.randn(tensor.shape, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


async def follow(client: WeightClient, mirror: Mirror) -> str | None:
    """Follow once; returns the kind of plan, None if there is nothing new."""
    plan = await client.latest(have=mirror.version)
    if plan is None:
        return None
    await mirror.follow(plan)
    return plan.kind
