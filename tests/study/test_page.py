"""docs/study.md: its tables are what the committed data say."""

from __future__ import annotations

from pathlib import Path

from aspo_study.page import tables_of
from aspo_study.summary import read_confirmed, read_csv, summary

DOCS = Path(__file__).parents[2] / "docs"
DATA = DOCS / "study" / "results.csv"


def test_the_pages_tables_are_what_its_data_say() -> None:
    assert tables_of(DOCS / "study.md") == summary(read_csv(DATA), read_confirmed(DATA)), (
        "docs/study.md is stale; run: aspo study publish"
    )


def test_the_data_are_small_and_every_plot_is_shown() -> None:
    assert DATA.stat().st_size < 1_000_000
    page = (DOCS / "study.md").read_text()
    plots = list(DATA.parent.glob("*.png"))
    assert len(plots) == 3
    assert all(f"](study/{plot.name})" in page for plot in plots)
