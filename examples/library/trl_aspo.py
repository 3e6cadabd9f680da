"""ASPO in TRL: a GRPOTrainer with another loss. Written for TRL 1.16, whose other parts stay as they are.

    ASPOTrainer(model, reward_funcs=reward, args=GRPOConfig(num_iterations=2), train_dataset=prompts).train()

Rollouts must be off-policy for the ratio to mean anything: num_iterations above 1, steps_per_generation
above gradient_accumulation_steps, or vLLM. With vLLM the ratio is taken to the sampler's own log-probs, so
leave its separate correction off (vllm_importance_sampling_correction=False). The loss is a mean over the
tokens of an optimizer step, as TRL's `dapo`; epsilon and epsilon_high are ASPO's hard clips; beta (KL), the
entropy bonus, top_entropy_quantile and off_policy_mask_threshold are refused, for they belong to the loss
that is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import GRPOTrainer

from aspo_learner.losses import aspo_loss


class ASPOTrainer(GRPOTrainer):
    """GRPOTrainer that trains by ASPO's loss."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        args = self.args
        if args.beta or args.entropy_coef or args.top_entropy_quantile < 1 or args.off_policy_mask_threshold:
            raise ValueError(
                "leave beta, entropy_coef, top_entropy_quantile and off_policy_mask_threshold unset"
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        completion, mask = inputs["completion_ids"], inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
        attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, completion.size(1), compute_entropy=True
        )
        behavior = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        mode, mask = "train" if self.model.training else "eval", mask * inputs.get("tool_mask", 1)
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":  # of one optimizer step, of the several that a generation feeds
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        loss, metrics = aspo_loss(
            logprobs,
            logprobs.detach() if behavior is None else behavior,
            inputs["advantages"].reshape(len(ids), -1).expand_as(logprobs),
            mask,
            eps_low=self.epsilon_low,
            eps_high=self.epsilon_high,
            normalizer=float(tokens),
        )
        self._metrics[mode]["entropy"].append(((entropy * mask).sum() / mask.sum().clamp(min=1)).item())
        for name, value in metrics.items():
            self._metrics[mode][f"aspo/{name}"].append(float(value))
        return loss
