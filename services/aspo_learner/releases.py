"""Which published version goes live: at once, or after a trial with one actor, the canary.

    releases = Releases(store, leases, config.canary)
    releases.stored(version)            # from the publisher's thread
    releases.report(version, report)    # from the HTTP thread

While a trial runs, later versions wait; the newest of them is tried next. A version that fails is withdrawn:
the live one stays, and the next version gets its own trial. Where the canary falls silent, another actor
tries the newest version.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter

from pydantic import BaseModel, Field

from aspo.config import CanaryConfig
from aspo.schemas import PolicyVersion
from aspo.weights.leases import Leases
from aspo.weights.store import WeightStore

log = logging.getLogger(__name__)


class TrialReport(BaseModel):
    """What a canary saw: KL in nats per token from the parent, mean rewards under either version."""

    client: str = Field(max_length=128)
    finite: bool
    kl: float = Field(allow_inf_nan=False)
    reward: float | None = Field(None, allow_inf_nan=False)
    reward_before: float | None = Field(None, allow_inf_nan=False)


class Releases:
    """Decides what is live; safe from any thread."""

    def __init__(self, store: WeightStore, leases: Leases, config: CanaryConfig) -> None:
        self._store, self._leases, self._config = store, leases, config
        self._lock = threading.RLock()
        self._trial: tuple[PolicyVersion, str, float] | None = None
        self._next: PolicyVersion | None = None
        self._unanswered: PolicyVersion | None = None  # the last whose canary fell silent
        self.outcomes: Counter[str] = Counter()

    @property
    def trial(self) -> tuple[PolicyVersion, str] | None:
        """The version on trial and its canary, None while there is none."""
        trial = self._trial
        return trial and trial[:2]

    @property
    def undecided(self) -> bool:
        """Whether a version is on trial or waits for one that may begin."""
        with self._lock:
            return self._trial is not None or (self._next is not None and not self._store.held())

    def stored(self, version: PolicyVersion) -> None:
        """Take in a version that was just stored."""
        with self._lock:
            if not self._config.enabled or self._store.live() is None:
                self._store.go_live(version)
                return
            self._next = version
            self._begin()

    def report(self, version: PolicyVersion, report: TrialReport) -> str:
        """Judge a canary's report; returns what became of the version."""
        with self._lock:
            if self._trial is None or self._trial[:2] != (version, report.client):
                return "ignored: that version is not on trial with this actor"
            if self._store.held():
                self._trial = None
                return "ignored: a rollback holds versions back"
            fault = self._fault(report)
            self._end(fault)
            return f"withdrawn: {fault}" if fault else "live"

    def overruled(self) -> None:
        """Forget the trial that runs: an operator has decided what is live."""
        with self._lock:
            self._trial = None

    def branch_off(self, version: PolicyVersion) -> None:
        """Make live the version that the learner goes on from; what came after it is never tried."""
        with self._lock:
            self._trial = self._next = None
            self._store.promote(version)

    def tick(self) -> None:
        """Give up on a canary that has not reported in time; called now and then."""
        with self._lock:
            if self._trial is not None and self._trial[2] < time.monotonic():
                version, canary, _ = self._trial
                self._leases.forget(canary)  # until it asks again, trials go to others
                if self._next is None and version != self._unanswered:
                    self._next = self._unanswered = version  # once more, with another
                self._end(f"no report within {self._config.timeout_s:g} s")
            elif self._trial is None and self._next is not None:
                self._begin()

    def _begin(self) -> None:
        """Try the newest waiting version out; without any actor, it waits for one."""
        if self._next == self._store.live():
            self._next = None  # an operator promoted it
        if self._trial is not None or self._next is None or self._store.held():
            return
        canary = self._canary()
        if canary is None:
            return
        version, self._next = self._next, None
        self._trial = version, canary, time.monotonic() + self._config.timeout_s
        self._store.try_out(version, canary)

    def _end(self, fault: str | None) -> None:
        assert self._trial is not None
        version, canary, _ = self._trial
        self._trial = None
        if fault is None:
            self.outcomes["promoted"] += 1
            self._store.go_live(version)
        else:
            self.outcomes["withdrawn"] += 1
            log.error("version %s withdrawn after its trial with %s: %s", version, canary, fault)
            self._store.withdraw()
        self._begin()

    def _canary(self) -> str | None:
        """The first by name of the actors that run a version, lest every trial have another."""
        actors = self._leases.clients(role="actor")
        return min((name for name, runs in actors.items() if runs is not None), default=None)

    def _fault(self, report: TrialReport) -> str | None:
        config = self._config
        if not report.finite:
            return "its log-probs are not finite"
        if report.kl > config.max_kl:
            return f"KL {report.kl:.4g} from the version before exceeds canary.max_kl {config.max_kl:g}"
        if report.reward is not None and report.reward_before is not None:
            drop = report.reward_before - report.reward
            if drop > config.max_reward_drop:
                return f"reward fell by {drop:.4g}, over canary.max_reward_drop {config.max_reward_drop:g}"
        return None
