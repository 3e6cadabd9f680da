"""The store: immutable versions, the cheapest way to each, collection by reference, faults of the disk."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from aspo.weights import blobs as blobs_module
from aspo.weights import state as state_module
from aspo.weights.leases import Leases
from aspo.weights.manifest import Manifest, Transfer, WeightsError, decode_manifest, decode_plan
from aspo.weights.store import WeightStore, cheapest
from versions import FILES, tensors, version


def publish(store: WeightStore, steps: range) -> None:
    for step in steps:
        store.put(version(step), tensors(step), FILES)


def ways(store: WeightStore, step: int) -> list[str | None]:
    return [transfer.base for transfer in store.transfers(version(step))]


def test_a_version_never_changes(store: WeightStore) -> None:
    store.put(version(0), tensors(0), FILES)
    store.put(version(0), tensors(0), FILES)
    with pytest.raises(WeightsError, match="exists with other content"):
        store.put(version(0), tensors(1), FILES)
    with pytest.raises(WeightsError, match="exists with other content"):
        store.put(version(0), tensors(0), {"config.json": b"{ }"})
    store.put(version(1), tensors(1), FILES)
    with pytest.raises(WeightsError, match="older than the newest"):
        store.put(version(0, epoch=0), tensors(0), FILES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_version_is_rebuilt_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    store = WeightStore(tmp_path, keep=20, snapshot_every=9)
    for step in range(20):
        store.put(version(step), tensors(step, dtype), FILES)
    for step in range(20):
        state = store.state(version(step))
        assert state.version == str(version(step))
        for name, tensor in tensors(step, dtype).items():
            assert torch.equal(state.tensors[name], tensor)


def test_the_first_version_is_whole_and_the_later_ones_are_deltas(store: WeightStore) -> None:
    publish(store, range(4))
    assert ways(store, 0) == [None]
    assert ways(store, 3) == ["r/1/2"]
    first, last = store.manifest(version(0)), store.manifest(version(3))
    assert first is not None
    assert last is not None
    assert (first.parent, first.changed_fraction) == (None, None)
    assert last.parent == "r/1/2"
    old, new = tensors(2), tensors(3)
    changed = sum(int((old[name] != new[name]).sum()) for name in old)
    assert last.changed_fraction == pytest.approx(changed / sum(t.numel() for t in new.values()))


def test_merged_deltas_and_snapshots_come_on_schedule(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, keep=40, snapshot_every=16)
    publish(store, range(20))
    assert ways(store, 8) == ["r/1/7", "r/1/0"]
    assert ways(store, 16) == ["r/1/15", None, "r/1/8"]
    plan = store.plan(version(9), have="r/1/0")
    assert plan is not None
    assert [t.base for t in plan.transfers] == ["r/1/0", "r/1/8"]
    assert plan.size < sum(min(t.size for t in store.transfers(version(s))) for s in range(1, 10))


def test_a_plan_costs_the_fewest_bytes() -> None:
    def transfer(step: int, base: int | None, size: int) -> Transfer:
        name = None if base is None else f"r/1/{base}"
        return Transfer(version=f"r/1/{step}", base=name, blobs=({"digest": "0" * 64, "size": size},))

    from aspo.weights.manifest import decode_transfer

    known = {
        version(0): [transfer(0, None, 100)],
        version(1): [transfer(1, 0, 30)],
        version(2): [transfer(2, 1, 30), transfer(2, 0, 50), transfer(2, None, 100)],
        version(3): [transfer(3, 2, 60), transfer(3, None, 101)],
    }
    graph = {
        key: [decode_transfer(json.dumps(_plain(t)).encode()) for t in value] for key, value in known.items()
    }

    def chosen(target: int, have: str | None) -> list[str | None] | None:
        found = cheapest(graph, version(target), have)
        return None if found is None else [t.base for t in found]

    assert chosen(2, "r/1/1") == ["r/1/1"]
    assert chosen(2, "r/1/0") == ["r/1/0"]
    assert chosen(2, None) == [None]
    assert chosen(3, "r/1/1") == ["r/1/1", "r/1/2"]
    assert chosen(3, "r/1/0") == [None]
    assert chosen(1, "r/1/3") == [None, "r/1/0"]
    assert chosen(3, "other/1/2") == [None]
    assert chosen(9, None) is None


def _plain(transfer: Transfer) -> dict[str, object]:
    return {"version": transfer.version, "base": transfer.base, "blobs": list(transfer.blobs)}


def test_collection_keeps_what_can_still_be_needed(store: WeightStore, leases: Leases) -> None:
    publish(store, range(10))  # keep 3, a snapshot every 4
    assert store.versions()[0] == version(4), "the newest three need the snapshot at 4"
    leases.renew("slow", version(5), None)
    publish(store, range(10, 14))
    assert store.versions()[0] == version(4), "somebody runs 5"
    leases.renew("slow", version(13), None)
    publish(store, range(14, 15))
    assert store.versions()[0] == version(12)
    used = {ref.digest for v in store.versions() for t in store.transfers(v) for ref in t.blobs}
    used |= {ref.digest for ref in store.manifest(version(14)).files.values()}  # type: ignore[union-attr]
    assert {path.name for path in store.blobs.folder.iterdir()} == used
    for v in store.versions():
        store.verify(v)


def test_the_live_version_is_never_collected(store: WeightStore) -> None:
    publish(store, range(2))
    store.roll_back(version(1))
    publish(store, range(2, 20))
    assert store.live() == version(1)
    store.verify(version(1))


def test_a_rollback_holds_later_versions_back_until_one_is_promoted(store: WeightStore) -> None:
    publish(store, range(3))
    store.roll_back(version(1))
    publish(store, range(3, 4))
    assert (store.live(), store.newest(), store.held()) == (version(1), version(3), True)
    store.promote(version(3))
    publish(store, range(4, 5))
    assert (store.live(), store.held()) == (version(4), False)
    with pytest.raises(WeightsError, match="no version r/1/99 here"):
        store.roll_back(version(99))


def test_a_trial_is_seen_by_its_client_alone(store: WeightStore) -> None:
    store.put(version(0), tensors(0), FILES)
    store.put(version(1), tensors(1), FILES, live=False)
    store.try_out(version(1), "canary")
    assert (store.target("canary"), store.target("other"), store.target(None)) == (
        version(1),
        version(0),
        version(0),
    )
    store.withdraw()
    assert store.target("canary") == version(0)
    store.try_out(version(1), "canary")
    store.go_live(version(1))
    assert store.target("other") == version(1)


def test_a_restarted_learner_goes_on_by_a_delta(store: WeightStore, tmp_path: Path) -> None:
    publish(store, range(3))
    store.roll_back(version(2))
    again = WeightStore(tmp_path / "weights", keep=3)
    assert (again.live(), again.held(), again.versions()) == (version(2), True, store.versions())
    manifest = again.put(version(2, epoch=2), tensors(3), FILES)
    assert manifest.parent == "r/1/2"
    assert [t.base for t in again.transfers(version(2, epoch=2))] == ["r/1/2"]
    again.verify(version(2, epoch=2))


def test_a_damaged_store_goes_on_with_a_snapshot(store: WeightStore, tmp_path: Path) -> None:
    publish(store, range(3))
    [delta] = store.transfers(version(2))
    blob = store.blobs.folder / delta.blobs[0].digest
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(WeightsError, match="missing or damaged"):
        store.verify(version(2))
    again = WeightStore(tmp_path / "weights", keep=3)
    again.put(version(0, epoch=2), tensors(5), FILES)
    assert [t.base for t in again.transfers(version(0, epoch=2))] == [None]
    again.verify(version(0, epoch=2))


def test_a_store_with_a_blob_missing_leaves_the_version_out(store: WeightStore, tmp_path: Path) -> None:
    publish(store, range(3))
    (store.blobs.folder / store.transfers(version(2))[0].blobs[0].digest).unlink()
    (tmp_path / "weights/manifests/r-1-1.json").write_bytes(b"{")
    again = WeightStore(tmp_path / "weights", keep=3)
    assert again.versions() == [version(0)]
    assert again.live() == version(0)
    assert len(again.left_out) >= 2


def test_a_full_disk_leaves_the_old_version_live(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, range(1))

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(blobs_module.os, "fsync", no_space)
        with pytest.raises(WeightsError, match="No space left on device; free space"):
            store.put(version(1), tensors(1), FILES)
    assert store.live() == version(0)
    assert store.versions() == [version(0)]
    assert not list(store.blobs.folder.glob(".tmp-*"))
    store.put(version(2), tensors(2), FILES)
    store.verify(version(2))


def test_a_transfer_to_what_could_not_be_recorded_leads_nobody(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, range(1))
    replace = blobs_module.os.replace

    def no_manifest(source: str, target: Path) -> None:
        if target.parent.name == "manifests":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(blobs_module.os, "replace", no_manifest)
        with pytest.raises(WeightsError, match="No space left on device"):
            store.put(version(1), tensors(1), FILES)
    store.put(version(1), tensors(2), FILES)
    assert len(store.transfers(version(1))) == 1
    store.verify(version(1))


def test_what_fails_after_a_version_is_stored_does_not_undo_it(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, range(2))

    def fail(*args: object) -> None:
        raise WeightsError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(store, "_add_shortcuts", fail)
        state = tensors(2)
        store.put(version(2), state, FILES)
        assert store.holds(state), "the base of the next delta: it must not be written to"
    assert store.live() == version(2)
    publish(store, range(3, 6))
    for v in store.versions():
        store.verify(v)


def test_a_damaged_file_is_mended_when_it_is_stored_again(store: WeightStore) -> None:
    publish(store, range(1))
    config = store.manifest(version(0)).files["config.json"]  # type: ignore[union-attr]
    (store.blobs.folder / config.digest).write_bytes(b"")
    publish(store, range(1, 2))
    store.verify(version(1))


@pytest.mark.parametrize("content", [b"", b"\xff", b'{"version":"garbage"}', b'{"version":"r/1/99"}'])
def test_a_damaged_word_on_what_is_live_means_the_newest(
    store: WeightStore, tmp_path: Path, content: bytes
) -> None:
    publish(store, range(3))
    (tmp_path / "weights/live").write_bytes(content)
    assert WeightStore(tmp_path / "weights").live() == version(2)


def test_what_was_left_out_is_told(store: WeightStore, tmp_path: Path) -> None:
    publish(store, range(4))
    (tmp_path / "weights/manifests/r-1-2.json").write_bytes(b"{")
    again = WeightStore(tmp_path / "weights")
    assert again.versions() == [version(0), version(1)], "what came after cannot be reached without it"
    assert again.plan(version(1)) is not None
    assert again.live() == version(1)
    assert any("r-1-2.json is damaged" in words for words in again.left_out)


def test_a_rollback_is_never_lost_to_a_publication(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    publish(store, range(2))
    for _ in range(100):
        store.promote(version(0))
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(store.go_live, version(1)), pool.submit(store.roll_back, version(0))]
        assert [job.result() for job in jobs] == [None, None]
        assert (store.live(), store.held()) == (version(0), True)


def test_other_shapes_are_a_new_start(store: WeightStore) -> None:
    publish(store, range(2))
    store.put(version(2), {"embed": torch.zeros(3)}, FILES)
    assert ways(store, 2) == [None]


def test_large_versions_are_cut_into_blobs(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "MAX_BLOB_BYTES", 5000)
    publish(store, range(3))
    assert [len(store.transfers(version(step))[0].blobs) for step in range(3)] == [2, 2, 2]
    store.verify(version(2))


def test_a_snapshot_on_demand(store: WeightStore) -> None:
    assert store.snapshot() is None
    publish(store, range(2))
    transfer = store.snapshot()
    assert transfer is not None
    assert ways(store, 1) == ["r/1/0", None]
    assert store.snapshot() == transfer


def test_a_snapshot_on_demand_after_a_restart(store: WeightStore, tmp_path: Path) -> None:
    publish(store, range(2))
    again = WeightStore(tmp_path / "weights")
    assert again.snapshot() is not None
    again.verify(version(1))


def test_a_manifest_is_checked_before_it_is_believed(store: WeightStore) -> None:
    good = json.loads(store.put(version(0), tensors(0), FILES).encode())
    for key, value, words in (
        ("state_digest", "0" * 64, "do not match its state digest"),
        ("config_digest", "0" * 64, "do not match its config digest"),
        ("version", "../x/1", "not a weights manifest"),
        ("parent", "r/1/-1", "not a weights manifest"),
        ("changed_fraction", 2.0, "not a weights manifest"),
        ("files", {"../evil": good["files"]["config.json"]}, "not a weights manifest"),
        ("files", {"evil": {"digest": "../../etc/passwd", "size": 1}}, "not a weights manifest"),
        ("extra", 1, "not a weights manifest"),
    ):
        with pytest.raises(WeightsError, match=words):
            decode_manifest(json.dumps({**good, key: value}).encode())
    for garbage in (b"", b"\xff\xfe", b"[]", b"{" * 100_000, b"[" * 1_000_000):
        with pytest.raises(WeightsError):
            decode_manifest(garbage)
        with pytest.raises(WeightsError):
            decode_plan(garbage)


def test_a_plan_must_be_a_chain_to_its_version(store: WeightStore) -> None:
    publish(store, range(3))
    plan = store.plan(version(2))
    assert plan is not None
    good = json.loads(plan.encode())
    assert decode_plan(plan.encode()) == plan
    with pytest.raises(WeightsError, match="leads to r/1/1"):
        decode_plan(json.dumps({**good, "transfers": good["transfers"][:-1]}).encode())
    broken = [good["transfers"][0], good["transfers"][2]]
    with pytest.raises(WeightsError, match="breaks off at r/1/0"):
        decode_plan(json.dumps({**good, "transfers": broken}).encode())


def test_versions_of_many_manifests_stay_ordered(store: WeightStore) -> None:
    publish(store, range(12))
    manifests = [store.manifest(v) for v in store.versions()]
    parents = [m.parent for m in manifests if isinstance(m, Manifest)]
    assert parents[1:] == [str(v) for v in store.versions()[:-1]]
