"""The policy: a transformers causal LM with fp32 master weights, and what is published of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from aspo.config import ConfigError, ModelConfig, Precision
from aspo_learner.attention import PACKED, Packing
from aspo_learner.batching import MicroBatch
from aspo_learner.head import token_logprobs_and_entropy

_OTHER = "use a model of another architecture, such as Qwen3 or Llama"
_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def pick_device(name: str) -> torch.device:
    """Resolve `auto`; raises ConfigError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"learner.device is {name!r} but torch sees no GPU; set it to cpu or mend the driver"
        )
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"learner.device {name!r}: {str(error).splitlines()[0]}") from None


class Policy:
    """A causal LM that scores completions; weights are trained in fp32 and published in `config.dtype`.

    `precision` is that of the products in the layers and the head: `fp32`, or `bf16` by autocast with sums in
    fp32; `auto` takes bf16 on a GPU. With `checkpoint_activations` backward computes the layers again.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        *,
        precision: Precision = "auto",
        checkpoint_activations: bool = False,
    ) -> None:
        self.model: Any = load_model(config.path).to(device)
        self.tokenizer = load_tokenizer(config.path)
        self.device = device
        self._bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._files: dict[str, bytes] | None = None
        # Sampling has no dropout, so the learner's log-probs must have none either.
        self.model.eval()
        if checkpoint_activations:
            _checkpoint_layers(self.model, config.path)
        _require_isolation(self.model, config.path)

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31 - 1))

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model can score."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def score(self, batch: MicroBatch, temperature: float, model: Any = None) -> tuple[Tensor, Tensor]:
        """Score a micro-batch's completions: log-probs and entropies [B, T] fp32, zero at padding.

        `model` scores in place of the policy's own, for a reference.
        """
        model = model or self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            hidden = model.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                packing=batch.packing,
                use_cache=False,
            ).last_hidden_state
        picked = hidden[0, batch.positions]
        weight = model.get_output_embeddings().weight
        logprobs, entropy = token_logprobs_and_entropy(
            picked.bfloat16() if self._bf16 else picked, weight, batch.targets, temperature=temperature
        )
        return batch.scatter(logprobs), batch.scatter(entropy.detach())

    @torch.no_grad()
    def copy_published(self, copy: dict[str, Tensor]) -> None:
        """Fill `copy` with the tensors of a version, on the CPU in the published type; tied tensors once."""
        for name, parameter in self.model.named_parameters():
            if name not in copy:
                copy[name] = torch.empty(parameter.shape, dtype=self._dtype)
            copy[name].copy_(parameter)

    @torch.no_grad()
    def load_published(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of a version; what its type rounds off stays lost."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[name])

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
        return self._files


def load_model(path: str) -> nn.Module:
    """Load a causal LM in fp32; raises ConfigError if there is none or its head is one we cannot score."""
    config = _from_pretrained(AutoConfig.from_pretrained, path)
    for name in _SCALED_LOGITS:
        if getattr(config, name, None) not in (None, 1.0):
            raise ConfigError(
                f"{path}: models with {name} are not supported; their logits are not a plain product"
            )
    model: Any = _from_pretrained(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ConfigError(f"{path}: an output head with a bias is not supported")
    if not model._supports_attention_backend:
        raise ConfigError(f"{path}: {type(model).__name__} does not let its attention be replaced; {_OTHER}")
    model.set_attn_implementation(PACKED)
    loaded: nn.Module = model
    return loaded


@torch.no_grad()
def _require_isolation(model: Any, path: str) -> None:
    """Raise ConfigError if a packed sequence sees its neighbour, as where a layer keeps a running state."""
    device = next(model.parameters()).device
    found = []
    for first in (0, 1):
        packed = torch.tensor([[first, first, 2, 3]], device=device)
        positions = torch.tensor([[0, 1, 0, 1]], device=device)
        try:
            out = model.base_model(
                input_ids=packed, position_ids=positions, packing=Packing.of([2, 2], device), use_cache=False
            )
        except TypeError as error:
            raise ConfigError(
                f"{path}: {type(model).__name__} cannot be packed ({error}); {_OTHER}"
            ) from None
        found.append(out.last_hidden_state[0, 2:])
    if not torch.equal(*found):
        raise ConfigError(f"{path}: {type(model).__name__} mixes the sequences of a pack; {_OTHER}")


def _checkpoint_layers(model: Any, path: str) -> None:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{path}: {type(model).__name__} has no layers to checkpoint; "
            "unset learner.activation_checkpointing"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = True  # they checkpoint in training only; what is in them still has no dropout


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
