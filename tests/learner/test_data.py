"""Prompts from files of every kind, by the real `datasets` library, and errors that name the row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from aspo.config import ConfigError, DataConfig
from aspo_learner.data import Prompt, PromptReader, load_prompts
from models import char_tokenizer

ROWS = [{"prompt": "12+3=", "answer": "15"}, {"prompt": "4=", "answer": "4"}]


def load(config: DataConfig, tokenizer: Any, room: int) -> list[Prompt]:
    return load_prompts(PromptReader(config, config.mixture[0], tokenizer, room=room))


def write_jsonl(path: Path) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_csv(path: Path) -> None:
    pa.csv.write_csv(pa.Table.from_pylist(ROWS), path)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return char_tokenizer()


@pytest.mark.parametrize(
    ("name", "write"), [("rows.jsonl", write_jsonl), ("rows.parquet", write_parquet), ("rows.csv", write_csv)]
)
def test_files_of_every_kind_give_the_same_prompts(
    tmp_path: Path, tokenizer: Any, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    prompts = load(DataConfig(path=str(tmp_path / name)), tokenizer, 10)
    assert [tokenizer.decode(p.token_ids).replace(" ", "") for p in prompts] == ["12+3=", "4="]
    assert [str(p.reward_inputs["answer"]) for p in prompts] == ["15", "4"]


def test_a_folder_that_load_dataset_knows_will_do(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    assert len(load(DataConfig(path=str(tmp_path)), tokenizer, 10)) == 2


def test_chat_messages_are_rendered_with_the_template(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "1+2"}], "answer": "3"}))
    config = DataConfig(path=str(path), prompt_column="messages")
    [prompt] = load(config, tokenizer, 10)
    assert prompt.token_ids == tokenizer("1+2=")["input_ids"]
    with pytest.raises(ConfigError, match=r"set data\.chat_template = true"):
        load(config.model_copy(update={"chat_template": False}), tokenizer, 10)


def test_a_system_prompt_and_options_go_into_the_template(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '+' if m['role'] == 'system' else '' }}{{ m['content'] }}{% endfor %}"
        "{% if thinking %}={% endif %}"
    )
    messages = [{"role": "system", "content": "4"}, {"role": "user", "content": "1"}]
    rows = [{"q": "12", "a": "3"}, {"q": "5", "a": "6"}]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"q": messages, "a": "3"}))
    config = DataConfig(
        path=str(tmp_path / "texts.jsonl"),
        columns={"prompt": "q", "answer": "a"},
        system_prompt="7",
        chat_template_options={"thinking": True},
    )
    prompts = load(config, tokenizer, 10)
    assert [p.token_ids for p in prompts] == [tokenizer(text)["input_ids"] for text in ("+712=", "+75=")]
    assert [p.reward_inputs for p in prompts] == [{"answer": "3"}, {"answer": "6"}]
    [prompt] = load(config.model_copy(update={"path": str(tmp_path / "chats.jsonl")}), tokenizer, 10)
    assert prompt.token_ids == tokenizer("+41=")["input_ids"]  # its own system message stays


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_saved_by_the_library_will_do(tmp_path: Path, tokenizer: Any, streaming: bool) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    config = DataConfig(path=str(tmp_path / "saved"), streaming=streaming)
    assert [p.reward_inputs["answer"] for p in load(config, tokenizer, 10)] == ["15", "4"]


EXACT = [("007", "7"), ("2020-01-01", "3.5"), ("3", "1.50"), ("NA", "")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.CSV"])
def test_answers_are_what_the_file_says(tmp_path: Path, tokenizer: Any, name: str, streaming: bool) -> None:
    rows = [{"prompt": "1=", "a": a, "b": b} for a, b in EXACT]
    kinds = {
        "rows.jsonl": "".join(f"\n{json.dumps(row)}\r\n" for row in rows),
        "rows.json": f"\n {json.dumps(rows)}",
        "rows.CSV": "\ufeffprompt,a,b\r\n" + "".join(f"1=,{a},{b}\r\n" for a, b in EXACT),
    }
    (tmp_path / name).write_bytes(kinds[name].encode())
    config = DataConfig(path=str(tmp_path / name), reward_columns=["a", "b"], streaming=streaming)
    found = [(p.reward_inputs["a"], p.reward_inputs["b"]) for p in load(config, tokenizer, 10)]
    assert found == EXACT


def test_numbers_keep_their_kind_and_their_digits(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "1=", "answer": {n}}}\n' for n in ("3", "3.5", "-7", "9" * 30)))
    answers = [p.reward_inputs["answer"] for p in load(DataConfig(path=str(path)), tokenizer, 10)]
    assert answers == [3, 3.5, -7, "9" * 30], "what no task can carry is text"
    assert isinstance(answers[0], int)


def test_a_row_without_a_column_is_named_and_null_is_a_value(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1=", "answer": null}\n{"prompt": "2=", "answer": "2"}\n')
    assert [p.reward_inputs["answer"] for p in load(DataConfig(path=str(path)), tokenizer, 10)] == [None, "2"]
    path.write_text('{"prompt": "1=", "answer": "1"}\n{"prompt": "2="}\n')
    with pytest.raises(ConfigError, match=r"row 1, has no column 'answer' \(it has prompt\)"):
        load(DataConfig(path=str(path)), tokenizer, 10)


def test_why_a_set_cannot_be_read_is_said(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("no parquet")
    with pytest.raises(ConfigError, match="Parquet magic bytes not found"):
        load(DataConfig(path=str(path)), tokenizer, 10)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["1=", "2="], r'row 0: a message of the prompt is not {"role": ..., "content": ...}'),
        ([{"role": "user"}], "a message of the prompt is not"),
        ({"role": "user", "content": "1"}, "neither text nor a list of messages, but dict"),
        (12, "neither text nor a list of messages, but int"),
        (0, "neither text nor a list of messages, but int"),
        ([], "the prompt is empty"),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path: Path, tokenizer: Any, prompt: Any, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "answer": "1"}))
    with pytest.raises(ConfigError, match=words):
        load(DataConfig(path=str(path), system_prompt="7"), tokenizer, 10)


def test_a_malformed_line_far_into_a_stream_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n" * 2000 + "{")
    with pytest.raises(ConfigError, match="line 2001 is not JSON"):
        load(DataConfig(path=str(path), streaming=True), tokenizer, 10)


def test_long_prompts_are_an_error_or_skipped_and_counted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "rows.jsonl")
    config = DataConfig(path=str(tmp_path / "rows.jsonl"))
    with pytest.raises(ConfigError, match="row 0: the prompt has 5 tokens, but the context leaves 3"):
        load(config, tokenizer, 3)
    skipping = config.model_copy(update={"overlong_prompts": "skip"})
    assert len(load(skipping, tokenizer, 3)) == 1
    assert "rows: 1 prompts, skipped 1 too long" in caplog.text
    with pytest.raises(ConfigError, match="no usable prompt"):
        load(skipping, tokenizer, 1)


TABLES = [
    ("", "it holds no rows"),
    ("prompt,answer\n", "it holds no rows"),
    ("prompt,answer\n1=,1\n2=\n", "line 3 has not as many fields as the first line"),
    ("prompt,answer\n1=,1,1\n", "line 2 has not as many fields"),
    ('prompt,answer\n1=,"1\n', "unexpected end of data"),
    ("prompt,answer\n1=,\xff\n", "can't decode byte"),
]
LINES = [
    ("", "it holds no rows"),
    ("{not json}\n", "cannot read prompts from .* line 1 is not JSON"),
    (
        '{"prompt": "1=", "answer": "1"}\n{"prompt": "1=", "ans\n',
        r"line 2 is not JSON \(Invalid",
    ),
    ('{"prompt": "1=", "answer": "1"}\n\n[1]\n', "line 3 is JSON, but no object"),
    ('{"question": "1"}\n', "has no column 'prompt'"),
    ('{"prompt": "", "answer": "1"}\n', "row 0: the prompt is empty"),
    ('{"prompt": "1=", "answer": "1"}\n{"prompt": null, "answer": "1"}\n', "row 1: the prompt is empty"),
]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *(("rows.jsonl", *case) for case in LINES),
        *(("rows.csv", *case) for case in TABLES),
        ("rows.json", '[{"prompt": "1=",\n "answer": }]', "line 2 is not JSON"),
        ("rows.json", "[1]", "entry 1 is JSON, but no object"),
    ],
)
def test_a_broken_file_is_one_line(
    tmp_path: Path, tokenizer: Any, name: str, content: str, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=words) as caught:
        load(DataConfig(path=str(path)), tokenizer, 10)
    assert "\n" not in str(caught.value)


def test_an_unknown_data_set_is_one_line(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"cannot read prompts from 'nobody/nothing', split 'train'"):
        load(DataConfig(path="nobody/nothing"), tokenizer, 10)
