"""LoRA: what is trained, published, merged and exported, against peft and transformers themselves."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor
from transformers import AutoModelForCausalLM

from aspo.config import AuthConfig, Config, ConfigError
from aspo.hello import file_refs, own_hello
from aspo.http import Server, create_app, listen
from aspo.weights.adapters import merge, scaling_of
from aspo.weights.client import Mirror, WeightClient, export
from aspo.weights.leases import Leases
from aspo.weights.manifest import WeightsError
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore
from aspo_learner.batching import micro_batches, sequences_of
from aspo_learner.checkpoint import Checkpoints
from aspo_learner.memory import shape_of_config, states_bytes
from aspo_learner.policy import Policy, load_policy
from aspo_learner.publisher import Publisher
from aspo_learner.ranks import ALONE, Ranks
from aspo_learner.report import RunHistory
from aspo_learner.trainer import Trainer
from models import save_model
from rollouts import make_group, write_config

CPU = torch.device("cpu")
LORA = ("learner.lora.rank=4", "learner.lora.alpha=8", "learner.learning_rate=0.01")
TOKENS = torch.tensor([[3, 4, 12, 5, 6, 13, 8, 10]])


def lora_config(folder: Path, *overrides: str) -> Config:
    if not (folder / "model").exists():
        save_model(folder / "model", hidden_size=64, layers=2)
    return write_config(folder, model=folder / "model", overrides=[*LORA, *overrides])


def new_trainer(folder: Path, *overrides: str) -> Trainer:
    torch.manual_seed(7)
    config = lora_config(folder, *overrides)
    return Trainer(load_policy(config, ALONE), config)


def train(trainer: Trainer, seeds: range) -> list[float]:
    groups = [[make_group(trainer.policy.model, seed=4 * seed + i) for i in range(4)] for seed in seeds]
    return [trainer.train_step(batch)["loss"] for batch in groups]


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """Of transformers' own forward on a few tokens."""
    model.eval()
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    found: Tensor = model(TOKENS).logits
    return found


def test_adapters_alone_are_trained_and_published_under_pefts_names(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    first: dict[str, Tensor] = {}
    trainer.policy.copy_published(first)
    base = trainer.policy.base()
    train(trainer, range(2))
    published: dict[str, Tensor] = {}
    trainer.policy.copy_published(published)
    assert len(published) == 2 * 2 * 7  # A and B of the seven matrices in each of two layers
    assert all(not torch.equal(published[name], first[name]) for name in published)
    for name, tensor in trainer.policy.base().items():
        assert torch.equal(tensor, base[name]), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert base.keys() == dict(plain.named_parameters()).keys()
    trainer.policy.load_published(first)
    assert torch.equal(trainer.policy.trained()[0], next(iter(first.values())))


def test_a_resumed_run_goes_on_bit_for_bit_and_wants_its_base(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    trainer = new_trainer(tmp_path)
    train(trainer, range(2))
    folder = checkpoints.save(2, trainer.policy.model, trainer.optimizer, {"trainer": trainer.state()})
    assert (folder / "model.safetensors").stat().st_size < 100_000
    losses = train(trainer, range(2, 4))
    resumed = new_trainer(tmp_path)
    state = checkpoints.load(resumed.policy.model, resumed.optimizer)
    assert state is not None
    resumed.load_state(state["trainer"])
    assert train(resumed, range(2, 4)) == losses
    for mine, theirs in zip(trainer.policy.trained(), resumed.policy.trained(), strict=True):
        assert torch.equal(mine, theirs)
    save_model(tmp_path / "model", seed=1, hidden_size=64, layers=2)
    with pytest.raises(ConfigError, match=r"other weights than those of model\.path"):
        new_trainer(tmp_path).load_state(state["trainer"])
    whole = Policy(lora_config(tmp_path).model, CPU)
    with pytest.raises(ConfigError, match=r"set model\.path and learner\.lora back"):
        checkpoints.load(whole.model, torch.optim.AdamW(whole.model.parameters()))


@pytest.mark.parametrize("setting", ['target_modules=["q_proj"]', "rank=2", "alpha=16"])
def test_adapters_of_other_settings_are_not_continued(tmp_path: Path, setting: str) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    trainer = new_trainer(tmp_path)
    train(trainer, range(1))
    checkpoints.save(1, trainer.policy.model, trainer.optimizer, {"trainer": trainer.state()})
    other = new_trainer(tmp_path, f"learner.lora.{setting}")
    with pytest.raises(ConfigError, match=r"set .*learner\.lora.* back"):
        other.load_state((checkpoints.load(other.policy.model, other.optimizer) or {})["trainer"])


def test_the_reference_is_the_model_without_adapters(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, "loss.kl_coefficient=0.1", "loss.ratio_reference=proximal")
    groups = [make_group(trainer.policy.model, seed=seed) for seed in range(4)]
    assert trainer.train_step(groups)["kl_reference"] > 1e-3
    sequences = [s for n, g in enumerate(groups) for s in sequences_of(g, [1.0] * len(g), n)]
    [batch] = micro_batches(sequences, range(len(sequences)), max_tokens=10_000, device=CPU)
    plain = Policy(lora_config(tmp_path).model, CPU)
    reference = trainer.policy.reference()
    with torch.no_grad():
        assert torch.equal(reference(batch, 1.0)[0], plain.score(batch, 1.0)[0])
        assert not torch.equal(trainer.policy.score(batch, 1.0)[0], plain.score(batch, 1.0)[0])
    assert all(parameter.requires_grad for parameter in trainer.policy.trained())


@pytest.mark.parametrize("targets", ["all-linear", '["q_proj", "v_proj"]'])
def test_in_bf16_frozen_matrices_are_held_in_it_and_score_the_same(tmp_path: Path, targets: str) -> None:
    scores = []
    lora_config(tmp_path)
    groups = [make_group(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), seed=i) for i in range(4)]
    for dtype in ("bfloat16", "float32"):
        settings = f"model.dtype={dtype}", f"learner.lora.target_modules={targets}", "learner.precision=bf16"
        trainer = new_trainer(tmp_path, *settings)
        scores.append([trainer.train_step(groups)["loss"] for _ in range(2)])
        own = trainer.policy.trained()
        assert {parameter.dtype for parameter in own} == {torch.float32}
        held = sum(parameter.nbytes for parameter in trainer.policy.model.parameters())
        states = held + 3 * sum(parameter.nbytes for parameter in own)  # gradients and moments
        shape = shape_of_config(str(tmp_path / "model"))
        expected = states_bytes(shape, lora_config(tmp_path, *settings), mixed=True)
        assert expected == pytest.approx(states, rel=0.01)
    assert scores[0] == scores[1]


def test_a_merge_is_the_product_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aspo.weights.adapters._AT_ONCE", 100)
    base, a, b = (torch.randn(*shape).bfloat16() for shape in ((33, 17), (4, 17), (33, 4)))
    exact = base.double().numpy() + 0.5 * (b.double().numpy() @ a.double().numpy())
    expected = torch.from_numpy(exact).bfloat16()
    assert torch.equal(merge(base, a, b, 0.5), expected)


@pytest.mark.parametrize("name", ["nowhere", "lm_head", "embed_tokens", "input_layernorm", "mlp"])
def test_modules_that_cannot_have_adapters_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{name}' names no linear layer .*; there are down_proj, gate_proj"
    ):
        new_trainer(tmp_path, f'learner.lora.target_modules=["q_proj", "{name}"]')


def test_ranks_and_offloading_are_refused(tmp_path: Path) -> None:
    ranks = Ranks(CPU)
    ranks.size = 2
    with pytest.raises(ConfigError, match="start it without torchrun"):
        load_policy(lora_config(tmp_path), ranks)
    with pytest.raises(ConfigError, match=r"learner\.lora and learner\.offload exclude each other"):
        lora_config(tmp_path, "learner.offload=true")


@pytest.mark.parametrize("config", [b"{", b'{"peft_type": "IA3"}', b'{"r": 4, "lora_alpha": 8}'])
def test_other_adapters_are_not_merged(config: bytes) -> None:
    with pytest.raises(WeightsError, match="not of plain LoRA"):
        scaling_of(config)


def publish(trainer: Trainer, store: WeightStore) -> Publisher:
    """A publisher that has stored the present weights as step 0."""
    publisher = Publisher(store, trainer.policy, "r", 1)
    publisher.publish(0)
    publisher.wait()
    return publisher


def add(totals: list[int], index: int, count: int) -> None:
    totals[index] += count


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[WeightStore, str]]:
    """A store and where it is served."""
    store, auth = WeightStore(folder), AuthConfig()
    app = create_app("test", auth=auth, ready=lambda: None, registry=CollectorRegistry())
    app.include_router(weight_routes(store, Leases()))
    app.include_router(blob_routes(store.blobs))
    with Server(app, listen("127.0.0.1", 0, auth)) as server:
        yield store, server.url


async def test_versions_are_of_adapters_alone_and_their_merged_weights_are_followed(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    with (
        served(tmp_path / "weights") as (store, url),
        contextlib.closing(publish(trainer, store)) as publisher,
    ):
        async with WeightClient(url, tmp_path / "cache") as client:
            mirror, arrived = Mirror(client), [0, 0, 0]
            for step in range(3):
                client.on_bytes = functools.partial(add, arrived, step)
                before = {name: tensor.clone() for name, tensor in mirror.weights.tensors.items()}
                plan = await client.latest(have=mirror.version)
                assert plan is not None
                update = await mirror.follow(plan)
                published: dict[str, Tensor] = {}
                trainer.policy.copy_published(published)
                assert {info.name for info in plan.manifest.tensors} == published.keys()
                for name, tensor in trainer.policy.merged(published).items():
                    assert torch.equal(mirror.weights.tensors[name], tensor), name
                assert update.base == (f"r/1/{step - 1}" if step else None)
                for name, (where, values) in update.changes.items() if step else ():
                    flat = before[name].reshape(-1)
                    flat[slice(None) if where is None else torch.from_numpy(where)] = values.reshape(-1)
                    assert torch.equal(before[name], mirror.weights.tensors[name])
                train(trainer, range(step, step + 1))
                publisher.publish(step + 1)
                publisher.wait()
            assert arrived[0] > 300_000 > 5 * max(arrived[1:])  # the base came once
            mirror.weights.tensors["model.norm.weight"] += 1  # damaged in memory
            await mirror.restore()
            assert mirror.weights.tensors["model.norm.weight"].max() < 2
    mine = own_hello(lora_config(tmp_path), plan.manifest.files)
    assert mine == own_hello(lora_config(tmp_path), file_refs(trainer.policy.published_files()))


async def test_a_version_is_exported_merged_and_as_an_adapter(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    trainer = new_trainer(tmp_path)
    train(trainer, range(1))
    with served(tmp_path / "weights") as (store, url), contextlib.closing(publish(trainer, store)):
        async with WeightClient(url, tmp_path / "cache") as client:
            plan = await client.plan("r/1/0")
            await export(client, plan, tmp_path / "merged")
            await export(client, plan, tmp_path / "adapter", adapter=True)
    expected = logits(trainer.policy.model)
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").base_model.model,
    ):
        np.testing.assert_allclose(logits(model), expected, atol=2e-5)


def test_a_run_leaves_a_merged_model_and_its_adapters(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    trainer = new_trainer(tmp_path)
    config = lora_config(tmp_path)
    train(trainer, range(1))
    publisher = Publisher(WeightStore(tmp_path / "weights"), trainer.policy, "r", 1)
    RunHistory(config).finish(publisher, trainer.policy, [])
    publisher.close()
    expected = logits(trainer.policy.model)
    merged = AutoModelForCausalLM.from_pretrained(config.run.path / "model")
    adapter = AutoPeftModelForCausalLM.from_pretrained(config.run.path / "adapter").base_model.model
    assert math.isclose(float((logits(merged) - expected).abs().max()), 0, abs_tol=2e-5)
    assert math.isclose(float((logits(adapter) - expected).abs().max()), 0, abs_tol=2e-5)
