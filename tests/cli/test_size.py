"""`aspo size` against what it estimates: real models, a real learner's memory, the wire's own bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from aspo.codec import encode_group
from aspo.config import ConfigError
from aspo_cli import size
from aspo_cli.main import app
from aspo_cli.size import KNOWN, estimate, load_settings, shape_of
from aspo_learner import head, memory
from aspo_learner.attention import PACKED, Packing
from aspo_learner.memory import Shape
from models import save_model, tiny_qwen3
from peak import VARIANTS
from rollouts import make_plain_group

ROOT = Path(__file__).parents[2]
DEFAULTS = load_settings(None, [])
CHECKPOINTED = load_settings(None, ["learner.activation_checkpointing=true"])
SIZES = ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "70B")


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_folder_are_counted_exactly(tmp_path: Path, tied: bool) -> None:
    folder = save_model(tmp_path / "model", tied=tied, hidden_size=64, layers=2)
    (folder / "model.safetensors").unlink()  # the config alone is read
    made = tiny_qwen3(tied=tied, hidden_size=64, layers=2)
    expected = Shape(str(folder), made.num_parameters(), 2, 64, 128, 64, 32, 16, tied)
    assert shape_of(str(folder)) == expected


@pytest.mark.parametrize("known", KNOWN, ids=lambda shape: shape.name)
def test_the_known_shapes_are_those_of_the_models(known: Shape) -> None:
    common: dict[str, Any] = {
        "vocab_size": known.vocabulary,
        "hidden_size": known.hidden,
        "intermediate_size": known.intermediate,
        "num_hidden_layers": known.layers,
        "num_attention_heads": known.query // 128,
        "num_key_value_heads": known.key // 128,
        "head_dim": 128,
        "tie_word_embeddings": known.tied,
    }
    with torch.device("meta"):
        if known.name.startswith("Llama"):
            model: Any = LlamaForCausalLM(LlamaConfig(**common))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**common))
    assert sum(parameter.numel() for parameter in model.parameters()) == known.parameters


def kept_for_backward(model: Any, tokens: int, *, mixed: bool) -> int:
    """Bytes that a forward pass keeps, but for weights and their casts."""
    model.set_attn_implementation(PACKED)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {shape for parameter in model.parameters() for shape in (parameter.shape, parameter.T.shape)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and not (tensor.dtype == torch.bfloat16 and tensor.shape in shapes):
            kept[place] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.base_model(
            input_ids=torch.zeros(1, tokens, dtype=torch.long),
            position_ids=torch.arange(128).repeat(tokens // 128)[None],
            packing=Packing.of([128] * (tokens // 128), torch.device("cpu")),
            use_cache=False,
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("hidden", "layers"), [(256, 4), (512, 2)])
@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension")
def test_activations_are_those_that_autograd_keeps(hidden: int, layers: int, mixed: bool) -> None:
    """Within a tenth, in both precisions; autocast on a CPU casts as that on a GPU does."""
    model, tokens = tiny_qwen3(hidden_size=hidden, layers=layers), 1280
    query, key = hidden, max(1, hidden // 64) * 32
    shape = Shape("tiny", 0, layers, hidden, 2 * hidden, query, key, 16)
    measured = kept_for_backward(model, tokens, mixed=mixed)
    assert memory.activation_bytes(shape, tokens, mixed=mixed) == pytest.approx(measured, rel=0.1)


def test_the_peak_is_that_of_a_real_learner(tmp_path: Path) -> None:
    """A training step of the real trainer, in a process of its own, by the kernel's count: within a tenth."""
    folder, tokens = save_model(tmp_path / "model", hidden_size=256, layers=4, vocab_size=4096), 2048
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}/tests:{os.environ.get('PYTHONPATH', '')}",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back at once, so that the peak is of use
    }
    command = [sys.executable, "-m", "peak", str(folder), str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    shape, settings = shape_of(str(folder)), [f"learner.micro_batch_tokens={tokens}"]
    assert measured["parameters"] == shape.parameters
    for name, more in VARIANTS.items():
        config = load_settings(None, [*settings, *more])
        expected = memory.learner_peak_bytes(shape, config, mixed=False)
        assert expected == pytest.approx(measured[name], rel=0.1), name


def test_the_cache_of_a_token_is_that_of_a_real_model() -> None:
    model = tiny_qwen3(hidden_size=128, layers=3)
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    shape = Shape("tiny", model.num_parameters(), 3, 128, 256, 128, 64, 16)
    config = load_settings(None, ["model.dtype=float32"])
    assert estimate(shape, config, actors=1, gpu_bytes=2**36).actor_kv_per_token == held // 10


def test_the_head_holds_as_many_tiles_of_its_size_as_are_counted() -> None:
    rows, columns = head._TILES["cuda"]
    assert 4 * rows * columns * 4 == memory.TILES  # four of them, in fp32


def test_redis_holds_what_the_wire_encodes() -> None:
    group = make_plain_group([[("sums/1/123", 1024)]] * 8, prompt_ids=range(64))
    assert pytest.approx(len(encode_group(group)) / (8 * 1024), rel=0.01) == size.WIRE_BYTES
    config = load_settings(None, ["learner.batch_prompts=10", "learner.mini_batch_prompts=1"])
    assert size.redis_bytes(config) == int((4 + 1 + 10) * 10 * 8 * 256 * size.WIRE_BYTES)


def test_deltas_are_those_that_were_measured() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    (parameters,) = re.findall(r"Qwen3-like model of ([\d.]+) M parameters", text)
    sizes = dict(re.findall(r"^\| (first|median|last) \| [\d.]+ % \| ([\d,]+) \|", text, re.MULTILINE))
    shares = {name: int(count.replace(",", "")) / (float(parameters) * 2e6) for name, count in sizes.items()}
    assert pytest.approx(shares["first"], rel=0.01) == size.DELTA_FIRST
    assert pytest.approx(shares["median"], rel=0.01) == size.DELTA_LATER


def test_more_gpus_are_taken_only_where_one_is_too_small() -> None:
    big = estimate(shape_of("8B"), DEFAULTS, actors=3, gpu_bytes=80 * 2**30)
    small = estimate(shape_of("8B"), DEFAULTS, actors=3, gpu_bytes=24 * 2**30)
    assert big.learner_gpus < small.learner_gpus
    assert big.gpus == big.learner_gpus + 3 * big.actor_gpus
    for found, gib in ((big, 80), (small, 24)):
        assert found.learner_gpu_peak <= size.USABLE * gib * 2**30
        assert found.learner_tokens < DEFAULTS.learner.micro_batch_tokens
    tiny = estimate(shape_of("100M"), DEFAULTS, actors=1, gpu_bytes=80 * 2**30)
    assert (tiny.learner_gpus, tiny.actor_gpus) == (1, 1)
    assert tiny.learner_tokens == DEFAULTS.learner.micro_batch_tokens


def test_adapters_are_sent_in_place_of_the_weights_and_trained_on_one_gpu() -> None:
    lora = load_settings(None, ["learner.lora.rank=16", 'learner.lora.target_modules=["q_proj", "v_proj"]'])
    whole, adapters = (estimate(shape_of("8B"), c, actors=1, gpu_bytes=80 * 2**30) for c in (DEFAULTS, lora))
    weights = 36 * 16 * (4096 + 4096 + 4096 + 1024)
    assert (whole.learner_gpus, adapters.learner_gpus) == (4, 1)
    assert adapters.snapshot == adapters.delta == 2 * weights < whole.delta
    assert adapters.actor_weights == whole.actor_weights
    with pytest.raises(ConfigError, match=r"learner\.lora trains on one GPU"):
        estimate(shape_of("70B"), lora, actors=1, gpu_bytes=80 * 2**30)


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["size", "7B", "--actors", "2", "--set", "sampling.max_tokens=1024"])
    assert shown.exit_code == 0
    assert "7B, shaped as Qwen3-8B" in shown.stdout
    found = json.loads(CliRunner().invoke(app, ["size", "7B", "--actors", "2", "--json"]).stdout)
    expected = estimate(shape_of("7B"), DEFAULTS, actors=2, gpu_bytes=80 * 2**30)
    assert found == {name: getattr(expected, name) for name in type(expected).__dataclass_fields__}


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: shape_of("0B"), "no size of a model"),
        (lambda: shape_of(str(ROOT / "tests")), "cannot be sized"),
        (lambda: estimate(shape_of("70B"), DEFAULTS, actors=1, gpu_bytes=2**33), "larger ones by --gpu-gib"),
    ],
)
def test_what_cannot_be_sized_is_said(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ask()


def markdown() -> str:
    """The table of docs/deploy.md, from the code."""
    names = "model", "learner GPUs", "GiB of each", "micro-batch", "host GiB", "disk GiB"
    names += "actor GPUs", "KV KiB/token", "sequences", "snapshot GiB", "delta MiB"
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for model in SIZES:
        found = estimate(shape_of(model), CHECKPOINTED, actors=1, gpu_bytes=80 * 2**30)
        numbers = (
            found.learner_gpus,
            found.learner_gpu_peak / 2**30,
            found.learner_tokens,
            found.learner_host / 2**30,
            found.learner_disk / 2**30,
            found.actor_gpus,
            found.actor_kv_per_token / 1024,
            found.actor_sequences,
            found.snapshot / 2**30,
            found.delta / 2**20,
        )
        lines.append(f"| {model} | {' | '.join(f'{number:,.0f}' for number in numbers)} |")
    return "\n".join(lines)


def test_the_table_of_the_docs_is_what_the_code_makes() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    assert markdown() in text, f"put this table in:\n{markdown()}"
