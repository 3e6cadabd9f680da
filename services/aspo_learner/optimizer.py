"""AdamW and its learning rate, and what happens to gradients that are no numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from aspo.config import LearnerConfig
from aspo.errors import AspoError
from aspo_learner.sharding import whole

log = logging.getLogger(__name__)
_COSINE_FLOOR = 0.1  # of the peak, at the end of a cosine


class DivergedError(AspoError):
    """So many gradients in a row were not finite that training on makes no sense."""


class Updater:
    """Turns gradients into updates: clips, schedules, steps, and skips those that are not finite."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: LearnerConfig) -> None:
        self._parameters, self._config = list(parameters), config
        self.optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.updates = 0
        self.skipped = 0
        self._skipped_in_a_row = 0

    def update(self) -> float:
        """Take one step along the gradients and forget them; returns their norm before clipping.

        Raises DivergedError once `max_skipped_updates` in a row were not finite.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        total = whole(torch.nn.utils.get_total_norm(gradients))  # over all ranks, and so the same on each
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self._config.max_grad_norm, total)
        norm = float(total)
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.optimizer.step()
            self.updates, self._skipped_in_a_row = self.updates + 1, 0
        else:
            self._skip()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _skip(self) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        log.warning("skipped an update: its gradient is not finite")
        if self._skipped_in_a_row >= self._config.max_skipped_updates:
            raise DivergedError(
                f"{self._skipped_in_a_row} gradients in a row were not finite; "
                "lower learner.learning_rate, or look at the batch"
            )

    def learning_rate(self) -> float:
        """The next update's: linear warm-up, then constant, or a cosine down to a tenth at the last step."""
        config, done = self._config, self.updates + 1
        if done <= config.warmup_updates or config.schedule == "constant":
            return config.learning_rate * min(1.0, done / (config.warmup_updates + 1))
        total = config.steps * config.epochs * math.ceil(config.batch_prompts / config.mini_batch_prompts)
        progress = (done - config.warmup_updates) / max(1, total - config.warmup_updates)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return config.learning_rate * (_COSINE_FLOOR + (1 - _COSINE_FLOOR) * cosine)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the optimizer's tensors."""
        return {"updates": self.updates, "skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.updates, self.skipped = state["updates"], state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
