"""What a learner does when Redis takes no writes, or has lost what it held: it goes on by itself."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from aspo.config import Config
from aspo.fence import DataLostError, Fence
from aspo.queue import TaskQueue, group_is_lost, refuses_writes
from aspo_learner.dispatcher import Dispatcher
from aspo_learner.evaluation import Evaluator
from aspo_learner.identity import claim_run
from aspo_learner.intake import Intake

log = logging.getLogger(__name__)
_PAUSE_S = 0.2
_SAY_EVERY_S = 10.0


class Outages:
    """Goes on without what Redis refused, and asks anew for what it has lost; `losses` counts the latter.

    with outages.ridden_out():
        dispatcher.top_up(...)      # what is refused here, the next call tries again
    """

    def __init__(
        self,
        config: Config,
        client: redis.Redis,
        fence: Fence,
        tasks: TaskQueue,
        dispatcher: Dispatcher,
        evaluator: Evaluator | None,
        intake: Intake,
    ) -> None:
        self._config, self._redis, self._fence, self._tasks = config, client, fence, tasks
        self._dispatcher, self._evaluator, self._intake = dispatcher, evaluator, intake
        self._said = -math.inf
        self.losses = 0

    @contextmanager
    def ridden_out(self) -> Iterator[None]:
        """Leave the body at a refusal or a loss, and go on after it; any other error is raised."""
        try:
            yield
        except (DataLostError, redis.ResponseError) as error:
            if isinstance(error, DataLostError) or group_is_lost(error):
                self._begin_anew(error)
            elif refuses_writes(error):
                self._wait(error)
            else:
                raise

    def _wait(self, error: Exception) -> None:
        if time.monotonic() - self._said > _SAY_EVERY_S:
            self._said = time.monotonic()
            log.warning("Redis takes no writes (%s); trying again until it does", error)
        time.sleep(_PAUSE_S)

    def _begin_anew(self, error: Exception) -> None:
        """Tie Redis to the run again and ask for every task that has neither ended nor arrived.

        What was read of it is trained all the same, once: the ledger is the learner's.
        """
        self.losses += 1
        log.error("Redis has lost data of this run (loss %d): %s", self.losses, error)
        self._intake.forget_deliveries()
        with self.ridden_out():
            claim_run(self._redis, self._config.run.name, self._config.run.path)
            self._fence.restore()
            self._tasks.reset("eval")
            asked = self._dispatcher.ask_again(self._intake.held)
            log.warning("asked again for %d tasks; %d rollouts are in memory", asked, len(self._intake.held))
            if self._evaluator is not None:
                self._evaluator.recover()
