"""Processes in which a user's code runs, off the event loop: a call that hangs or dies costs itself alone."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pebble import ProcessExpired, ProcessPool

from aspo.telemetry import setup_logging


class CallLost(Exception):
    """A call that did not come back; says why."""


class Workers:
    """So many processes that are started again when they end; use as a context manager."""

    def __init__(
        self, count: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
    ) -> None:
        # Spawned, not forked: the actor has threads.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(
            max_workers=count, context=context, initializer=_begin, initargs=[initializer, initargs]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    async def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        """What a function gives; raises CallLost if it raises, takes longer, or ends its process."""
        future = self._pool.schedule(_contained, args=[function, *arguments], timeout=timeout_s)
        try:
            return await asyncio.wrap_future(future)
        except TimeoutError:
            raise CallLost(f"it took longer than {timeout_s:g} s") from None
        except ProcessExpired as error:
            raise CallLost(f"it ended its worker process ({error})") from None


def describe(error: BaseException) -> str:
    """What a user's code raised, and where, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    try:
        said = str(error)
    except Exception:
        said = "(its text cannot be had)"
    # Escaped, for it may quote what a model wrote.
    text = f"{type(error).__name__}: {said}"[:300].encode("unicode_escape").decode()
    return f"{text} ({where})"


def _begin(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """In a new worker; its log lines may quote what a model wrote, so they are escaped as the actor's are."""
    setup_logging()
    logging.getLogger().setLevel(logging.WARNING)
    if initializer is not None:
        initializer(*arguments)


def _contained(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a worker: call a function; what it raises may be the end of a process, but not of the actor's."""
    try:
        return function(*arguments)
    except BaseException as error:
        raise CallLost(describe(error)) from None
