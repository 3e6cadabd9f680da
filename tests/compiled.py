"""Importing this compiles the delta codec for bf16, for the processes forked afterwards."""

from __future__ import annotations

from itertools import pairwise

from aspo.weights.delta import decode_delta, encode_delta, merge_deltas
from versions import tensors

_states = [tensors(step) for step in range(3)]
# On one thread: a pool's threads would not survive the fork.
_deltas = [encode_delta(*pair, threads=1) for pair in pairwise(_states)]
decode_delta(_states[0], merge_deltas(_deltas, threads=1), threads=1)
