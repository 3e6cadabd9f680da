"""ASPO's loss alone, in any training loop: log-probs in, a loss to call backward on."""

import torch

from aspo_learner.losses import aspo_loss

logits = torch.randn(2, 5, 100, requires_grad=True)  # of your model: [sequences, tokens, vocabulary]
tokens, mask = torch.randint(100, (2, 5)), torch.ones(2, 5)
logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[..., None]).squeeze(-1)
behavior = logprobs.detach() + 0.1 * torch.randn(2, 5)  # what the sampler reported
advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 5)

loss, metrics = aspo_loss(logprobs, behavior, advantages, mask)
loss.backward()
print({name: round(float(value), 3) for name, value in metrics.items()})
