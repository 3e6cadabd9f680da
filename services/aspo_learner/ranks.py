"""The processes of one learner, one a device, as torchrun starts and numbers them.

Rank 0 is the learner that the rest of the service knows. It announces what is to be done together, and the
others do it with it (`follower`):

    ranks = Ranks.join(config.learner)      # `ALONE`, and no group at all, without torchrun
    ranks.announce(Train(...))              # on rank 0
    order = ranks.next_order()              # on the others
    replies = ranks.gather(b"...")          # on all; rank 0 gets everyone's
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from aspo.config import ConfigError, LearnerConfig
from aspo.errors import AspoError

log = logging.getLogger(__name__)
# Followers may wait for a batch for as long as a run is paused; a rank that dies closes its connections.
_PATIENCE = timedelta(days=3650)
_GRACE_S = 5.0  # for a rank that has noticed by itself to end in order


class RankLostError(AspoError):
    """Another process of this learner has ended before its time."""

    exit_code = 1


class Train(msgspec.Struct, tag=True, frozen=True):
    """Train on these groups; token weights (float32) and lags (int32) by group, where there are any."""

    groups: list[bytes]
    weights: list[bytes] | None
    lags: list[bytes] | None


class Gather(msgspec.Struct, tag=True, frozen=True):
    """Hand the weights to rank 0, one tensor at a time."""


class Fill(msgspec.Struct, tag=True, frozen=True):
    """Take other weights from rank 0, one tensor at a time."""


class Forget(msgspec.Struct, tag=True, frozen=True):
    """Begin with an optimizer that has seen nothing."""


class Resume(msgspec.Struct, tag=True, frozen=True):
    """Go on from a trainer's state, in JSON."""

    state: str


class Save(msgspec.Struct, tag=True, frozen=True):
    """Write this rank's part of a checkpoint into a folder."""

    folder: str


class Verify(msgspec.Struct, tag=True, frozen=True):
    """Look whether this rank's share of a checkpoint's files is as it was written."""

    folder: str
    digests: dict[str, str]


class Load(msgspec.Struct, tag=True, frozen=True):
    """Read this rank's part of a checkpoint."""

    folder: str


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End: the run is over."""


Order = Train | Gather | Fill | Forget | Resume | Save | Verify | Load | Stop


class Ranks:
    """This process among those of its learner; `gather`, `add_up` and `broadcast` are for all at once."""

    def __init__(self, device: torch.device, mesh: DeviceMesh | None = None, patient: Any = None) -> None:
        self.device, self.mesh, self._patient = device, mesh, patient
        self._watch: _Watch | None = None
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if mesh is not None else (0, 1)

    @classmethod
    def join(cls, config: LearnerConfig) -> Ranks:
        """Meet the other processes that torchrun started; raises ConfigError for missing devices."""
        size = world_size()
        device = pick_device(config.device, size)
        if device.index is not None:
            torch.cuda.set_device(device)
        if size == 1 and not config.offload:
            return cls(device)
        shape = _mesh_shape(size, config.shard_size or size)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        ranks = cls(device, mesh, dist.new_group(backend="gloo", timeout=_PATIENCE))
        if size > 1:
            ranks._watch = _Watch(ranks.rank, size)
        return ranks

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def keeps_first_copy(self) -> bool:
        """Whether this rank's part of the weights is of the first copy, where several are kept."""
        return self.mesh is None or self.mesh.ndim == 1 or self.mesh.get_local_rank(0) == 0

    def announce(self, order: Order) -> None:
        """Have the other ranks do what rank 0 is about to do; called by one of them, it does nothing."""
        if self.size > 1 and self.leads:
            self._broadcast(msgspec.msgpack.encode(order))

    def next_order(self) -> Order:
        """Wait for what rank 0 announces next."""
        order: Order = msgspec.msgpack.decode(self._broadcast(b""), type=Order)
        return order

    def gather(self, reply: bytes) -> list[bytes]:
        """Everyone's reply by rank, at rank 0; nothing elsewhere."""
        if self.size == 1:
            return [reply]
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(reply)
        dist.all_reduce(lengths, group=self._patient)
        mine = _tensor(reply.ljust(int(lengths.max()), b"\0"))
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)] if self.leads else None
        dist.gather(mine, all_of_them, dst=0, group=self._patient)
        return [
            _bytes(one)[:length] for one, length in zip(all_of_them or (), lengths.tolist(), strict=False)
        ]

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """Give rank 0's tensor to all, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def close(self) -> None:
        """Tell the others that the run is over, and leave."""
        self.announce(Stop())
        if self._watch is not None:
            self._watch.end()
        if self.mesh is not None:
            dist.destroy_process_group()

    def _broadcast(self, content: bytes) -> bytes:
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0, group=self._patient)
        body = _tensor(content) if self.leads else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(body, 0, group=self._patient)
        return _bytes(body)


class _Watch:
    """Has this process end when the next in a ring of the ranks has, whatever it is doing; so all of them do.

    An operation of NCCL may wait minutes for a rank that is gone; a learner that awaits rollouts asks none.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._watched, self._watcher = (rank + 1) % size, (rank - 1) % size
        self._thread = threading.Thread(target=self._wait, name="watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Let the others know that this rank ends in order, and wait for the one it watches to."""
        dist.send(torch.zeros(1), self._watcher, group=self._group)
        self._thread.join()

    def _wait(self) -> None:
        try:
            dist.recv(torch.zeros(1), self._watched, group=self._group)
        except RuntimeError:
            log.error("process %d of this learner has ended; its log says why", self._watched)
            time.sleep(_GRACE_S)
            os._exit(RankLostError.exit_code)


@contextmanager
def losses_named() -> Iterator[None]:
    """Say in one line that another rank has ended, in place of what its connections say; RankLostError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0].rpartition("gloo/")[2]
        raise RankLostError(
            f"another process of this learner has ended ({reason}); its log says why. Start all of them again"
        ) from None


def world_size() -> int:
    """How many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(name: str, size: int = 1) -> torch.device:
    """Resolve `auto`, and give each rank a GPU of its own; raises ConfigError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"learner.device is {name!r} but torch sees no GPU; set it to cpu or mend the driver"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"learner.device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cpu" or size == 1:
        return device
    here = int(os.environ["LOCAL_RANK"])
    if device.index is not None or here >= torch.cuda.device_count():
        raise ConfigError(
            f"learner.device is {name!r}, and torchrun starts process {here} of this machine, which has "
            f"{torch.cuda.device_count()} GPUs; set it to cuda, and --nproc-per-node to the number of GPUs"
        )
    return torch.device("cuda", here)


def _mesh_shape(size: int, shard_size: int) -> tuple[int, ...]:
    """Ranks next to each other share a copy of the weights; raises ConfigError if they come out uneven."""
    if size % shard_size:
        raise ConfigError(
            f"learner.shard_size ({shard_size}) does not divide the {size} processes; set it to the GPUs of "
            "one machine, or unset it"
        )
    return (size,) if shard_size == size else (size // shard_size, shard_size)


def _tensor(content: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8)
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


ALONE = Ranks(torch.device("cpu"))
