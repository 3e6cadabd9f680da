"""Tasks out and rollouts in, over a real Redis: credits, admission, duplicates, quarantine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from aspo.codec import encode_group
from aspo.config import ConfigError, EvalSet
from aspo.quarantine import Quarantine
from aspo.queue import RolloutReader, RolloutWriter, TaskQueue
from aspo.schemas import PolicyVersion, RolloutGroup
from aspo_learner.data import HeldOut, Prompt
from aspo_learner.dispatcher import Dispatcher, task_index, task_uid
from aspo_learner.evaluation import Evaluator
from aspo_learner.identity import claim_run
from aspo_learner.intake import Intake, Limits
from aspo_learner.ledger import Ledger
from aspo_learner.order import PromptOrder
from aspo_learner.policy import load_model
from aspo_learner.staleness import StalenessRule
from models import save_model
from rollouts import make_group, write_config

PROMPTS = [Prompt([2, 3, i], {"answer": str(i)}) for i in range(5)]
SETS = [
    HeldOut(EvalSet(path="sums.jsonl"), PROMPTS),
    HeldOut(EvalSet(path="words.jsonl", k=2, temperature=0.5), PROMPTS[:2]),
]


class StubAsker:
    """Has asked for a hundred groups at temperature 1."""

    cursor = 100

    def was_asked(self, group: RolloutGroup, index: int) -> bool:
        return index < self.cursor and group.temperature == 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(str(save_model(tmp_path_factory.mktemp("model"), hidden_size=64, layers=1)))


@pytest.fixture
def new_intake(client: redis.Redis, run: str) -> Callable[..., Intake]:
    def make(
        ledger: Ledger | None = None,
        on_eval: Callable[[RolloutGroup], None] = lambda group: None,
        refill: int = 0,
    ) -> Intake:
        limits = Limits(
            run=run,
            vocab_size=16,
            max_tokens=6,
            max_prompt_tokens=10,
            max_entry_bytes=2**20,
            stamp="ours",
        )
        return Intake(
            RolloutReader(client, run),
            Ledger() if ledger is None else ledger,
            StubAsker(),
            limits,
            StalenessRule(max_staleness=2),
            on_eval=on_eval,
            refill=refill,
        )

    return make


@pytest.fixture
def send(client: redis.Redis, run: str, model: Any) -> Callable[..., RolloutGroup]:
    writer = RolloutWriter(client, run, "actor")

    def put(index: int, *, step: int = 5, **changes: Any) -> RolloutGroup:
        uid = task_uid(run, "train", index)
        group = make_group(model, uid=uid, version=f"{run}/1/{step}", seed=index)
        group = dataclasses.replace(group, **changes)
        writer.put(group.uid, encode_group(group))
        return group

    return put


def current(run: str, step: int = 5) -> PolicyVersion:
    return PolicyVersion(epoch=1, step=step, run=run)


def test_a_batch_is_given_once_it_is_whole_oldest_first(
    new_intake: Callable[..., Intake], send: Callable[..., RolloutGroup], run: str
) -> None:
    intake = new_intake()
    for index in (2, 0):
        send(index)
    intake.pump(current(run), 0.01)
    assert intake.take(3, current(run)) is None
    send(1)
    intake.pump(current(run), 0.01)
    batch = intake.take(3, current(run))
    assert batch is not None
    assert [group.uid for group in batch] == [task_uid(run, "train", i) for i in range(3)]


def test_uninformative_groups_make_room_for_others_up_to_a_bound(
    new_intake: Callable[..., Intake], send: Callable[..., RolloutGroup], client: redis.Redis, run: str
) -> None:
    ledger = Ledger()
    intake = new_intake(ledger, refill=2)
    agreed = np.ones(4, np.float32)
    for index in range(3):
        send(index, rewards=agreed)
    send(3)
    intake.pump(current(run), 0.01)
    assert intake.take(2, current(run)) is None  # three dropped, and their credits are free again
    assert (len(ledger), intake.held, intake.ended["uninformative"]) == (3, {3}, 3)
    for index in (4, 5):
        send(index, rewards=agreed)
    intake.pump(current(run), 0.01)
    batch = intake.take(2, current(run))  # only four may go for a batch of two
    assert batch is not None
    assert [group.uid for group in batch] == [task_uid(run, "train", i) for i in (3, 5)]
    assert [group.uid for group in intake.refilled()] == [task_uid(run, "train", i) for i in (0, 1, 2, 4)]
    assert intake.refilled() == []
    intake.acknowledge()
    assert RolloutReader(client, run).depth() == 0
    send(6, rewards=agreed)
    intake.pump(current(run), 0.01)
    assert intake.take(1, current(run)) is None  # a new batch, a new allowance


def test_what_was_scored_by_other_rewards_is_set_aside(
    new_intake: Callable[..., Intake], client: redis.Redis, run: str, model: Any
) -> None:
    intake = new_intake()
    for index, stamp in enumerate(("ours", "theirs", "")):
        group = make_group(model, uid=task_uid(run, "train", index), version=f"{run}/1/5", seed=index)
        RolloutWriter(client, run, f"actor-{index}", stamp=stamp).put(group.uid, encode_group(group))
    intake.pump(current(run), 0.01)
    assert intake.ended == {"other-rewards": 1}
    assert intake.held == {0, 2}
    [entry] = Quarantine(client, run).entries()
    assert (entry.uid, entry.actor) == (task_uid(run, "train", 1), "actor-1")
    assert "another reward function" in entry.reason


def test_nothing_is_acknowledged_before_the_checkpoint(
    new_intake: Callable[..., Intake], send: Callable[..., RolloutGroup], run: str
) -> None:
    ledger = Ledger()
    intake = new_intake(ledger)
    for index in range(3):
        send(index)
    intake.pump(current(run), 0.01)
    assert intake.take(2, current(run)) is not None

    crashed = new_intake(Ledger())  # the checkpoint of a learner that had trained nothing
    crashed.pump(current(run), 0.01)
    assert crashed.ready == 3

    intake.acknowledge()
    later = new_intake(Ledger.load(ledger.state()))
    later.pump(current(run), 0.01)
    assert later.ready == 1
    assert later.ended == {}


def test_a_group_that_comes_twice_is_trained_once(
    new_intake: Callable[..., Intake], send: Callable[..., RolloutGroup], run: str
) -> None:
    intake = new_intake()
    for _ in range(2):
        send(0)
    intake.pump(current(run), 0.01)
    assert intake.ready == 1
    assert intake.take(1, current(run)) is not None
    send(0)
    intake.pump(current(run), 0.01)
    assert intake.ready == 0
    assert intake.ended == {"duplicate": 2}


def test_groups_past_the_staleness_bound_are_dropped_and_counted(
    new_intake: Callable[..., Intake], send: Callable[..., RolloutGroup], run: str
) -> None:
    ledger = Ledger()
    intake = new_intake(ledger)
    for index, step in enumerate((2, 3, 5)):
        send(index, step=step)
    intake.pump(current(run), 0.01)
    batch = intake.take(2, current(run, 5))
    assert batch is not None
    assert len(batch) == 2
    assert intake.ended == {"stale": 1}
    assert ledger.missing_below(3) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"behavior_logprobs": lambda g: np.full_like(g.behavior_logprobs, np.nan)}, "nan-logprob"),
        ({"behavior_logprobs": lambda g: np.full_like(g.behavior_logprobs, 0.5)}, "positive-logprob"),
        ({"token_ids": lambda g: np.full_like(g.token_ids, 16)}, "token-out-of-range"),
        ({"rewards": lambda g: np.full_like(g.rewards, np.inf)}, "bad-reward"),
        ({"uid": lambda g: "other:train:0"}, "foreign-uid"),
        ({"uid": lambda g: g.uid.replace(":0", ":100")}, "not-as-asked"),
        ({"temperature": 0.5}, "not-as-asked"),
        ({"rewards": lambda g: np.full_like(g.rewards, 3e38)}, "bad-reward"),
        ({"uid": lambda g: g.uid.replace(":0", ":" + "9" * 90)}, "foreign-uid"),
        ({"step": 6}, "future-version"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_poison_is_set_aside_with_its_reason(
    new_intake: Callable[..., Intake],
    send: Callable[..., RolloutGroup],
    client: redis.Redis,
    run: str,
    model: Any,
    changes: dict[str, Any],
    reason: str,
) -> None:
    good = make_group(model, uid=task_uid(run, "train", 0), version=f"{run}/1/5", seed=0)
    intake = new_intake()
    send(0, **{key: value(good) if callable(value) else value for key, value in changes.items()})
    intake.pump(current(run), 0.01)
    assert intake.ready == 0
    assert intake.ended == {reason: 1}
    [(_, fields)] = client.xrange(f"aspo:{run}:quarantine")
    assert fields[b"reason"].decode().startswith(reason)


def test_an_altered_rollout_is_asked_for_again_once(
    new_intake: Callable[..., Intake], client: redis.Redis, run: str, model: Any
) -> None:
    """An actor whose answers are altered every time must not keep a task open for ever."""
    uid, ledger = task_uid(run, "train", 0), Ledger()
    frame = bytearray(encode_group(make_group(model, uid=uid, version=f"{run}/1/5", seed=0)))
    frame[-30] ^= 1
    intake, writer = new_intake(ledger), RolloutWriter(client, run, "actor")
    writer.put(uid, bytes(frame))
    intake.pump(current(run), 0.01)
    assert intake.altered
    assert 0 not in ledger
    writer.put(uid, bytes(frame))
    intake.pump(current(run), 0.01)
    assert 0 in ledger
    assert intake.ended == {"undecodable": 2}


def test_what_redis_lost_is_trained_from_memory_and_acknowledges_nothing_new(
    new_intake: Callable[..., Intake],
    send: Callable[..., RolloutGroup],
    client: redis.Redis,
    run: str,
    model: Any,
) -> None:
    """An entry that came after the loss may have the id of one from before it."""
    intake = new_intake()
    first = send(0)
    intake.pump(current(run), 0.01)
    client.delete(*client.keys(f"aspo:{run}:*"))
    intake.forget_deliveries()
    writer = RolloutWriter(client, run, "actor")
    second = make_group(model, uid=task_uid(run, "train", 1), version=f"{run}/1/5", seed=1)
    writer.put(second.uid, encode_group(second))
    batch = intake.take(1, current(run))
    assert batch is not None
    assert batch[0].uid == first.uid
    intake.acknowledge()
    intake.pump(current(run), 0.01)
    assert intake.held == {1}


def test_bytes_that_are_no_group_are_set_aside(
    new_intake: Callable[..., Intake], client: redis.Redis, run: str
) -> None:
    ledger = Ledger()
    RolloutWriter(client, run, "hostile").put(task_uid(run, "train", 0), b"\xff" * 100)
    intake = new_intake(ledger)
    intake.pump(current(run), 0.01)
    assert intake.ended == {"undecodable": 1}
    assert 0 in ledger


def set_aside(intake: Intake, group: RolloutGroup, run: str) -> None:
    """Have an intake quarantine a group that was sent: it is too long by the settings."""
    intake.limits = dataclasses.replace(intake.limits, max_tokens=int(group.lengths.max()) - 1)
    intake.pump(current(run), 0.01)


def test_a_requeued_group_is_judged_by_the_settings_of_today_and_trained_once(
    new_intake: Callable[..., Intake], send: Callable[..., RolloutGroup], client: redis.Redis, run: str
) -> None:
    ledger, quarantine = Ledger(), Quarantine(client, run)
    strict = new_intake(ledger)
    set_aside(strict, send(0), run)
    strict.acknowledge()
    assert strict.ended == {"too-long": 1}
    assert 0 in ledger

    later = new_intake(Ledger.load(ledger.state()))  # started again with another sampling.max_tokens
    [entry] = quarantine.entries()
    quarantine.requeue(entry.id)
    later.pump(current(run), 0.01)
    assert later.take(1, current(run)) is not None
    later.acknowledge()
    send(0)
    later.pump(current(run), 0.01)
    assert later.ready == 0
    assert later.ended == {"duplicate": 1}
    assert client.xlen(f"aspo:{run}:rollouts:_requeued") == 0


def test_a_learner_that_dies_holding_a_requeued_group_finds_it_again(
    new_intake: Callable[..., Intake], send: Callable[..., RolloutGroup], client: redis.Redis, run: str
) -> None:
    ledger, quarantine = Ledger(), Quarantine(client, run)
    strict = new_intake(ledger)
    set_aside(strict, send(0), run)
    [entry] = quarantine.entries()
    quarantine.requeue(entry.id)  # while the original is not acknowledged yet
    dead = new_intake(Ledger.load(ledger.state()))
    while dead.pump(current(run), 0.01):
        pass
    assert dead.take(1, current(run)) is not None  # but no checkpoint followed
    heir = new_intake(Ledger.load(ledger.state()))
    while heir.pump(current(run), 0.01):
        pass
    assert heir.take(2, current(run)) is None
    assert heir.take(1, current(run)) is not None
    assert heir.ended == {"duplicate": 1}


def test_a_requeued_group_that_has_become_stale_is_dropped(
    new_intake: Callable[..., Intake], send: Callable[..., RolloutGroup], client: redis.Redis, run: str
) -> None:
    ledger = Ledger()
    intake = new_intake(ledger)
    send(0, step=6)
    intake.pump(current(run, 5), 0.01)
    [entry] = Quarantine(client, run).entries()
    assert entry.reason == "future-version"
    Quarantine(client, run).requeue(entry.id)
    intake.pump(current(run, 9), 0.01)
    assert ledger.missing_below(1) == [0], "it counts as outstanding again"
    assert intake.take(1, current(run, 9)) is None
    assert intake.ended == {"future-version": 1, "stale": 1}
    assert ledger.missing_below(1) == []


def test_tasks_out_never_exceed_the_staleness_bound(client: redis.Redis, run: str, tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        model="m",
        run=run,
        overrides=["learner.max_staleness=2", "learner.batch_prompts=3", "learner.mini_batch_prompts=3"],
    )
    queue, ledger = TaskQueue(client, run), Ledger()
    dispatcher = Dispatcher(queue, PromptOrder(PROMPTS, config.run.seed), config, ledger)
    dispatcher.top_up(remaining_steps=100)
    assert dispatcher.outstanding == queue.depth()["train"] == 9
    dispatcher.top_up(remaining_steps=100)
    assert dispatcher.outstanding == 9
    for index in (0, 1, 4):
        ledger.add(index)
    dispatcher.top_up(remaining_steps=100)
    assert dispatcher.cursor == 12
    for index in range(12):
        ledger.add(index)
    dispatcher.top_up(remaining_steps=1)
    assert dispatcher.cursor == 15


def test_a_new_learner_asks_again_for_exactly_what_is_missing(
    client: redis.Redis, run: str, tmp_path: Path
) -> None:
    """Also when Redis kept the tasks of a run whose folder is gone, or lost those of one that is there."""
    config = write_config(tmp_path, model="m", run=run)
    queue = TaskQueue(client, run)
    Dispatcher(queue, PromptOrder(PROMPTS, config.run.seed), config, Ledger()).top_up(100)
    asked = [claim.task for claim in queue.claim("a", count=100)]

    anew = Dispatcher(queue, PromptOrder(PROMPTS, config.run.seed), config, Ledger())
    anew.ask_again(held=())
    anew.top_up(100)
    assert [claim.task for claim in queue.claim("b", count=100)] == asked

    queue.finish(queue.claim("b", count=100))
    late = Dispatcher(queue, PromptOrder(PROMPTS, config.run.seed), config, Ledger(), cursor=4)
    assert late.cursor == len(asked), "what was asked after the last checkpoint counts as asked"

    client.delete(f"aspo:{run}:tasks:train")
    ledger = Ledger()
    ledger.add(1)
    resumed = Dispatcher(
        TaskQueue(client, run), PromptOrder(PROMPTS, config.run.seed), config, ledger, cursor=len(asked)
    )
    resumed.ask_again(held={3})
    found = [claim.task for claim in queue.claim("c", count=100)]
    assert found == [task for task in asked if task.index not in (1, 3)]
    resumed.recover(held={3})
    assert queue.claim("d", count=100) == []
    queue.reset("train")
    resumed.recover(held={3})
    assert [claim.task for claim in queue.claim("d", count=100)] == found


def test_a_delivery_lost_on_its_way_is_read_again_and_known_ones_are_not(
    new_intake: Callable[..., Intake], send: Callable[..., RolloutGroup], client: redis.Redis, run: str
) -> None:
    intake = new_intake()
    for index in range(2):
        send(index)
    intake.pump(current(run), 0.01)
    send(2)
    # Redis delivered it to us, but the reply was lost: it is pending and `>` never gives it again.
    stream = f"aspo:{run}:rollouts:actor"
    client.xreadgroup("aspo", "learner", {stream: ">"})
    intake.pump(current(run), 0.01)
    assert intake.ready == 2
    intake.reread(current(run))
    assert intake.ready == 3
    assert intake.ended == {}


def test_a_folder_and_its_keys_are_of_one_life(client: redis.Redis, run: str, tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    other.mkdir()
    claim_run(client, run, ours)
    claim_run(client, run, ours)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"Redis holds another run named .* choose another run\.name"):
            claim_run(client, run, other)
    client.delete(f"aspo:{run}:id")  # Redis lost its data: the folder goes on
    claim_run(client, run, ours)


def test_every_pass_over_the_prompts_is_a_new_seeded_permutation() -> None:
    order, same = PromptOrder(PROMPTS, seed=1), PromptOrder(PROMPTS, seed=1)
    passes = [[order[5 * n + i].reward_inputs["answer"] for i in range(5)] for n in range(3)]
    assert all(sorted(answers) == list("01234") for answers in passes)
    assert passes[0] != passes[1] or passes[1] != passes[2]
    assert [same[i].reward_inputs["answer"] for i in range(10, 15)] == passes[2]


def test_an_evaluation_ends_with_its_last_answer(
    client: redis.Redis, run: str, tmp_path: Path, model: Any
) -> None:
    config = write_config(tmp_path, model="m", run=run)
    evaluator = Evaluator(TaskQueue(client, run), SETS, config, epoch=1)
    evaluator.start(f"{run}/1/3", count=2)
    tasks = [claim.task for claim in TaskQueue(client, run).claim("a", count=100)]
    assert [(t.temperature, t.group_size) for t in tasks] == [(0.0, 1)] * 2 + [(0.5, 2)] * 2
    assert {t.min_version for t in tasks} == {f"{run}/1/3"}
    rewards = ([0.0], [1.0], [0.0, 1.0], [0.0, 0.0])
    answers = [
        make_group(model, uid=t.uid, size=t.group_size, rewards=r)
        for t, r in zip(tasks, rewards, strict=True)
    ]
    assert evaluator.take(answers[0].uid, answers[0]) is None
    assert evaluator.take(answers[0].uid, answers[0]) is None
    assert evaluator.take(answers[1].uid, answers[1]) is None
    assert evaluator.take(answers[3].uid, answers[0]) is None, "one answer for two: wrong, both"
    assert evaluator.running
    assert evaluator.take(answers[2].uid, answers[2]) == {
        "accuracy": 0.375,
        "set_accuracy/sums": 0.5,
        "set_accuracy/words": 0.25,
        "set_pass/words": 0.5,
        "evaluation_tokens": sum(len(answers[i].token_ids) for i in (0, 1, 2)),
    }
    assert not evaluator.running


def test_another_learners_answers_do_not_count_and_lost_tasks_are_asked_for_again(
    client: redis.Redis, run: str, tmp_path: Path, model: Any
) -> None:
    config = write_config(tmp_path, model="m", run=run)
    Evaluator(TaskQueue(client, run), SETS[:1], config, epoch=1).start(f"{run}/1/3", count=1)
    [asked] = TaskQueue(client, run).claim("a", count=100)
    later = Evaluator(TaskQueue(client, run), SETS[:1], config, epoch=2)
    later.start(f"{run}/2/3", count=1)
    answer = make_group(model, uid=asked.task.uid, size=1, rewards=[1.0])
    assert later.take(answer.uid, answer) is None, "an answer to a former learner's question"
    [claim] = TaskQueue(client, run).claim("a", count=100)
    later.recover()
    assert TaskQueue(client, run).claim("a", count=100) == []
    TaskQueue(client, run).finish([claim])
    later.recover()
    assert [c.task for c in TaskQueue(client, run).claim("a", count=100)] == [claim.task]


def test_an_evaluation_is_put_off_while_it_costs_more_than_its_share(
    client: redis.Redis, run: str, tmp_path: Path, model: Any
) -> None:
    config = write_config(tmp_path, model="m", run=run, overrides=["eval.every=10", "eval.max_prompts=2"])
    evaluator = Evaluator(TaskQueue(client, run), SETS[:1], config, epoch=1)
    assert not evaluator.due(9, trained=0)
    assert evaluator.due(10, trained=0), "nothing is known of its cost yet"
    evaluator.start(f"{run}/1/10")
    assert not evaluator.due(20, trained=10**6), "one at a time"
    length = 0
    for claim in TaskQueue(client, run).claim("a", count=100):
        answer = make_group(model, uid=claim.task.uid, size=1, rewards=[1.0])
        length += len(answer.token_ids)
        evaluator.take(answer.uid, answer)
    cost = 2 * length / 5  # it took five answers, and the next will take two
    assert not evaluator.due(20, trained=int(cost / 0.05) - 1)
    assert evaluator.due(30, trained=int(cost / 0.05) + 1)
    assert not evaluator.due(40, trained=int(cost / 0.05) + 2), "counted from the one before"
    restarted = Evaluator(TaskQueue(client, run), SETS[:1], config, epoch=2)
    restarted.load_state(evaluator.state())
    assert not restarted.due(40, trained=int(cost / 0.05) + 2), "nor is one free after a restart"
    assert restarted.due(50, trained=2 * int(cost / 0.05) + 3)


def test_only_an_answer_to_the_question_counts(
    client: redis.Redis, run: str, tmp_path: Path, model: Any
) -> None:
    config = write_config(tmp_path, model="m", run=run)
    dispatcher = Dispatcher(TaskQueue(client, run), PromptOrder(PROMPTS, config.run.seed), config, Ledger())
    dispatcher.top_up(1)
    asked = TaskQueue(client, run).claim("a", count=1)[0].task
    group = make_group(model, uid=asked.uid)
    right = dataclasses.replace(group, prompt_ids=np.array(asked.prompt_ids, dtype=np.int32))
    assert dispatcher.was_asked(right, 0)
    assert not dispatcher.was_asked(right, dispatcher.cursor)
    assert not dispatcher.was_asked(group, 0)
    assert not dispatcher.was_asked(dataclasses.replace(right, temperature=0.5), 0)
    small = make_group(model, uid=asked.uid, size=2)
    assert not dispatcher.was_asked(dataclasses.replace(small, prompt_ids=right.prompt_ids), 0)


def test_a_uid_says_whose_task_it_is() -> None:
    assert task_index(task_uid("r", "train", 7), "r", "train") == 7
    for uid in ("r:eval:7", "s:train:7", "r:train:x", "r:train:-1", "", ":"):
        assert task_index(uid, "r", "train") is None
