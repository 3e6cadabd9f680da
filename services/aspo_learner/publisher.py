"""Names, stores and announces the learner's weights as policy versions, beside the training thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aspo.failpoints import reach
from aspo.schemas import PolicyVersion
from aspo.weights.manifest import Manifest, WeightsError
from aspo.weights.store import Files, WeightStore

if TYPE_CHECKING:  # its import takes seconds, and a publisher only calls it
    from aspo_learner.policy import Policy

log = logging.getLogger(__name__)


class Publisher:
    """Publishes a policy's weights under `run/epoch/step`.

    The training thread only copies them; encoding and storing happen in a thread of its own, one version at a
    time. `on_stored` is called there with every version that has been stored.
    """

    def __init__(
        self,
        store: WeightStore,
        policy: Policy,
        run: str,
        epoch: int,
        on_stored: Callable[[PolicyVersion], None] | None = None,
    ) -> None:
        self._store, self._policy, self._run, self._epoch = store, policy, run, epoch
        self._on_stored = on_stored or store.go_live
        self._base = store.keep_base(policy.base())
        self._thread = ThreadPoolExecutor(1, "publisher")
        self._pending: Future[Manifest] | None = None
        # Two copies by turns: the store compares the one it gets with the one it got before.
        self._copies: list[dict[str, Tensor]] = [{}, {}]
        self.last: PolicyVersion | None = None
        self.metrics: dict[str, float] = {}
        self.failures = 0

    def version(self, step: int) -> PolicyVersion:
        """The name of this learner's version of a step."""
        return PolicyVersion(epoch=self._epoch, step=step, run=self._run)

    def publish(self, step: int) -> PolicyVersion:
        """Copy the current weights and begin to store them; a failure is logged, the next step mends it."""
        version = self.version(step)
        try:
            self.wait()
        except WeightsError as error:
            log.error("a version was not published: %s; actors stay on %s", error, self._store.live())
        if version != self.last:
            copy = self._copies[0]
            self._policy.copy_published(copy)
            self._pending = self._thread.submit(self._store_copy, version, copy)
        return version

    def wait(self) -> None:
        """Wait until what was published is stored; raises `WeightsError` if it could not be."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            manifest = pending.result()
        except WeightsError:
            self.failures += 1
            raise
        self.last = manifest.policy_version

    def close(self) -> None:
        """Wait for the last version and end the thread."""
        self._thread.shutdown()

    @torch.no_grad()
    def _store_copy(self, version: PolicyVersion, copy: dict[str, Tensor]) -> Manifest:
        try:
            reach("publish.storing")
            files: Files = {**self._policy.published_files(), **self._base}
            manifest = self._store.put(version, copy, files, live=False)
            reach("publish.stored")
        finally:
            if self._store.holds(copy):
                self._copies.reverse()
        self._on_stored(version)
        reach("publish.live")
        transfers = self._store.transfers(version)
        self.metrics = {"weights_bytes": float(min((t.size for t in transfers), default=0))}
        if manifest.changed_fraction is not None:
            self.metrics["weights_changed_fraction"] = manifest.changed_fraction
        return manifest
