"""The learner: take stale rollouts, train, publish, checkpoint, acknowledge.

    Learner(config, fence).run()        # serves HTTP in a thread of its own while it trains

The order is train -> durable checkpoint -> acknowledge; publishing may run ahead of the checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import redis
import torch

from aspo.config import Config
from aspo.failpoints import reach
from aspo.fence import Fence
from aspo.hello import file_refs, own_hello, say
from aspo.http import bind
from aspo.presence import ActorStatus, Attendance, present
from aspo.queue import OUTAGE_S, RolloutReader, TaskQueue, connect, fault_of
from aspo.schemas import FloatArray, PolicyVersion, RolloutGroup
from aspo.telemetry import LEARNER_METRICS, Gauges
from aspo.tracing import Traces
from aspo.weights.leases import Leases
from aspo.weights.store import WeightStore
from aspo_learner.app import Controls, LearnerStatus, TrialStatus, build_app
from aspo_learner.checkpoint import CheckpointError, Checkpoints
from aspo_learner.data import HeldOut, load_held_out, room_for_prompts
from aspo_learner.dispatcher import Dispatcher
from aspo_learner.evaluation import Evaluator
from aspo_learner.groups import describe_groups, mask_truncated
from aspo_learner.intake import Intake, Limits
from aspo_learner.journal import Journal
from aspo_learner.ledger import Ledger
from aspo_learner.live import Live
from aspo_learner.optimizer import DivergedError
from aspo_learner.order import Prompts
from aspo_learner.outages import Outages
from aspo_learner.planner import Planner
from aspo_learner.policy import load_policy
from aspo_learner.publisher import Publisher
from aspo_learner.ranks import Ranks
from aspo_learner.releases import Releases
from aspo_learner.report import (
    RunHistory,
    describe_batch,
    describe_ended,
    describe_sets,
    log_step,
    save_batch,
)
from aspo_learner.staleness import StalenessRule
from aspo_learner.trainer import Trainer

log = logging.getLogger(__name__)
_POLL_S = 0.2
_SILENCE_S = 10.0
_DISK_RETRY_S = 1.0


class Learner:
    """One run's learner; `run` returns when the steps are done, the target is met or it is told so."""

    def __init__(self, config: Config, fence: Fence) -> None:
        self.config, self.controls, self._fence = config, Controls(), fence
        self._redis = connect(config.redis.location, retries=OUTAGE_S)
        # The HTTP thread must not wait out an outage.
        self._status_redis = connect(config.redis.location, retries=1, timeout_s=1.0)
        self._attendance = Attendance(self._status_redis, config.run.name)
        self._place = bind(config.learner, config.auth)
        if config.learner.threads:
            torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.run.seed)
        self._ranks = Ranks.join(config.learner)
        self.policy = load_policy(config, self._ranks)
        self._room = room_for_prompts(config, self.policy.context_length)
        self._prompts = Prompts(config, self.policy.tokenizer, room=self._room, folder=fence.folder)
        held_out = load_held_out(config, self.policy.tokenizer, room=self._room)
        self.trainer = Trainer(self.policy, config)
        self.leases = Leases()
        self._store = WeightStore(
            fence.folder / "weights",
            keep=config.weights.keep,
            snapshot_every=config.weights.snapshot_every,
            leased=self.leases.versions,
        )
        self.releases = Releases(self._store, self.leases, config.canary)
        self._checkpoints = Checkpoints(
            fence.folder / "checkpoints", keep=config.learner.keep_checkpoints, ranks=self._ranks
        )
        self._gauges = Gauges("learner", LEARNER_METRICS)
        self._history, self._traces = RunHistory(config), Traces(config, "learner")
        self.live = Live(config.run.name, lambda: self._history.steps, self.policy.tokenizer)
        self.step, self._phase, self._checkpoint_seconds = 0, "starting", 0.0
        self._disk_trouble: str | None = None
        self._ledger, cursor, evaluation = self._restore()
        self._publisher = self._new_publisher()
        self._connect_queues(held_out, cursor)
        if self._evaluator is not None and evaluation is not None:
            self._evaluator.load_state(evaluation)

    def run(self) -> dict[str, Any]:
        """Train to the end and return the run's summary, also written to summary.json."""
        app = build_app(self, self._store, self.leases, self._gauges, self.config.auth, self.live)
        with self._place.serve(app) as server:
            log.info("learner of run %s serves on %s", self.config.run.name, server.url)
            self._planner.resume(self._current)
            self._publish()
            self._publisher.wait()
            self._say_hello()
            with self._outages.ridden_out():
                self._dispatcher.ask_again(self._intake.held)
            if self.step == 0:
                self._history.accuracy_before = self._evaluate_now("evaluating before training")
            self._dispatch()
            while not self._finished():
                self._train_one_step()
            self._history.accuracy_after = self._evaluate_now("evaluating after training")
            self._checkpoint()
            self._phase = "done"
            summary = self._history.finish(self._publisher, self.policy, self._actors())
            self._ranks.close()
            what = "stopped as told" if self.controls.stop.is_set() else "done"
            log.info("%s: the model is in %s, the figures in summary.json beside it", what, summary["model"])
            self._serve_on()
            return summary

    def _serve_on(self) -> None:
        """Serve status and weights until told to stop, where the learner would only be started again."""
        while self.config.learner.keep_serving and not self.controls.stop.is_set():
            self._fence.require()
            self.releases.tick()
            time.sleep(_POLL_S)  # not wait: a signal's handler may set the event in the midst of it

    def status(self) -> LearnerStatus:
        """A snapshot for `/v1/status`; safe from any thread."""
        newest, live, history = self._store.newest(), self._store.live(), self._history
        trial, actors = self.releases.trial, self._actors()
        return LearnerStatus(
            run=self.config.run.name,
            phase=self._phase,
            version=str(newest) if newest else None,
            live=str(live) if live else None,
            held=self._store.held(),
            trial=TrialStatus(version=str(trial[0]), canary=trial[1]) if trial else None,
            trials=dict(self.releases.outcomes),
            step=self.step,
            steps=self.config.learner.steps,
            accuracy_before=history.accuracy_before,
            accuracy=history.accuracy,
            accuracy_after=history.accuracy_after,
            idle_fraction=history.idle_fraction,
            tokens=history.tokens,
            rollouts=history.rollouts,
            uptime_seconds=history.seconds,
            ended=dict(self._intake.ended),
            trouble=self._disk_trouble or self._fence.trouble,
            redis_losses=self._outages.losses,
            metrics=dict(history.last),
            actors=actors,
            without_actors_seconds=self._absent_s,
        )

    def unsure(self) -> str | None:
        """Why the learner may not speak for the run now, None if it may: it has slept, or cannot ask."""
        return "the learner does not know whether it still holds the run" if self._fence.lapsed else None

    def not_ready(self) -> str | None:
        """Why the learner cannot do its work now, None if it can."""
        if self._store.live() is None:
            return "no version is published yet"
        return fault_of(self.config.redis.location) or self.unsure()

    @property
    def _current(self) -> PolicyVersion:
        return self._publisher.version(self.step)

    def _actors(self) -> list[ActorStatus]:
        if self._fence.trouble:
            return []  # nobody can announce itself to a Redis that takes no writes: unknown
        try:
            actors = self._attendance.look()
        except redis.RedisError:
            return []
        self._gauges.set({"actors": len(actors)})
        return actors

    @property
    def _absent_s(self) -> float | None:
        return None if self._fence.trouble else self._attendance.absent_s

    def _restore(self) -> tuple[Ledger, int, dict[str, int] | None]:
        """Continue from the newest intact checkpoint, if there is one; gives ledger, cursor, evaluator's."""
        state = self._checkpoints.load(self.policy.model, self.trainer.optimizer)
        if state is None:
            self._history.forget()
            return Ledger(), 0, None
        self.step = state["step"]
        self.trainer.load_state(state["trainer"])
        self._history.load_state(state["history"])
        self._prompts.load_state(state.get("prompts", {}))
        log.info("continuing run %s from the checkpoint of step %d", self.config.run.name, self.step)
        return Ledger.load(state["ledger"]), state["cursor"], state.get("evaluation")

    def _connect_queues(self, held_out: Sequence[HeldOut], cursor: int) -> None:
        config, epoch = self.config, self._fence.epoch
        self._tasks = TaskQueue(
            self._redis, config.run.name, lease_s=config.redis.task_lease_s, fence=self._fence
        )
        journal = Journal(self._fence.folder / "plan.jsonl")
        cursor = max(cursor, journal.cursor)
        self._dispatcher = Dispatcher(self._tasks, self._prompts, config, self._ledger, cursor)
        self._evaluator = Evaluator(self._tasks, held_out, config, epoch) if held_out else None
        self._hello = own_hello(config, file_refs(self.policy.published_files()))
        limits = Limits.of(config, self.policy.vocab_size, self._room, self._hello.stamp)
        staleness = StalenessRule.of(config.learner, branch=self.step)
        self._reader = RolloutReader(self._redis, config.run.name, fence=self._fence)
        self._intake = Intake(
            self._reader,
            self._ledger,
            self._dispatcher,
            limits,
            staleness,
            on_eval=lambda group: self._on_evaluated(group.uid, group),
            on_lost_eval=self._on_evaluated,
            on_set_aside=self.live.set_aside,
            refill=config.groups.refill,
        )
        self._outages = Outages(
            config, self._redis, self._fence, self._tasks, self._dispatcher, self._evaluator, self._intake
        )
        self._planner = Planner(journal, self._intake, self._ledger, self.step)

    def _finished(self) -> bool:
        """Whether to stop; says why."""
        target, accuracy = self.config.eval.stop_accuracy, self._history.accuracy
        if self.controls.stop.is_set():
            log.info("stopping as told, at step %d", self.step)
        elif self.step >= self.config.learner.steps:
            log.info("all %d steps are done", self.step)
        elif self.step < self.config.eval.min_steps or target is None or accuracy is None:
            return False
        elif accuracy >= target:
            log.info("held-out accuracy %.3f has reached %.3f at step %d", accuracy, target, self.step)
        else:
            return False
        return True

    def _train_one_step(self) -> None:
        started = time.monotonic()
        if self.controls.continue_from is not None:
            version, self.controls.continue_from = self.controls.continue_from, None
            self._continue_from(version)
        groups = self._wait_for_batch()
        if groups is None:
            return
        taken = time.monotonic()
        reach("step.read")
        self._planner.write(self.step + 1, groups)
        self._phase = "training"
        weights = [self._intake.staleness.weights(group, self._current) for group in groups]
        refilled = self._intake.refilled()
        metrics = self._describe(groups, weights, refilled)
        if self.config.groups.truncated == "mask":
            weights = [mask_truncated(group, own) for group, own in zip(groups, weights, strict=True)]
        lags = [self._intake.staleness.token_lags(group, self._current) for group in groups]
        metrics |= self._train(groups, weights, lags)
        answered = (*groups, *refilled)
        self._prompts.observe((self._dispatcher.prompt_of(group), group.rewards) for group in answered)
        trained = time.monotonic()
        reach("step.trained")
        self.step += 1
        self._traces.trained((group.uid for group in groups), self._current, taken=taken, trained=trained)
        self.live.samples.keep(self.step, groups, self.trainer.token_traces)
        self._publish_if_due()
        self._dispatch()
        metrics |= self._publisher.metrics | {
            "wait_seconds": taken - started,
            "train_seconds": trained - taken,
            "publish_seconds": time.monotonic() - trained,
            "checkpoint_seconds": self._checkpoint_seconds,
        }
        self._checkpoint_seconds = 0.0
        # Before the checkpoint, which must cover it.
        self._record(metrics, rollouts=sum(len(group) for group in groups))
        if self.step % self.config.learner.checkpoint_every == 0 or self.controls.checkpoint.is_set():
            self._checkpoint()

    def _train(self, *batch: Any) -> dict[str, float]:
        try:
            return self.trainer.train_step(*batch)
        except DivergedError as error:
            folder = save_batch(self._fence.folder / f"diverged-{self.step + 1}", batch[0])
            raise DivergedError(f"step {self.step + 1}: {error} (rollout groups in {folder})") from None

    def _describe(
        self,
        groups: Sequence[RolloutGroup],
        weights: Sequence[FloatArray],
        refilled: Sequence[RolloutGroup],
    ) -> dict[str, float]:
        """The figures of a batch before it is trained on."""
        rule, dropped = self._intake.staleness, self._intake.dropped_lengths()
        return {
            **describe_batch(rule, groups, weights, dropped, self._current),
            **describe_groups(groups, refilled),
            **describe_sets(groups, [self._dispatcher.prompt_of(group).source for group in groups]),
            **self._prompts.metrics(),
        }

    def _wait_for_batch(self) -> list[RolloutGroup] | None:
        """Wait for a whole batch; None when told to stop."""
        self._heard = time.monotonic()
        with self._outages.ridden_out():
            self._intake.pump(self._current, 0.0)
        while not self.controls.stop.is_set():
            if self.controls.checkpoint.is_set():
                self._checkpoint()
            if self.controls.running.is_set():
                batch = self._planner.take(self.config.learner.batch_prompts, self._current)
                if batch is not None:
                    return batch
            self._dispatch()
            waiting = "waiting for rollouts" if self._absent_s is None else "waiting for an actor"
            self._phase = waiting if self.controls.running.is_set() else "paused"
            self._listen()
        return None

    def _listen(self) -> None:
        """Take in what arrives; after a long silence say so, and ask again for what may have been lost."""
        self._fence.require()
        self.releases.tick()
        if self._attendance.due:
            self._actors()
        with self._outages.ridden_out():
            self._receive()

    def _receive(self) -> None:
        if self._intake.pump(self._current, _POLL_S):
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard > _SILENCE_S and self.controls.running.is_set():
            self._heard = time.monotonic()
            names = ", ".join(f"{actor.id} ({actor.state})" for actor in self._actors())
            actors = f"actors: {names or 'none; start `aspo actor`'}"
            log.warning("no rollout for %.0f s; %s", _SILENCE_S, self._fence.trouble or actors)
            self._say_hello()  # Redis may have lost it
            self._intake.reread(self._current)
            self._dispatcher.recover(self._intake.held)
            if self._evaluator is not None:
                self._evaluator.recover()
        if self._intake.altered:
            self._intake.altered = False
            log.warning("asked again for %d tasks", self._dispatcher.ask_again(self._intake.held))

    def _say_hello(self) -> None:
        say(self._fence, self.config.run.name, self._hello)

    def _dispatch(self) -> None:
        current, newest = self._current, self._store.newest()
        # While steps are trained again, the newest version is ahead.
        behind = max(0, self._intake.staleness.lag(newest, current)) if newest else 0
        remaining = self.config.learner.steps - self.step
        with self._outages.ridden_out():
            self._dispatcher.top_up(remaining, current=current, live=self._store.live(), behind=behind)

    def _publish_if_due(self) -> None:
        if self.step % self.config.weights.publish_every == 0:
            self._publish()
        if self.step < self._planner.retraining_until:
            return
        if self._evaluator is not None and self._evaluator.due(self.step, self._history.tokens):
            with self._outages.ridden_out():
                self._evaluator.start(self._evaluable(), self.config.eval.max_prompts)

    def _publish(self) -> None:
        live = self._store.live()
        if self.step < self._planner.retraining_until and live is not None:
            self._history.weight_version = str(live)  # newer than this, and no less true
            return
        version = self._publisher.publish(self.step)
        self._history.weight_version = str(version)
        self.releases.tick()

    def _evaluable(self) -> str:
        """The version that actors are to have at least when they evaluate: the one published last."""
        live = self._store.live()
        if live is not None and (self._store.held() or self.config.canary.enabled):
            return str(live)  # the newest may never go live
        return self._history.weight_version

    def _await_release(self) -> None:
        """Wait until the version just stored has passed its trial, if there is one."""
        deadline = time.monotonic() + 2 * self.config.canary.timeout_s
        while self.releases.undecided and not self.controls.stop.is_set() and time.monotonic() < deadline:
            self._listen()

    def _new_publisher(self) -> Publisher:
        stored = self._traces.after(self.releases.stored)
        return Publisher(self._store, self.policy, self.config.run.name, self._fence.epoch, stored)

    def _continue_from(self, version: PolicyVersion) -> None:
        """Take a version's weights up again, as an operator asked, under a new epoch and a new optimizer."""
        self._publisher.close()
        self.policy.load_published(self._store.state(version).tensors)
        self.trainer.forget_moments()
        self._fence.advance()
        self._planner.forget_after(self.step)
        self._publisher = self._new_publisher()
        self.releases.branch_off(version)
        self._publish()
        self._checkpoint()
        log.warning("step %d continues from the weights of %s", self.step, version)

    def _checkpoint(self) -> None:
        """Make all that has ended durable, then acknowledge it."""
        started = time.monotonic()
        self.controls.checkpoint.clear()
        while not self._saved():
            until = time.monotonic() + _DISK_RETRY_S
            while time.monotonic() < until and not self.controls.stop.is_set():
                self._listen()
        reach("acknowledge.before")
        with self._outages.ridden_out():
            self._intake.acknowledge()
            reach("acknowledge.after")
            self._reader.forget({actor.id for actor in present(self._redis, self.config.run.name)})
            self._say_hello()
        self._checkpoint_seconds = time.monotonic() - started

    def _saved(self) -> bool:
        """Write the checkpoint; False, having said why, if the disk does not take it."""
        state = {
            "trainer": self.trainer.state(),
            "ledger": self._ledger.state(),
            "cursor": self._dispatcher.cursor,
            "prompts": self._prompts.state(),
            "history": self._history.state(),
            "evaluation": self._evaluator.state() if self._evaluator else None,
        }
        try:
            self._checkpoints.save(self.step, self.policy.model, self.trainer.optimizer, state)
        except CheckpointError as error:
            if self.controls.stop.is_set():
                raise
            if self._disk_trouble is None:
                log.error("%s; training waits, and nothing is acknowledged", error)
            self._phase, self._disk_trouble = "waiting for disk", str(error)
            return False
        self._disk_trouble = None
        return True

    def _evaluate_now(self, phase: str) -> float | None:
        """Publish, and wait for the accuracy of exactly these weights on the whole held-out set."""
        if self._evaluator is None or self.controls.stop.is_set():
            return None
        self._phase, self._heard = phase, time.monotonic()
        self._publish()
        self._publisher.wait()
        self._await_release()
        with self._outages.ridden_out():
            self._evaluator.start(self._evaluable())
        while self._evaluator.running and not self.controls.stop.is_set():
            self._listen()
        return None if self._evaluator.running else self._history.accuracy

    def _on_evaluated(self, uid: str, group: RolloutGroup | None = None) -> None:
        found = self._evaluator.take(uid, group) if self._evaluator else None
        if found is not None:
            self._history.evaluated, self._history.accuracy = found, found["accuracy"]
            log.info("held-out accuracy at step %d: %.3f", self.step, found["accuracy"])

    def _record(self, metrics: dict[str, float], rollouts: int) -> None:
        metrics |= describe_ended(self._intake.ended) | {
            "step": float(self.step),
            "queue_tasks": float(sum(self._tasks.depth().values())),
            "queue_rollouts": float(self._reader.depth()),
            "tracker_failures": float(self._history.trackers.failures),
        }
        metrics |= self._history.evaluated
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._fence.require()
        self._history.add(metrics, rollouts=rollouts)
        self._gauges.set(metrics)
        log_step(metrics)
