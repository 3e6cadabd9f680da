"""The policy: a transformers causal LM with fp32 master weights, and what is published of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from aspo.config import Config, ConfigError, ModelConfig, Precision
from aspo.lora_config import LoraConfig
from aspo.weights.adapters import CONFIG, merge, pairs, scaling_of
from aspo.weights.manifest import state_digest
from aspo.weights.state import describe
from aspo_learner import adapters
from aspo_learner.attention import PACKED, Packing
from aspo_learner.batching import MicroBatch
from aspo_learner.forecast import MemoryForecast, uses_bf16
from aspo_learner.head import token_logprobs_and_entropy
from aspo_learner.ranks import ALONE, Fill, Gather, Ranks
from aspo_learner.sharding import fill, shard, whole

_OTHER = "use a model of another architecture, such as Qwen3 or Llama"
Score = Callable[[MicroBatch, float], tuple[Tensor, Tensor]]  # as `Policy.score` is
_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Scorer(nn.Module):
    """A causal LM with the fused head: from packed tokens to log-probs, with all it takes below one root."""

    def __init__(self, model: nn.Module, *, bf16: bool) -> None:
        super().__init__()
        self.model: Any = model
        self._bf16 = bf16

    def forward(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [B, T] fp32 of a micro-batch's completions, zero at padding."""
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self._bf16):
            hidden = self.model.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                packing=batch.packing,
                use_cache=False,
            ).last_hidden_state
        picked = hidden[0, batch.positions]
        logprobs, entropy = token_logprobs_and_entropy(
            picked.bfloat16() if self._bf16 else picked,
            self.model.get_output_embeddings().weight,
            batch.targets,
            temperature=temperature,
        )
        return batch.scatter(logprobs), batch.scatter(entropy.detach())


class Policy:
    """A causal LM that scores completions; weights are trained in fp32 and published in `config.dtype`.

    `precision` is that of the products in the layers and the head: `fp32`, or `bf16` by autocast with sums in
    fp32; `auto` takes bf16 on a GPU. With `checkpoint_activations` backward computes the layers again. The
    weights are spread over the `ranks`, all of which must make the policy and score with it together; with
    `offload` they lie in the CPU's memory. With `lora`, on one rank alone, adapters are trained and
    published, and the weights under them stay.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        *,
        precision: Precision = "auto",
        checkpoint_activations: bool = False,
        offload: bool = False,
        lora: LoraConfig | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._path, self.device, self.ranks = config.path, device, ranks
        self._bf16 = uses_bf16(precision, device)
        self.forecast: MemoryForecast | None = None
        self._checkpoint_activations, self._offload, self._lora = checkpoint_activations, offload, lora
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._files: dict[str, bytes] | None = None
        self._base_digest: str | None = None
        self.tokenizer = load_tokenizer(config.path)
        self.scorer = self._load(trained=True)
        self.model: Any = self.scorer.model

    def reference(self) -> Score:
        """What scores as the model did at first and is not trained."""
        if self._lora is not None:
            return self._score_without_adapters
        scorer: Score = self._load(trained=False).requires_grad_(False)
        return scorer

    def _score_without_adapters(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        with adapters.switched_off(self.model):
            return self.score(batch, temperature)

    def _load(self, *, trained: bool) -> Scorer:
        model: Any = load_model(self._path, empty=not self.ranks.leads)
        # Sampling has no dropout, so the learner's log-probs must have none either.
        model.eval()
        if self._checkpoint_activations and trained:
            _checkpoint_layers(model, self._path)
        if self._lora is not None:
            adapters.inject(model, self._lora, self._path)
            if self._bf16 and self._dtype == torch.bfloat16:  # to which autocast would bring them every time
                adapters.hold_base_in(model, self._dtype)
        if self.ranks.mesh is None:
            model.to(self.device)
        if self.ranks.leads:
            _require_isolation(model, self._path, bf16=self._bf16)
        scorer = Scorer(model, bf16=self._bf16)
        if self.ranks.mesh is not None:
            _spread(scorer, self._path, self.ranks, bf16=self._bf16, offload=self._offload, trained=trained)
        return scorer

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31 - 1))

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model can score."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def score(
        self, batch: MicroBatch, temperature: float, scorer: Score | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score a micro-batch's completions: log-probs and entropies [B, T] fp32, zero at padding.

        `scorer` scores in place of the policy's own, for a reference.
        """
        scored: tuple[Tensor, Tensor] = (scorer or self.scorer)(batch, temperature)
        return scored

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def copy_published(self, copy: dict[str, Tensor]) -> None:
        """Fill `copy` with the tensors of a version, on the CPU in the published type; tied tensors once.

        The ranks gather them one at a time, and rank 0 keeps them.
        """
        self.ranks.announce(Gather())
        for name, parameter in self._published():
            tensor = whole(parameter) if self.ranks.mesh is None else whole(parameter.to(self._dtype))
            if not self.ranks.leads:
                continue
            if name not in copy:
                copy[name] = torch.empty(tensor.shape, dtype=self._dtype)
            copy[name].copy_(tensor)

    def load_published(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of a version, which rank 0 gives; what its type rounds off stays lost."""
        self.ranks.announce(Fill())
        for name, parameter in self._published():
            fill(parameter, tensors[name] if self.ranks.leads else None)

    @torch.no_grad()
    def base(self) -> dict[str, Tensor]:
        """What the adapters are added to, on the CPU in the published type; empty where there are none."""
        if self._lora is None:
            return {}
        return {
            name: parameter.detach().to("cpu", self._dtype) for name, parameter in adapters.base(self.model)
        }

    def base_digest(self) -> str | None:
        """Names the weights under the adapters by their content; None where there are no adapters."""
        if self._lora is not None and self._base_digest is None:
            self._base_digest = state_digest(describe(self.base()))
        return self._base_digest

    @property
    def scaling(self) -> float | None:
        """By what the adapters are multiplied; None where there are none."""
        return self._lora.alpha / self._lora.rank if self._lora else None

    def merged(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that actors run with, of a version that `copy_published` gave."""
        if self._lora is None:
            return dict(published)
        weights, scaling = self.base(), scaling_of(self.published_files()[CONFIG])
        for module, (a, b) in pairs(published).items():
            weights[f"{module}.weight"] = merge(weights[f"{module}.weight"], a, b, scaling)
        return weights

    def _published(self) -> Iterator[tuple[str, nn.Parameter]]:
        named: Iterator[tuple[str, nn.Parameter]] = self.model.named_parameters()
        return named if self._lora is None else adapters.published(self.model)

    def published_files(self) -> dict[str, bytes]:
        """The config and tokenizer files that make a version loadable by `from_pretrained`."""
        if self._files is None:
            with tempfile.TemporaryDirectory() as folder:
                self.model.config.dtype = self._dtype
                self.model.config.save_pretrained(folder)
                if getattr(self.model, "generation_config", None) is not None:
                    self.model.generation_config.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
                self._files = {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}
            if self._lora is not None:
                self._files |= adapters.config_file(self.model, self._lora, self._path)
        return self._files


def load_policy(config: Config, ranks: Ranks) -> Policy:
    """The policy of a run, on the device of its rank; raises ConfigError for what cannot be trained so."""
    if config.learner.lora is not None and ranks.size > 1:
        raise ConfigError(
            "learner.lora trains in one process; start it without torchrun, or unset learner.lora"
        )
    forecast = MemoryForecast.foresee(config, ranks) if ranks.leads else None
    policy = Policy(
        config.model,
        ranks.device,
        precision=config.learner.precision,
        checkpoint_activations=config.learner.activation_checkpointing,
        offload=config.learner.offload,
        lora=config.learner.lora,
        ranks=ranks,
    )
    policy.forecast = forecast
    return policy


def load_model(path: str, *, empty: bool = False) -> nn.Module:
    """Load a causal LM in fp32; raises ConfigError if there is none or its head is one we cannot score.

    An `empty` one has the shapes and, until they are written to, takes no memory for its weights.
    """
    config = _from_pretrained(AutoConfig.from_pretrained, path)
    for name in _SCALED_LOGITS:
        if getattr(config, name, None) not in (None, 1.0):
            raise ConfigError(
                f"{path}: models with {name} are not supported; their logits are not a plain product"
            )
    model: Any
    if empty:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.to_empty(device="cpu")
        model.tie_weights()
    else:
        model = _from_pretrained(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ConfigError(f"{path}: an output head with a bias is not supported")
    if not model._supports_attention_backend:
        raise ConfigError(f"{path}: {type(model).__name__} does not let its attention be replaced; {_OTHER}")
    model.set_attn_implementation(PACKED)
    loaded: nn.Module = model
    return loaded


@torch.no_grad()
def _spread(scorer: Scorer, path: str, ranks: Ranks, *, bf16: bool, offload: bool, trained: bool) -> None:
    """Shard a model that rank 0 alone has loaded, and give the others their parts of it."""
    content = dict(scorer.named_parameters()) if ranks.leads and ranks.size > 1 else {}
    layers = _layers(scorer, path, "learner.offload" if ranks.size == 1 else "--nproc-per-node")
    shard(scorer, layers, ranks, bf16=bf16, offload=offload, trained=trained)
    for buffer in scorer.buffers():
        ranks.broadcast(buffer)
    if ranks.size > 1:
        for name, parameter in scorer.named_parameters():
            fill(parameter, content.pop(name, None))


@torch.no_grad()
def _require_isolation(model: Any, path: str, *, bf16: bool) -> None:
    """Raise ConfigError if a packed sequence sees its neighbour, as where a layer keeps a running state."""
    device = next(model.parameters()).device
    found = []
    for first in (0, 1):
        packed = torch.tensor([[first, first, 2, 3]], device=device)
        positions = torch.tensor([[0, 1, 0, 1]], device=device)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                out = model.base_model(
                    input_ids=packed,
                    position_ids=positions,
                    packing=Packing.of([2, 2], device),
                    use_cache=False,
                )
        except TypeError as error:
            raise ConfigError(
                f"{path}: {type(model).__name__} cannot be packed ({error}); {_OTHER}"
            ) from None
        found.append(out.last_hidden_state[0, 2:])
    if not torch.equal(*found):
        raise ConfigError(f"{path}: {type(model).__name__} mixes the sequences of a pack; {_OTHER}")


def _checkpoint_layers(model: Any, path: str) -> None:
    layers = _layers(model, path, "learner.activation_checkpointing")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = True  # they checkpoint in training only; what is in them still has no dropout


def _layers(model: nn.Module, path: str, reason: str) -> list[nn.Module]:
    """The layers of a model; raises ConfigError, naming why they are asked for, if it names none."""
    found: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not found:
        raise ConfigError(f"{path}: {type(model).__name__} does not say what its layers are; unset {reason}")
    return found


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer that lies with a model; raises ConfigError if there is none."""
    return _from_pretrained(AutoTokenizer.from_pretrained, path)


def _from_pretrained(load: Callable[..., Any], path: str, **options: Any) -> Any:
    try:
        return load(path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.path {path!r} cannot be loaded ({reason}); give a model folder or hub name"
        ) from None
