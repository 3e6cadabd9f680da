"""The actor: a vLLM engine that turns tasks into scored rollouts and applies new weights in flight."""
