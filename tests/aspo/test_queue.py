"""The queue over a real redis-server: at least once, idempotent, nothing lost before its acknowledgement."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from aspo.fence import Fence
from aspo.queue import (
    QueueError,
    RolloutReader,
    RolloutWriter,
    TaskQueue,
    connect,
    fault_of,
    rollout_keys,
    url_without_password,
)
from aspo.schemas import Task
from aspo_cli.processes import find_redis_server


def make_task(run: str, index: int, purpose: str = "train") -> Task:
    return Task(
        uid=f"{run}:{purpose}:{index}",
        index=index,
        purpose=purpose,  # type: ignore[arg-type]
        prompt_ids=[1, 2, 3],
        group_size=2,
        max_tokens=8,
        temperature=1.0,
        reward_inputs={"answer": "4"},
    )


def test_a_task_put_twice_is_claimed_once(client: redis.Redis, run: str) -> None:
    queue = TaskQueue(client, run)
    queue.put([make_task(run, 0), make_task(run, 1)])
    queue.put([make_task(run, 0), make_task(run, 1), make_task(run, 2)])
    assert [claim.task.index for claim in queue.claim("a", count=10)] == [0, 1, 2]
    assert queue.claim("b", count=10) == []


def test_what_was_asked_counts_as_asked_whatever_is_asked_again(client: redis.Redis, run: str) -> None:
    queue = TaskQueue(client, run)
    queue.put(make_task(run, index) for index in range(4))
    queue.reset("train", [make_task(run, 1)], next_index=4)
    assert queue.next_index("train") == 4, "a second successor would take answers to the rest for unasked"
    queue.put([make_task(run, 3), make_task(run, 4)])
    assert [claim.task.index for claim in queue.claim("a", count=10)] == [1, 4]
    queue.reset("train")
    assert queue.next_index("train") == 0


def test_evaluation_tasks_go_first(client: redis.Redis, run: str) -> None:
    queue = TaskQueue(client, run)
    queue.put([make_task(run, 0), make_task(run, 0, "eval")])
    assert [claim.task.purpose for claim in queue.claim("a", count=10)] == ["eval", "train"]


def test_a_finished_task_is_gone_and_frees_its_memory(client: redis.Redis, run: str) -> None:
    queue = TaskQueue(client, run, lease_s=0.001)
    queue.put([make_task(run, 0)])
    queue.finish(queue.claim("a", count=1))
    assert queue.depth() == {"train": 0, "eval": 0}
    assert queue.claim("b", count=1, block_ms=20) == []


def test_an_abandoned_task_goes_to_another_actor_and_a_renewed_one_does_not(
    client: redis.Redis, run: str
) -> None:
    queue = TaskQueue(client, run, lease_s=0.2)
    queue.put([make_task(run, 0), make_task(run, 1)])
    kept, abandoned = queue.claim("a", count=2)
    assert queue.claim("b", count=2) == []
    client.xclaim(abandoned.stream, "aspo", "a", 0, [abandoned.entry_id], idle=1000, justid=True)
    client.xclaim(kept.stream, "aspo", "a", 0, [kept.entry_id], idle=1000, justid=True)
    queue.renew("a", [kept])
    assert [claim.task.index for claim in queue.claim("b", count=2)] == [1]


def test_a_task_handed_back_is_taken_at_once(client: redis.Redis, run: str) -> None:
    queue = TaskQueue(client, run, lease_s=3600)
    queue.put([make_task(run, 0)])
    queue.hand_back("a", queue.claim("a", count=1))
    assert [claim.task.index for claim in queue.claim("b", count=1)] == [0]


def test_an_entry_that_is_no_task_is_skipped(client: redis.Redis, run: str) -> None:
    queue = TaskQueue(client, run)
    client.xadd(f"aspo:{run}:tasks:train", {"task": b"garbage"}, id="0-1")
    queue.put([make_task(run, 1)])
    assert [claim.task.index for claim in queue.claim("a", count=10)] == [1]
    assert queue.depth()["train"] == 1


def test_rollouts_stay_until_acknowledged_and_are_replayed_to_the_next_learner(
    client: redis.Redis, run: str
) -> None:
    writers = [RolloutWriter(client, run, actor) for actor in ("a", "b")]
    for number, writer in enumerate(writers * 3):
        writer.put(f"uid-{number}", b"payload %d" % number)
    first = RolloutReader(client, run)
    read = first.read(count=100)
    assert sorted(d.payload for d in read) == [b"payload %d" % i for i in range(6)]
    first.acknowledge(read[:2])
    assert first.depth() == 4
    replayed = []
    second = RolloutReader(client, run)
    while deliveries := second.read(count=1):
        replayed += deliveries
    assert sorted(d.uid for d in replayed) == sorted(d.uid for d in read[2:])


def test_a_retried_send_adds_nothing(client: redis.Redis, run: str) -> None:
    writer = RolloutWriter(client, run, "a")
    writer.put("uid", b"once")
    writer._sent -= 1  # what a lost reply looks like to the writer: it sends the same id again
    writer.put("uid", b"once")
    assert [d.payload for d in RolloutReader(client, run).read(count=10)] == [b"once"]


def test_two_actors_of_one_name_lose_nothing(client: redis.Redis, run: str) -> None:
    first, second = RolloutWriter(client, run, "a"), RolloutWriter(client, run, "a")
    for number, writer in enumerate((first, second, first, second, first)):
        writer.put(str(number), b"payload %d" % number)
    assert [d.uid for d in RolloutReader(client, run).read(count=10)] == list("01234")


def test_a_restarted_actor_writes_after_its_former_self(client: redis.Redis, run: str) -> None:
    RolloutWriter(client, run, "a").put("1", b"old")
    RolloutWriter(client, run, "a").put("2", b"new")
    assert [d.payload for d in RolloutReader(client, run).read(count=10)] == [b"old", b"new"]


def test_only_streams_that_are_empty_and_of_nobody_alive_are_forgotten(client: redis.Redis, run: str) -> None:
    writers = {actor: RolloutWriter(client, run, actor) for actor in ("gone", "alive", "unread")}
    for actor in ("gone", "alive"):
        writers[actor].put(f"{actor}-0", b"payload")
    reader = RolloutReader(client, run)
    read = reader.read(count=10)
    writers["unread"].put("unread-0", b"payload")
    reader.read(count=10)
    assert reader.forget({"alive"}) == 0, "what is not acknowledged was forgotten"
    reader.acknowledge(read)
    assert reader.forget({"alive"}) == 1
    assert not client.exists(rollout_keys(run, "gone")[1])
    assert reader.streams == len(client.smembers(rollout_keys(run, "")[0])) == 2
    writers["gone"].put("gone-1", b"back")  # it was only cut off
    assert [d.uid for d in reader.read(count=10)] == ["gone-1"]
    assert {d.uid for d in RolloutReader(client, run).read(count=10)} == {"unread-0", "gone-1"}


def test_a_rollout_stored_while_its_stream_is_being_forgotten_is_not_lost(
    client: redis.Redis, run: str, tmp_path: Path
) -> None:
    writer = RolloutWriter(client, run, "slow")

    class Interrupted(Fence):
        """An actor stores a rollout between every look at its stream and what follows from it."""

        def execute(
            self, queue: Callable[..., Any], *, condition: Callable[..., bool] | None = None, **options: Any
        ) -> list[Any]:
            def look(pipeline: Any) -> bool:
                holds = condition is None or condition(pipeline)
                if condition is not None and writer._sent == 1:
                    writer.put("late", b"payload")
                return holds

            return super().execute(queue, condition=look, **options)

    fence = Interrupted.acquire(client, run, tmp_path)
    reader = RolloutReader(client, run, fence=fence)
    writer.put("early", b"payload")
    reader.acknowledge(reader.read(count=10))
    assert reader.forget(()) == 0
    assert [d.uid for d in reader.read(count=10)] == ["late"]
    fence.release()


def test_quarantine_keeps_payload_and_reason(client: redis.Redis, run: str) -> None:
    RolloutWriter(client, run, "a").put("uid", b"bad")
    reader = RolloutReader(client, run)
    reader.quarantine(reader.read(count=1)[0], "nan-logprob", max_bytes=3)
    [(_, fields)] = client.xrange(f"aspo:{run}:quarantine")
    assert fields == {b"reason": b"nan-logprob", b"uid": b"uid", b"actor": b"a", b"group": b"bad"}


def test_a_unix_socket_will_do(tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    command = [find_redis_server(), "--port", "0", "--unixsocket", str(socket)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert server.poll() is None
        assert connect(f"unix://{socket}").ping()
        assert fault_of(f"unix://{socket}") is None
    finally:
        server.terminate()
        server.wait(10)
    assert "Redis does not answer" in (fault_of(f"unix://{socket}") or "")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://127.0.0.1:1/0", "start redis-server"),
        ("http://127.0.0.1", "is not a Redis URL"),
        ("redis://user:secret@127.0.0.1:1/0", "no Redis at redis://***@127.0.0.1:1/0"),
    ],
)
def test_a_wrong_url_says_what_to_do(url: str, words: str) -> None:
    with pytest.raises(QueueError, match=words.replace("*", r"\*")) as caught:
        connect(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_never_shows() -> None:
    assert url_without_password("redis://:pw@host:1/0") == "redis://***@host:1/0"
    assert url_without_password("redis://host:1/0") == "redis://host:1/0"
