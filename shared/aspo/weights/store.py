"""The learner's folder of versions: what each is made of, the ways to reach it, and which one is live.

    store = WeightStore(Path("runs/demo/weights"))
    store.put(PolicyVersion(1, 0, "demo"), model_tensors, files={"config.json": b"{...}"})
    store.plan(store.live(), have="demo/1/7")           # the cheapest chain of transfers, by bytes
    store.roll_back(version), store.promote(version)

The first version is stored as a snapshot, each later one as a delta from the one before it. Every `merge`-th
also gets a delta from `merge` versions back, and every `snapshot_every`-th a snapshot, so that nobody has a
long way. Blobs are written first, then the transfer, then the manifest, then `live` moves; each by rename,
so a reader never sees half a version.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import safetensors.torch
from torch import Tensor

from aspo.schemas import PolicyVersion
from aspo.weights.adapters import base_name
from aspo.weights.blobs import TEMPORARY, BlobStore, write_file
from aspo.weights.delta import describe_delta, encode_delta, merge_deltas
from aspo.weights.manifest import (
    BlobRef,
    Manifest,
    Plan,
    Transfer,
    WeightsError,
    config_digest,
    decode_manifest,
    decode_transfer,
    state_digest,
)
from aspo.weights.state import State, describe, shards

log = logging.getLogger(__name__)
T = TypeVar("T")
Files = Mapping[str, bytes | BlobRef]  # by name: content, or what is stored already
MERGE = 8


class Live(msgspec.Struct, frozen=True):
    """The version that actors should run; `held` keeps later ones from going live by themselves."""

    version: str
    held: bool = False


class WeightStore:
    """Versions on disk; one writer, any number of reading threads.

    `keep` versions stay for download, and with them what `leased` names and the live one.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int = 8,
        snapshot_every: int = 16,
        leased: Callable[[], Collection[PolicyVersion]] = tuple,
    ) -> None:
        self._root, self._keep, self._snapshot_every = root, keep, snapshot_every
        self._leased = leased
        self._lock = threading.RLock()  # of what is known
        self._writing = threading.RLock()  # of what is on disk; taken first
        self.left_out: list[str] = []  # damaged files, in words
        self._listeners: list[Callable[[], None]] = []
        self.blobs = BlobStore(root / "blobs")
        for name in ("manifests", "transfers"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._manifests: dict[PolicyVersion, Manifest] = {}
        self._transfers: dict[PolicyVersion, list[Transfer]] = {}
        self._load()
        self._live = self._load_live()
        self._trial: tuple[PolicyVersion, str] | None = None
        self._newest: State | None = None  # the base of the next delta

    def live(self) -> PolicyVersion | None:
        """The version that actors should run, None before the first."""
        return PolicyVersion.parse(self._live.version) if self._live else None

    def held(self) -> bool:
        """Whether versions published now stay back until one is promoted."""
        return self._live is not None and self._live.held

    def target(self, client: str | None) -> PolicyVersion | None:
        """The version that a client should run: the live one, or the candidate if it is on trial with it."""
        with self._lock:
            if self._trial is not None and self._trial[1] == client:
                return self._trial[0]
            return self.live()

    def try_out(self, version: PolicyVersion, client: str) -> None:
        """Offer a version to one client alone, until another goes live."""
        self._require(version)
        with self._lock:
            self._trial = version, client
        self._announce()

    def withdraw(self) -> None:
        """End a trial: the client goes back to the live version."""
        with self._lock:
            self._trial = None
        self._announce()

    def newest(self) -> PolicyVersion | None:
        """The version published last, None before the first."""
        with self._lock:
            return max(self._manifests, default=None)

    def versions(self) -> list[PolicyVersion]:
        """All versions kept, oldest first."""
        with self._lock:
            return sorted(self._manifests)

    def manifest(self, version: PolicyVersion) -> Manifest | None:
        """The manifest of a version that is kept, else None."""
        with self._lock:
            return self._manifests.get(version)

    def transfers(self, version: PolicyVersion) -> tuple[Transfer, ...]:
        """The transfers that lead straight to a version."""
        with self._lock:
            return tuple(self._transfers.get(version, ()))

    def plan(self, version: PolicyVersion, have: str | None = None) -> Plan | None:
        """The way to a version that costs the fewest bytes from `have`; None for a version not kept."""
        with self._lock:
            manifest = self._manifests.get(version)
            if manifest is None:
                return None
            if have == str(version):
                return Plan(manifest=manifest, transfers=())
            chain = cheapest(self._transfers, version, have)
        return None if chain is None else Plan(manifest=manifest, transfers=chain)

    def on_move(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, in the mover's thread, after what some client should run has changed."""
        self._listeners.append(listener)

    def put(
        self, version: PolicyVersion, tensors: Mapping[str, Tensor], files: Files, *, live: bool = True
    ) -> Manifest:
        """Store a version, live at once unless `live` is False or the store is held.

        `tensors` are on the CPU and contiguous, and stay the store's until the next call has returned. Raises
        `WeightsError` if the name has other content, is not newer than all before, or cannot be written.
        """
        with self._writing:
            return self._put(version, tensors, files, live)

    def _put(
        self, version: PolicyVersion, tensors: Mapping[str, Tensor], files: Files, live: bool
    ) -> Manifest:
        infos = describe(tensors)
        refs = {n: f if isinstance(f, BlobRef) else self.blobs.put(f) for n, f in files.items()}
        digests = state_digest(infos), config_digest(refs)
        existing = self._existing(version, *digests)
        if existing is not None:
            if live:
                self.go_live(version)
            return existing
        base = self._base(tensors)
        state = State(tensors, str(version))
        transfer, changed = self._first_transfer(version, state, base)
        manifest = Manifest(
            version=str(version),
            parent=base.version if base else None,
            state_digest=digests[0],
            config_digest=digests[1],
            changed_fraction=changed,
            tensors=infos,
            files=refs,
        )
        self.adopt(manifest, [transfer])
        self._newest = state
        if live:
            self.go_live(version)
        try:
            self._add_shortcuts(version, tensors)
            self.collect()
        except (WeightsError, OSError) as error:  # the version is stored, and the next makes up for it
            log.error("tidying up after %s: %s", version, error)
        return manifest

    def keep_base(self, tensors: Mapping[str, Tensor]) -> dict[str, BlobRef]:
        """Store what versions of adapters are merged into, for `put` to take as their files."""
        return {base_name(number): ref for number, ref in enumerate(self._put_shards(tensors))}

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these very tensors are the base of the next delta, and must stay as they are."""
        held = {id(tensor) for tensor in self._newest.tensors.values()} if self._newest else set()
        return any(id(tensor) in held for tensor in tensors.values())

    def adopt(self, manifest: Manifest, transfers: Collection[Transfer]) -> None:
        """Record a version whose blobs are here, with the transfers that lead to it."""
        version = manifest.policy_version
        with self._writing:
            for transfer in transfers:
                write_file(self._transfer_file(transfer), transfer.encode())
            write_file(self._file("manifests", version), manifest.encode())
            with self._lock:  # all or nothing: a transfer to what could not be recorded must lead nobody
                self._manifests[version] = manifest
                for transfer in transfers:
                    self._note_transfer(transfer)

    def go_live(self, version: PolicyVersion) -> None:
        """Make a version live unless the store is held."""
        with self._lock:
            if self.held():
                return
            self._move(Live(str(version)))
        self._announce()

    def promote(self, version: PolicyVersion) -> None:
        """Make a version live, and let the later ones follow; raises `WeightsError` if it is not kept."""
        with self._lock:
            self._require(version)
            self._move(Live(str(version)))
        self._announce()

    def roll_back(self, version: PolicyVersion) -> None:
        """Make an older version live and hold the later ones back until one is promoted."""
        with self._lock:
            self._require(version)
            self._move(Live(str(version), held=True))
        self._announce()

    def snapshot(self) -> Transfer | None:
        """Give the newest version a snapshot if it has none; None if there is no version."""
        with self._writing:
            version = self.newest()
            if version is None:
                return None
            for transfer in self.transfers(version):
                if transfer.base is None:
                    return transfer
            held = self._newest if self._newest and self._newest.version == str(version) else None
            transfer = self._store_snapshot(version, (held or self.state(version)).tensors)
            self._add_transfer(transfer)
            return transfer

    def state(self, version: PolicyVersion) -> State:
        """Rebuild a version's tensors from the store and verify them; raises `WeightsError`."""
        plan = self.plan(version)
        if plan is None:
            raise WeightsError(f"version {version} is no longer kept; see `aspo weights ls`")
        state = State({})
        for transfer in plan.transfers:
            paths = [self._verified(ref) for ref in transfer.blobs]
            if transfer.base is None:
                state = State.load(paths)
                state.version = transfer.version
            else:
                state.advance(transfer, (path.read_bytes() for path in paths))
        state.verify(plan.manifest)
        return state

    def verify(self, version: PolicyVersion) -> None:
        """Check a version's files and every way to it, byte by byte; raises `WeightsError`."""
        manifest = self._require(version)
        for transfer in self.transfers(version):
            for ref in transfer.blobs:
                self._verified(ref)
        for ref in manifest.files.values():
            self._verified(ref)
        self.state(version)

    def _existing(self, version: PolicyVersion, state: str, config: str) -> Manifest | None:
        found = self.manifest(version)
        if found is not None and (found.state_digest, found.config_digest) != (state, config):
            raise WeightsError(f"version {version} exists with other content; versions never change")
        newest = self.newest()
        if found is None and newest is not None and version < newest:
            raise WeightsError(f"version {version} is older than the newest, {newest}")
        return found

    def _base(self, tensors: Mapping[str, Tensor]) -> State | None:
        """The newest version's tensors, if a delta from them can be made."""
        newest = self.newest()
        if newest is not None and (self._newest is None or self._newest.version != str(newest)):
            try:
                self._newest = self.state(newest)
            except (WeightsError, OSError) as error:
                log.warning("cannot continue from %s (%s); publishing a snapshot", newest, error)
                self._newest = None
        base = self._newest
        return base if base is not None and _shapes(base.tensors) == _shapes(tensors) else None

    def _first_transfer(
        self, version: PolicyVersion, state: State, base: State | None
    ) -> tuple[Transfer, float | None]:
        """Store a delta from the base, or a snapshot if there is none or it would be smaller."""
        if base is None:
            return self._store_snapshot(version, state.tensors), None
        blobs, changed, total = [], 0, 0
        for part in shards(state.tensors):
            first = next(iter(sorted(part)))
            old = {name: base.tensors[name] for name in part}
            blob = encode_delta(old, part, base_check=base.checks.get(first))
            info = describe_delta(blob)
            changed, total = changed + info.changed, total + info.size
            state.checks[first] = info.new_check
            blobs.append(blob)
        fraction = changed / max(total, 1)
        if sum(map(len, blobs)) >= _size(state.tensors):
            return self._store_snapshot(version, state.tensors), fraction
        refs = tuple(self.blobs.put(blob) for blob in blobs)
        return Transfer(version=str(version), base=base.version, blobs=refs), fraction

    def _store_snapshot(self, version: PolicyVersion, tensors: Mapping[str, Tensor]) -> Transfer:
        return Transfer(version=str(version), blobs=self._put_shards(tensors))

    def _put_shards(self, tensors: Mapping[str, Tensor]) -> tuple[BlobRef, ...]:
        return tuple(
            self.blobs.put(safetensors.torch.save(part, metadata={"format": "pt"}))
            for part in shards(tensors)
        )

    def _add_shortcuts(self, version: PolicyVersion, tensors: Mapping[str, Tensor]) -> None:
        """Add the merged delta and the snapshot that are due; what is live already does not wait for them."""
        steps = list(self._steps_back(version))
        if steps and (len(steps) >= self._snapshot_every or sum(s.size for s in steps) > _size(tensors)):
            self._add_transfer(self._store_snapshot(version, tensors))
        if len(steps) >= MERGE and len(steps) % MERGE == 0:
            span = steps[:MERGE][::-1]
            blobs = zip(*([self._read(ref) for ref in step.blobs] for step in span), strict=True)
            refs = tuple(self.blobs.put(merge_deltas(part)) for part in blobs)
            self._add_transfer(Transfer(version=str(version), base=span[0].base, blobs=refs))

    def _steps_back(self, version: PolicyVersion) -> Iterator[Transfer]:
        """The deltas from one version to the next that lead to `version` from a snapshot, newest first."""
        while True:
            found = self.transfers(version)
            if not found or any(transfer.base is None for transfer in found):
                return
            yield found[0]
            version = PolicyVersion.parse(str(found[0].base))

    def _add_transfer(self, transfer: Transfer) -> None:
        with self._lock:
            write_file(self._transfer_file(transfer), transfer.encode())
            self._note_transfer(transfer)

    def _note_transfer(self, transfer: Transfer) -> None:
        known = self._transfers.setdefault(PolicyVersion.parse(transfer.version), [])
        if transfer not in known:
            known.append(transfer)

    def _move(self, live: Live) -> None:
        if live != self._live:
            write_file(self._root / "live", msgspec.json.encode(live))
        self._live, self._trial = live, None

    def _announce(self) -> None:
        for listener in self._listeners:
            listener()

    def collect(self) -> None:
        """Forget versions older than all that somebody may need and the snapshot before them."""
        with self._writing, self._lock:
            ordered = sorted(self._manifests)
            live = self.live()
            wanted = {*ordered[-self._keep :], *(set(self._leased()) & self._manifests.keys())}
            wanted |= {live} if live in self._manifests else set()
            oldest = min(wanted)
            anchors = [v for v in ordered if v <= oldest and any(t.base is None for t in self._transfers[v])]
            # Newest first: wherever a crash ends this, what remains can be reached.
            for version in reversed(ordered[: ordered.index(anchors[-1])] if anchors else []):
                del self._manifests[version], self._transfers[version]
                self._file("manifests", version).unlink(missing_ok=True)
            for known in self._transfers.values():
                known[:] = [t for t in known if not t.base or PolicyVersion.parse(t.base) in self._manifests]
            self._sweep()

    def _sweep(self) -> None:
        """Delete what no version is made of: unused blobs, damaged files, and what crashes left."""
        transfers = [transfer for known in self._transfers.values() for transfer in known]
        refs: list[BlobRef] = [ref for m in self._manifests.values() for ref in m.files.values()]
        refs += [ref for transfer in transfers for ref in transfer.blobs]
        used = {self._file("manifests", version) for version in self._manifests}
        used |= {self._transfer_file(transfer) for transfer in transfers}
        for pattern in ("manifests/*", "transfers/*", f"{TEMPORARY}*"):
            for path in set(self._root.glob(pattern)) - used:
                path.unlink(missing_ok=True)
        self.blobs.keep_only({ref.digest for ref in refs})

    def _require(self, version: PolicyVersion) -> Manifest:
        manifest = self.manifest(version)
        if manifest is None:
            raise WeightsError(f"there is no version {version} here; see `aspo weights ls`")
        return manifest

    def _verified(self, ref: BlobRef) -> Path:
        path = self.blobs.verify(ref.digest)
        if path is None:
            raise WeightsError(f"blob {ref.digest[:12]} of the store is missing or damaged")
        return path

    def _read(self, ref: BlobRef) -> bytes:
        return self._verified(ref).read_bytes()

    def _load(self) -> None:
        """Take up what a former process left whole; say what is damaged and leave it out."""
        for manifest in self._decoded("manifests", decode_manifest):
            self._manifests[manifest.policy_version] = manifest
        for transfer in self._decoded("transfers", decode_transfer):
            version = PolicyVersion.parse(transfer.version)
            base = PolicyVersion.parse(transfer.base) if transfer.base else None
            if version not in self._manifests or (base is not None and base not in self._manifests):
                continue  # of a version that a crash kept from being recorded, or that was collected
            if all(self.blobs.has(ref) for ref in transfer.blobs):
                self._transfers.setdefault(version, []).append(transfer)
            else:
                self._leave_out(f"a blob of the transfer to {version} is missing")
        for version in sorted(self._manifests):
            if cheapest(self._transfers, version, None) is None:
                self._leave_out(f"{version} can no longer be reached")
                del self._manifests[version]
                self._transfers.pop(version, None)
        for known in self._transfers.values():
            known.sort(key=_nearest_first)

    def _decoded(self, kind: str, decode: Callable[[bytes], T]) -> Iterator[T]:
        for path in sorted((self._root / kind).glob("*.json")):
            try:
                yield decode(path.read_bytes())
            except (WeightsError, OSError) as error:
                self._leave_out(f"{path} is damaged ({error})")

    def _leave_out(self, what: str) -> None:
        log.error("%s; left out", what)
        self.left_out.append(what)

    def _load_live(self) -> Live | None:
        try:
            live = msgspec.json.decode((self._root / "live").read_bytes(), type=Live)
            if PolicyVersion.parse(live.version) in self._manifests:
                return live
        except (OSError, ValueError) as error:
            if self._manifests:
                log.info("no word on which version is live (%s); taking the newest", error)
        newest = max(self._manifests, default=None)
        return Live(str(newest)) if newest else None

    def _transfer_file(self, transfer: Transfer) -> Path:
        base = PolicyVersion.parse(transfer.base) if transfer.base else None
        return self._file("transfers", PolicyVersion.parse(transfer.version), base)

    def _file(self, kind: str, version: PolicyVersion, base: PolicyVersion | None = None) -> Path:
        origin = f".from-{base.epoch}-{base.step}" if base else ""
        return self._root / kind / f"{version.run}-{version.epoch}-{version.step}{origin}.json"


def cheapest(
    transfers: Mapping[PolicyVersion, Collection[Transfer]], target: PolicyVersion, have: str | None
) -> tuple[Transfer, ...] | None:
    """The chain of transfers to `target` with the fewest bytes, from `have` or from nothing; None if none."""
    cost: dict[str, int] = {have: 0} if have else {}
    last: dict[str, Transfer] = {}
    for version in sorted(transfers):
        for transfer in transfers[version]:
            start = 0 if transfer.base is None else cost.get(transfer.base)
            if start is not None and start + transfer.size < cost.get(transfer.version, 2**63):
                cost[transfer.version], last[transfer.version] = start + transfer.size, transfer
    chain: list[Transfer] = []
    at: str | None = str(target)
    while at is not None and at != have:
        if at not in last:
            return None
        chain.append(last[at])
        at = last[at].base
    return tuple(reversed(chain))


def _nearest_first(transfer: Transfer) -> tuple[int, int]:
    base = PolicyVersion.parse(transfer.base) if transfer.base else None
    return (-base.epoch, -base.step) if base else (1, 0)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()}


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
