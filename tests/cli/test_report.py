"""`aspo report`: figures of one run or several, in one file that loads nothing and runs nothing."""

from __future__ import annotations

import html.parser
import json
import logging
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aspo_cli.main import app
from aspo_learner.events import EventLog

HOSTILE = "<script>alert(1)</script>\x1b[31m"


def write_run(folder: Path, steps: int = 3, *, done: bool = False, **settings: object) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"seconds": 60.0 * i, "step": float(i), "reward": 0.1 * i, "accuracy": 0.5, "tokens": 100.0}
        | {"wait_seconds": 1.0, "train_seconds": 3.0, "staleness_mean": 1.0, "grad_norm": math.sqrt(i)}
        for i in range(1, steps + 1)
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 4.0, "rew')  # the learner is writing
    values = {"loss.name": {"value": "aspo", "source": "default"}}
    values |= {name: {"value": value, "source": "my.toml"} for name, value in settings.items()}
    (folder / "config.json").write_text(json.dumps(values))
    event = {"time": 0.0, "level": "warning", "source": "aspo", "message": HOSTILE}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    if done:
        (folder / "summary.json").write_text(json.dumps({"accuracy_before": 0.25, "accuracy_after": 0.75}))


class Page(html.parser.HTMLParser):
    """The tags of a page, what its attributes refer to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data.strip()}" if data.strip() else ""


def test_runs_are_compared_in_one_file_that_loads_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a", done=True, **{"learner.steps": 5, "data.path": "same"})
    write_run(tmp_path / "runs/$b$<i>", steps=120, **{"learner.steps": HOSTILE, "data.path": "same"})
    arguments = ["report", "a", "$b$<i>", "--runs", str(tmp_path / "runs"), "--json"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    answer = json.loads(told.output)
    folder = tmp_path / "runs/a/report"
    assert answer["report"] == str(folder / "index.html")
    assert answer["runs"]["a"]["held-out accuracy after"] == "0.750"
    assert answer["runs"]["$b$<i>"]["steps"] == "120"
    page = Page(folder / "index.html")
    assert not {"script", "i", "link"} & page.tags
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "learner.steps 5" in page.text
    assert "data.path" not in page.text  # the same in both
    assert page.text.count("<script>alert(1)</script>") == 3  # as text: a setting, and an event of each
    assert "\x1b" not in page.text
    assert "time spent waiting 25% 25%" in page.text
    for name in ("learning", "optimisation", "asynchrony"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_one_run_shows_its_settings_and_events(tmp_path: Path) -> None:
    write_run(tmp_path / "a", **{"learner.steps": 5})
    told = CliRunner().invoke(app, ["report", str(tmp_path / "a"), "-o", str(tmp_path / "out")])
    page = Page(Path(told.output.strip()))
    assert "Settings not at their default" in page.text
    assert "learner.steps 5" in page.text
    assert "loss.name" not in page.text
    assert "not finished" in page.text
    assert "Last events" in page.text


@pytest.mark.parametrize(
    ("names", "words"),
    [(["none"], "in runs there are: a, b"), (["b"], "has not done a step yet"), (["a", "a"], "same name")],
)
def test_what_cannot_be_reported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/b", steps=0)
    told = CliRunner().invoke(app, ["report", *names])
    assert words in str(told.exception)


def test_the_log_is_kept_as_events_but_for_what_the_metrics_say(tmp_path: Path) -> None:
    handler = EventLog(tmp_path / "events.jsonl")
    for name, level in (("aspo_learner.report", "info"), ("aspo_learner.report", "warning"), ("x", "info")):
        number = logging.getLevelNamesMapping()[level.upper()]
        handler.emit(logging.LogRecord(name, number, "", 0, "actor %s\n{", ("a\x1b",), None))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["source"], event["level"]) for event in events] == [
        ("aspo_learner.report", "warning"),
        ("x", "info"),
    ]
    assert events[0]["message"] == r"actor a\x1b\n{"
    EventLog(tmp_path / "no" / "folder").emit(logging.LogRecord("x", 20, "", 0, "lost", (), None))
