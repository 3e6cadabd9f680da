"""One learner a run, on a real Redis: leases, epochs, and what a learner that overslept may still do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from aspo import fence as fencing
from aspo.fence import LEASE_S, Fence, FencedError, RunTakenError


@pytest.fixture
def overslept(
    client: redis.Redis, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fence]:
    """A learner whose lease is not renewed, as of one that is stopped."""
    monkeypatch.setattr(Fence, "_keep_renewing", lambda self: None)
    old = Fence.acquire(client, run, tmp_path)
    monkeypatch.undo()
    client.delete(f"aspo:{run}:lease")
    yield old
    old._left.set()


def test_a_living_learner_keeps_a_second_one_out(client: redis.Redis, run: str, tmp_path: Path) -> None:
    first = Fence.acquire(client, run, tmp_path)
    began = time.monotonic()
    with pytest.raises(RunTakenError, match=r"process \d+ .* holds run .*; stop it"):
        Fence.acquire(client, run, tmp_path)
    assert time.monotonic() - began < LEASE_S
    first.release()
    second = Fence.acquire(client, run, tmp_path)
    assert second.epoch == first.epoch + 1
    second.release()


def test_the_lease_of_a_dead_learner_is_waited_out(client: redis.Redis, run: str, tmp_path: Path) -> None:
    client.set(f"aspo:{run}:lease", b"elsewhere, process 1", px=500)
    fence = Fence.acquire(client, run, tmp_path)
    assert fence.epoch == 1
    fence.release()


def test_a_learner_that_overslept_can_change_nothing(
    overslept: Fence, client: redis.Redis, run: str, tmp_path: Path
) -> None:
    new = Fence.acquire(client, run, tmp_path)
    with pytest.raises(FencedError, match=r"epoch 2, this is 1"):
        overslept.execute(lambda pipeline: pipeline.set(f"aspo:{run}:x", 1))
    assert client.get(f"aspo:{run}:x") is None
    with pytest.raises(FencedError):
        overslept.require()
    with pytest.raises(FencedError), overslept.commit():
        raise AssertionError("entered")
    with pytest.raises(FencedError):
        overslept.advance()
    overslept.release()
    assert client.get(f"aspo:{run}:lease") is not None, "it gave up what is no longer its own"
    new.execute(lambda pipeline: pipeline.set(f"aspo:{run}:x", 2))
    new.release()


def test_the_folder_alone_keeps_it_out_too(
    overslept: Fence, client: redis.Redis, run: str, tmp_path: Path
) -> None:
    new = Fence.acquire(client, run, tmp_path)
    with pytest.raises(FencedError), overslept.commit():
        raise AssertionError("entered")
    new.release()


def test_a_takeover_between_check_and_act_is_seen(
    overslept: Fence, client: redis.Redis, run: str, tmp_path: Path
) -> None:
    taken: list[Fence] = []

    def take_over_first(pipeline: redis.client.Pipeline) -> None:
        if not taken:
            taken.append(Fence.acquire(client, run, tmp_path))
        pipeline.set(f"aspo:{run}:x", 1)

    with pytest.raises(FencedError):
        overslept.execute(take_over_first)
    assert client.get(f"aspo:{run}:x") is None
    taken[0].release()


def test_nobody_takes_over_while_a_commit_is_under_way(
    overslept: Fence, client: redis.Redis, run: str, tmp_path: Path
) -> None:
    taken: list[Fence] = []
    with overslept.commit():
        thread = threading.Thread(target=lambda: taken.append(Fence.acquire(client, run, tmp_path)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        with overslept.commit():
            pass  # within another, as the store's collection is
    thread.join(5)
    assert taken[0].epoch == 2
    taken[0].release()


def test_the_epoch_outlives_the_loss_of_redis(client: redis.Redis, run: str, tmp_path: Path) -> None:
    fence = Fence.acquire(client, run, tmp_path)
    client.delete(f"aspo:{run}:epoch", f"aspo:{run}:lease")
    assert fence.execute(lambda pipeline: pipeline.set(f"aspo:{run}:x", 1)) == [True]
    assert client.get(f"aspo:{run}:epoch") == b"1"
    fence.release()
    client.delete(f"aspo:{run}:epoch")
    later = Fence.acquire(client, run, tmp_path)
    assert later.epoch == 2
    assert later.advance() == 3
    later.release()


def test_the_lease_is_renewed(
    client: redis.Redis, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fencing, "LEASE_S", 0.3)
    fence = Fence.acquire(client, run, tmp_path)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        assert client.exists(f"aspo:{run}:lease")
    fence.release()
    assert not client.exists(f"aspo:{run}:lease")
