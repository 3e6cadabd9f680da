"""What the processes of a learner do that are not its rank 0: whatever that announces, with it."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from aspo.codec import decode_group
from aspo.config import Config
from aspo_learner.checkpoint import read_part, verify_part, write_part
from aspo_learner.optimizer import DivergedError
from aspo_learner.policy import load_policy
from aspo_learner.ranks import (
    Fill,
    Forget,
    Gather,
    Load,
    Order,
    Ranks,
    Resume,
    Save,
    Stop,
    Train,
    Verify,
    losses_named,
)
from aspo_learner.trainer import Trainer


def follow(config: Config) -> None:
    """Hold a part of the policy and train with it, until rank 0 says that the run is over.

    A signal to end is rank 0's to act on: it still needs this part, for the last checkpoint. Raises
    RankLostError if another rank has ended.
    """
    logging.getLogger().setLevel(logging.ERROR)  # the rest rank 0 says as well
    if config.learner.threads:
        torch.set_num_threads(config.learner.threads)
    with losses_named():
        _follow(config, Ranks.join(config.learner))


def _follow(config: Config, ranks: Ranks) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    trainer = Trainer(load_policy(config, ranks), config)
    while not isinstance(order := ranks.next_order(), Stop):
        with contextlib.suppress(DivergedError):  # rank 0 has yet to say so, and to keep the batch
            _carry_out(order, trainer, ranks)
    ranks.close()


def _carry_out(order: Order, trainer: Trainer, ranks: Ranks) -> None:
    model, optimizer = trainer.policy.model, trainer.optimizer
    match order:
        case Train():
            groups = [decode_group(group) for group in order.groups]
            trainer.train_step(groups, _arrays(order.weights, np.float32), _arrays(order.lags, np.int32))
        case Gather():
            trainer.policy.copy_published({})
        case Fill():
            trainer.policy.load_published({})
        case Forget():
            trainer.forget_moments()
        case Resume():
            trainer.load_state(json.loads(order.state))
        case Save():
            ranks.gather(write_part(Path(order.folder), model, optimizer, ranks))
        case Verify():
            ranks.gather(verify_part(Path(order.folder), order.digests, ranks))
        case Load():
            read_part(Path(order.folder), model, optimizer)


def _arrays(content: Sequence[bytes] | None, kind: type[np.generic]) -> list[np.ndarray] | None:
    return None if content is None else [np.frombuffer(one, dtype=kind) for one in content]
