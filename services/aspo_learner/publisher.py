"""Names, stores and announces the learner's weights as policy versions."""

from __future__ import annotations

import redis

from aspo.schemas import PolicyVersion
from aspo.weights.store import WeightStore
from aspo_learner.policy import Policy


def next_epoch(client: redis.Redis, run: str, store: WeightStore) -> int:
    """Take an epoch higher than any before, in Redis and in the store alike."""
    key = f"aspo:{run}:epoch"
    highest = max((version.epoch for version in store.versions()), default=0)
    while (epoch := int(client.incr(key))) <= highest:
        client.incrby(key, highest - epoch)
    return epoch


class Publisher:
    """Publishes a policy's weights under `run/epoch/step`."""

    def __init__(self, store: WeightStore, policy: Policy, run: str, epoch: int) -> None:
        self.store = store
        self._policy, self._run, self._epoch = policy, run, epoch

    def version(self, step: int) -> PolicyVersion:
        """The name of this learner's version of a step."""
        return PolicyVersion(epoch=self._epoch, step=step, run=self._run)

    def publish(self, step: int) -> PolicyVersion:
        """Store the current weights as the version of `step` and make it the latest."""
        version = self.version(step)
        self.store.put(version, dict(self._policy.published_tensors()), self._policy.published_files())
        return version
