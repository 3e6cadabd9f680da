"""One learner a run, on a real Redis: leases, epochs, and what a learner that overslept may still do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from aspo import fence as fencing
from aspo.fence import LEASE_S, DataLostError, Fence, FencedError, RunTakenError
from aspo.queue import connect
from proxy import Fault, Proxy
from services import wait_until


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


def test_the_lease_of_a_dead_learner_is_waited_out(
    client: redis.Redis, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fencing, "LEASE_S", 0.3)
    client.set(f"aspo:{run}:lease", b"elsewhere, process 1", px=500)
    fence = Fence.acquire(client, run, tmp_path)
    assert fence.epoch == 1
    assert not fence.lapsed, "the wait is no silence of its own"
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
    with pytest.raises(FencedError):
        overslept.advance()
    overslept.release()
    assert client.get(f"aspo:{run}:lease") is not None, "it gave up what is no longer its own"
    new.execute(lambda pipeline: pipeline.set(f"aspo:{run}:x", 2))
    new.release()


def test_its_paths_lead_nowhere(overslept: Fence, client: redis.Redis, run: str, tmp_path: Path) -> None:
    (overslept.folder / "checkpoint").write_text("kept")
    (partial := overslept.folder / "partial").write_text("late")
    new = Fence.acquire(client, run, tmp_path)
    with pytest.raises(FileNotFoundError):
        partial.replace(overslept.folder / "checkpoint")
    assert (new.folder / "checkpoint").read_text() == "kept"
    assert (tmp_path / "state").resolve() == new.folder.resolve()
    with pytest.raises(FencedError):
        overslept.require()
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


def test_of_two_that_take_over_at_once_one_holds_the_run(
    overslept: Fence, client: redis.Redis, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fence, "_take_lease", lambda self: None)
    outcomes: list[Fence | FencedError] = []

    def take() -> None:
        try:
            outcomes.append(Fence.acquire(client, run, tmp_path))
        except FencedError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(outcomes) == len(threads)
    fences = [outcome for outcome in outcomes if isinstance(outcome, Fence)]
    holder = max(fences, key=lambda fence: fence.epoch)
    assert [path.name for path in tmp_path.glob("state-*")] == [holder.folder.name]
    holder.require()
    for fence in fences:
        fence._left.set()
        if fence is not holder:
            with pytest.raises(FencedError):
                fence.require()


def test_the_epoch_outlives_the_loss_of_redis(client: redis.Redis, run: str, tmp_path: Path) -> None:
    fence = Fence.acquire(client, run, tmp_path)
    client.delete(f"aspo:{run}:epoch", f"aspo:{run}:lease")
    with pytest.raises(DataLostError):
        fence.execute(lambda pipeline: pipeline.set(f"aspo:{run}:x", 1))
    assert client.get(f"aspo:{run}:x") is None
    fence.restore()
    assert fence.execute(lambda pipeline: pipeline.set(f"aspo:{run}:x", 1)) == [True]
    assert client.get(f"aspo:{run}:epoch") == b"1"
    fence.release()
    client.delete(f"aspo:{run}:epoch")
    later = Fence.acquire(client, run, tmp_path)
    assert later.epoch == 2
    assert later.advance() == 3
    later.release()


def test_who_takes_the_run_first_after_a_loss_keeps_it(client: redis.Redis, run: str, tmp_path: Path) -> None:
    fence = Fence.acquire(client, run, tmp_path)
    client.delete(f"aspo:{run}:epoch", f"aspo:{run}:lease")
    quicker = Fence.acquire(client, run, tmp_path)
    with pytest.raises(FencedError):
        fence.restore()
    quicker.release()
    fence.release()


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


def test_a_learner_that_cannot_ask_knows_that_it_may_have_lost_the_run(
    redis_url: str, run: str, tmp_path: Path
) -> None:
    with (
        Proxy("127.0.0.1", urlsplit(redis_url).port or 0) as proxy,
        connect(f"redis://127.0.0.1:{proxy.port}/0", timeout_s=0.2) as client,
    ):
        fence = Fence.acquire(client, run, tmp_path)
        assert not fence.lapsed
        proxy.inject(repeat(Fault(swallow=True)))
        wait_until(lambda: fence.lapsed, 2 * LEASE_S)
        assert fence.trouble
        proxy.heal()
        wait_until(lambda: not fence.lapsed and not fence.trouble, 30)
        fence.release()
