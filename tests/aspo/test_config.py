"""Configuration: precedence, bounds, and one-line errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from aspo.config import ConfigError, load_config
from aspo.hello import own_hello


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npath = "m"\n[data]\npath = "d.jsonl"\n[learner]\nsteps = 5\n')
    return path


def test_overrides_beat_the_environment_beats_the_file_beats_the_default(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_config(config_file).learner.steps == 5
    monkeypatch.setenv("ASPO_LEARNER__STEPS", "6")
    monkeypatch.setenv("ASPO_LEARNER__BATCH_PROMPTS", "128")
    config = load_config(config_file, ["learner.steps=7", "run.name=my-run"])
    assert (config.learner.steps, config.learner.batch_prompts, config.run.name) == (7, 128, "my-run")
    assert config.learner.mini_batch_prompts == 16


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.lerning_rate=1", "did you mean 'learning_rate'"),
        ("lerner.steps=1", "did you mean 'learner'"),
        ("learner.steps=0", "learner.steps.*greater than or equal to 1"),
        ("learner.steps=many", "learner.steps.*valid integer"),
        ("loss.name=ppo", "loss.name"),
        ("learner.mini_batch_prompts=1000", "exceeds batch_prompts"),
        ("learner.staleness_policy=keep", "learner.staleness_policy.*drop.*mask.*decay"),
        ("learner.staleness_decay=1", "learner.staleness_decay.*less than 1"),
        ("run.name=../etc", "run.name"),
        ("weights.publish_every=9", "all data would be too stale; lower it or raise max_staleness"),
        ("auth.operator_token=''", "auth.operator_token"),
        ("auth.reader_token=r", "no actor could fetch weights; set auth.actor_token"),
        ("reward.failed_score=inf", "reward.failed_score"),
        ("learner.betas=[1.0, 1.0]", "learner.betas"),
        ("no-equals-sign", "write it as section.key=value"),
        ("reward.function=os.system", "reward.function"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(config_file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(config_file, [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_variable_is_refused(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASPO_LEARNER__STEEPS", "1")
    with pytest.raises(ConfigError, match="ASPO_LEARNER__STEEPS names no setting"):
        load_config(config_file)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file at"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    for text in ("[model\n", f"[learner]\nsteps = {'9' * 5000}\n", f"x = {'[' * 5000}{']' * 5000}\n"):
        broken.write_text(text)
        with pytest.raises(ConfigError, match="not valid TOML"):
            load_config(broken)


def test_an_override_beyond_reason_is_text(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--set: 'learner\.steps'"):
        load_config(config_file, [f"learner.steps={'9' * 5000}"])


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"'model' is not set; add it; 'data' is not set"):
        load_config(path)


def test_an_environment_takes_room_and_is_agreed_on_only_where_there_is_one(config_file: Path) -> None:
    plain = load_config(config_file, ["environment.max_tokens=64"])
    spoken = load_config(config_file, ["environment.function=m:Env", "environment.max_tokens=64"])
    assert (plain.longest_completion, spoken.longest_completion) == (256, 320)
    assert "environment.function" not in own_hello(load_config(config_file), {}).settings
    assert own_hello(spoken, {}).settings["environment.function"] == "m:Env"
    assert own_hello(spoken, {}).stamp != own_hello(load_config(config_file), {}).stamp
    with pytest.raises(ConfigError, match="those of the environment included; lower one"):
        load_config(config_file, ["environment.function=m:Env", "environment.max_tokens=1000000"])


def test_settings_are_frozen_and_tokens_do_not_show(config_file: Path) -> None:
    config = load_config(config_file, ["auth.operator_token=hunter2"])
    assert "hunter2" not in repr(config)
    with pytest.raises(ValueError, match="frozen"):
        config.learner.steps = 3  # type: ignore[misc]


def test_tokens_are_read_from_files(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("  hunter2\n")
    monkeypatch.setenv("ASPO_AUTH__ACTOR_TOKEN_FILE", str(tmp_path / "token"))
    config = load_config(config_file, ["auth.operator_token=other"])
    assert config.auth.tokens == {"actor": "hunter2", "operator": "other"}
    assert "hunter2" not in repr(config)
    assert "hunter2" not in config.model_dump_json()


def test_a_token_file_that_holds_no_token_is_named(config_file: Path, tmp_path: Path) -> None:
    for name, content in (("empty", b" \n"), ("binary", b"\xff\xfe"), ("token", b"hunter2")):
        (tmp_path / name).write_bytes(content)
    file = f"auth.actor_token_file={tmp_path}"
    for overrides, words in (
        ([f"{file}/none"], r"auth\.actor_token_file: cannot read .*none \(No such file"),
        ([file], r"auth\.actor_token_file: cannot read .*Is a directory"),
        ([f"{file}/empty"], "empty is empty; put a token in it"),
        ([f"{file}/binary"], "it is no text file"),
        (["auth.actor_token_file=3"], r"auth\.actor_token_file: cannot read 3"),
        ([f"{file}/token", "auth.actor_token=hunter2"], "are both set; keep one"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            load_config(config_file, overrides)
        assert "\n" not in str(caught.value)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["auth=8675309"],
        ["auth.actor_token=8675309"],
        ["auth.actor_token=a8675309", "auth.actor_token.x=8675309"],
        ["redis=8675309"],
        ["redis.url=8675309"],
    ],
)
def test_an_error_shows_no_secret(config_file: Path, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, overrides)
    assert "8675309" not in str(caught.value)


def test_what_rewards_depend_on_is_said_and_what_older_releases_lack_is_not(config_file: Path) -> None:
    """A rollout's stamp outlives an upgrade: with the settings of old it is what it was."""
    hello = own_hello(load_config(config_file), {})
    assert hello.stamp == "134998f6881692ef"
    parts = 'reward.parts=[{function = "a:f"}, {function = "b:f", name = "second", weight = 2}]'
    other = own_hello(load_config(config_file, [parts]), {})
    assert other.settings["reward.parts"] == [
        {"function": "a:f"},
        {"function": "b:f", "name": "second", "weight": 2.0},
    ]
    assert other.stamp != hello.stamp


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (['reward.parts=[{function = "a:f"}, {function = "b:f"}]'], "two reward.parts are named 'f'"),
        (
            ['reward.parts=[{function = "a:f"}]', "reward.function=a:f"],
            "reward.function and reward.parts are",
        ),
        (["reward.code.sandbox=bubblewrap", "reward.code.wall_s=10"], "raise reward.timeout_s"),
        (["reward.code.sandbox=docker"], "reward.code.sandbox.*'off', 'bubblewrap' or 'none'"),
    ],
)
def test_rewards_that_contradict_themselves_are_named(
    config_file: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(config_file, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (['data.sets=[{path = "a.jsonl"}]'], "set either data.path or data.sets"),
        (["data.path=''"], "data.path"),
        (["data.curriculum=true", "data.streaming=true"], "data.curriculum needs the whole set"),
        (['data.columns={prompt = "q", solution = "s"}'], "columns names 'solution', which is neither"),
        (['eval.columns={solution = "s"}'], "columns names 'solution', which is neither"),
        (['eval.sets=[{path = "a", columns = {solution = "s"}}]'], "columns names 'solution', which is"),
        (['eval.sets=[{path = "a/b.jsonl"}, {path = "c/b.csv"}]'], "two of eval.sets are named 'b'"),
        (["eval.path=a", 'eval.sets=[{path = "b"}]'], "eval.path is for one set"),
        (["eval.k=4", 'eval.sets=[{path = "b"}]'], "eval.k is for one set"),
        (["eval.path=a", "eval.k=4"], "greedy answers are all the same; set temperature too, or k = 1"),
        (['eval.sets=[{path = "b", k = 4}]'], "greedy answers are all the same"),
        (["eval.temperature=0.001"], "temperature 0.001 is not 0"),
        (["eval.answer_pattern=("], "eval.answer_pattern is no regular expression"),
        (['eval.sets=[{path = "b", k = 512, temperature = 1.0}]', "sampling.max_tokens=9000"], "lower one"),
    ],
)
def test_prompts_that_cannot_be_meant_are_named(config_file: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(config_file, overrides)
    assert "\n" not in str(caught.value)


def test_a_mixture_is_checked_as_one_set_is(tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    sets = '[[data.sets]]\npath = "x/a.jsonl"\n[[data.sets]]\npath = "{second}"\n'
    text = '[model]\npath = "m"\n[data]\n{more}' + sets
    path.write_text(text.format(more="", second="hub/b"))
    assert [one.label for one in load_config(path).data.mixture] == ["a", "b"]
    path.write_text(text.format(more="", second="y/a.csv"))
    with pytest.raises(ConfigError, match=r"two of data\.sets are named 'a'"):
        load_config(path)
    path.write_text(text.format(more='split = "test"\n', second="b"))
    with pytest.raises(ConfigError, match=r"data\.split is for data\.path; set it in each of data\.sets"):
        load_config(path)
