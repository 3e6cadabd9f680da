"""A small user's project: a model, a Parquet file of chats, a reward function and a config."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aspo.config import ConfigError, load_config
from aspo_cli.processes import free_port
from aspo_cli.status import fetch_status
from models import char_tokenizer, save_model
from services import Service

REWARD = """
def sevens(completion, *, wanted, **columns):
    return completion.count(wanted) / max(1, len(completion))
"""
CONFIG = """
[run]
name = "{run}"
[redis]
url = "{redis_url}"
[model]
path = "start"
dtype = "float32"
[data]
path = "questions.parquet"
prompt_column = "messages"
reward_columns = ["wanted"]
[eval]
path = "questions.parquet"
every = 4
max_prompts = 8
[sampling]
group_size = 8
max_tokens = 12
[reward]
function = "my_reward:sevens"
concurrency = 1
[learner]
threads = 1
port = {port}
steps = 12
batch_prompts = 4
mini_batch_prompts = 4
learning_rate = 3e-3
warmup_updates = 0
weight_decay = 0.0
max_staleness = 2
checkpoint_every = 4
[actor]
id = "actor-0"
port = 0
learner_url = "http://127.0.0.1:{port}"
[actor.engine]
max_num_seqs = 32
max_model_len = 64
cpu_kv_cache_gib = 0.1
"""


def make_project(folder: Path, redis_url: str, *, run: str) -> Path:
    """Write the project: the reward is the share of sevens in the completion."""
    save_model(folder / "start", seed=3, hidden_size=64, layers=2, init_scale=0.05)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    tokenizer.save_pretrained(folder / "start")
    rows = [{"messages": [{"role": "user", "content": f"{i}+{i}"}], "wanted": "7"} for i in range(10, 26)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "questions.parquet")
    (folder / "my_reward.py").write_text(REWARD)
    (folder / "my.toml").write_text(CONFIG.format(run=run, redis_url=redis_url, port=free_port()))
    return folder


def learner_url(project: Path) -> str:
    """Where the project's learner serves."""
    return load_config(project / "my.toml").actor.learner_url


def step_of(url: str) -> int:
    """The learner's step, -1 while none answers."""
    try:
        return int(fetch_status(url)["step"])
    except ConfigError:
        return -1


def metrics_of(project: Path, run: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (project / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def post(url: str) -> None:
    """Tell a service something."""
    with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10):
        return


def aspo_weights(project: Path, url: str, *arguments: str) -> str:
    """Run `aspo weights` against a learner; gives what it printed."""
    command = Service(project, "weights", *arguments, "--learner", url)
    assert command.wait(60) == 0, command.text
    return command.text
