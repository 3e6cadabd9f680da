"""The memory that a learner takes, by formula: for `aspo size`, and before a run loads anything.

    learner_peak_bytes(shape_of_config("Qwen/Qwen3-8B"), config)

The formulas stand in docs/deploy.md. Tests hold them against a real learner's memory, within a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass

from aspo.config import Config, ConfigError
from aspo.lora_config import LoraConfig

MASTER, GRADIENT, MOMENTS, CAST = 4, 4, 8, 2  # bytes per weight; the casts of autocast are bf16
TILES = 4 * 4096 * 16384 * 4  # fp32 tiles of logits that the head holds at a time on a GPU


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides its size; `query` and `key` are heads times head size.

    `tied` models have one tensor for embedding and head.
    """

    name: str
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    vocabulary: int
    tied: bool = False

    @property
    def inner(self) -> int:
        """Weights of the layers."""
        return max(0, self.parameters - self.outer)

    @property
    def outer(self) -> int:
        """Weights outside of the layers: embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


def shape_of_config(model: str) -> Shape:
    """Read config.json alone; the model is made without memory, which counts its weights exactly."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config)
        query = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // query
        key = getattr(config, "num_key_value_heads", None) or query
        return Shape(
            name=model,
            parameters=sum(parameter.numel() for parameter in made.parameters()),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query=query * head,
            key=key * head,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )
    except (OSError, ValueError, AttributeError, TypeError, LookupError, ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{model!r} cannot be sized ({reason}); name a size such as 7B, a model folder or a hub name"
        ) from None


def states_bytes(shape: Shape, config: Config, *, mixed: bool = True) -> int:
    """Weights, gradients and AdamW's moments in fp32, and the weights of a reference where there is one.

    With LoRA only adapters have the latter, and the reference is the model without them.
    """
    trained = MASTER + GRADIENT + MOMENTS
    if config.learner.lora is None:
        reference = MASTER if config.loss.kl_coefficient > 0 else 0
        return shape.parameters * (trained + reference)
    frozen = CAST if _held_in_bf16(config, mixed) else MASTER
    adapters = adapter_parameters(shape, config.learner.lora)
    return shape.outer * MASTER + shape.inner * frozen + adapters * trained


def adapter_parameters(shape: Shape, lora: LoraConfig) -> int:
    """Of adapters on the layers that are named, or on every linear one but the head."""
    outside = {
        **dict.fromkeys(("q_proj", "o_proj"), shape.query),
        **dict.fromkeys(("k_proj", "v_proj"), shape.key),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.intermediate),
    }
    named = outside if lora.target_modules == "all-linear" else outside.keys() & set(lora.target_modules)
    return shape.layers * lora.rank * sum(shape.hidden + outside[name] for name in named)


def _held_in_bf16(config: Config, mixed: bool) -> bool:
    return mixed and config.model.dtype == "bfloat16"


def activation_bytes(shape: Shape, tokens: int, *, mixed: bool, checkpointed: bool = False) -> int:
    """What a micro-batch of so many tokens keeps for backward; `mixed` is bf16 autocast, as on a GPU.

    Per layer and token: two norms keep input, normalised and output; attention its queries and keys thrice,
    values and output; the MLP gate, its SiLU, up and their product. The fp32 ones among them stay fp32.
    Checkpointed layers keep their inputs, and one of them all of it.
    """
    if mixed:
        layer = 20 * shape.hidden + 10 * (shape.query + shape.key) + 8 * shape.intermediate
    else:
        # Without torch's variable-length kernel the output is there twice.
        layer = 24 * shape.hidden + 20 * shape.query + 16 * shape.key + 16 * shape.intermediate
    last = 20 * shape.hidden  # the final norm, and the hidden states that are scored
    layers = shape.layers * 4 * shape.hidden + layer if checkpointed else shape.layers * layer
    return tokens * (layers + last)


def kept_bytes(shape: Shape, config: Config, tokens: int, *, mixed: bool = True) -> int:
    """The activations of so many tokens under a run's settings."""
    checkpointed = config.learner.activation_checkpointing
    return activation_bytes(shape, tokens, mixed=mixed, checkpointed=checkpointed)


def learner_peak_bytes(
    shape: Shape, config: Config, *, tokens: int | None = None, gpus: int = 1, mixed: bool = True
) -> int:
    """Of each GPU, when backward begins; AdamW's step takes less, for it works in place.

    Micro-batches have `tokens`, or what is configured. On several GPUs the states are sharded, and what is
    whole for a while is `gathered_bytes`; so it is where they are offloaded to the CPU's memory.
    """
    tokens = config.learner.micro_batch_tokens if tokens is None else tokens
    held = 0 if config.learner.offload else states_bytes(shape, config, mixed=mixed) // gpus
    if gpus > 1 or config.learner.offload:
        held += gathered_bytes(shape)
    elif config.learner.lora is None:
        held += shape.vocabulary * shape.hidden * GRADIENT + (CAST * shape.parameters if mixed else 0)
    elif mixed and not _held_in_bf16(config, mixed):
        held += CAST * shape.inner
    return held + (TILES if mixed else 0) + kept_bytes(shape, config, tokens, mixed=mixed)


def gathered_bytes(shape: Shape) -> int:
    """Whole on each of several GPUs: embedding and head with their gradient, two layers in bf16 and one's."""
    layer = shape.inner // shape.layers
    return shape.outer * (MASTER + GRADIENT) + layer * (2 * CAST + GRADIENT)
