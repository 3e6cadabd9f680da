"""The fused head alone: log-probs and entropy of tokens from hidden states, without their logits."""

import torch

from aspo_learner.head import token_logprobs_and_entropy

hidden = torch.randn(64, 32, requires_grad=True)  # [tokens, hidden size]
weight = torch.randn(5000, 32, requires_grad=True)  # lm_head.weight
targets = torch.randint(5000, (64,))

logprobs, entropy = token_logprobs_and_entropy(hidden, weight, targets, temperature=0.7)
(-logprobs.mean() - 0.01 * entropy.mean()).backward()
print(f"log-prob {logprobs.mean():.2f}, entropy {entropy.mean():.2f} nats, gradient {weight.grad.norm():.2f}")
