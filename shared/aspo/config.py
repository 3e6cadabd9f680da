"""Configuration: one TOML file that the learner and every actor read, `ASPO_*` variables and `--set` over it.

    settings = load_config(Path("my.toml"), overrides=["learner.learning_rate=1e-5"])

Precedence: `--set` > environment (`ASPO_LEARNER__LEARNING_RATE=1e-5`) > TOML > defaults. Unknown keys are
refused.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from aspo import failpoints
from aspo.errors import AspoError
from aspo.lora_config import LoraConfig
from aspo.network_config import AuthConfig as AuthConfig
from aspo.network_config import HttpConfig as HttpConfig
from aspo.network_config import Port
from aspo.network_config import RedisConfig as RedisConfig
from aspo.task_config import CodeConfig as CodeConfig
from aspo.task_config import DataConfig as DataConfig
from aspo.task_config import EnvironmentConfig as EnvironmentConfig
from aspo.task_config import Estimator as Estimator
from aspo.task_config import EvalConfig as EvalConfig
from aspo.task_config import EvalSet as EvalSet
from aspo.task_config import Fraction, Name, Section
from aspo.task_config import GroupsConfig as GroupsConfig
from aspo.task_config import PromptSet as PromptSet
from aspo.task_config import RewardConfig as RewardConfig
from aspo.task_config import RewardPart as RewardPart
from aspo.task_config import SamplingConfig as SamplingConfig
from aspo.task_config import Source as Source
from aspo.watch_config import TrackersConfig as TrackersConfig

ENV_PREFIX = "ASPO_"
ENV_DELIMITER = "__"
MAX_GROUP_TOKENS = 2**22  # of one rollout group; what the codec carries
TOKEN_VARIABLE = "ASPO_TOKEN"  # what the command line sends; no setting of the services
_SECRET_SECTIONS = {"auth", "redis"}  # whose values are never shown
_OTHER_VARIABLES = {TOKEN_VARIABLE, failpoints.VARIABLE}

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Precision = Literal["auto", "fp32", "bf16"]
StalenessPolicy = Literal["drop", "mask", "decay"]


class ConfigError(AspoError, ValueError):
    """A setting that the user must mend; its text is one line that says which and how."""


class RunConfig(Section):
    """What is being run and where it is kept."""

    name: Name = Field("default", description="Names versions, keys and folders.")
    dir: Path = Field(Path("runs"), description="Parent folder of the run's folder.")
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seeds the data order, the learner and the actors' engines."
    )

    @property
    def path(self) -> Path:
        """The run's own folder."""
        return self.dir / self.name


class ModelConfig(Section):
    """The policy: any folder or name that `from_pretrained` loads."""

    path: str = Field(..., min_length=1, description="Model folder or hub name to start from.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16",
        description="Type in which weights are published and actors run; the learner keeps fp32 masters.",
    )


class LossConfig(Section):
    """The objective; see docs/concepts.md for the ratios. What is unset takes the loss's own default."""

    name: Literal["aspo", "no-is", "response-mean", "ratio", "grpo", "dapo", "cispo", "gspo"] = Field(
        "aspo", description="ASPO, its ablations, or a peer's loss on the same interface."
    )
    eps_low: float | None = Field(
        None, ge=0, le=1, description="Hard clip of negative tokens: r >= 1 - eps_low."
    )
    eps_high: float | None = Field(None, ge=0, description="Hard clip of positive tokens: r <= 1 + eps_high.")
    dual_clip_pos: float | None = Field(None, gt=1, description="Soft cap of the weight of positive tokens.")
    dual_clip_neg: float | None = Field(None, gt=1, description="Soft cap of the weight of negative tokens.")
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] | None = Field(
        None, description="Over the whole mini-batch, whatever the micro-batches."
    )
    ratio_reference: Literal["behavior", "proximal"] = Field(
        "behavior",
        description="Denominator of r: the sampler's own log-probs, or a recompute at the batch's start.",
    )
    proximal_source: Literal["recompute", "loglinear"] = Field(
        "recompute",
        description="Proximal log-probs: a forward pass, or between the sampler's and the policy's by lag.",
    )
    behavior_correction: Literal["truncate", "mask", "none"] = Field(
        "truncate", description="Weight by s = proximal/behavior; only with ratio_reference = 'proximal'."
    )
    correction_level: Literal["token", "sequence"] = Field("token", description="Granularity of s.")
    entropy_split_clip: bool = Field(
        False, description="Reference code's 0.2/0.4 clip split by token entropy."
    )
    kl_coefficient: float = Field(
        0.0, ge=0, description="K3 KL to the initial policy; > 0 loads a reference model."
    )


class LearnerConfig(HttpConfig):
    """Optimisation and cadence."""

    _prefix = "learner."

    device: str = Field("auto", description="cpu, cuda, cuda:N; auto takes a GPU when there is one.")
    threads: int | None = Field(None, ge=1, description="CPU threads of the learner; unset: torch's choice.")
    steps: int = Field(1000, ge=1, description="Rollout batches to train on.")
    batch_prompts: int = Field(64, ge=1, description="Prompt groups per rollout batch.")
    mini_batch_prompts: int = Field(16, ge=1, description="Prompt groups per optimizer update.")
    epochs: int = Field(1, ge=1, description="Passes over a rollout batch.")
    micro_batch_tokens: int = Field(16384, ge=1, description="Tokens packed into a forward pass.")
    precision: Precision = Field(
        "auto", description="Of the products: fp32, bf16 (sums and weights stay fp32); auto: bf16 on a GPU."
    )
    activation_checkpointing: bool = Field(
        False, description="Compute the layers again in backward: less memory, about a third more time."
    )
    offload: bool = Field(
        False, description="Keep weights, gradients and AdamW's state in the CPU's memory, layers on the GPU."
    )
    lora: LoraConfig | None = Field(None, description="Train adapters alone; unset: all weights.")
    shard_size: int | None = Field(
        None, ge=1, description="Under torchrun, processes that share a copy of the weights; unset: all."
    )
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    warmup_updates: int = Field(10, ge=0, description="Linear warm-up, in optimizer updates.")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="After the warm-up: constant, or a cosine down to a tenth at the last step."
    )
    max_skipped_updates: int = Field(
        5, ge=1, description="Gradients in a row that are not finite before the run stops."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW betas.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping.")
    max_staleness: int = Field(
        4, ge=0, description="Versions a rollout may lag; also bounds the tasks in flight."
    )
    staleness_policy: StalenessPolicy = Field(
        "drop",
        description="Past max_staleness: drop the group, mask its late tokens, or decay their weight.",
    )
    staleness_decay: float = Field(
        0.5, gt=0, lt=1, description="Under decay, the factor on a token's weight for each version past."
    )
    checkpoint_every: int = Field(
        10, ge=1, description="Steps between durable checkpoints; rollouts are kept till then."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept.")
    keep_serving: bool = Field(
        False, description="When the steps are done, serve status and weights until told to stop."
    )
    port: Port = Field(8000, description="Port to serve on; 0 picks a free one.")

    @model_validator(mode="after")
    def _whole_mini_batches(self) -> LearnerConfig:
        if self.mini_batch_prompts > self.batch_prompts:
            raise ValueError(
                f"mini_batch_prompts ({self.mini_batch_prompts}) exceeds batch_prompts "
                f"({self.batch_prompts}); lower it"
            )
        if self.lora is not None and self.offload:
            raise ValueError("learner.lora and learner.offload exclude each other; unset one")
        return self


class WeightsConfig(Section):
    """The learner's version store."""

    publish_every: int = Field(1, ge=1, description="Steps between published versions.")
    keep: int = Field(8, ge=2, description="Newest versions kept for download; older ones answer 410.")
    snapshot_every: int = Field(16, ge=1, description="Versions between snapshots; the rest are deltas.")


class CanaryConfig(Section):
    """A trial of every version with one actor before the others get it."""

    enabled: bool = Field(False, description="Try every version; raise learner.max_staleness with it.")
    max_kl: float = Field(0.5, gt=0, description="Largest KL from the version before, nats per token.")
    max_reward_drop: float = Field(0.5, gt=0, description="Largest fall of the mean reward.")
    groups: int = Field(4, ge=0, description="Groups whose reward is compared; 0 compares none.")
    timeout_s: float = Field(60.0, gt=0, description="Seconds after which a silent canary means withdrawal.")


class EngineConfig(Section):
    """The vLLM engine of an actor; `extra` goes to `AsyncEngineArgs` unchanged."""

    max_model_len: int | None = Field(None, ge=8, description="Context length; unset: the model's own.")
    max_num_seqs: int = Field(128, ge=1, description="Sequences decoded together.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one copy of the model.")
    data_parallel_size: int = Field(1, ge=1, description="Copies of the model behind one actor.")
    gpu_memory_utilization: Fraction = Field(0.9, description="Share of the GPU's memory for vLLM.")
    cpu_kv_cache_gib: float = Field(1.0, gt=0, description="KV cache size when vLLM runs on a CPU, in GiB.")
    cpu_threads: str = Field(
        "auto",
        description="On a CPU: cores, as VLLM_CPU_OMP_THREADS_BIND takes them; auto: all but one, unpinned.",
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="Any other AsyncEngineArgs field.")


class ActorConfig(HttpConfig):
    """An actor: where it finds the learner and how much it takes on."""

    _prefix = "actor."

    id: Name | None = Field(None, description="Unset: host name and process id.")
    learner_url: str = Field(
        "http://127.0.0.1:8000",
        pattern=r"^https?://",
        description="Where the weights come from: the learner, or a relay.",
    )
    port: Port = Field(8001, description="Port to serve on; 0 picks a free one.")
    tls_ca: Path | None = Field(None, description="CA of the learner and other actors; unset: the system's.")
    advertise_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Where other actors reach this one for weights; unset: its address, if it has just one.",
    )
    max_samples: int | None = Field(
        None, ge=1, description="Completions in flight; unset: max_num_seqs and one group more."
    )
    guest_samples: int = Field(
        8, ge=0, description="Completions in flight for /v1/completions and its like; further ones wait."
    )
    grace_s: float = Field(
        20.0,
        ge=0,
        description="After SIGTERM, time to finish what is being sampled; what is left is handed back.",
    )
    probe_every_s: float = Field(30.0, gt=0, description="Seconds between tokens generated as a probe.")
    probe_timeout_s: float = Field(60.0, gt=0, description="An engine silent for so long is given up.")
    engine: EngineConfig = EngineConfig()


class Config(BaseSettings):
    """All settings of a run; frozen."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER
    )

    model: ModelConfig
    data: DataConfig
    run: RunConfig = RunConfig()
    redis: RedisConfig = RedisConfig()
    eval: EvalConfig = EvalConfig()
    sampling: SamplingConfig = SamplingConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    reward: RewardConfig = RewardConfig()
    groups: GroupsConfig = GroupsConfig()
    loss: LossConfig = LossConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    canary: CanaryConfig = CanaryConfig()
    actor: ActorConfig = ActorConfig()
    trackers: TrackersConfig = TrackersConfig()
    auth: AuthConfig = AuthConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for columns in (self.eval.columns, *(one.columns for one in self.eval.chosen)):
            self.data.require_known(columns)
        if self.auth.reader_token and not (self.auth.actor_token or self.auth.operator_token):
            raise ValueError(
                "auth.reader_token is set alone, so no actor could fetch weights; set auth.actor_token"
            )
        bound = self.learner.max_staleness + 1
        if self.weights.publish_every > bound:
            raise ValueError(
                f"weights.publish_every ({self.weights.publish_every}) exceeds learner.max_staleness + 1 "
                f"({bound}): all data would be too stale; lower it or raise max_staleness"
            )
        largest = max(self.sampling.group_size, *(one.k for one in self.eval.chosen), 1)
        if largest * self.longest_completion > MAX_GROUP_TOKENS:
            raise ValueError(
                f"sampling.group_size (or an eval set's k) * max_tokens exceeds {MAX_GROUP_TOKENS} tokens "
                f"a group{', those of the environment included' if self.environment.room else ''}; lower one"
            )
        return self

    @property
    def longest_completion(self) -> int:
        """Tokens that can follow a prompt: the model's, and in between the environment's."""
        return self.sampling.max_tokens + self.environment.room


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, the environment and `key.path=value` overrides into one frozen `Config`.

    Raises `ConfigError`, in one line, for a missing or broken file, an unknown key or a value out of bounds.
    """
    if not path.is_file():
        raise ConfigError(f"no config file at {path}; pass --config with the path of a TOML file")

    class FileConfig(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    _refuse_unknown_variables()
    given = parse_overrides(overrides)
    try:
        settings = FileConfig(**given)
    except SettingsError as error:
        raise ConfigError(f"environment: {error}; give lists and tables as JSON") from None
    except ValidationError as error:
        by_option = all(_is_given(given, detail["loc"]) for detail in error.errors())
        raise ConfigError(f"{'--set' if by_option else path}: {describe_validation_error(error)}") from None
    except (ValueError, RecursionError) as error:  # no TOML, or a number or a nesting beyond Python's limits
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return settings


def _is_given(tree: Any, location: tuple[int | str, ...]) -> bool:
    """Whether a setting is in a tree of them; what concerns several settings has no location."""
    for part in location:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[str(part)]
    return bool(location)


def describe_validation_error(error: ValidationError) -> str:
    """Say what is wrong with each setting, in one line."""
    faults = []
    for detail in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            faults.append(f"unknown key '{key}'{_suggest(detail['loc'])}")
        elif detail["type"] == "missing":
            faults.append(f"'{key}' is not set; add it")
        elif detail["type"] == "value_error":
            faults.append(detail["msg"].removeprefix("Value error, "))
        else:
            secret = detail["loc"][0] in _SECRET_SECTIONS
            faults.append(f"'{key}': {detail['msg']}" + ("" if secret else f" (got {detail['input']!r})"))
    return "; ".join(faults)


def _suggest(location: tuple[int | str, ...]) -> str:
    fields: Any = Config.model_fields
    for part in location[:-1]:
        section = fields[str(part)].annotation if str(part) in fields else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return "; remove it"
        fields = section.model_fields
    close = difflib.get_close_matches(str(location[-1]), fields, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys: {', '.join(fields)}"


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Turn `a.b=value` strings into a nested dict; values are TOML where they parse as TOML, else strings."""
    tree: dict[str, Any] = {}
    for text in overrides:
        key, separator, raw = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {text!r}: write it as section.key=value")
        try:
            value = tomllib.loads(f"value = {raw}")["value"]
        except (ValueError, RecursionError):
            value = raw
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {key}: '{parent}' is already a value")
        node[leaf] = value
    return tree


def _refuse_unknown_variables() -> None:
    for name in os.environ:
        if not name.upper().startswith(ENV_PREFIX) or name in _OTHER_VARIABLES:
            continue
        section, _, key = name[len(ENV_PREFIX) :].lower().partition(ENV_DELIMITER)
        field = Config.model_fields.get(section)
        known = field is not None and (
            not key or key.split(ENV_DELIMITER)[0] in getattr(field.annotation, "model_fields", {})
        )
        if not known:
            raise ConfigError(
                f"environment variable {name} names no setting; "
                f"use {ENV_PREFIX}SECTION{ENV_DELIMITER}KEY or unset it"
            )
