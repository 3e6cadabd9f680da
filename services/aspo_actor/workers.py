"""Processes in which a user's code runs, off the event loop: a call that hangs or dies costs itself alone."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from pebble import ProcessExpired, ProcessPool


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
            max_workers=count, context=context, initializer=initializer, initargs=list(initargs)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    async def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        """What a function gives in one of them; raises CallLost if it takes longer, or ends its process."""
        future = self._pool.schedule(function, args=arguments, timeout=timeout_s)
        try:
            return await asyncio.wrap_future(future)
        except TimeoutError:
            raise CallLost(f"it took longer than {timeout_s:g} s") from None
        except ProcessExpired as error:
            raise CallLost(f"it ended its worker process ({error})") from None
