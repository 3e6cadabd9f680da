"""From an index to a prompt: every row once a pass, the same again after a restart, mixtures by weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aspo.config import Config, ConfigError
from aspo_learner.curriculum import Curriculum
from aspo_learner.data import Prompt
from aspo_learner.order import Mixture, Order, PromptOrder, Prompts, StreamedOrder
from models import char_tokenizer
from rollouts import write_config


def prompts_of(count: int, source: str = "") -> list[Prompt]:
    return [Prompt([i], {}, source) for i in range(count)]


def ids(order: Order, indices: Any) -> list[int]:
    return [order[index].token_ids[0] for index in indices]


class Source:
    """A set that counts how often it is read."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, 0

    def __iter__(self) -> Iterator[Prompt]:
        for prompt in prompts_of(self.count):
            self.read += 1
            yield prompt


def streamed(source: Any, block: int = 4, window: int = 8) -> StreamedOrder:
    return StreamedOrder(source, 7, block=block, window=window)


@given(count=st.integers(1, 30), block=st.integers(1, 9), start=st.integers(0, 90), window=st.integers(0, 20))
@settings(max_examples=100, deadline=None, database=None)
def test_a_stream_gives_every_row_once_a_pass_and_the_same_again(
    count: int, block: int, start: int, window: int
) -> None:
    whole = ids(streamed(prompts_of(count), block, window), range(120))
    for number in range(120 // count):
        assert sorted(whole[number * count : (number + 1) * count]) == list(range(count))
    restarted = streamed(prompts_of(count), block, window)
    assert ids(restarted, range(start, 120)) == whole[start:]
    backwards = streamed(prompts_of(count), block, window)
    assert ids(backwards, reversed(range(120))) == whole[::-1]


def test_a_stream_is_shuffled_in_blocks_anew_in_every_pass() -> None:
    order = streamed(prompts_of(400), block=100)
    first, second = ids(order, range(400)), ids(order, range(400, 800))
    assert first != list(range(400))
    assert first != second
    assert sorted(first[100:200]) == list(range(100, 200))


def test_a_stream_reads_no_further_than_asked_and_little_twice() -> None:
    source = Source(1000)
    order = streamed(source, block=10, window=20)
    ids(order, range(100))
    assert source.read == 100
    for index in range(100, 980):  # as the learner looks back, within the window
        order[index], order[index - 20]
    assert source.read == 980


def test_a_mixture_keeps_its_weights_and_goes_through_every_set_in_turn() -> None:
    parts = [prompts_of(50, "a"), prompts_of(3000, "b")]
    orders = [PromptOrder(part, 1, number) for number, part in enumerate(parts)]
    mixed = Mixture(orders, [3, 1], 1)
    drawn = [mixed[index] for index in range(8000)]
    counts = Counter(prompt.source for prompt in drawn)
    assert counts["a"] == pytest.approx(6000, abs=5 * np.sqrt(8000 * 0.75 * 0.25))
    for number, name in enumerate("ab"):
        of_set = [prompt.token_ids[0] for prompt in drawn if prompt.source == name]
        assert of_set == ids(orders[number], range(len(of_set)))
    again = Mixture([PromptOrder(part, 1, number) for number, part in enumerate(parts)], [3, 1], 1)
    assert [again[index] for index in (7999, 0, 1024, 1023)] == [drawn[i] for i in (7999, 0, 1024, 1023)]


def test_one_set_is_asked_for_as_ever() -> None:
    """Runs that were begun with an earlier release continue in the same order."""
    rows = np.random.default_rng([5, 2, 1]).permutation(9)
    assert ids(PromptOrder(prompts_of(9), 5), range(9, 18)) == rows.tolist()


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    for name, key, rows in (("sums", "prompt", 12), ("tasks", "question", 6)):
        lines = [json.dumps({key: "1+" * (i % 3) + "1=", "answer": str(i)}) for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sets = [
        {"path": str(tmp_path / "sums.jsonl")},
        {"path": str(tmp_path / "tasks.jsonl"), "columns": {"prompt": "question"}, "weight": 2, "name": "t"},
    ]

    def make(**data: Any) -> Config:
        config = write_config(tmp_path, model="m", run="r", redis_url="redis://", overrides=[])
        given = {"sets": sets, "max_prompt_tokens": 4, **data}
        return config.model_copy(update={"data": type(config.data)(**given)})

    return make


@pytest.mark.parametrize("streaming", [False, True])
def test_sets_of_a_config_are_mixed_filtered_and_counted(
    make_config: Callable[..., Config], tmp_path: Path, streaming: bool
) -> None:
    config = make_config(streaming=streaming, shuffle_block=4)
    prompts = Prompts(config, char_tokenizer(), room=10, folder=tmp_path)
    drawn = [prompts[index] for index in range(60)]
    assert {prompt.source for prompt in drawn} == {"sums", "t"}
    assert {len(prompt.token_ids) for prompt in drawn} == {2, 4}
    assert {p.reward_inputs["answer"] for p in drawn if p.source == "t"} == {"0", "1", "3", "4"}
    assert prompts.metrics() == {
        "prompts_read/sums": 12,
        "prompts_skipped/sums": 4,
        "prompts_read/t": 6,
        "prompts_skipped/t": 2,
    }
    again = Prompts(config, char_tokenizer(), room=10, folder=tmp_path)
    assert [again[index] for index in range(40, 60)] == drawn[40:]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"prompt_column": "question"},
            r"sums.jsonl has no column 'question' \(it has prompt, answer\); set",
        ),
        ({"reward_columns": ["answer", "hint"]}, "has no column 'hint'"),
        ({"max_prompt_tokens": 1}, r"sums.jsonl holds no usable prompt \(12 rows, 12 too long\)"),
    ],
)
def test_sets_that_cannot_be_used_are_named_at_the_start(
    make_config: Callable[..., Config], tmp_path: Path, data: dict[str, Any], words: str, streaming: bool
) -> None:
    if "prompt_column" in data:
        config = make_config(streaming=streaming)
        only = config.data.sets[0].model_dump()
        data = data | {"sets": [only]}
    with pytest.raises(ConfigError, match=words):
        Prompts(make_config(streaming=streaming, **data), char_tokenizer(), room=10, folder=tmp_path)


def curriculum(folder: Path, count: int = 60, block: int = 10) -> Curriculum:
    return Curriculum(prompts_of(count), (7,), block, folder / "curriculum.jsonl")


def test_a_curriculum_turns_to_what_is_sometimes_solved(tmp_path: Path) -> None:
    order = curriculum(tmp_path)
    assert all(len(set(ids(order, range(start, start + 10)))) == 10 for start in range(0, 200, 10))
    for row in range(60):
        order.observe(row, [0.0, 0.5, 1.0][row % 3])
    rows = ids(order, range(1000, 7000))
    shares = [sum(row % 3 == kind for row in rows) / len(rows) for kind in range(3)]
    # Without replacement in a block the shares are a little nearer each other than the weights 1 : 6 : 1.
    assert 0.6 < shares[1] < 0.75
    assert shares[0] == pytest.approx(shares[2], abs=0.03)


def test_what_a_curriculum_has_asked_it_asks_again(tmp_path: Path) -> None:
    asked = ids(curriculum(tmp_path), range(35))
    again = curriculum(tmp_path)
    again.observe(3, 1.0)  # measured since, and of no account for what was decided
    assert ids(again, range(35)) == asked
    path = tmp_path / "curriculum.jsonl"
    path.write_bytes(path.read_bytes()[:-3])  # a crash in the middle of the fourth line
    assert ids(curriculum(tmp_path), range(30)) == asked[:30]
    assert len(path.read_text().splitlines()) == 3
    assert ids(curriculum(tmp_path, count=8, block=4), range(8)) != asked[:8]  # another set: begun anew


def test_solve_rates_are_a_moving_mean_and_part_of_a_checkpoint(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(curriculum=True)
    prompts = Prompts(config, char_tokenizer(), room=10, folder=tmp_path)
    easy = next(prompt for index in range(100) if (prompt := prompts[index]).source == "sums")
    for rewards in ([1.0, 0.0], [1.0, 1.0]):
        prompts.observe([(easy, np.array(rewards, np.float32))])
    state = json.loads(json.dumps(prompts.state()))
    assert state == {"sums": {str(easy.row): 0.75}, "t": {}}
    again = Prompts(config, char_tokenizer(), room=10, folder=tmp_path)
    again.load_state(state | {"t": {"10000": 0.5}})
    assert again.state() == state
    assert [again[i] for i in range(100)] == [prompts[i] for i in range(100)]
