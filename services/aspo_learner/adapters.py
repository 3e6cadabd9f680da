"""LoRA by peft: adapters put into a model, what is published of them, and the model without them."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aspo.config import ConfigError
from aspo.lora_config import LoraConfig
from aspo.weights.adapters import CONFIG, PREFIX

if TYPE_CHECKING:  # its import takes seconds, and most runs train all weights
    import peft

_NAME = "default"  # peft's for the adapter


def inject(model: Any, config: LoraConfig, path: str) -> None:
    """Put adapters, which change nothing yet, into a model and freeze all else.

    Raises ConfigError for modules that are not there or cannot have one.
    """
    import peft

    peft.inject_adapter_in_model(_peft_config(config, _targets(model, config, path), path), model)


def _targets(model: Any, config: LoraConfig, path: str) -> list[str]:
    """The ends of the names of the layers that get adapters."""
    outer = {model.get_output_embeddings(), model.get_input_embeddings()}
    modules = dict(model.named_modules())
    linear = {name for name, found in modules.items() if type(found) is nn.Linear and found not in outer}
    known = sorted({name.rpartition(".")[2] for name in linear})
    if config.target_modules == "all-linear":
        return known
    for target in config.target_modules:
        found = {name for name in modules if name == target or name.endswith(f".{target}")}
        if not found or found - linear:
            raise ConfigError(
                f"learner.lora.target_modules: {target!r} names no linear layer within {path}; "
                f"there are {', '.join(known)}"
            )
    return list(config.target_modules)


def hold_base_in(model: Any, dtype: torch.dtype) -> None:
    """Keep the matrices of the frozen linear layers, but for the head's, in a smaller type."""
    head = model.get_output_embeddings()
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not head and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(dtype)


def published(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters, by the names that peft stores them under."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"{PREFIX}{name.replace(f'.{_NAME}.', '.')}", parameter


def base(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """All weights but the adapters, by the names that they have in the model without any."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name.replace(".base_layer.", "."), parameter


@contextlib.contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Have the model be as it was before there were adapters."""
    for _, layer in _layers(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in _layers(model):
            layer.enable_adapters(True)


def config_file(model: Any, config: LoraConfig, path: str) -> dict[str, bytes]:
    """peft's adapter_config.json; the same bytes for the same adapters."""
    targets = sorted({name.rpartition(".")[2] for name, _ in _layers(model)})
    with tempfile.TemporaryDirectory() as folder:
        _peft_config(config, targets, path).save_pretrained(folder)
        values = json.loads((Path(folder) / CONFIG).read_text())
    values["target_modules"] = targets  # peft keeps a set, whose order changes from process to process
    return {CONFIG: json.dumps(values, indent=2, sort_keys=True).encode()}


def _peft_config(config: LoraConfig, targets: list[str], path: str) -> peft.LoraConfig:
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=path,
        inference_mode=False,
    )


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
