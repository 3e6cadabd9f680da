"""Runs a reward function in worker processes: one that hangs or dies costs its samples and nothing else."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessPool

from aspo.codec import MAX_REWARD
from aspo.config import ConfigError, RewardConfig
from aspo.schemas import FloatArray

log = logging.getLogger(__name__)
RewardFunction = Callable[..., float]


@dataclass(frozen=True, slots=True)
class Scores:
    """The rewards of a group and which of them stand for a failed call; both [G]."""

    rewards: FloatArray
    failed: NDArray[np.bool_]


def load_reward_function(path: str, columns: Sequence[str]) -> RewardFunction:
    """Import `module:function`; raises ConfigError if it is not there or cannot take the columns."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(f"reward.function {path!r}: {error}; put its folder on PYTHONPATH") from None
    except AttributeError:
        raise ConfigError(f"reward.function {path!r}: module {module_name} has no {name!r}") from None
    except (Exception, SystemExit) as error:  # a user's module may fail in any way as it is imported
        raise ConfigError(
            f"reward.function {path!r}: importing it raised {error!r}; mend the module"
        ) from None
    unfit = (inspect.isclass, inspect.iscoroutinefunction, inspect.isgeneratorfunction)
    if not callable(function) or any(is_kind(function) for is_kind in unfit):
        raise ConfigError(f"reward.function {path!r} is not a plain function")
    try:
        inspect.signature(function).bind("completion", **dict.fromkeys(columns))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward.function {path!r} does not take (completion, {', '.join(columns)}): {error}; "
            "set data.reward_columns"
        ) from None
    found: RewardFunction = function
    return found


class Scorer:
    """Scores groups off the event loop, with a time limit; use as a context manager."""

    def __init__(self, config: RewardConfig, columns: Sequence[str]) -> None:
        load_reward_function(config.function, columns)
        self._config = config
        self.failures = 0
        # Workers are spawned, not forked: the actor has threads.
        self._pool = ProcessPool(max_workers=config.concurrency, context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    async def score(self, completions: Sequence[str], columns: dict[str, Any]) -> Scores:
        """Score one prompt's completions; a call that raises, hangs or gives no number counts as failed."""
        values = await self._call(completions, columns)
        if values is None and len(completions) > 1:
            # Something hung or died: one by one, so that only the culprits fail.
            single = [self._call([completion], columns) for completion in completions]
            values = [value[0] if value else None for value in await asyncio.gather(*single)]
        values = values or [None] * len(completions)
        failed = np.array([value is None for value in values])
        self.failures += int(failed.sum())
        rewards = [self._config.failed_score if value is None else value for value in values]
        return Scores(np.array(rewards, dtype=np.float32), failed)

    async def _call(self, completions: Sequence[str], columns: dict[str, Any]) -> list[float | None] | None:
        """One call in a worker; None when it did not come back."""
        future = self._pool.schedule(
            _score_all,
            args=(self._config.function, list(completions), columns),
            timeout=self._config.timeout_s,
        )
        try:
            results: list[float | str] = await asyncio.wrap_future(future)
        except TimeoutError:
            log.warning(
                "reward.function took longer than %.1f s; its samples count as failed", self._config.timeout_s
            )
            return None
        except ProcessExpired as error:
            log.warning("reward.function ended its worker process (%s)", error)
            return None
        for fault in {result for result in results if isinstance(result, str)}:
            log.warning("reward.function failed: %s", fault)
        return [None if isinstance(result, str) else result for result in results]


def _score_all(path: str, completions: list[str], columns: dict[str, Any]) -> list[float | str]:
    """In a worker: a number per completion, or what went wrong."""
    module_name, _, name = path.partition(":")
    function = getattr(importlib.import_module(module_name), name)
    return [_score_one(function, completion, columns) for completion in completions]


def _score_one(function: RewardFunction, completion: str, columns: dict[str, Any]) -> float | str:
    try:
        value = float(function(completion, **columns))
    except Exception as error:  # a user's function may raise anything; the sample fails, the run goes on
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        # Escaped, for it may quote what a model wrote.
        text = f"{type(error).__name__}: {error}"[:300].encode("unicode_escape").decode()
        return f"{text} ({where})"
    return value if abs(value) <= MAX_REWARD else f"it gave {value}, not a number within {MAX_REWARD:g}"
