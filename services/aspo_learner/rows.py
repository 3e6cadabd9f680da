"""The rows of a set: JSON and CSV as they are written, all else by `datasets`.

`datasets` gives every column of a file one type: the text "2020-01-01" becomes a date, 3 beside a 3.5 in
another row 3.0, and 007 in CSV 7. A reward that compares text would never match; so they are read here.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aspo.config import ConfigError, Source

Row = dict[str, Any]
_INTEGERS = range(-(2**63), 2**64)  # what a task can carry
_FAULTS = (OSError, ValueError, TypeError, ArithmeticError, RecursionError, StopIteration, csv.Error)


@dataclass(frozen=True, slots=True)
class Rows:
    """A set's rows, a pass for every iteration, which raises ConfigError where they cannot be read."""

    chosen: Source
    begin: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        import datasets

        try:
            yield from self.begin()
        except (*_FAULTS, datasets.exceptions.DatasetsError) as error:
            raise _unreadable(self.chosen, error) from None


def load_rows(chosen: Source, *, streaming: bool) -> Rows:
    """Open a set; raises ConfigError for one that is not there, or that `datasets` cannot open."""
    path = Path(chosen.path)
    suffix = path.suffix.lower()
    if suffix in (*_TEXT, ".parquet") and not path.is_file():
        raise ConfigError(f"no prompt file at {path}; set data.path or eval.path to a file that exists")
    if suffix in _TEXT:
        return Rows(chosen, partial(_TEXT[suffix], path))
    return _by_datasets(chosen, streaming=streaming)


def _by_datasets(chosen: Source, *, streaming: bool) -> Rows:
    import datasets

    path, split = chosen.path, chosen.split
    try:
        if Path(path).suffix.lower() == ".parquet":
            found = datasets.load_dataset(
                "parquet", data_files={split: path}, split=split, streaming=streaming
            )
        elif (Path(path) / "state.json").is_file():  # as `save_to_disk` writes it
            found = datasets.load_from_disk(path)
            found = found.to_iterable_dataset() if streaming else found
        else:
            found = datasets.load_dataset(path, chosen.subset, split=split, streaming=streaming)
    except (*_FAULTS, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(chosen, error) from None
    return Rows(chosen, found.__iter__)


def _unreadable(chosen: Source, error: BaseException) -> ConfigError:
    while error.__cause__ is not None:  # the first says only that something went wrong
        error = error.__cause__
    reason = (str(error).splitlines() or ["it holds no rows"])[0]
    return ConfigError(f"cannot read prompts from {chosen.path!r}, split {chosen.split!r}: {reason}")


def _json(path: Path) -> Iterator[Row]:
    """Objects, one a line; or a list of them."""
    with path.open("rb") as file:
        if file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            file.seek(0)
            yield from (_object(row, "entry", number) for number, row in enumerate(_parse(file.read()), 1))
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _object(_parse(line, number), "line", number)


def _parse(text: bytes, line: int = 1) -> Any:
    try:
        return json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(f"line {line} is not JSON ({getattr(error, 'msg', error)})") from None


def _integer(digits: str) -> int | str:
    """An integer; as text where no task can carry it."""
    return int(digits) if len(digits) < 30 and int(digits) in _INTEGERS else digits


def _object(row: Any, kind: str, number: int) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{kind} {number} is JSON, but no object")
    return row


def _csv(path: Path) -> Iterator[Row]:
    """Rows below a line of names; every value is text."""
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, strict=True)
        for row in table:
            if None in row or None in row.values():
                raise ValueError(f"line {table.line_num} has not as many fields as the first line")
            yield row


_TEXT: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _json, ".json": _json, ".csv": _csv}
