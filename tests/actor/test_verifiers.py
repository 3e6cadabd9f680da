"""The adapter for `verifiers`, on the package itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aspo_actor.environments.host import Answer, Opening, answer, unpack
from aspo_actor.environments.verifiers import load, message_of, rubric, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore")  # of many things that only verifiers can mend
CONVERSATION = "aspo_actor.environments.verifiers:Conversation"


@pytest.fixture
def row(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    write_prompts("vf-tasks", tmp_path / "prompts.jsonl", json.dumps({"kind": request.param}))
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert len(lines) == 2
    found: dict[str, Any] = json.loads(lines[0])
    return found


def ask(row: dict[str, Any], kind: str, state: bytes | None, text: str, **args: Any) -> Answer | str:
    """The very call that a worker makes."""
    options = {"env_id": "vf-tasks", "env_args": {"kind": kind} | args}
    return answer(CONVERSATION, options, Opening("", row), state, text)


def play(row: dict[str, Any], kind: str, *said: str) -> list[Answer]:
    """What the environment makes of turns, one after the other."""
    answers: list[Answer] = []
    for text in said:
        found = ask(row, kind, answers[-1].state if answers else None, text)
        assert isinstance(found, Answer), found
        answers.append(found)
    return answers


def score(row: dict[str, Any], kind: str, turns: Sequence[str], state: Any = None) -> float:
    options = {"env_id": "vf-tasks", "env_args": {"kind": kind}}
    return asyncio.run(rubric(turns[-1], turns=turns, environment_state=state, **options, **row))


@pytest.mark.parametrize("row", ["single"], indirect=True)
def test_a_single_answer_is_scored_by_the_rubric(row: dict[str, Any]) -> None:
    assert row["prompt"] == [
        {"content": "Be brief.", "role": "system"},
        {"content": "6*7?", "role": "user"},
    ]
    assert score(row, "single", ["It is 42."]) == 1.375
    assert score(row, "single", ["No idea."]) == 0.375


@pytest.mark.parametrize("row", ["game"], indirect=True)
def test_a_game_is_played_turn_by_turn(row: dict[str, Any]) -> None:
    first, second, last = play(row, "game", "40", "41", "42")
    assert [first.reply, second.reply] == [
        [{"role": "user", "content": f"No, that is wrong ({count})."}] for count in (1, 2)
    ]
    assert (first.done, second.done, last.done) == (False, False, True)
    state = unpack(last.state)
    assert [len(step["prompt"]) for step in state["rollout"]["trajectory"]] == [2, 4, 6]
    assert state["rollout"]["wrong"] == 2
    turns = ["40", "No, that is wrong (1).", "41", "No, that is wrong (2).", "42"]
    assert score(row, "game", turns, state) == 1.125
    # One that was cut before the environment saw its last turn is scored with it.
    assert (
        score(row, "game", [*turns[:3], "No, that is wrong (2).", "It is 42"], unpack(second.state)) == 1.125
    )


@pytest.mark.parametrize("row", ["game"], indirect=True)
def test_the_environments_own_end_ends_the_conversation(row: dict[str, Any]) -> None:
    *_, last = play(row, "game", "1", "2", "3")
    assert last.done
    assert score(row, "game", ["1", "", "2", "", "3"], unpack(last.state)) == 0.125


@pytest.mark.parametrize("row", ["game"], indirect=True)
def test_a_state_that_is_no_plain_data_is_a_failure_that_says_so(row: dict[str, Any]) -> None:
    fault = ask(row, "game", None, "42", tricks=True)
    assert isinstance(fault, str)
    assert "its state is not plain data" in fault


@pytest.mark.parametrize("row", ["tool"], indirect=True)
def test_a_tool_is_called_and_answers(row: dict[str, Any]) -> None:
    call = 'So: <tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call>'
    first, last = play(row, "tool", call, "It is 42.")
    assert first.reply == [{"role": "tool", "content": "42", "tool_call_id": "call_0"}]
    assert last.done
    assert score(row, "tool", [call, "42", "It is 42."], unpack(last.state)) == 1.375


def test_only_what_is_well_written_is_a_call() -> None:
    assert message_of("<tool_call>{bad}</tool_call>") == {
        "role": "assistant",
        "content": "<tool_call>{bad}</tool_call>",
    }
    assert message_of('<tool_call>{"name": "f"}</tool_call>')["tool_calls"][0]["function"] == {
        "name": "f",
        "arguments": "{}",
    }


def test_an_environment_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="Could not import"):
        load("vf-no-such-thing", "{}")
