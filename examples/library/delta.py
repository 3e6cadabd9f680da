"""The delta codec alone: what a step changed in bf16 weights, lossless, in a fraction of their bytes."""

import torch

from aspo.weights.delta import decode_delta, encode_delta

master = {"proj": 0.02 * torch.randn(1024, 1024)}  # fp32, as an optimizer keeps them
before = {name: tensor.bfloat16() for name, tensor in master.items()}
after = {name: (tensor + 1e-6 * torch.randn_like(tensor)).bfloat16() for name, tensor in master.items()}

delta = encode_delta(before, after)
decoded = decode_delta(before, delta)
same = torch.equal(decoded["proj"], after["proj"])
print(f"{len(delta):,} bytes for {before['proj'].nbytes:,}; equal: {same}")
