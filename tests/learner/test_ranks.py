"""A learner of several ranks against one of a single process: the same figures, weights and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from aspo.codec import decode_group, encode_group
from aspo.config import Config, ConfigError, LearnerConfig, load_config
from aspo_learner.checkpoint import Checkpoints
from aspo_learner.policy import load_policy
from aspo_learner.ranks import Ranks, Verify
from aspo_learner.trainer import Trainer
from models import save_model, tiny_qwen3
from ranked import run_ranks
from rollouts import make_group, write_config

# Adam takes a whole step where a gradient is nothing but rounding; of an update as a whole that is little.
UPDATE_TOLERANCE = 1e-4
FIGURE_TOLERANCE = {"rel": 1e-4, "abs": 1e-6}
# The last batch has fewer sequences than four ranks.
BATCHES = [[(4, seed) for seed in range(4)], [(4, seed) for seed in range(4, 8)], [(3, 8)]]
VARIANTS = {
    "1 rank, offloaded": (1, True, ["learner.offload=true"]),
    "2 ranks, tied": (2, True, []),
    "4 ranks, untied": (4, False, ["loss.ratio_reference=proximal"]),
    "2 copies on 2 ranks each": (
        4,
        True,
        ["learner.shard_size=2", "learner.activation_checkpointing=true", "loss.kl_coefficient=0.01"],
    ),
    "2 ranks, offloaded, split clip": (2, False, ["learner.offload=true", "loss.entropy_split_clip=true"]),
}


def prepare(folder: Path, *, tied: bool) -> Path:
    """Write a model, its config and batches of groups of uneven lengths; gives the config's path."""
    shape = {"hidden_size": 64, "layers": 2}
    write_config(folder, model=save_model(folder / "model", tied=tied, **shape))
    model = tiny_qwen3(tied=tied, **shape)
    for number, batch in enumerate(BATCHES):
        (folder / f"batch-{number}").mkdir()
        for size, seed in batch:
            rewards, uid = [float(i == 1) for i in range(size)], f"test:train:{seed}"
            group = make_group(model, uid=uid, size=size, seed=seed, rewards=rewards)
            (folder / f"batch-{number}" / f"{seed}").write_bytes(encode_group(group))
    return folder / "config.toml"


def train(config: Config, folder: Path, out: Path) -> None:
    """Train on the batches as a learner does, and leave behind figures and weights."""
    ranks = Ranks.join(config.learner)
    trainer = Trainer(load_policy(config, ranks), config)
    figures = []
    for number in range(len(BATCHES)):
        files = sorted((folder / f"batch-{number}").iterdir())
        figures.append(trainer.train_step([decode_group(file.read_bytes()) for file in files]))
        for (uid, sample), trace in trainer.token_traces.items():
            figures[-1][f"trace {uid} {sample}"] = float(np.sum(trace.logprobs + trace.weights))
        assert ranks.rank or len(trainer.token_traces) == (3 if number == 2 else 8), (
            "those of the first update"
        )
    leave(trainer, out)
    check_that_broken_weights_are_skipped_and_others_taken(trainer, files, weights_of(out))
    (out / "figures.json").write_text(json.dumps(figures))
    ranks.close()


def check_that_broken_weights_are_skipped_and_others_taken(
    trainer: Trainer, files: list[Path], weights: dict[str, Tensor]
) -> None:
    broken = {name: tensor.clone() for name, tensor in weights.items()}
    broken["model.norm.weight"][0] = torch.nan
    trainer.policy.load_published(broken)
    trainer.train_step([decode_group(file.read_bytes()) for file in files])
    assert trainer.updater.skipped > 0
    trainer.policy.load_published(weights)
    trainer.forget_moments()
    taken: dict[str, Tensor] = {}
    trainer.policy.copy_published(taken)
    assert all(torch.equal(taken[name], tensor) for name, tensor in weights.items())
    assert not trainer.optimizer.state


def leave(trainer: Trainer, out: Path) -> None:
    weights: dict[str, Tensor] = {}
    trainer.policy.copy_published(weights)
    out.mkdir(exist_ok=True)
    safetensors.torch.save_file(weights, out / "weights.safetensors")


def weights_of(out: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(out / "weights.safetensors")


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


SHORT = ("2 copies on 2 ranks each", "2 ranks, offloaded, split clip")


@pytest.mark.parametrize(
    "variant", [v if v in SHORT else pytest.param(v, marks=pytest.mark.faults) for v in VARIANTS]
)
def test_ranks_train_as_one_process_does(tmp_path: Path, variant: str) -> None:
    size, tied, overrides = VARIANTS[variant]
    config = prepare(tmp_path, tied=tied)
    overrides = ["learner.micro_batch_tokens=15", *overrides]
    alone = [one for one in overrides if "shard_size" not in one and "offload" not in one]
    train(load_config(config, alone), tmp_path, tmp_path / "alone")
    run_ranks(size, train, config, overrides, tmp_path, tmp_path / "ranks")
    model = tiny_qwen3(tied=tied, hidden_size=64, layers=2)
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}
    one, many = weights_of(tmp_path / "alone"), weights_of(tmp_path / "ranks")
    assert one.keys() == many.keys() == before.keys()
    update = flat(one) - flat(before)
    assert float((flat(many) - flat(one)).norm() / update.norm()) < UPDATE_TOLERANCE
    pairs = zip(
        *(json.loads((tmp_path / o / "figures.json").read_text()) for o in ("alone", "ranks")), strict=True
    )
    for figures, found in pairs:
        assert figures.keys() == found.keys()
        for name, value in figures.items():
            assert found[name] == pytest.approx(value, **FIGURE_TOLERANCE), name


def test_half_precision_rounds_no_more_on_ranks(tmp_path: Path) -> None:
    config, half = prepare(tmp_path, tied=True), ["learner.precision=bf16"]
    train(load_config(config), tmp_path, tmp_path / "exact")
    train(load_config(config, half), tmp_path, tmp_path / "half")
    run_ranks(2, train, config, half, tmp_path, tmp_path / "ranks")
    exact, one, many = (flat(weights_of(tmp_path / out)) for out in ("exact", "half", "ranks"))
    assert 0 < float((many - exact).norm()) < 1.1 * float((one - exact).norm())


def train_and_save(config: Config, folder: Path, out: Path) -> None:
    """Train on the first batch, then save a checkpoint."""
    ranks = Ranks.join(config.learner)
    trainer = Trainer(load_policy(config, ranks), config)
    files = sorted((folder / "batch-0").iterdir())
    trainer.train_step([decode_group(file.read_bytes()) for file in files])
    save(trainer, ranks, out)
    ranks.close()


def load_and_save(config: Config, source: Path, out: Path) -> None:
    """Load a checkpoint, and save it again."""
    ranks = Ranks.join(config.learner)
    trainer = Trainer(load_policy(config, ranks), config)
    state = Checkpoints(source, keep=1, ranks=ranks).load(trainer.policy.model, trainer.optimizer)
    assert state is not None
    trainer.load_state(state["trainer"])
    save(trainer, ranks, out)
    ranks.close()


def save(trainer: Trainer, ranks: Ranks, out: Path) -> None:
    checkpoints = Checkpoints(out, keep=1, ranks=ranks)
    checkpoints.save(1, trainer.policy.model, trainer.optimizer, {"trainer": trainer.state()})


def test_a_checkpoint_is_loaded_by_any_number_of_ranks(tmp_path: Path) -> None:
    config = prepare(tmp_path, tied=False)
    train_and_save(load_config(config), tmp_path, tmp_path / "a")
    run_ranks(2, load_and_save, config, [], tmp_path / "a", tmp_path / "b")
    run_ranks(4, load_and_save, config, ["learner.shard_size=2"], tmp_path / "b", tmp_path / "c")
    run_ranks(4, load_and_save, config, [], tmp_path / "c", tmp_path / "d")
    run_ranks(2, load_and_save, config, [], tmp_path / "d", tmp_path / "e")
    load_and_save(load_config(config), tmp_path / "e", tmp_path / "f")
    expected = files_of(tmp_path / "a")
    assert set(expected) == {"model.safetensors", "optimizer.safetensors", "state.json", "digests.json"}
    assert files_of(tmp_path / "f") == expected
    assert len(files_of(tmp_path / "c")) == 2 * 2 + 2, "one of the copies is enough"
    assert len(files_of(tmp_path / "d")) == 4 * 2 + 2


class Apart(Ranks):
    """Two ranks, the other of which finds nothing where rank 0 writes."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.size = 2

    def announce(self, order: object) -> None:
        assert isinstance(order, Verify)
        self._theirs = json.dumps({"digests": {}, "error": f"rank 1: no {order.folder}"}).encode()

    def gather(self, reply: bytes) -> list[bytes]:
        return [reply, self._theirs]


def test_ranks_whose_folders_are_not_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rank 1: no .*set run\.dir to storage that their machines share"):
        Checkpoints(tmp_path / "checkpoints", keep=1, ranks=Apart())
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "torch sees no GPU"),
        ({"device": "cpu", "shard_size": 3}, r"learner\.shard_size \(3\) does not divide the 4 processes"),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    settings: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=message):
        Ranks.join(LearnerConfig(**settings))


def files_of(folder: Path) -> dict[str, bytes]:
    (checkpoint,) = folder.iterdir()
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}
