"""The rollout engine on a real vLLM, against transformers' model as the oracle."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
import pytest_asyncio
import torch
from blake3 import blake3
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from aspo.config import AuthConfig, EngineConfig
from aspo.http import Server, create_app, listen
from aspo_actor import engine_settings
from aspo_actor.completion import Completion
from aspo_actor.engine import RolloutEngine
from aspo_actor.errors import EngineError, WeightsRefusedError
from aspo_actor.guests import Guests
from aspo_actor.openai_routes import openai_routes
from aspo_actor.patch import write_patch
from models import char_tokenizer, save_model
from rollouts import write_config

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's imports warn of many things that only vLLM can mend.
    pytest.mark.filterwarnings("ignore"),
]

SETTINGS = EngineConfig(max_model_len=256, max_num_seqs=64, cpu_kv_cache_gib=0.1)
PROMPT = char_tokenizer()("12+345=\n")["input_ids"]
EOS = 1
# vLLM's attention and the oracle's sum in different orders; a wrong weight moves log-probs by whole nats.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `tied-0`, `tied-1`, `untied-0`, `untied-1`: their seeds give different weights."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_model(root / f"tied-{seed}", seed=seed)
        save_model(root / f"untied-{seed}", seed=seed, tied=False)
    return root


@pytest.fixture(scope="module", autouse=True)
def _collect() -> Iterator[None]:
    """vLLM leaves its sockets to the garbage collector; let it complain here, not in another module."""
    yield
    gc.collect()


@contextlib.asynccontextmanager
async def running(model: Path, version: str, dtype: str = "float32") -> AsyncIterator[RolloutEngine]:
    engine = await RolloutEngine.start(model, dtype, SETTINGS, version=version)
    try:
        yield engine
    finally:
        await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[RolloutEngine]:
    """An engine started on `tied-0`; tests that need weights call `serve`, and can make an update fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_settings, "EXTENSION", "faulty.FaultyExtension")
        async with running(folder / "tied-0", "test/0/0") as started:
            yield started


async def serve(engine: RolloutEngine, model: Path, version: str) -> None:
    if engine.version != version or not engine.healthy:
        await engine.apply_weights([model / "model.safetensors"], version)


def change(model: Path, target: Path, seed: int) -> tuple[Path, Path]:
    """Change 2 % of every matrix of `model` and all of its vectors: the new model, and the patch to it."""
    shutil.copytree(model, target)
    tensors, generator = load_file(model / "model.safetensors"), torch.Generator().manual_seed(seed)
    changes: dict[str, tuple[np.ndarray | None, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensor += torch.randn(tensor.shape, generator=generator) * 0.1
            changes[name] = None, tensor
            continue
        where = torch.randperm(tensor.numel(), generator=generator)[: tensor.numel() // 50].sort().values
        tensor.view(-1)[where] += torch.randn(len(where), generator=generator)
        changes[name] = where.numpy(), tensor.view(-1)[where]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    write_patch(target / "patch", changes)
    return target, target / "patch"


def published_digests(model: Path) -> dict[str, str]:
    tensors = load_file(model / "model.safetensors")
    return {name: blake3(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


async def check_weights(engine: RolloutEngine, model: Path) -> None:
    """Hold the engine's weights against those of a model folder: their bits, and what they compute."""
    expected = published_digests(model)
    assert await engine.digests(list(expected)) == expected
    np.testing.assert_allclose(await engine.score(PROMPT), oracle_score(model, PROMPT), atol=TOLERANCE)
    (drawn,) = await engine.sample(PROMPT, n=1, max_tokens=16, temperature=1.0)
    check_against_oracle(model, drawn)


def oracle(model: Path, token_ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [T-1, V] that transformers gives for what follows each but the last of `token_ids`."""
    network = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = network(torch.tensor([list(token_ids)])).logits[0, :-1]
    return (logits / temperature).log_softmax(-1)


def oracle_score(model: Path, token_ids: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probs [T-1] that transformers gives for `token_ids[1:]`."""
    rows = oracle(model, token_ids, temperature)
    return rows.gather(1, torch.tensor([list(token_ids[1:])]).T)[:, 0].numpy()


def check_against_oracle(model: Path, completion: Completion, temperature: float = 1.0) -> None:
    expected = oracle_score(model, [*PROMPT, *completion.token_ids], temperature)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)


def engine_core(engine: RolloutEngine) -> psutil.Process:
    """The process that runs the model of `engine`."""
    return psutil.Process(engine.client.engine_core.resources.engine_manager.processes[0].pid)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_those_of_the_distribution_sampled_from(
    engine: RolloutEngine, folder: Path, temperature: float
) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    completions = await engine.sample(PROMPT, n=6, max_tokens=24, temperature=temperature)
    assert len({tuple(c.token_ids) for c in completions}) > 1
    for completion in completions:
        check_against_oracle(folder / "tied-0", completion, temperature)


async def test_sampling_frequencies_follow_the_distribution(engine: RolloutEngine, folder: Path) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    draws = await engine.sample(PROMPT, n=512, max_tokens=1, temperature=0.7, seed=5)
    counts = np.bincount([int(c.token_ids[0]) for c in draws], minlength=16) / len(draws)
    expected = oracle(folder / "tied-0", [*PROMPT, 0], 0.7)[-1].exp().numpy()
    # Four standard deviations of each frequency.
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected * (1 - expected) / len(draws)) + 1e-3).all()


async def test_greedy_takes_the_likeliest_token_at_unscaled_logprobs(
    engine: RolloutEngine, folder: Path
) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    first, second = await engine.sample(PROMPT, n=2, max_tokens=12, temperature=0.0)
    rows = oracle(folder / "tied-0", [*PROMPT, *first.token_ids])[len(PROMPT) - 1 :]
    assert first.token_ids.tolist() == rows.argmax(-1).tolist() == second.token_ids.tolist()
    check_against_oracle(folder / "tied-0", first)


async def test_stop_includes_the_end_of_sequence_token_and_length_does_not(engine: RolloutEngine) -> None:
    completions = await engine.sample(PROMPT, n=64, max_tokens=10, temperature=1.0, seed=1)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        ids = completion.token_ids.tolist()
        assert (ids[-1] == EOS) == (completion.finish_reason == "stop")
        assert EOS not in ids[:-1]
        assert len(ids) == 10 or completion.finish_reason == "stop"
        assert completion.logprobs.shape == completion.token_ids.shape
        assert completion.text == char_tokenizer().decode([i for i in ids if i > EOS])


async def test_a_seed_repeats_a_group_and_its_neighbour_shares_no_sample(engine: RolloutEngine) -> None:
    async def sample(seed: int) -> list[tuple[int, ...]]:
        group = await engine.sample(PROMPT, n=8, max_tokens=24, temperature=1.5, seed=seed)
        return [tuple(completion.token_ids) for completion in group]

    first, again, neighbour = await asyncio.gather(sample(7), sample(7), sample(8))
    assert first == again
    assert not {ids for ids in first if len(ids) > 3} & set(neighbour)


async def test_seeded_prompts_beyond_a_steps_token_budget_are_served(engine: RolloutEngine) -> None:
    # vLLM's CPU runner dies of a seeded request whose prompt it has to split between steps.
    prompts = [[2 + (index * step) % 14 for index in range(200)] for step in range(1, 25)]
    groups = await asyncio.gather(
        *(engine.sample(prompt, n=2, max_tokens=4, temperature=1.0, seed=3) for prompt in prompts)
    )
    assert [len(group) for group in groups] == [2] * len(prompts)


async def test_score_is_the_oracles(engine: RolloutEngine, folder: Path) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    np.testing.assert_allclose(
        await engine.score(PROMPT), oracle_score(folder / "tied-0", PROMPT), atol=TOLERANCE
    )


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "temperature", "message"),
    [
        ([], 4, 1.0, "empty"),
        ([3, 16], 4, 1.0, "vocabulary of 16"),
        ([3, -1], 4, 1.0, "vocabulary of 16"),
        ([3] * 250, 7, 1.0, "exceed the context of 256"),
        ([3], 4, 2.5, "temperature 2.5"),
        ([3], 4, 0.001, "temperature 0.001"),
        ([3], 0, 1.0, "max_tokens"),
    ],
)
async def test_requests_that_cannot_be_served_are_refused_in_one_line(
    engine: RolloutEngine, prompt: list[int], max_tokens: int, temperature: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        await engine.sample(prompt, n=2, max_tokens=max_tokens, temperature=temperature)
    assert "\n" not in str(refusal.value)
    assert engine.healthy


@pytest.mark.parametrize("kind", ["complete", "patch"])
async def test_an_update_in_flight_keeps_every_request_and_labels_every_token(
    engine: RolloutEngine, folder: Path, tmp_path: Path, kind: str
) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    new, patch = change(folder / "tied-0", tmp_path / "new", 1)
    completions: list[Completion] = []
    begun, updated = asyncio.Event(), False

    async def sample_past_the_update() -> None:
        while not updated:
            completions.extend(await engine.sample(PROMPT, n=16, max_tokens=100, temperature=1.0))
            begun.set()

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(sample_past_the_update())
        await begun.wait()
        if kind == "patch":
            await engine.apply_patch(patch, "test/0/0", "test/0/5")
        else:
            await engine.apply_weights([new / "model.safetensors"], "test/0/5")
        completions.extend(await engine.sample(PROMPT, n=2, max_tokens=4, temperature=1.0))
        updated = True

    assert engine.version == "test/0/5"
    assert all(sum(span.length for span in c.spans) == len(c.token_ids) for c in completions)
    versions = {tuple(span.version for span in c.spans) for c in completions}
    assert versions == {("test/0/0",), ("test/0/0", "test/0/5"), ("test/0/5",)}
    # Tokens drawn before the switch have the old weights' log-probs to the last one.
    crossing = next(c for c in completions if len(c.spans) == 2)
    before = crossing.spans[0].length
    expected = oracle_score(folder / "tied-0", [*PROMPT, *crossing.token_ids])[len(PROMPT) - 1 :]
    np.testing.assert_allclose(crossing.logprobs[:before], expected[:before], atol=TOLERANCE)
    assert np.abs(crossing.logprobs[before:] - expected[before:]).max() > 100 * TOLERANCE
    await check_weights(engine, new)


async def test_patches_and_complete_updates_follow_each_other_in_any_order(
    engine: RolloutEngine, folder: Path, tmp_path: Path
) -> None:
    assert engine.unpatchable is None
    await serve(engine, folder / "tied-0", "test/0/0")
    await check_patches(engine, folder / "tied-0", folder / "tied-1", tmp_path)


async def check_patches(engine: RolloutEngine, model: Path, other: Path, target: Path) -> None:
    """Patch `model`, which runs, twice; load `other` and patch that."""
    first, patch = change(model, target / "first", 1)
    await engine.apply_patch(patch, engine.version, "test/1/1")
    assert engine.version == "test/1/1"
    await check_weights(engine, first)
    second, patch = change(first, target / "second", 2)
    timings = await engine.apply_patch(patch, "test/1/1", "test/1/2")
    assert min(timings.check_s, timings.pause_s, timings.apply_s, timings.probe_s) > 0
    await check_weights(engine, second)
    await engine.apply_weights([other / "model.safetensors"], "test/1/3")
    await check_weights(engine, other)
    third, patch = change(other, target / "third", 3)
    for base, version in (("test/1/3", "test/1/4"), ("test/1/4", "test/1/5")):
        await engine.apply_patch(patch, base, version)  # a patch may be applied again
        await check_weights(engine, third)


async def test_after_an_update_nothing_of_the_old_weights_is_left(
    engine: RolloutEngine, folder: Path
) -> None:
    # Longer than a block of the prefix cache, which must not answer with keys of the old weights.
    prompt = (PROMPT * 30)[:200]
    for seed in (0, 1, 0):
        model = folder / f"tied-{seed}"
        await serve(engine, model, f"test/0/{seed}")
        for _ in range(2):
            (sampled,) = await engine.sample(prompt, n=1, max_tokens=8, temperature=0.0)
            expected = oracle_score(model, [*prompt, *sampled.token_ids])[len(prompt) - 1 :]
            np.testing.assert_allclose(sampled.logprobs, expected, atol=TOLERANCE)
        np.testing.assert_allclose(await engine.score(prompt), oracle_score(model, prompt), atol=TOLERANCE)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.3.mlp.down_proj.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.4.mlp.down_proj.weight"] = torch.zeros(2, 2)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(64)


def _recast(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(128, dtype=torch.float64)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop, "1 tensors are missing, among them model.layers.3.mlp.down_proj.weight"),
        (_add, "1 tensors are unknown to the model, among them model.layers.4.mlp.down_proj.weight"),
        (_reshape, r"model.norm.weight has shape \[64\]"),
        (_recast, "model.norm.weight has dtype F64"),
        (None, "cannot be read as safetensors"),
    ],
)
async def test_an_unfit_update_is_refused_and_the_old_weights_serve_on(
    engine: RolloutEngine, folder: Path, tmp_path: Path, spoil: object, message: str
) -> None:
    before, version = await engine.score(PROMPT), engine.version
    source, file = folder / "tied-1" / "model.safetensors", tmp_path / "model.safetensors"
    if callable(spoil):
        tensors = load_file(source)
        spoil(tensors)
        save_file(tensors, file)
    else:
        file.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(WeightsRefusedError, match=message) as refusal:
        await engine.apply_weights([file], "test/0/9")
    assert "\n" not in str(refusal.value)
    assert engine.healthy
    assert engine.version == version
    np.testing.assert_array_equal(await engine.score(PROMPT), before)


HEAD = "model.embed_tokens.weight"
ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.9.mlp.up_proj.weight": (None, ONES)}, "up_proj.weight is unknown to the model"),
        ({HEAD: (np.array([0, 16 * 128]), ONES)}, r"positions outside 0 \.\. 2047"),
        ({HEAD: (np.array([-1, 5]), ONES)}, "positions outside"),
        ({HEAD: (np.array([5, 5]), ONES)}, "positions that do not ascend"),
        ({HEAD: (np.array([4, 5]), ONES.half())}, "has dtype F16; the engine runs in F32"),
        ({HEAD: (np.array([4]), ONES)}, "1 positions for values of shape"),
        ({HEAD: (None, ONES)}, r"has shape \[2\]; the model has \[16, 128\]"),
        (None, "cannot be read"),
    ],
)
async def test_an_unfit_patch_is_refused_and_the_old_weights_serve_on(
    engine: RolloutEngine,
    tmp_path: Path,
    changes: dict[str, tuple[np.ndarray | None, torch.Tensor]] | None,
    message: str,
) -> None:
    before, version, patch = await engine.score(PROMPT), engine.version, tmp_path / "patch"
    write_patch(patch, changes or {HEAD: (None, torch.ones(16, 128))})
    if changes is None:
        patch.write_bytes(patch.read_bytes()[:-1])
    with pytest.raises(WeightsRefusedError, match=message) as refusal:
        await engine.apply_patch(patch, version, "test/0/9")
    assert "\n" not in str(refusal.value)
    assert engine.healthy
    assert engine.version == version
    np.testing.assert_array_equal(await engine.score(PROMPT), before)


async def test_a_patch_to_other_weights_than_run_is_refused(
    engine: RolloutEngine, folder: Path, tmp_path: Path
) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    _, patch = change(folder / "tied-0", tmp_path / "new", 1)
    with pytest.raises(WeightsRefusedError, match="the patch is to test/0/8 and the engine runs test/0/0"):
        await engine.apply_patch(patch, "test/0/8", "test/0/9")
    await check_weights(engine, folder / "tied-0")


async def standing_still(engine: RolloutEngine, sampling: asyncio.Task[list[Completion]]) -> None:
    """Check that nothing comes out of a damaged engine, which says so."""
    assert not engine.healthy
    assert engine.recoverable
    assert await engine.client.is_paused()
    with pytest.raises(EngineError, match="failed"):
        await engine.sample(PROMPT, n=1, max_tokens=1, temperature=1.0)
    with pytest.raises(EngineError, match="failed"):
        await engine.probe(1.0)
    assert engine.recoverable
    assert not sampling.done()


@pytest.mark.parametrize("kind", ["complete", "patch"])
async def test_an_update_that_fails_midway_is_mended_by_a_complete_one(
    engine: RolloutEngine, folder: Path, tmp_path: Path, kind: str
) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    new, patch = change(folder / "tied-0", tmp_path / "new", 1)
    sampling = asyncio.create_task(engine.sample(PROMPT, n=16, max_tokens=200, temperature=2.0))
    await engine.score(PROMPT)  # by then the other runs
    if kind == "patch":
        await engine.client.collective_rpc("fail_next_patch")
        with pytest.raises(EngineError, match=r"weights test/2/0 failed: .*out of bounds"):
            await engine.apply_patch(patch, "test/0/0", "test/2/0")
    else:
        await engine.client.collective_rpc("fail_next_load")
        with pytest.raises(EngineError, match=r"weights test/2/0 failed: .*on fire"):
            await engine.apply_weights([new / "model.safetensors"], "test/2/0")
    assert engine.version == "test/0/0"
    await standing_still(engine, sampling)
    with pytest.raises(EngineError, match="failed"):
        await engine.apply_patch(patch, "test/0/0", "test/2/0")
    with pytest.raises(WeightsRefusedError, match="cannot be read"):
        await engine.apply_weights([tmp_path / "nowhere"], "test/2/0")
    await standing_still(engine, sampling)
    # An older version than the failed one mends it too.
    await engine.apply_weights([folder / "tied-1" / "model.safetensors"], "test/1/9")
    assert engine.healthy
    assert not engine.recoverable
    assert engine.failure is None
    versions = {tuple(span.version for span in c.spans) for c in await sampling}
    assert versions <= {("test/0/0",), ("test/0/0", "test/1/9")}
    assert ("test/0/0", "test/1/9") in versions
    await check_weights(engine, folder / "tied-1")


async def test_a_condemned_engine_drops_its_requests_until_it_is_mended(
    engine: RolloutEngine, folder: Path
) -> None:
    await serve(engine, folder / "tied-1", "test/0/1")
    sampling = asyncio.create_task(engine.sample(PROMPT, n=16, max_tokens=200, temperature=2.0))
    await engine.score(PROMPT)
    await engine.condemn("a digest is wrong")
    with pytest.raises(EngineError, match="a digest is wrong"):
        await sampling
    assert engine.recoverable
    await engine.apply_weights([folder / "tied-0" / "model.safetensors"], "test/0/0")
    await check_weights(engine, folder / "tied-0")


@contextlib.asynccontextmanager
async def guest(engine: RolloutEngine, folder: Path, places: int) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of OpenAI's, with the engine behind HTTP."""
    config = write_config(folder, model="m", run="test", overrides=[f"actor.guest_samples={places}"])
    guests = Guests(engine, config)
    app = create_app("actor", auth=AuthConfig(), ready=lambda: None, registry=CollectorRegistry())
    app.include_router(openai_routes(lambda: guests))
    with Server(app, listen("127.0.0.1", 0, AuthConfig())) as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client


async def guests_running(engine: RolloutEngine, samples: int) -> None:
    async with asyncio.timeout(30):
        while sum(engine._running.values()) != samples:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


async def test_guests_wait_for_their_few_places_and_give_them_back(
    engine: RolloutEngine, folder: Path, tmp_path: Path
) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    async with guest(engine, tmp_path, places=2) as client:
        ask = functools.partial(client.completions.create, model="test", prompt=PROMPT, max_tokens=8)
        await engine._pause()
        hanging = asyncio.create_task(ask(n=2))
        await guests_running(engine, 2)
        others = [asyncio.create_task(ask(seed=seed)) for seed in range(5)]
        done, _ = await asyncio.wait(others, timeout=0.5)
        assert (len(done), sum(engine._running.values())) == (0, 2)
        hanging.cancel()  # hangs up: the others have its places
        await guests_running(engine, 2)
        await engine.client.resume_generation()
        answers = await asyncio.gather(*others)
        assert len({answer.choices[0].text for answer in answers}) > 1
        await guests_running(engine, 0)
        with pytest.raises(openai.BadRequestError, match="3 completions are more than the 2"):
            await ask(n=3)


async def test_guests_are_dropped_with_the_weights_that_answer_them(
    engine: RolloutEngine, folder: Path, tmp_path: Path
) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    async with guest(engine, tmp_path, places=2) as client:
        ask = functools.partial(client.completions.create, model="test", prompt=PROMPT, max_tokens=8)
        await engine._pause()
        asked = [asyncio.create_task(ask()), asyncio.create_task(ask(stream=True))]
        await guests_running(engine, 2)
        async with asyncio.timeout(30):
            while engine.client.output_processor.get_num_unfinished_requests() != 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await engine.condemn("a digest is wrong")
        for job in (*asked, ask()):
            with pytest.raises(openai.InternalServerError, match="a digest is wrong"):
                await job
        await engine.apply_weights([folder / "tied-1" / "model.safetensors"], "test/0/1")
        greedy = await ask(temperature=0)
        (own,) = await engine.sample(PROMPT, n=1, max_tokens=8, temperature=0.0)
        assert greedy.choices[0].text == own.text
        assert greedy.system_fingerprint == "test/0/1"


async def test_guests_that_vllm_does_not_know_yet_are_dropped_too(
    engine: RolloutEngine, folder: Path
) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    never = asyncio.Event()

    async def guest() -> None:
        async with engine.drawing({"cmpl-of-nobody": 1}):
            await never.wait()

    asked = asyncio.create_task(guest())
    await guests_running(engine, 1)
    await engine.condemn("a digest is wrong")
    with pytest.raises(EngineError, match="a digest is wrong"):
        await asked
    await engine.apply_weights([folder / "tied-1" / "model.safetensors"], "test/0/1")
    asked = asyncio.create_task(guest())
    await guests_running(engine, 1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked


async def test_vllms_own_update_calls_refuse_an_unfit_update_too(
    engine: RolloutEngine, folder: Path, tmp_path: Path
) -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    def request(file: Path) -> WeightTransferUpdateRequest:
        return WeightTransferUpdateRequest(update_info={"files": [str(file)]})

    await serve(engine, folder / "tied-0", "test/0/0")
    before, file = await engine.score(PROMPT), tmp_path / "model.safetensors"
    tensors = load_file(folder / "tied-1" / "model.safetensors")
    _drop(tensors)
    save_file(tensors, file)
    await engine.client.start_weight_update()
    with pytest.raises(Exception, match="1 tensors are missing"):
        await engine.client.update_weights(request(file))
    np.testing.assert_array_equal(await engine.score(PROMPT), before)
    await engine.client.start_weight_update()
    with pytest.raises(Exception, match="before any weights were loaded"):
        await engine.client.finish_weight_update("test/0/9")
    await engine.client.update_weights(request(folder / "tied-0" / "model.safetensors"))
    await engine.client.finish_weight_update("test/0/0")
    np.testing.assert_array_equal(await engine.score(PROMPT), before)


async def test_vllms_own_update_calls_take_a_patch_and_after_a_failed_one_only_complete_weights(
    engine: RolloutEngine, folder: Path, tmp_path: Path
) -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    async def update(**info: object) -> None:
        await engine.client.start_weight_update()
        await engine.client.update_weights(WeightTransferUpdateRequest(update_info=info))
        await engine.client.finish_weight_update("test/0/0")

    await serve(engine, folder / "tied-0", "test/0/0")
    new, patch = change(folder / "tied-0", tmp_path / "new", 1)
    with pytest.raises(Exception, match="either files or a patch"):
        await update()
    await update(patch=str(patch))
    await check_weights(engine, new)
    await engine.client.collective_rpc("fail_next_patch")
    with pytest.raises(Exception, match="out of bounds"):
        await update(patch=str(patch))
    with pytest.raises(Exception, match="the next must be complete"):
        await update(patch=str(patch))
    await update(files=[str(folder / "tied-0" / "model.safetensors")])
    await check_weights(engine, folder / "tied-0")


async def test_an_update_may_come_in_several_files(
    engine: RolloutEngine, folder: Path, tmp_path: Path
) -> None:
    tensors = sorted(load_file(folder / "tied-1" / "model.safetensors").items())
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file(dict(tensors[0::2]), files[0])
    save_file(dict(tensors[1::2]), files[1])
    await engine.apply_weights(files, "test/0/2")
    np.testing.assert_allclose(
        await engine.score(PROMPT), oracle_score(folder / "tied-1", PROMPT), atol=TOLERANCE
    )


async def test_a_fresh_engine_agrees_and_a_hung_one_is_given_up(engine: RolloutEngine, folder: Path) -> None:
    await serve(engine, folder / "tied-1", "test/0/1")
    async with running(folder / "tied-1", "fresh/0/0") as fresh:
        np.testing.assert_allclose(await fresh.score(PROMPT), await engine.score(PROMPT), atol=1e-6)

        core = engine_core(fresh)
        sampling = asyncio.create_task(fresh.sample(PROMPT, n=16, max_tokens=240, temperature=2.0))
        await asyncio.sleep(0.1)
        core.send_signal(signal.SIGSTOP)
        with pytest.raises(EngineError, match="no token within 1 s"):
            await fresh.probe(1.0)
        with pytest.raises(EngineError, match="no token within 1 s"):
            await sampling
        assert not fresh.healthy
        assert not fresh.recoverable
        with pytest.raises(EngineError):
            await fresh.apply_weights([folder / "tied-0" / "model.safetensors"], "fresh/0/1")
    core.wait(10)


async def test_an_untied_head_is_updated_and_a_dead_engine_says_so(folder: Path, tmp_path: Path) -> None:
    async with running(folder / "untied-0", "test/0/0") as untied:
        for seed in (1, 0):
            model = folder / f"untied-{seed}"
            await untied.apply_weights([model / "model.safetensors"], f"test/1/{seed}")
            np.testing.assert_allclose(
                await untied.score(PROMPT), oracle_score(model, PROMPT), atol=TOLERANCE
            )
        await check_patches(untied, folder / "untied-0", folder / "untied-1", tmp_path)
        sampling = asyncio.create_task(untied.sample(PROMPT, n=16, max_tokens=240, temperature=2.0))
        await asyncio.sleep(0.1)
        os.kill(engine_core(untied).pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="vLLM failed"):
            await sampling
        assert not untied.healthy
        assert not untied.recoverable
        with pytest.raises(EngineError):
            await untied.probe(1.0)


async def test_weights_that_are_not_finite_hand_out_no_token_and_can_be_mended(
    engine: RolloutEngine, folder: Path, tmp_path: Path
) -> None:
    await serve(engine, folder / "tied-0", "test/0/0")
    nan = np.array([0]), torch.tensor([torch.nan])
    write_patch(tmp_path / "patch", {"model.norm.weight": nan})
    sampling = asyncio.create_task(engine.sample(PROMPT, n=32, max_tokens=240, temperature=2.0))
    await engine.score(PROMPT)
    with pytest.raises(EngineError, match="not finite"):
        await engine.apply_patch(tmp_path / "patch", "test/0/0", "test/0/1")
    with pytest.raises(EngineError, match="not finite"):
        await sampling
    assert not engine.healthy
    assert engine.recoverable
    assert engine.version == "test/0/0"
    await engine.apply_weights([folder / "tied-1" / "model.safetensors"], "test/0/2")
    await check_weights(engine, folder / "tied-1")


async def test_a_model_that_cannot_be_patched_takes_complete_updates(folder: Path, tmp_path: Path) -> None:
    # oneDNN packs half precision on a few CPUs only; vLLM multiplies it on all.
    async with running(folder / "tied-0", "test/0/0", dtype="float16") as half:
        if half.unpatchable is None:
            pytest.skip("this CPU packs half precision")
        _, patch = change(folder / "tied-0", tmp_path / "new", 1)
        with pytest.raises(WeightsRefusedError, match=r"takes no patches: .* is packed in a way"):
            await half.apply_patch(patch, "test/0/0", "test/0/1")
        await half.apply_weights([folder / "tied-1" / "model.safetensors"], "test/0/1")
        expected = oracle_score(folder / "tied-1", PROMPT)
        np.testing.assert_allclose(await half.score(PROMPT), expected, atol=0.1)
        assert await half.digests(["model.norm.weight"]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EngineConfig(max_model_len=100_000), "max_model_len"),
        (EngineConfig(extra={"enforce_eagre": True}), "did you mean 'enforce_eager'"),
        (EngineConfig(extra={"trust_remote_code": True}), "may not set 'trust_remote_code'"),
    ],
)
async def test_settings_that_vllm_cannot_take_are_refused_in_one_line(
    folder: Path, settings: EngineConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        await RolloutEngine.start(folder / "tied-0", "float32", settings, version="test/0/0")
    assert "\n" not in str(refusal.value)


async def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model at"):
        await RolloutEngine.start(tmp_path / "nowhere", "float32", SETTINGS, version="test/0/0")
