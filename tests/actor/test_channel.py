"""Calls beside the sampling: answers find their question, failures come back as text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aspo_actor.channel import Channel, ChannelError, answer_calls


class Worker:
    """A worker with two sockets, as an engine with two ranks has."""

    def __init__(self) -> None:
        self.going_on = threading.Event()
        calls = {"double": lambda number: number * 2, "wait": self.wait, "fail": self.fail}
        self.paths = [answer_calls(calls) for _ in range(2)]

    def wait(self, word: str) -> str:
        self.going_on.wait(10)
        return word

    def fail(self, argument: None) -> None:
        raise ValueError("no such tensor")


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
async def channel(worker: Worker) -> AsyncIterator[Channel]:
    channel = await Channel.connect(worker.paths)
    yield channel
    channel.close()


async def test_every_worker_answers_and_only_its_client_could_have_come(
    worker: Worker, channel: Channel
) -> None:
    assert await channel.call("double", 21) == [42, 42]
    assert not any(Path(path).parent.exists() for path in worker.paths)


async def test_a_failure_comes_back_and_the_worker_goes_on(channel: Channel) -> None:
    with pytest.raises(ChannelError, match="ValueError: no such tensor"):
        await channel.call("fail", None)
    assert await channel.call("double", 1) == [2, 2]


async def test_the_answer_to_a_call_given_up_is_not_taken_for_the_next(
    worker: Worker, channel: Channel
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await channel.call("wait", "late")
    worker.going_on.set()
    assert await channel.call("wait", "new") == ["new", "new"]


async def test_a_client_that_left_before_its_answer_ends_the_thread_quietly(
    worker: Worker, channel: Channel
) -> None:
    threads = [thread for thread in threading.enumerate() if thread.name == "aspo-calls"]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await channel.call("wait", "late")
    channel.close()
    await asyncio.sleep(0)  # the connections are closed in the loop's next turn
    worker.going_on.set()
    for thread in threads:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()  # had one raised, pytest would fail this test for it


async def test_a_worker_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with await asyncio.start_unix_server(lambda reader, writer: writer.close(), path):
        channel = await Channel.connect([path])
        with pytest.raises((ChannelError, ConnectionError)):
            await channel.call("double", 1)
        channel.close()
