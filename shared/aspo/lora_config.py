"""The settings of LoRA, `[learner.lora]` of `aspo.config`; unset, all weights are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aspo.task_config import Section


class LoraConfig(Section):
    """Adapters to train in place of the weights; without dropout, for sampling has none."""

    rank: int = Field(16, ge=1, le=4096, description="Rows of A and columns of B.")
    alpha: float = Field(32.0, gt=0, le=1e6, description="The weights move by alpha / rank * B @ A.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear",
        min_length=1,
        description="Linear layers by the end of their names, such as q_proj; all-linear: all but the head.",
    )
