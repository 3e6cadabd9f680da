"""The page of the study: its text is written by hand, its tables between two marks are not."""

from __future__ import annotations

from pathlib import Path

from aspo.config import ConfigError
from aspo_study import confirm, run
from aspo_study.summary import CONFIRMED, read_confirmed, read_csv, summary, write_csv

BEGIN, END = "<!-- tables: aspo study publish -->\n", "<!-- end of tables -->\n"


def write_data(folder: Path, data: Path) -> None:
    """Write a study's results as CSV, those of the service beside them; raises ConfigError for none."""
    results = run.read_results(folder)
    if not results:
        raise ConfigError(f"no results in {folder}; aspo study run makes them")
    write_csv(results, data)
    confirmed = run.read_results(folder, confirm.RESULTS)
    if confirmed:
        write_csv(confirmed, data.with_name(CONFIRMED))


def tables_of(page: Path) -> str:
    """What stands between the marks; raises ConfigError for a page without them."""
    return _cut(page)[1]


def renew(page: Path, data: Path) -> None:
    """Put the tables of a study's data in the place of the former ones."""
    before, _, after = _cut(page)
    page.write_text(f"{before}{BEGIN}{summary(read_csv(data), read_confirmed(data))}{END}{after}")


def _cut(page: Path) -> tuple[str, str, str]:
    text = page.read_text() if page.exists() else ""
    before, begins, rest = text.partition(BEGIN)
    tables, ends, after = rest.partition(END)
    if not begins or not ends:
        raise ConfigError(f"{page} lacks the lines {BEGIN.strip()} and {END.strip()}; add them")
    return before, tables, after
