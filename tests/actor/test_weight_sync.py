"""Following a store over HTTP with the real engine: patches, repairs, rollback, and a canary's trial."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor
from transformers import Qwen3ForCausalLM

from aspo.config import AuthConfig, CanaryConfig, EngineConfig
from aspo.http import ApiError, Scope, Server, create_app, listen, require
from aspo.schemas import PolicyVersion, RolloutGroup, Task
from aspo.weights.client import Mirror, WeightClient, export
from aspo.weights.leases import Leases
from aspo.weights.manifest import WeightsError
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore
from aspo_actor import weight_sync as weight_sync_module
from aspo_actor.completion import Completion
from aspo_actor.engine import RolloutEngine
from aspo_actor.errors import EngineError
from aspo_actor.rewards.scorer import Scores
from aspo_actor.trial import Trials, k3
from aspo_actor.weight_sync import WeightSync
from aspo_actor.worker import assemble
from aspo_learner.batching import micro_batches, sequences_of
from aspo_learner.policy import load_policy
from aspo_learner.publisher import Publisher
from aspo_learner.ranks import ALONE
from aspo_learner.releases import Releases, TrialReport
from aspo_learner.trainer import Trainer
from models import char_tokenizer, save_model
from rollouts import make_group, write_config

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore"),
]
SETTINGS = EngineConfig(max_model_len=256, max_num_seqs=16, cpu_kv_cache_gib=0.1)
CPU = torch.device("cpu")
TOKENS = char_tokenizer()("12+345=\n678+9=")["input_ids"]


@dataclass
class Plane:
    """A learner's side, an engine that follows it, and the model that is published."""

    store: WeightStore
    releases: Releases
    client: WeightClient
    engine: RolloutEngine
    mirror: Mirror
    sync: WeightSync
    model: Qwen3ForCausalLM
    files: dict[str, bytes]
    step: int = 0

    def publish(self, scale: float = 1e-3, share: float = 0.05) -> str:
        """Change a share of the weights a little and publish the next version."""
        generator = torch.Generator().manual_seed(self.step)
        with torch.no_grad():
            for parameter in self.model.parameters():
                chosen = torch.rand(parameter.shape, generator=generator) < share
                parameter += chosen * scale * torch.randn(parameter.shape, generator=generator)
        self.step += 1
        version = PolicyVersion(1, self.step, "r")
        self.store.put(version, self.tensors(), self.files, live=False)
        self.releases.stored(version)
        return str(version)

    def tensors(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    async def check(self, version: str) -> None:
        """The engine runs `version` and scores as transformers does with its weights."""
        assert self.engine.version == version
        network = Qwen3ForCausalLM(self.model.config).eval()
        network.load_state_dict(self.store.state(PolicyVersion.parse(version)).tensors, strict=False)
        with torch.no_grad():
            rows = network(torch.tensor([TOKENS])).logits[0, :-1].log_softmax(-1)
        expected = rows.gather(1, torch.tensor([TOKENS[1:]]).T)[:, 0].numpy()
        np.testing.assert_allclose(await self.engine.score(TOKENS), expected, atol=1e-4)


@pytest.fixture(scope="module", autouse=True)
def _collect() -> Iterator[None]:
    yield
    gc.collect()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plane]:
    folder = tmp_path_factory.mktemp("plane")
    save_model(folder / "model", seed=0)
    model = Qwen3ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    files = {p.name: p.read_bytes() for p in (folder / "model").iterdir() if p.suffix != ".safetensors"}
    leases, auth = Leases(), AuthConfig()
    store = WeightStore(folder / "weights", leased=leases.versions)
    releases = Releases(store, leases, CanaryConfig(groups=0))
    app = create_app("test", auth=auth, ready=lambda: None, registry=CollectorRegistry())

    @app.post("/v1/weights/{version:path}/report", dependencies=[require(Scope.ACTOR)])
    def report(version: str, body: TrialReport) -> dict[str, str]:
        if store.manifest(PolicyVersion.parse(version)) is None:
            raise ApiError(404, "no_version", version)
        return {"state": releases.report(PolicyVersion.parse(version), body)}

    app.include_router(weight_routes(store, leases))
    app.include_router(blob_routes(store.blobs))
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    store.put(PolicyVersion(1, 0, "r"), first, files)
    with Server(app, listen("127.0.0.1", 0, auth)) as server:
        async with WeightClient(server.url, folder / "cache", name="actor-0", role="actor") as client:
            plan = await client.latest()
            assert plan is not None
            mirror = await export(client, plan, folder / "engine")
            engine = await RolloutEngine.start(folder / "engine", "float32", SETTINGS, version="r/1/0")
            trials = Trials(client, engine, CanaryConfig(groups=0), "actor-0")
            sync = WeightSync(client, engine, mirror, folder, trials)
            yield Plane(store, releases, client, engine, mirror, sync, model, files)
            await engine.close()


async def test_deltas_are_patched_in(plane: Plane) -> None:
    patches = plane.sync.stats.patches
    for _ in range(3):
        version = plane.publish()
        assert await plane.sync.sync_once() == version
        await plane.check(version)
    assert plane.sync.stats.patches == patches + 3
    assert plane.sync.stats.audited > 0


async def test_several_versions_at_once_are_one_patch(plane: Plane) -> None:
    patches = plane.sync.stats.patches
    for _ in range(4):
        version = plane.publish()
    await plane.sync.sync_once()
    await plane.check(version)
    assert plane.sync.stats.patches == patches + 1


async def test_requests_run_on_through_the_updates(plane: Plane) -> None:
    sampling = asyncio.create_task(
        plane.engine.sample(TOKENS, n=8, max_tokens=200, temperature=1.0)  # seconds, on a CPU
    )
    await asyncio.sleep(0.1)
    before = plane.engine.version
    version = plane.publish()
    await plane.sync.sync_once()
    completions = await sampling
    seen = {span.version for completion in completions for span in completion.spans}
    assert seen <= {before, version}
    assert all(sum(s.length for s in c.spans) == len(c.token_ids) for c in completions)


async def test_a_rollback_and_a_promotion_are_followed(plane: Plane) -> None:
    first, second = plane.publish(), plane.publish()
    await plane.sync.sync_once()
    plane.store.roll_back(PolicyVersion.parse(first))
    await plane.sync.sync_once()
    await plane.check(first)
    plane.store.promote(PolicyVersion.parse(second))
    await plane.sync.sync_once()
    await plane.check(second)


async def test_a_patch_that_did_not_land_is_found_out_and_mended(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, repairs = weight_sync_module.write_patch, plane.sync.stats.repairs

    def spoil(path: Path, changes: dict[str, tuple[Any, Tensor]]) -> None:
        write(path, {name: (where, values + 0.5) for name, (where, values) in changes.items()})

    version = plane.publish()
    with monkeypatch.context() as spoilt:
        spoilt.setattr(weight_sync_module, "write_patch", spoil)
        await plane.sync.sync_once()
    assert plane.sync.stats.repairs == repairs + 1
    assert plane.engine.healthy
    await plane.check(version)


async def test_a_damaged_engine_is_mended_without_a_new_version(plane: Plane) -> None:
    version = plane.publish()
    await plane.sync.sync_once()
    await plane.engine.condemn("for the test")
    assert plane.engine.recoverable
    with pytest.raises(EngineError, match="for the test"):
        await plane.engine.sample(TOKENS, n=1, max_tokens=2, temperature=1.0)
    mending = asyncio.create_task(plane.sync.keep_mended())
    async with asyncio.timeout(20):
        while not plane.engine.healthy:  # noqa: ASYNC110 - the engine announces nothing
            await asyncio.sleep(0.05)
    mending.cancel()
    await plane.check(version)


async def test_a_damaged_mirror_is_fetched_anew(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go wrong at once: the update, and the copy that would mend it."""
    version = plane.publish()

    async def break_down(*args: object) -> None:
        next(iter(plane.mirror.state.tensors.values())).zero_()
        await plane.engine.condemn("for the test")
        raise EngineError("for the test")

    with monkeypatch.context() as broken:
        broken.setattr(plane.engine, "apply_patch", break_down)
        await plane.sync.sync_once()
    await plane.check(version)
    plane.mirror.state.verify(plane.mirror.manifest)  # type: ignore[arg-type]


async def test_a_damaged_mirror_waits_for_a_learner_that_is_gone(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version = plane.publish()
    await plane.sync.sync_once()
    next(iter(plane.mirror.state.tensors.values())).zero_()
    await plane.engine.condemn("for the test")
    with monkeypatch.context() as gone:
        gone.setattr("aspo.weights.client.RETRIES", 1)
        gone.setattr(plane.client, "_url", "http://127.0.0.1:1")
        mending = asyncio.create_task(plane.sync.keep_mended())
        async with asyncio.timeout(20):
            while "waits for weights" not in caplog.text:  # noqa: ASYNC110 - only the log tells
                await asyncio.sleep(0.05)
        assert not mending.done()
    async with asyncio.timeout(20):
        while not plane.engine.healthy:  # noqa: ASYNC110 - the engine announces nothing
            await asyncio.sleep(0.05)
    mending.cancel()
    await plane.check(version)


async def test_an_engine_beyond_repair_is_an_error(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    plane.publish()

    async def fail(*args: object) -> None:
        if plane.engine.healthy:
            await plane.engine.condemn("for the test")
        raise EngineError("still broken")

    with monkeypatch.context() as broken:
        broken.setattr(plane.engine, "apply_patch", fail)
        broken.setattr(plane.engine, "apply_weights", fail)
        with pytest.raises(EngineError, match="still broken"):
            await plane.sync.sync_once()
    assert not plane.engine.healthy
    version = plane.publish()
    await plane.sync.sync_once()
    await plane.check(version)


async def test_a_learner_that_is_gone_leaves_the_version_in_place(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aspo.weights.client.RETRIES", 1)
    version = plane.engine.version
    with monkeypatch.context() as gone:
        gone.setattr(plane.client, "_url", "http://127.0.0.1:1")
        with pytest.raises(WeightsError, match="no learner answers"):
            await plane.sync.sync_once()
    await plane.check(version)


async def trial_of(plane: Plane, monkeypatch: pytest.MonkeyPatch, scale: float) -> tuple[str, str]:
    """Publish under a canary's rule; gives the versions before and after."""
    await plane.sync.sync_once()
    before = plane.engine.version
    group = make_group(plane.model, version=before)
    assert plane.sync._trials is not None
    await plane.sync._trials.saw(group)
    with monkeypatch.context() as canary:
        canary.setattr(plane.releases, "_config", CanaryConfig(enabled=True, groups=0))
        version = plane.publish(scale=scale, share=1.0)
        await plane.sync.sync_once()
        await asyncio.gather(*plane.sync._reporting)
    return before, version


async def test_a_canary_promotes_a_good_version(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    _, version = await trial_of(plane, monkeypatch, scale=1e-4)
    assert str(plane.store.live()) == version
    await plane.check(version)


async def test_a_canary_withdraws_a_bad_version_and_goes_back(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, version = await trial_of(plane, monkeypatch, scale=1.0)
    assert plane.engine.version == version, "it was tried"
    assert str(plane.store.live()) == before
    await plane.sync.sync_once()
    await plane.check(before)


async def test_a_completion_that_fills_the_context_is_not_scored(plane: Plane) -> None:
    trials = Trials(plane.client, plane.engine, CanaryConfig(), "actor-0")
    group = make_group(plane.model)
    await trials.saw(group)
    room = SETTINGS.max_model_len
    assert room is not None
    await trials.saw(dataclasses.replace(group, prompt_ids=np.full(room, 5, dtype=np.int32)))
    assert len(await trials.score()) == 1


async def test_a_trial_waits_for_a_completion_to_compare(plane: Plane) -> None:
    trials = Trials(plane.client, plane.engine, CanaryConfig(), "actor-0")
    scoring = asyncio.create_task(trials.score())
    await plane.engine.probe(60)
    assert not scoring.done()
    await trials.saw(make_group(plane.model))
    assert len(await scoring) == 1


async def test_adapters_are_merged_into_the_running_engine_and_log_probs_are_the_learners(
    plane: Plane, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", seed=5)
    overrides = ["learner.lora.rank=4", "learner.learning_rate=0.01", "run.name=lora"]
    config = write_config(tmp_path, model=tmp_path / "model", overrides=overrides)
    trainer = Trainer(load_policy(config, ALONE), config)
    store, auth = WeightStore(tmp_path / "weights"), AuthConfig()
    publisher = Publisher(store, trainer.policy, "lora", 1)
    app = create_app("test", auth=auth, ready=lambda: None, registry=CollectorRegistry())
    app.include_router(weight_routes(store, Leases()))
    app.include_router(blob_routes(store.blobs))
    with Server(app, listen("127.0.0.1", 0, auth)) as server:
        async with WeightClient(server.url, tmp_path / "cache") as client:
            sync = WeightSync(client, plane.engine, Mirror(client), tmp_path)
            for step in range(3):
                trainer.train_step([make_group(trainer.policy.model, seed=4 * step + i) for i in range(4)])
                publisher.publish(step)
                publisher.wait()
                assert await sync.sync_once() == f"lora/1/{step}"
                drawn = await plane.engine.sample(TOKENS, n=4, max_tokens=12, temperature=1.0)
                sequences = list(sequences_of(as_group(TOKENS, drawn), [1.0] * 4, 0))
                [batch] = micro_batches(sequences, range(4), max_tokens=999, device=CPU)
                with torch.no_grad():
                    logprobs, _ = trainer.policy.score(batch, 1.0)
                difference = (logprobs - batch.behavior_logprobs)[batch.mask]
                assert difference.abs().max() < 1e-4, f"lora/1/{step}"
    publisher.close()
    assert sync.stats.patches == 2  # the first came whole
    assert sync.stats.audited > 0
    await plane.engine.condemn("for the test")
    await sync._repair()
    assert plane.engine.version == "lora/1/2"


def as_group(prompt: list[int], completions: list[Completion]) -> RolloutGroup:
    """What a worker would store of them."""
    task = Task(
        uid="lora:train:0",
        index=0,
        purpose="train",
        prompt_ids=prompt,
        group_size=len(completions),
        max_tokens=12,
        temperature=1.0,
        reward_inputs={},
    )
    zeros = np.zeros(len(completions), dtype=np.float32)
    return assemble(task, "actor-0", completions, Scores(zeros, zeros.astype(bool), {}))


def test_k3_is_zero_for_equal_policies_and_grows_with_their_distance() -> None:
    logprobs = [np.array([-1.0, -2.0], dtype=np.float32), np.array([-0.5], dtype=np.float32)]
    assert k3(logprobs, logprobs) == 0
    assert k3([], []) == 0
    shifted = [row + np.float32(0.1) for row in logprobs]
    assert k3(logprobs, shifted) == pytest.approx(np.expm1(0.1) - 0.1, rel=1e-5)
