"""A worker extension whose updates can be made to fail midway, in vLLM's own process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from aspo_actor.vllm_plugin import AspoWorkerExtension


class FaultyExtension(AspoWorkerExtension):
    """The extension of the actor, and calls that spoil the next update of either kind."""

    def fail_next_patch(self) -> None:
        """Have the next patch fail once half of it has been written."""
        engine: Any = self.weight_transfer_engine

        def stage(patch: str) -> None:
            del engine.stage
            engine.stage(patch)
            identity, writes = engine._staged
            middle = writes[len(writes) // 2]
            beyond = torch.full((1,), len(middle.block.memory))
            bad = dataclasses.replace(middle, where=beyond, values=middle.block.memory[:1].clone())
            engine._staged = identity, [*writes[: len(writes) // 2], bad]

        engine.stage = stage

    def fail_next_load(self) -> None:
        """Have the next complete update fail once half of the tensors have been read."""
        model: Any = self.weight_transfer_engine.model

        def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            del model.load_weights
            loaded: set[str] = model.load_weights(half(list(weights)))
            return loaded

        def half(weights: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            yield from weights[: len(weights) // 2]
            raise RuntimeError("the disk is on fire")

        model.load_weights = load_weights
