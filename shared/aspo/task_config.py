"""The settings of what is learnt: prompts, held-out sets, sampling, rewards; sections of `aspo.config`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FunctionPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
Estimator = Literal["grpo", "dr-grpo", "rloo", "reinforce++"]
RewardStyle = Literal["plain", "trl", "trl-chat"]


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Section):
    """A data set and its columns."""

    path: str = Field(
        ...,
        min_length=1,
        description="A .jsonl, .json, .parquet or .csv file, a folder or a name that `datasets` loads.",
    )
    name: Name | None = Field(None, description="Name in the metrics; unset: the path's last part.")
    subset: str | None = Field(None, description="Configuration of a HF data set, such as 'main'.")
    split: str = Field("train", description="Split to read.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Its names of data.prompt_column and data.reward_columns, where they differ.",
    )

    @property
    def label(self) -> str:
        """The name in the metrics."""
        return self.name or self.path.rstrip("/").rpartition("/")[2].partition(".")[0] or "data"


class PromptSet(Source):
    """One data set to train on."""

    weight: float = Field(1.0, gt=0, le=1e6, description="Share of the prompts, relative to other sets.")


class EvalSet(Source):
    """One held-out data set, and how its prompts are answered."""

    k: int = Field(1, ge=1, le=1024, description="Answers to each prompt, for avg@k and pass@k.")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="Of the answers; 0 is greedy.")

    @model_validator(mode="after")
    def _varied(self) -> EvalSet:
        _require_varied(self.k, self.temperature)
        return self


class DataConfig(Section):
    """Where prompts come from and which columns mean what: one set, or a mixture of `sets`."""

    path: str | None = Field(None, min_length=1, description="The one set; see `sets`.")
    subset: str | None = Field(None, description="Configuration of a HF data set, such as 'main'.")
    split: str = Field("train", description="Split to read.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="The set's names of the columns below, where they differ."
    )
    sets: tuple[PromptSet, ...] = Field((), description="Several sets, mixed by weight, in place of the one.")
    streaming: bool = Field(False, description="Read as training goes on, shuffled in blocks, never whole.")
    shuffle_block: int = Field(4096, ge=1, description="Prompts shuffled together when streaming.")
    curriculum: bool = Field(
        False, description="Ask more often for prompts that are sometimes solved; see docs/tasks.md."
    )
    prompt_column: str = Field("prompt", description="A string, or a list of chat messages.")
    reward_columns: tuple[str, ...] = Field(("answer",), description="Columns handed to the reward function.")
    system_prompt: str | None = Field(None, min_length=1, description="System message put before prompts.")
    chat_template: bool | None = Field(
        None, description="Render prompts with the tokenizer's chat template; unset: when it has one."
    )
    chat_template_options: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the template, such as enable_thinking."
    )
    max_prompt_tokens: int | None = Field(None, ge=1, description="Longer prompts are left out, and counted.")
    overlong_prompts: Literal["error", "skip"] = Field(
        "error", description="What to do with a prompt that leaves no room for `sampling.max_tokens`."
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if (self.path is None) == (not self.sets):
            raise ValueError("set either data.path or data.sets, to say where the prompts come from")
        if self.sets and (single := {"subset", "split", "columns"} & self.model_fields_set):
            raise ValueError(f"data.{min(single)} is for data.path; set it in each of data.sets")
        if self.curriculum and self.streaming:
            raise ValueError("data.curriculum needs the whole set; unset it or data.streaming")
        _require_distinct("data.sets", self.mixture)
        for one in self.mixture:
            self.require_known(one.columns)
        return self

    def require_known(self, columns: Iterable[str]) -> None:
        """Raise ValueError for a column that is renamed and that nothing asks for."""
        known = (self.prompt_column, *self.reward_columns)
        for column in columns:
            if column not in known:
                raise ValueError(
                    f"columns names {column!r}, which is neither data.prompt_column nor in "
                    f"data.reward_columns ({', '.join(known)})"
                )

    @property
    def mixture(self) -> tuple[PromptSet, ...]:
        """The sets, or the one as a set."""
        if self.path is None:
            return self.sets
        one = PromptSet(path=self.path, subset=self.subset, split=self.split, columns=self.columns)
        return (one,)


class EvalConfig(Section):
    """Held-out evaluation by the actors, without stopping training: of one set, or of `sets`."""

    path: str | None = Field(None, description="Prompts as in `data`; without path and sets: no evaluation.")
    subset: str | None = Field(None, description="Configuration of a HF data set, such as 'main'.")
    split: str = Field("train", description="Split to read.")
    columns: dict[str, str] = Field(default_factory=dict, description="As in `data`.")
    k: int = Field(1, ge=1, le=1024, description="Answers to each prompt, for avg@k and pass@k.")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="Of the answers; 0 is greedy.")
    sets: tuple[EvalSet, ...] = Field((), description="Several sets, in place of the one.")
    right_above: float = Field(0.5, description="Answers with more reward are right, for pass@k.")
    answer_pattern: str | None = Field(
        None, min_length=1, description="Finds the answer that votes in majority@k; see docs/evaluation.md."
    )
    every: int = Field(20, ge=1, description="Learner steps between evaluations.")
    max_prompts: int = Field(
        256, ge=1, description="Prompts of each set used during training; before and after use all."
    )
    max_share: float = Field(
        0.05, gt=0, description="An evaluation is put off while the last one's tokens are a larger share."
    )
    stop_accuracy: Fraction | None = Field(
        None, description="Stop training once an evaluation, averaged over sets, reaches this."
    )
    min_steps: int = Field(0, ge=0, description="But not before this many steps.")

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        single = {"path", "subset", "split", "columns", "k", "temperature"} & self.model_fields_set
        if self.sets and single:
            raise ValueError(f"eval.{min(single)} is for one set; set it in each of eval.sets")
        _require_varied(self.k, self.temperature)
        _require_distinct("eval.sets", self.chosen)
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise ValueError(f"eval.answer_pattern is no regular expression: {error}") from None
        return self

    @property
    def chosen(self) -> tuple[EvalSet, ...]:
        """The sets, or the one as a set; none without a path."""
        if self.path is None:
            return self.sets
        one = EvalSet(
            path=self.path,
            subset=self.subset,
            split=self.split,
            columns=self.columns,
            k=self.k,
            temperature=self.temperature,
        )
        return (one,)


def _require_varied(k: int, temperature: float) -> None:
    if 0 < temperature < 0.01:
        raise ValueError(f"temperature {temperature} is not 0 (greedy) or at least 0.01")
    if k > 1 and temperature == 0:
        raise ValueError(f"k is {k}, and greedy answers are all the same; set temperature too, or k = 1")


def _require_distinct(setting: str, sets: Iterable[Source]) -> None:
    """Raise ValueError for two sets of one name."""
    labels = Counter(one.label for one in sets)
    if twice := [label for label, count in labels.items() if count > 1]:
        raise ValueError(f"two of {setting} are named {twice[0]!r}; give one a name of its own")


class SamplingConfig(Section):
    """How actors sample; top-p, top-k and penalties are off: they would falsify the behaviour log-probs."""

    group_size: int = Field(
        8, ge=2, le=1024, description="Completions per prompt; one alone has nothing to be compared with."
    )
    max_tokens: int = Field(256, ge=1, description="Longest completion, in tokens of the model.")
    temperature: float = Field(1.0, ge=0.01, le=2.0, description="Applied by actor and learner alike.")


class EnvironmentConfig(Section):
    """What answers the model between its turns; without a function a completion is one turn."""

    function: FunctionPath | None = Field(
        None, description="Import path `module:factory` of the environment; see docs/environments.md."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Arguments of the factory.")
    max_turns: int = Field(8, ge=1, le=128, description="Turns of the model in one conversation.")
    max_tokens: int = Field(
        1024, ge=1, description="Tokens it may say in one conversation; the model's are sampling.max_tokens."
    )
    role: Literal["user", "tool"] = Field(
        "user", description="In whose name it speaks, where there is a chat template."
    )
    timeout_s: float = Field(10.0, gt=0, description="A slower answer ends the conversation as failed.")
    loading_s: float = Field(120.0, gt=0, description="Time for a worker process to load it.")
    concurrency: int = Field(4, ge=1, le=256, description="Worker processes that run the environment.")

    @property
    def room(self) -> int:
        """Most tokens it may add to a completion."""
        return self.max_tokens if self.function else 0


class GroupsConfig(Section):
    """What a group of completions teaches."""

    advantage: Estimator = Field(
        "grpo", description="How rewards become advantages; reinforce++ is its variant with group baseline."
    )
    refill: int = Field(
        0,
        ge=0,
        le=100,
        description="Uninformative groups are replaced, at most so many batches of them for one batch.",
    )
    truncated: Literal["train", "mask"] = Field(
        "train", description="Whether completions cut at sampling.max_tokens are trained on."
    )


class RewardPart(Section):
    """One of several reward functions, whose weighted sum is the reward; its mean is logged by its name."""

    function: FunctionPath = Field(..., description="Import path `module:function`.")
    name: Name | None = Field(None, description="Name in the metrics; unset: the function's own.")
    weight: float = Field(1.0, ge=-1e3, le=1e3, description="Factor in the sum.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the function.")
    style: RewardStyle = Field(
        "plain",
        description="plain: f(completion, **columns); trl: f(prompts, completions, **columns) on texts, or "
        "on chat messages (trl-chat).",
    )

    @property
    def label(self) -> str:
        """The name in the metrics."""
        return self.name or self.function.partition(":")[2]


class CodeConfig(Section):
    """How code that a model wrote is run, by reward functions that ask for a sandbox."""

    sandbox: Literal["off", "bubblewrap", "none"] = Field(
        "off", description="none: limits only; the code can read files and reach the network."
    )
    wall_s: float = Field(5.0, gt=0, description="Time for one program.")
    cpu_s: int = Field(5, ge=1, description="CPU time of each of its processes.")
    memory_mib: int = Field(512, ge=64, description="Address space of each of its processes.")
    processes: int = Field(8, ge=1, description="Processes and threads, the first included.")
    files_mib: int = Field(16, ge=1, description="Its files together; it has nowhere else to write.")
    output_kib: int = Field(256, ge=1, description="Standard output that is read; more is dropped.")


class RewardConfig(Section):
    """Who scores a completion: one function, or the weighted sum of `parts`."""

    function: FunctionPath = Field(
        "aspo_actor.rewards:exact_match", description="Import path `module:function`."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the function.")
    style: RewardStyle = Field("plain", description="How the function is called; see `parts`.")
    parts: tuple[RewardPart, ...] = Field((), description="Several functions, in place of the one.")
    code: CodeConfig = CodeConfig()
    timeout_s: float = Field(10.0, gt=0, description="A slower call scores the sample as failed.")
    failed_score: float = Field(0.0, ge=-1e6, le=1e6, description="Reward of a sample whose scoring failed.")
    concurrency: int = Field(4, ge=1, le=256, description="Worker processes that run the reward function.")

    @model_validator(mode="after")
    def _consistent(self) -> RewardConfig:
        single = {"function", "options", "style"} & self.model_fields_set
        if self.parts and single:
            raise ValueError(f"reward.{min(single)} and reward.parts are both set; keep one")
        labels = Counter(part.label for part in self.parts)
        if twice := [label for label, count in labels.items() if count > 1]:
            raise ValueError(f"two reward.parts are named {twice[0]!r}; give one another name")
        if self.code.sandbox != "off" and self.code.wall_s >= self.timeout_s:
            raise ValueError(
                f"reward.code.wall_s ({self.code.wall_s}) reaches reward.timeout_s ({self.timeout_s}), which "
                "would fail the sample; lower it or raise reward.timeout_s"
            )
        return self

    @property
    def terms(self) -> tuple[RewardPart, ...]:
        """The parts, or the one function as a part of weight 1."""
        one = RewardPart(function=self.function, options=self.options, style=self.style)
        return self.parts or (one,)
