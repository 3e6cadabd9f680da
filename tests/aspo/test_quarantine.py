"""The quarantine over a real Redis and through the real command: looked at safely, requeued once, purged."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import redis

from aspo.codec import encode_group
from aspo.quarantine import Quarantine, QuarantineError, describe
from aspo.queue import Delivery, RolloutReader
from aspo.text import printable
from aspo_learner.policy import load_model
from models import save_model
from rollouts import make_group, write_config
from services import Service

HOSTILE = "\x1b[2J\x1b]0;gone\x07[bold red]x[/] \u202emoor\r\n\udcff"


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model = load_model(str(save_model(tmp_path_factory.mktemp("model"), hidden_size=32, layers=1)))
    return encode_group(make_group(model, rewards=[1, 0, float("nan"), 0]))


def set_aside(client: redis.Redis, run: str, *payloads: bytes, reason: str = "bad-reward") -> list[str]:
    reader = RolloutReader(client, run)
    for number, data in enumerate(payloads):
        delivery = Delivery(f"uid-{number}", data, f"aspo:{run}:rollouts:actor-7".encode(), b"1-1")
        reader.quarantine(delivery, reason, max_bytes=10_000)
    return [entry.id for entry in Quarantine(client, run).entries()][::-1]


def aspo(folder: Path, *arguments: str) -> Service:
    service = Service(folder, "quarantine", arguments[0], "--config", "config.toml", *arguments[1:])
    service.wait(60)
    assert "Traceback" not in service.text, service.text
    return service


def test_a_requeued_entry_comes_back_once_however_many_requeue_it(client: redis.Redis, run: str) -> None:
    ids = set_aside(client, run, *(b"payload %d" % number for number in range(20)))
    quarantine, refused = Quarantine(client, run), []

    def requeue_all() -> None:
        for entry_id in ids:
            try:
                quarantine.requeue(entry_id)
            except QuarantineError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=requeue_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = RolloutReader(client, run).read(count=100)
    assert sorted(d.payload for d in read) == sorted(b"payload %d" % number for number in range(20))
    assert {d.uid for d in read} == {f"uid-{number}" for number in range(20)}
    assert len(refused) == 60
    assert list(quarantine.entries()) == []


def test_an_id_without_its_number_moves_one_entry(client: redis.Redis, run: str) -> None:
    stream = f"aspo:{run}:quarantine"
    for number in range(2):
        client.xadd(stream, {"uid": f"uid-{number}", "group": "payload"}, id=f"5-{number}")
    quarantine = Quarantine(client, run)
    quarantine.requeue("5")
    assert [entry.id for entry in quarantine.entries()] == ["5-1"]
    quarantine.requeue("5")
    assert list(quarantine.entries()) == []
    assert [d.uid for d in RolloutReader(client, run).read(count=9)] == ["uid-0", "uid-1"]


def test_a_requeue_that_fails_loses_nothing(client: redis.Redis, run: str) -> None:
    [entry_id] = set_aside(client, run, b"payload")
    client.set(f"aspo:{run}:rollouts:_requeued", "no stream")
    with pytest.raises(redis.ResponseError):
        Quarantine(client, run).requeue(entry_id)
    assert [entry.id for entry in Quarantine(client, run).entries()] == [entry_id]


def test_of_a_huge_rollout_only_the_beginning_is_kept(client: redis.Redis, run: str) -> None:
    [entry_id] = set_aside(client, run, b"x" * 1_000_000)
    entry, kept = Quarantine(client, run).entry(entry_id)
    assert (entry.size, entry.whole, len(kept)) == (1_000_000, False, 4096)
    with pytest.raises(QuarantineError, match="too large to be kept whole"):
        Quarantine(client, run).requeue(entry_id)


def test_what_is_old_by_redis_own_clock_is_purged(client: redis.Redis, run: str) -> None:
    stream, now = f"aspo:{run}:quarantine", client.time()[0]
    for age in (7200, 3500, 0):
        client.xadd(stream, {"reason": f"{age}"}, id=f"{(now - age) * 1000}-0")
    quarantine = Quarantine(client, run)
    assert quarantine.purge(older_s=3600) == 1
    assert [entry.reason for entry in quarantine.entries()] == ["0", "3500"]
    assert quarantine.purge() == 2
    assert quarantine.purge(older_s=1) == 0


@pytest.mark.parametrize("entry_id", ["1-1", "nonsense", "\x1b[2J", "-"])
def test_an_entry_that_is_not_there_is_said_plainly(client: redis.Redis, run: str, entry_id: str) -> None:
    set_aside(client, run, b"one", b"two")
    with pytest.raises(QuarantineError) as caught:
        Quarantine(client, run).requeue(entry_id)
    assert str(caught.value).isprintable()


def test_a_payload_is_described_as_far_as_it_decodes(payload: bytes) -> None:
    whole = describe(payload)
    assert whole["fault"] is None
    assert whole["fields"]["rewards"] == "4 values: 1.0, 0.0, nan, 0.0"
    assert whole["fields"]["token_ids"].split()[1] == "values:"
    altered = describe(payload.replace(b"test:train:0", b"test:train:9"))
    assert altered["fault"].startswith("digest: ")
    assert altered["fields"]["uid"] == "'test:train:9'"
    cut = describe(payload[:-9])
    assert cut["fault"].startswith("truncated: ")
    assert cut["fields"] == {}
    assert cut["begins_with"].startswith("41 53 50 67")
    for body in (b"", b"\x91" * 50_000, b"\xdf\xff\xff\xff\xff", b"\x81\xa1\xff\x01", b"\xc1", b"\x01"):
        assert describe(b"h" * 32 + body)["fields"] == {}
    assert describe(b"h" * 32 + b"\x81" + b"\x91" * 500 + b"\x01" * 2)["fault"]


def test_hostile_text_is_escaped() -> None:
    shown = printable(HOSTILE)
    assert shown.isprintable()
    assert shown.startswith(r"\x1b[2J\x1b]0;gone\x07[bold red]x[/] \u202emoor\r\n")
    assert printable("Grüße 数字") == "Grüße 数字"
    assert len(printable("\x00" * 10_000)) <= 4 * 500 + 1


def test_the_command_lists_shows_requeues_and_purges(
    client: redis.Redis, redis_url: str, run: str, tmp_path: Path, payload: bytes
) -> None:
    write_config(tmp_path, model="m", run=run, redis_url=redis_url)
    first, second = set_aside(client, run, payload, b"\xff" * 40)
    client.xadd(
        f"aspo:{run}:quarantine",
        {"reason": HOSTILE.encode(errors="surrogateescape"), "uid": b"\xff\x1b[1m", "group": b"\x1b"},
    )
    listed = aspo(tmp_path, "ls").text
    assert re.search(r"bad-reward +│ 2 ", listed)
    assert "[bold red]x[/]" in listed
    assert "\x1b" not in listed
    assert "\u202e" not in listed
    found: dict[str, Any] = json.loads(aspo(tmp_path, "ls", "--json", "--last", "2").text)
    assert found["counts"]["bad-reward"] == 2
    assert [entry["id"] for entry in found["newest"]][1] == second
    shown = json.loads(aspo(tmp_path, "show", first, "--json").text)
    assert (shown["actor"], shown["reason"], shown["size"]) == ("actor-7", "bad-reward", len(payload))
    assert "4 values: 1.0, 0.0, nan, 0.0" in aspo(tmp_path, "show", first).text

    assert aspo(tmp_path, "requeue", first, second).text == f"requeued {first}\nrequeued {second}\n"
    assert {d.payload for d in RolloutReader(client, run).read(count=9)} == {payload, b"\xff" * 40}
    again = aspo(tmp_path, "requeue", first)
    assert again.process.returncode == 2
    assert f"holds no {first}" in again.text

    for arguments, words in (
        (["purge"], "either --older 7d or --all"),
        (["purge", "--older", "7w"], "write a number and a unit"),
    ):
        refused = aspo(tmp_path, *arguments)
        assert refused.process.returncode == 2
        assert words in refused.text
    assert aspo(tmp_path, "purge", "--all").process.returncode == 1, "nobody confirmed it"
    assert aspo(tmp_path, "purge", "--older", "1h", "--yes").text == "purged 0 entries\n"
    assert aspo(tmp_path, "purge", "--all", "--yes").text == "purged 1 entries\n"
