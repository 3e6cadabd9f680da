"""A curriculum: prompts that are sometimes solved come more often than those that always or never are.

    order = Curriculum(prompts, seed=(7,), block=64, path=folder / "curriculum-sums.jsonl")
    order[index]                        # decides on a block of prompts, durably, before it gives the first
    order.observe(prompt.row, 0.5)      # the share of a group that was right

Rows are drawn by p (1 - p) + a floor, p being the row's measured solve rate: the variance of what there is to
learn from. What was drawn is written down before it is asked, so that after a crash an index means the same
prompt, whatever has been measured since; a line a block: `{"block": 3, "rows": [17, 4]}`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aspo_learner.data import Prompt

log = logging.getLogger(__name__)
_FLOOR = 0.05  # against 0.25 for a row that is solved half of the time, or was never asked
_MEMORY = 0.5  # weight of what was measured before


class Curriculum:
    """An endless order of a set's prompts, drawn block by block; `rates` is the state for a checkpoint."""

    def __init__(self, prompts: Sequence[Prompt], seed: tuple[int, ...], block: int, path: Path) -> None:
        self._prompts, self._seed, self._path = prompts, seed, path
        self._size = min(block, len(prompts))
        self.rates: dict[int, float] = {}
        self._blocks = _read(path, self._size, len(prompts))
        partial = path.with_suffix(".partial")  # a file of our own, as the journal's
        partial.write_text("".join(_line(number, rows) for number, rows in enumerate(self._blocks)))
        partial.replace(path)

    def __getitem__(self, index: int) -> Prompt:
        block, place = divmod(index, self._size)
        while len(self._blocks) <= block:
            self._decide()
        return self._prompts[self._blocks[block][place]]

    def __len__(self) -> int:
        return len(self._prompts)

    def observe(self, row: int, solved: float) -> None:
        """Take in the share of a group that was right."""
        before = self.rates.get(row)
        self.rates[row] = solved if before is None else _MEMORY * before + (1 - _MEMORY) * solved

    def _decide(self) -> None:
        rates = np.full(len(self._prompts), 0.5)
        rates[list(self.rates)] = list(self.rates.values())
        weights = rates * (1 - rates) + _FLOOR
        random = np.random.default_rng([*self._seed, len(self._blocks)])
        rows = random.choice(len(rates), size=self._size, replace=False, p=weights / weights.sum()).tolist()
        with self._path.open("a") as file:
            file.write(_line(len(self._blocks), rows))
            file.flush()
            os.fsync(file.fileno())
        self._blocks.append(rows)


def _line(number: int, rows: Sequence[int]) -> str:
    return json.dumps({"block": number, "rows": list(rows)}) + "\n"


def _read(path: Path, size: int, prompts: int) -> list[list[int]]:
    """Read up to the first line that is broken, which was never asked, or of another data set."""
    blocks: list[list[int]] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            entry = json.loads(line)
            rows = [int(row) for row in entry["rows"]]
            if not line.endswith(b"\n") or entry["block"] != len(blocks) or len(rows) != size:
                raise ValueError("not the next block")
            if not 0 <= min(rows) <= max(rows) < prompts:
                raise ValueError("a row that is not there")
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the curriculum in %s ends at block %d (%s)", path, len(blocks), error)
            break
        blocks.append(rows)
    return blocks
