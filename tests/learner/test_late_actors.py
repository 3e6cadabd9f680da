"""Row 21: a learner, a punctual actor and one that was paused; what each policy does with what is late."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from urllib.request import urlopen

import pytest

from aspo.codec import encode_group
from aspo.queue import Claim, RolloutWriter, TaskQueue, connect
from aspo.schemas import PolicyVersion
from aspo_cli.processes import free_port
from aspo_cli.services import hold_run
from aspo_learner.learner import Learner
from models import save_model
from rollouts import make_plain_group, write_config

MAX_STALENESS = 3
PAUSED_UNTIL = 6  # the version at which the paused actor comes back
STEPS = 12
GROUP = 4
COUNTS = ("groups_dropped", "tokens_masked", "tokens_decayed")


class PunctualAndPaused:
    """Two actors in a thread: one answers at once, one claims two tasks and is away for some steps.

    Its first group was sampled by version 0 alone; of its second the last token of each response is by the
    version that is live at the return, as after an update in flight.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner, self._run = learner, learner.config.run.name
        self._client = connect(learner.config.redis.url)
        self._tasks = TaskQueue(self._client, self._run)
        self._paused: list[Claim] | None = None
        self.scraped = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> PunctualAndPaused:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        self._client.close()

    def _work(self) -> None:
        punctual, paused = (RolloutWriter(self._client, self._run, name) for name in ("punctual", "paused"))
        while not self._stop.is_set():
            claims = self._tasks.claim("punctual", count=1, block_ms=10)
            live = self._learner.status().live or f"{self._run}/1/0"  # no older than what the tasks need
            step = PolicyVersion.parse(live).step
            for claim in claims:
                if self._paused is None:
                    self._paused = [claim, *self._tasks.claim("paused", count=1)]
                else:
                    self._answer(punctual, claim, [(live, 3)])
            if self._paused and step >= PAUSED_UNTIL:
                first, second = self._paused
                old = f"{self._run}/1/0"
                self._answer(paused, first, [(old, 6)])
                self._answer(paused, second, [(old, 4), (live, 1)])
                self._paused = []
            if step > PAUSED_UNTIL + MAX_STALENESS and not self.scraped:
                with urlopen(f"http://127.0.0.1:{self._learner.config.learner.port}/metrics") as response:
                    self.scraped = response.read().decode()

    def _answer(self, writer: RolloutWriter, claim: Claim, spans: list[tuple[str, int]]) -> None:
        task = claim.task
        group = make_plain_group([spans] * task.group_size, uid=task.uid, prompt_ids=task.prompt_ids)
        writer.put(task.uid, encode_group(group))
        self._tasks.finish([claim])


@pytest.mark.parametrize(
    ("policy", "dropped", "masked", "decayed"),
    [("drop", 2, 0, 0), ("mask", 1, GROUP * 4, 0), ("decay", 0, 0, GROUP * (6 + 4))],
)
def test_late_groups_are_handled_as_the_policy_says(
    redis_url: str, run: str, tmp_path: Path, policy: str, dropped: int, masked: int, decayed: int
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": "2"}) + "\n" for i in range(8)))
    settings = {
        "learner.port": free_port(),
        "learner.steps": STEPS,
        "learner.batch_prompts": 2,
        "learner.mini_batch_prompts": 2,
        "learner.max_staleness": MAX_STALENESS,
        "learner.staleness_policy": policy,
        "sampling.group_size": GROUP,
    }
    config = write_config(
        tmp_path,
        model=save_model(tmp_path / "model", hidden_size=64, layers=1),
        run=run,
        redis_url=redis_url,
        data=prompts,
        overrides=[f"{name}={value}" for name, value in settings.items()],
    )
    fence = hold_run(config)
    learner = Learner(config, fence)
    with PunctualAndPaused(learner) as actors:
        learner.run()
    fence.release()
    steps = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    assert [sum(step[f"stale_{name}"] for step in steps) for name in COUNTS] == [dropped, masked, decayed]
    assert steps[-1]["ended_stale"] == dropped
    touched = [step for step in steps if any(step[f"stale_{name}"] for name in COUNTS)]
    assert all(step["response_length_bias"] < 0 for step in touched), "the late responses are the longer ones"
    assert all(step["response_length_bias"] == 0 for step in steps if step not in touched)
    assert max(step["staleness_max"] for step in steps if step not in touched) <= MAX_STALENESS
    assert all(f"aspo_learner_stale_{name} " in actors.scraped for name in COUNTS)
    assert "aspo_learner_response_length_bias " in actors.scraped
