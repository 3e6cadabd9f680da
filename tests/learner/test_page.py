"""The live page in a real headless Chromium: it shows, follows, survives, and runs nothing it is told."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from pydantic import SecretStr

import aspo_learner.learner
from aspo.config import AuthConfig, Config
from aspo.schemas import RolloutGroup, VersionSpan
from aspo_cli.processes import free_port
from aspo_cli.services import hold_run
from browsing import Learner, actor, chromium, group, needs_chromium, opened
from models import save_model
from rollouts import write_config
from scripted import ScriptedActor
from services import wait_until

pytestmark = [
    needs_chromium,
    # Playwright's own event loop ends with the process.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TOKEN = AuthConfig(reader_token=SecretStr("reader"))
PHONE = {"width": 360, "height": 740}
HOSTILE = {
    100: "<script>document.title='broken'</script>",
    101: "<img src=x onerror=\"document.title='broken'\">",
    102: "\u202egnol\u2066\u0000\u001b[31m\u200b",
    103: "]]></textarea></style><svg onload=alert(1)>",
    104: "x" * 100_000,
    105: "Z" + "\u0335\u0489\u033f" * 500,
    106: "javascript:alert(1) ${1+1} {{1+1}}",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    """A learner with all that there is to show, at step 40."""
    return busy_learner(tmp_path, sampled=10)


def busy_learner(folder: Path, *, sampled: int) -> Learner:
    learner = Learner(folder, steps=40 - sampled)
    learner.publish(3)
    learner.actors = [actor(number) for number in range(3)]
    for step in range(41 - sampled, 41):
        learner.add(group(step, 0), group(step, 1))
    learner.ended = {"stale": 2, "undecodable": 1}
    learner.live.set_aside("mallory", "sums:train:3", "undecodable: the digest does not match")
    return learner


def go(page: Page, view: str) -> None:
    page.get_by_role("navigation", name="Views").get_by_role("link", name=view).click()


def figure(page: Page, name: str) -> str:
    return (
        page.locator(".figures > div", has=page.get_by_text(name, exact=True))
        .locator("dd")
        .first.inner_text()
    )


def test_it_signs_in_follows_the_run_and_finds_back_to_a_learner_that_restarts(
    browser: Browser, learner: Learner, tmp_path: Path
) -> None:
    with learner.serve(TOKEN) as server, opened(browser, server.url) as (page, faults):
        port = int(server.url.rpartition(":")[2])
        page.get_by_label("Reader token").fill("wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("refused")
        page.get_by_label("Reader token").fill("reader")
        page.get_by_role("button", name="Sign in").click()
        expect(page.locator("canvas").first).to_be_visible()
        expect(page.get_by_text("40 / 400")).to_be_visible()
        learner.add(group(41, 0))
        expect(page.get_by_text("41 / 400")).to_be_visible()
        page.get_by_text("Table of Entropy").click()
        expect(
            page.get_by_role("region", name="Entropy, last points").locator("tbody th").first
        ).to_have_text("41")
        assert figure(page, "reward") == f"{learner.metrics[-1]['reward']:.3f}"
        server.__exit__(None, None, None)
        expect(page.get_by_text("Reconnecting…")).to_be_visible()
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        again = Learner(tmp_path / "again", steps=37)  # it went on from its checkpoint
        with again.serve(TOKEN, port):
            expect(page.get_by_text("37 / 400")).to_be_visible()
            expect(page.get_by_role("alert")).to_have_count(0)
            expect(
                page.get_by_role("region", name="Entropy, last points").locator("tbody th").first
            ).to_have_text("37")
            page.get_by_role("button", name="Sign out").click()
            expect(page.get_by_label("Reader token")).to_be_visible()
            assert page.evaluate("sessionStorage.length") == 0
        assert not [fault for fault in faults if not fault.startswith("Failed to load resource")]


def test_rollouts_are_filtered_opened_and_read_by_keyboard(browser: Browser, learner: Learner) -> None:
    with learner.serve() as server, opened(browser, server.url) as (page, faults):
        go(page, "Rollouts")
        expect(page.locator(".list a")).to_have_count(100)
        page.get_by_role("button", name="Show more").click()
        expect(page.locator(".list a")).to_have_count(160)
        page.get_by_role("spinbutton", name="Step").fill("36")
        page.get_by_label("Advantage").select_option("positive")
        expect(page.locator(".found")).to_contain_text("of 160 rollouts kept")
        expect(page.locator(".list a").first).to_contain_text("step 36")
        page.locator(".list a").first.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Rollout of step 36")).to_be_focused()
        number = int(page.url.rpartition("/")[2])
        rollout = learner.live.samples.get(number)
        assert rollout is not None
        tokens = page.get_by_role("group", name="Completion")
        expect(tokens.locator(".t")).to_have_count(rollout.tokens)
        tokens.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        readout = page.locator(".readout")
        expect(readout).to_contain_text(f"3 of {rollout.tokens}")
        expect(readout).to_contain_text(f"{rollout.behavior[2]:.3f}"[:5])
        for mode, shown in (("weight", "clipped"), ("policy version", "1/36")):
            page.get_by_role("radio", name=mode).check()
            expect(page.locator(".scale")).to_contain_text(shown)
        page.get_by_role("button", name="Table", exact=True).click()
        expect(page.get_by_role("region", name="Tokens").locator("tbody tr")).to_have_count(rollout.tokens)
        page.get_by_role("button", name="Reset").click()
        learner.add(group(41, 0))
        page.get_by_role("button", name="Show newer").click()
        expect(page.locator(".list a").first).to_contain_text("step 41")
        assert faults == []


def hostile_group() -> RolloutGroup:
    source = group(41, 0, size=len(HOSTILE))
    ids = np.array([token for first in HOSTILE for token in (first, 1, 2)], dtype=np.int32)
    lengths = np.full(len(HOSTILE), 3, dtype=np.int32)
    spans = tuple((VersionSpan("sums/1/41", 3),) for _ in HOSTILE)
    return dataclasses.replace(
        source,
        token_ids=ids,
        lengths=lengths,
        prompt_ids=np.array(list(HOSTILE), dtype=np.int32),
        behavior_logprobs=np.full(len(ids), -1.0, dtype=np.float32),
        spans=spans,
        actor="<b>actor</b>\u202e",
    )


def test_what_strangers_wrote_is_shown_and_never_run(browser: Browser, tmp_path: Path) -> None:
    learner = Learner(tmp_path, steps=5, strange=HOSTILE)
    learner.actors = [actor(0, id=HOSTILE[100], state=HOSTILE[101], weight_plan=HOSTILE[102])]
    learner.live.set_aside(HOSTILE[101], HOSTILE[103], HOSTILE[102])
    learner.ended = {HOSTILE[100]: 1}
    learner.trouble = HOSTILE[101]
    learner.add(hostile_group())
    with learner.serve() as server, opened(browser, server.url, viewport=PHONE) as (page, faults):
        go(page, "Fleet")
        expect(page.get_by_role("rowheader", name="<script>")).to_be_visible()
        expect(page.get_by_text("\\u{202e}gnol\\u{2066}\\u{0}\\u{1b}[31m\\u{200b}").first).to_be_visible()
        go(page, "Rollouts")
        expect(page.locator(".list a")).to_have_count(len(HOSTILE))
        for number in range(len(HOSTILE)):
            page.goto(f"{server.url}/#rollouts/{number}")
            expect(page.locator(".tokens .t")).to_have_count(3)
            assert page.locator(".tokens .t").first.inner_text().replace("…", "")[:20]
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.locator(".tokens, .prompt, .excerpt").locator("script, img, svg, b, style").count() == 0
        text = page.locator("body").inner_text()
        assert not any(mark in text for mark in "\u202e\u2066\u0000\u200b")
        assert page.title() == "sums: Rollouts – ASPO"
        assert faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_any_view(browser: Browser, tmp_path: Path, scheme: str) -> None:
    axe, learner = Axe(), busy_learner(tmp_path, sampled=1)  # it looks at every element

    def check(page: Page) -> None:
        found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        assert grave == [], [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in grave]

    viewport = PHONE if scheme == "dark" else {"width": 1280, "height": 900}
    context = {"color_scheme": scheme, "viewport": viewport, "bypass_csp": True}  # axe is put in as a script
    with learner.serve(TOKEN) as server, opened(browser, server.url, **context) as (page, _):
        expect(page.get_by_label("Reader token")).to_be_focused()
        check(page)
        page.evaluate("sessionStorage.setItem('aspo.token', 'reader')")
        page.reload()
        expect(page.locator("canvas").first).to_be_visible()
        page.get_by_text("Table of Entropy").click()
        check(page)
        go(page, "Fleet")
        expect(page.get_by_role("region", name="Versions kept")).to_be_visible()
        check(page)
        go(page, "Rollouts")
        page.locator(".list a").first.click()
        for mode in ("log-prob difference", "weight", "policy version"):
            page.get_by_role("radio", name=mode).check()
            check(page)
        background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (background == "rgb(18, 19, 21)") == (scheme == "dark")
        page.get_by_label("Colours").select_option("light")
        lit = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert lit == "rgb(247, 247, 245)"
        server.__exit__(None, None, None)
        expect(page.get_by_role("alert")).to_be_visible()
        check(page)


def step_shown(page: Page) -> int:
    texts = page.locator(".progress span").all_inner_texts()
    return int(texts[0].partition("/")[0].replace(",", "")) if texts else 0


@contextmanager
def training(config: Config) -> Iterator[aspo_learner.learner.Learner]:
    """Have a real learner train in a thread, until the block ends."""
    fence = hold_run(config)
    learner = aspo_learner.learner.Learner(config, fence)
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(learner.run)
        try:
            yield learner
        finally:
            learner.controls.stop.set()
            run.result(60)
            fence.release()


def test_it_follows_a_real_run_through_a_restart(
    browser: Browser, redis_url: str, run: str, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{i}+1=", "answer": ""}}\n' for i in range(8)))
    config = write_config(
        tmp_path,
        model=save_model(tmp_path / "model", hidden_size=64, layers=1),
        run=run,
        redis_url=redis_url,
        data=prompts,
        overrides=["learner.steps=100000", f"learner.port={free_port()}"],
    )
    with ScriptedActor(redis_url, run, config.run.path), opened(browser, "about:blank") as (page, faults):
        with training(config):
            page.goto(f"http://127.0.0.1:{config.learner.port}")
            wait_until(lambda: step_shown(page) >= 6, 60)
            expect(page.locator("canvas").first).to_be_visible()
            go(page, "Rollouts")
            page.get_by_label("Advantage").select_option("positive")
            page.locator(".list a", has_text="A +").first.click()
            expect(page.locator(".tokens .t").first).to_have_text(re.compile(r"[0-9]"))
            assert page.locator(".tokens .t:not(.dna)").count() > 0, "it was trained on"
            go(page, "Fleet")
            expect(page.get_by_role("region", name="Versions kept")).to_contain_text("delta from")
        expect(page.get_by_text("Reconnecting…")).to_be_visible()
        before = step_shown(page)
        with training(config) as again:
            expect(page.get_by_text("Live", exact=True)).to_be_visible()
            wait_until(lambda: step_shown(page) > before + 2, 60)
            assert again.step > before
        assert not [fault for fault in faults if not fault.startswith("Failed to load resource")]


def test_a_run_that_has_not_begun_says_what_it_waits_for(browser: Browser, tmp_path: Path) -> None:
    learner = Learner(tmp_path)
    with learner.serve() as server, opened(browser, server.url) as (page, faults):
        expect(page.get_by_role("heading", name="No step has been trained yet")).to_be_visible()
        expect(page.get_by_text("aspo actor --config FILE")).to_be_visible()
        go(page, "Rollouts")
        expect(page.get_by_text("No rollout yet")).to_be_visible()
        learner.add(group(1, 0))
        expect(page.locator(".list a")).to_have_count(8)
        go(page, "Training")
        expect(page.locator("canvas").first).to_be_visible()
        assert faults == []
