"""The order in which training asks for prompts: from an index to a prompt, the same after every restart.

    prompts = Prompts(config, tokenizer, room=room, folder=folder)
    prompts[index]                          # the only state is the index, which the checkpoint holds

A set in memory is permuted anew for every pass, a streamed one in blocks; under a curriculum its rows are
drawn by how they fare. A mixture draws for every index which set it comes from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aspo.config import Config
from aspo.schemas import FloatArray
from aspo_learner.curriculum import Curriculum
from aspo_learner.data import Prompt, PromptReader, load_prompts

_DRAWS = 1024  # of a mixture, made at once
_Indices = NDArray[np.int64]


class Order(Protocol):
    """An endless sequence of prompts."""

    def __getitem__(self, index: int) -> Prompt: ...


class PromptOrder:
    """A seeded permutation of the rows for every pass over the data."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, number: int = 0) -> None:
        self._prompts, self._seed = prompts, _seeds(seed, number)
        self._pass, self._rows = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> Prompt:
        number, place = divmod(index, len(self._prompts))
        if number != self._pass:
            self._pass = number
            self._rows = np.random.default_rng([*self._seed, number]).permutation(len(self._prompts))
        return self._prompts[int(self._rows[place])]


class StreamedOrder:
    """Blocks of a set, which is read as training goes on and is not empty, each permuted anew in every pass.

    `window` is how far apart indices asked for lie: so many prompts are kept. What lies further back is read
    again from the start, as after a restart.
    """

    def __init__(
        self, source: Iterable[Prompt], seed: int, *, block: int, window: int, number: int = 0
    ) -> None:
        self._source, self._seed, self._size = source, _seeds(seed, number), block
        self._kept = 2 + window // block
        self._blocks: dict[int, list[Prompt]] = {}
        self._reading: Iterator[Prompt] = iter(())
        self._next = -1
        self._length: int | None = None  # of a pass, known after the first
        self._permutation = lru_cache(maxsize=self._kept)(self._permute)

    def __getitem__(self, index: int) -> Prompt:
        number, place = divmod(index, self._length) if self._length else (0, index)
        block = self._block(place // self._size)
        if place % self._size >= len(block):
            return self[index]  # the pass has ended before: its length is known now
        rows = self._permutation(number, place // self._size, len(block))
        return block[int(rows[place % self._size])]

    def _block(self, wanted: int) -> list[Prompt]:
        """The prompts of a block; fewer than its size, or none, at the end of a pass."""
        if wanted in self._blocks:
            return self._blocks[wanted]
        if not 0 <= self._next <= wanted:
            self._reading, self._next = iter(self._source), 0
        while self._next <= wanted:
            block = list(itertools.islice(self._reading, self._size))
            self._blocks.pop(self._next, None)  # so that the one read last is kept longest
            self._blocks[self._next] = block
            if len(block) < self._size:
                self._length = self._next * self._size + len(block)
                self._next = -1
                break
            self._next += 1
        found = self._blocks.get(wanted, [])
        while len(self._blocks) > self._kept:
            del self._blocks[next(iter(self._blocks))]
        return found

    def _permute(self, number: int, block: int, size: int) -> _Indices:
        return np.random.default_rng([*self._seed, number, block]).permutation(size)


class Mixture:
    """Prompts of several orders, by weight; each order is gone through in its own turn."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self._orders, self._seed = orders, seed
        self._shares = np.array(weights) / np.sum(weights)
        self._before = [np.zeros(len(orders), dtype=np.int64)]  # draws of each order before each chunk
        self._chunk = lru_cache(maxsize=8)(self._draw)

    def __getitem__(self, index: int) -> Prompt:
        chunk, place = divmod(index, _DRAWS)
        while len(self._before) <= chunk:
            last = self._draw(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(last, minlength=len(self._orders)))
        draws = self._chunk(chunk)
        chosen = int(draws[place])
        earlier = self._before[chunk][chosen] + np.count_nonzero(draws[:place] == chosen)
        return self._orders[chosen][int(earlier)]

    def _draw(self, chunk: int) -> _Indices:
        return np.random.default_rng([self._seed, 3, chunk]).choice(
            len(self._orders), size=_DRAWS, p=self._shares
        )


class Prompts:
    """The order of all prompts that a config names, and what was left out of each set."""

    def __init__(self, config: Config, tokenizer: Any, *, room: int, folder: Path) -> None:
        data = config.data
        self._curricula: dict[str, Curriculum] = {}
        self._readers = [PromptReader(data, one, tokenizer, room=room) for one in data.mixture]
        window = (config.learner.max_staleness + 1) * config.learner.batch_prompts
        orders: list[Order] = []
        for number, reader in enumerate(self._readers):
            if data.streaming:
                streamed = StreamedOrder(
                    reader, config.run.seed, block=data.shuffle_block, window=window, number=number
                )
                orders.append(streamed)
            elif data.curriculum:
                path = folder / f"curriculum-{reader.name}.jsonl"
                seed, block = (config.run.seed, 5, number), config.learner.batch_prompts
                self._curricula[reader.name] = Curriculum(load_prompts(reader), seed, block, path)
                orders.append(self._curricula[reader.name])
            else:
                orders.append(PromptOrder(load_prompts(reader), config.run.seed, number))
        shares = [one.weight for one in data.mixture]
        self._order = orders[0] if len(orders) == 1 else Mixture(orders, shares, config.run.seed)
        for order in orders:
            order[0]  # a set that cannot be read says so now

    def __getitem__(self, index: int) -> Prompt:
        return self._order[index]

    def observe(self, answers: Iterable[tuple[Prompt, FloatArray]]) -> None:
        """Tell the curriculum, if there is one, the rewards [G] of prompts; above 0 is right."""
        for prompt, rewards in answers if self._curricula else ():
            self._curricula[prompt.source].observe(prompt.row, float((rewards > 0).mean()))

    def state(self) -> dict[str, dict[str, float]]:
        """What a checkpoint must hold beside the cursor: solve rates by set and row."""
        return {
            name: {str(row): rate for row, rate in curriculum.rates.items()}
            for name, curriculum in self._curricula.items()
        }

    def load_state(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from what `state` returned; rows that are no longer there are forgotten."""
        for name, curriculum in self._curricula.items():
            rates = {int(row): rate for row, rate in state.get(name, {}).items()}
            curriculum.rates = {row: rate for row, rate in rates.items() if row < len(curriculum)}

    def metrics(self) -> dict[str, float]:
        """By set, the rows read, and those left out for their length; of a streamed set, in this pass."""
        return {
            f"{metric}/{reader.name}": float(value)
            for reader in self._readers
            for metric, value in (
                ("prompts_read", reader.counts.read),
                ("prompts_skipped", reader.counts.too_long),
            )
        }


def _seeds(seed: int, number: int) -> tuple[int, ...]:
    """Of the order of the set of this number in a mixture."""
    return (seed, 2) if number == 0 else (seed, 4, number)
