"""The learner: trains on stale rollouts with ASPO and publishes weight versions over HTTP."""
