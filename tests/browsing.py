"""The live page in a real headless Chromium, of a learner whose figures are made up.

Whoever has no chromium on the PATH is told so, and these tests are skipped.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from aspo.config import AuthConfig, CanaryConfig
from aspo.http import Server, listen
from aspo.presence import ActorStatus
from aspo.schemas import RolloutGroup, VersionSpan
from aspo.telemetry import LEARNER_METRICS, Gauges
from aspo.weights.leases import Leases
from aspo.weights.store import WeightStore
from aspo_learner.app import Controls, LearnerStatus, TrialStatus, build_app
from aspo_learner.live import Live
from aspo_learner.releases import Releases
from aspo_learner.token_traces import TokenTrace
from versions import FILES, tensors, version

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEXT = "so the carry of nine and seven is one , then 16 + 27 = 43 . def f ( x ) : return \n"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the machine's own Chromium; the sandbox wants rights that containers lack."""
    expect.set_options(timeout=30_000)  # ends what hangs, and bears a busy machine
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Words:
    """A tokenizer of a few words, or of whatever texts it is given by number."""

    WORDS = TEXT.split(" ")

    def __init__(self, strange: dict[int, str] | None = None) -> None:
        self._strange = strange or {}

    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return ["".join(self._word(i) for i in one) for one in ids]

    def _word(self, token: int) -> str:
        return self._strange.get(token) or f"{self.WORDS[token % len(self.WORDS)]} "


def figures(step: int) -> dict[str, float]:
    """A step's metrics, as of a run that goes well."""
    done, wave = 1 - math.exp(-step / 150), math.sin(step * 12.9898) * 0.5
    return {
        "step": float(step),
        "reward": 0.25 + 0.7 * done + 0.05 * wave,
        "accuracy": 0.25 + 0.72 * (1 - math.exp(-(step // 10 * 10) / 150)),
        "entropy": 0.9 - 0.6 * done + 0.03 * wave,
        "approx_kl_k3": 0.004 + 0.002 * wave,
        "mismatch_k3": 0.0008 + 0.0003 * wave,
        "ratio_mean_pos": 1.01 + 0.01 * wave,
        "ratio_mean_neg": 0.98 - 0.01 * wave,
        "ratio_p01": 0.72 + 0.03 * wave,
        "ratio_p99": 1.35 + 0.05 * wave,
        "clip_fraction_pos": 0.02 + 0.01 * wave,
        "clip_fraction_neg": 0.03 - 0.01 * wave,
        "dual_clip_fraction_pos": 0.002 + 0.001 * wave,
        "dual_clip_fraction_neg": 0.001 + 0.0005 * wave,
        "weight_mean_pos": 1.02 + 0.02 * wave,
        "weight_mean_neg": 0.95 + 0.02 * wave,
        "ess_fraction": 0.93 + 0.01 * wave,
        "staleness_mean": 1.2 + 0.5 * wave,
        "staleness_max": 2.0 + (step % 7 == 0),
        "staleness_groups/0": 4.0,
        "staleness_groups/1": 18.0 + 4 * wave,
        "staleness_groups/2": 9.0,
        "staleness_groups/more": float(step % 7 == 0),
        "queue_tasks": 24.0 + 8 * wave,
        "queue_rollouts": 11.0 + 6 * wave,
        "wait_seconds": 0.06 + 0.05 * wave,
        "train_seconds": 0.41 + 0.02 * wave,
        "publish_seconds": 0.02,
        "checkpoint_seconds": 0.2 * (step % 20 == 0),
        "response_length": 41 - 6 * done + wave,
        "grad_norm": 0.8 - 0.3 * done + 0.1 * wave,
        "grad_norm_max": 1.2 - 0.3 * done + 0.2 * wave,
        "weights_changed_fraction": 0.31 + 0.05 * wave,
        "tokens": 1312.0,
    }


def actor(number: int, **given: Any) -> ActorStatus:
    """An actor that samples."""
    plain: dict[str, Any] = {
        "id": f"actor-{number}",
        "url": "",
        "state": "sampling",
        "version": "r/1/1",
        "groups": 812 + number,
        "groups_in_flight": 8,
        "tokens_per_second": 1830.0 + 70 * number,
        "weight_syncs": 240,
        "weight_patches": 236,
        "weight_plan": "delta",
        "weight_bytes": 41_200_000,
        "weight_bytes_from_peers": 12_000_000 * number,
        "weight_pull_seconds": 0.021,
        "weight_apply_seconds": 0.014,
        "weight_pause_seconds": 0.006,
    }
    return ActorStatus(run="sums", **plain | given)


def group(step: int, number: int, *, size: int = 8, tokens: int = 40) -> RolloutGroup:
    """A group of made-up completions of about so many tokens."""
    rng = np.random.default_rng([step, number])
    lengths = rng.integers(max(1, tokens // 2), tokens + 1, size=size).astype(np.int32)
    total = int(lengths.sum())
    return RolloutGroup(
        uid=f"sums:train:{step * 4 + number}",
        actor=f"actor-{number % 3}",
        purpose="train",
        temperature=1.0,
        prompt_ids=np.array([14, 15, 16, 17], dtype=np.int32),
        lengths=lengths,
        token_ids=rng.integers(0, len(Words.WORDS), size=total).astype(np.int32),
        behavior_logprobs=-rng.exponential(0.6, size=total).astype(np.float32),
        rewards=rng.integers(0, 2, size=size).astype(np.float32),
        failed=np.zeros(size, dtype=bool),
        finish_reasons=tuple("length" if n == tokens else "stop" for n in lengths),
        spans=tuple(
            (
                VersionSpan(f"sums/1/{step}", int(n) // 2),
                VersionSpan(f"sums/1/{step + 1}", int(n) - int(n) // 2),
            )
            for n in lengths
        ),
    )


def traces(group: RolloutGroup) -> dict[tuple[str, int], TokenTrace]:
    """What an update might have made of a group."""
    rng = np.random.default_rng(int(group.lengths.sum()))
    found = {}
    for i, (start, stop) in enumerate(zip(group.offsets[:-1], group.offsets[1:], strict=True)):
        sampler = group.behavior_logprobs[start:stop]
        learner = np.minimum(0, sampler + rng.normal(0, 0.25, size=len(sampler))).astype(np.float32)
        weights = np.exp(sampler - learner).clip(0, 3).astype(np.float32)
        weights[rng.random(len(sampler)) < 0.04] = 0.0
        advantage = float(group.rewards[i] * 2 - 1) * 0.9
        found[group.uid, i] = TokenTrace(learner, weights, advantage)
    return found


class Learner:
    """What the app needs of a learner, its figures made up."""

    def __init__(self, folder: Path, *, steps: int = 0, strange: dict[int, str] | None = None) -> None:
        self.controls, self.leases = Controls(), Leases()
        self.store = WeightStore(folder / "weights")
        self.releases = Releases(self.store, self.leases, CanaryConfig())
        self.metrics = [figures(step) for step in range(1, steps + 1)]
        self.live = Live("sums", lambda: self.metrics, Words(strange))
        self.actors: list[ActorStatus] = []
        self.ended: dict[str, int] = {}
        self.trouble: str | None = None
        self.trial: TrialStatus | None = None

    def publish(self, steps: int) -> None:
        """Have some versions in the store."""
        for step in range(steps):
            self.store.put(version(step), tensors(step), FILES)
            self.leases.renew(f"actor-{step}", version(step))

    def add(self, *groups: RolloutGroup) -> None:
        """Do a step, with these groups for samples."""
        step = len(self.metrics) + 1
        self.live.samples.keep(step, groups, {k: t for one in groups for k, t in traces(one).items()})
        self.metrics.append(figures(step))

    def status(self) -> LearnerStatus:
        newest, live = self.store.newest(), self.store.live()
        step = len(self.metrics)
        return LearnerStatus(
            run="sums",
            phase="training" if step else "waiting for an actor",
            version=str(newest) if newest else None,
            live=str(live) if live else None,
            held=self.store.held(),
            trial=self.trial,
            step=step,
            steps=max(400, step),
            accuracy_before=0.25,
            accuracy=self.metrics[-1]["accuracy"] if step else None,
            idle_fraction=0.12 if step else 0.0,
            tokens=1312 * step,
            rollouts=32 * step,
            uptime_seconds=0.5 * step,
            ended=self.ended,
            trouble=self.trouble,
            metrics=self.metrics[-1] if step else {},
            actors=self.actors,
            without_actors_seconds=None if self.actors else 12.0,
        )

    def not_ready(self) -> str | None:
        return None

    def unsure(self) -> str | None:
        return None

    def serve(self, auth: AuthConfig | None = None, port: int = 0) -> Server:
        """Serve its app."""
        auth, gauges = auth or AuthConfig(), Gauges("learner", LEARNER_METRICS)
        app = build_app(self, self.store, self.leases, gauges, auth, self.live)
        return Server(app, listen("127.0.0.1", port, auth))


@contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[tuple[Page, list[str]]]:
    """Open a page in a context of its own; gives it and a list of what went wrong in it."""
    faults: list[str] = []
    with browser.new_context(**context) as made:
        page = made.new_page()
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: faults.append("a dialog opened") or dialog.dismiss())
        page.goto(url)
        yield page, faults
