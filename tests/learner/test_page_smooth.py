"""The live page and its learner under load: first paint, size, long tasks, and what it takes of a step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from aspo_learner.live import page_files
from aspo_learner.policy import load_policy
from aspo_learner.ranks import ALONE
from aspo_learner.samples import KEPT, Samples
from aspo_learner.token_traces import Tracer
from aspo_learner.trainer import Trainer
from browsing import Learner, actor, chromium, group, needs_chromium, opened
from models import save_model
from rollouts import make_group, write_config

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore::ResourceWarning")]
STEPS, LONGEST = 10_000, 8192


@pytest.fixture
def busy(tmp_path: Path) -> Learner:
    """A learner of 10,000 steps that holds as many rollouts as it may, the newest of them very long."""
    learner = Learner(tmp_path, steps=STEPS)
    learner.publish(3)
    learner.actors = [actor(number) for number in range(32)]
    for step in range(STEPS - KEPT // 32 - 1, STEPS):
        learner.live.samples.keep(step, [group(step, n) for n in range(4)], {})
    learner.live.samples.keep(STEPS, [group(STEPS, 0, tokens=LONGEST)], {})
    return learner


def longest_tasks(trace: Path) -> list[float]:
    """Milliseconds of the longest tasks of the page's own thread, the longest first, but for the driver's.

    What Playwright asks of the page (roles and names of thousands of elements) runs in that thread as well,
    as messages to DevTools. What it does by mouse and keyboard is the page's, and comes as a user's does.
    """
    events = json.loads(trace.read_bytes())["traceEvents"]
    main = {(e["pid"], e["tid"]) for e in events if e.get("args", {}).get("name") == "CrRendererMain"}
    tasks: dict[tuple[int, int], list[tuple[float, float]]] = {thread: [] for thread in main}
    asked: dict[tuple[int, int], list[float]] = {thread: [] for thread in main}
    for event in events:
        thread = event.get("pid"), event.get("tid")
        if event["name"] == "RunTask" and "dur" in event and thread in tasks:
            tasks[thread].append((event["ts"], event["ts"] + event["dur"]))
        tag = event.get("args", {}).get("chrome_mojo_event_info", {}).get("mojo_interface_tag", "")
        if tag.startswith("blink.mojom.DevTools") and thread in asked:
            asked[thread].append(event["ts"])
    assert any(asked.values()), "no message of the driver was told apart"
    own = [
        (end - start) / 1e3
        for thread, spans in tasks.items()
        for start, end in spans
        if not any(start <= moment < end for moment in asked[thread])
    ]
    return sorted(own, reverse=True)[:3]


def use(page: Any, learner: Learner) -> None:
    """Look at everything, while steps go on."""
    for _ in range(5):
        learner.metrics.append(learner.metrics[-1] | {"step": learner.metrics[-1]["step"] + 1})
        expect(page.get_by_text(f"{len(learner.metrics):,} / ")).to_be_visible()
    for label in ("Last 1,000", "Last 100", "All"):
        page.get_by_role("button", name=label).click()
        expect(page.get_by_role("button", name=label)).to_have_attribute("aria-pressed", "true")
    place = page.locator(".plot").first.bounding_box()
    page.mouse.move(place["x"] + 100, place["y"] + 60)
    page.mouse.down()
    page.mouse.move(place["x"] + 220, place["y"] + 60, steps=10)
    page.mouse.up()
    expect(page.get_by_role("button", name="Steps")).to_be_visible()
    page.get_by_role("link", name="Fleet").click()
    expect(page.get_by_role("region", name="Actors alive")).to_be_visible()
    page.get_by_role("link", name="Rollouts").click()
    for pages in range(1, 11):
        expect(page.locator(".list a")).to_have_count(100 * pages)
        page.get_by_role("button", name="Show more").click()
    page.locator(".list a").first.click()
    expect(page.locator(".tokens .t").nth(LONGEST // 2 - 1)).to_be_attached()
    page.get_by_role("radio", name="policy version").check()
    page.get_by_label("Search").click()
    page.keyboard.type("seven is")
    expect(page.locator(".found")).to_contain_text(f"of {KEPT:,}")


@needs_chromium
def test_the_page_is_quick_to_show_and_smooth_at_ten_thousand_steps(busy: Learner, tmp_path: Path) -> None:
    with chromium() as browser, busy.serve() as server:
        paint = first_paint(browser, server.url)
        with opened(browser, server.url, viewport={"width": 1360, "height": 900}) as (page, faults):
            browser.start_tracing(
                page=page,
                path=tmp_path / "trace.json",
                categories=["toplevel", "disabled-by-default-devtools.timeline", "__metadata"],
            )
            page.reload()
            expect(page.locator("canvas").first).to_be_visible()
            use(page, busy)
            browser.stop_tracing()
            assert faults == []
    tasks, size = longest_tasks(tmp_path / "trace.json"), sum(map(len, page_files().values()))
    print(f"first paint {paint:.0f} ms, longest tasks {tasks} ms, {size:,} bytes")
    assert len(tasks) == 3
    assert paint < 1000
    assert tasks[0] < 200
    assert size < 300_000


def first_paint(browser: Browser, url: str) -> float:
    """Milliseconds until something is shown, with nothing in the browser's cache."""
    with opened(browser, url) as (page, _):
        expect(page.locator("canvas").first).to_be_visible()
        script = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        return float(page.evaluate(script))


@contextmanager
def timed(kind: type, *names: str) -> Iterator[Callable[[], float]]:
    """Add up the seconds that are spent in methods of a class."""
    spent = 0.0

    def timing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal spent
            begun = time.perf_counter()
            try:
                return method(*given, **named)
            finally:
                spent += time.perf_counter() - begun

        return call

    with patch.multiple(kind, **{name: timing(getattr(kind, name)) for name in names}):
        yield lambda: spent


def test_samples_take_less_than_a_hundredth_of_a_step(tmp_path: Path) -> None:
    """Of the demo's size of model and batch, which is the least that is trained."""
    model = save_model(tmp_path / "model", hidden_size=128, layers=4)
    settings = ["learner.batch_prompts=32", "learner.mini_batch_prompts=32", "sampling.group_size=8"]
    config = write_config(tmp_path, model=model, overrides=settings)
    trainer = Trainer(load_policy(config, ALONE), config)
    samples = Samples(trainer.policy.tokenizer)
    batch = [make_group(trainer.policy.model, uid=f"u{seed}", size=8, seed=seed) for seed in range(32)]
    trainer.train_step(batch)
    shares, seconds = [], []
    for step in range(10):
        with timed(Tracer, "add", "traces") as tracing, timed(Samples, "keep") as keeping:
            begun = time.perf_counter()
            trainer.train_step(batch)
            samples.keep(step, batch, trainer.token_traces)
            whole = time.perf_counter() - begun
        shares.append((tracing() + keeping()) / whole)
        seconds.append(whole)
    share = float(np.median(shares))
    print(f"samples take {share:.2%} of a step of {np.median(seconds):.3f} s")
    assert share < 0.01
