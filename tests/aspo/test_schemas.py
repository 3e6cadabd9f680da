import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aspo.schemas import PolicyVersion, RolloutGroup, VersionSpan

numbers = st.integers(0, 10**9 - 1)
runs = st.from_regex(r"[aZ0][aZ0._-]{0,63}", fullmatch=True)


@given(runs, numbers, numbers)
@settings(database=None, deadline=None)
def test_a_policy_version_reads_back_what_it_prints(run: str, epoch: int, step: int) -> None:
    version = PolicyVersion(run=run, epoch=epoch, step=step)
    assert str(version) == f"{run}/{epoch}/{step}"
    assert PolicyVersion.parse(str(version)) == version


@given(st.text(max_size=12) | st.from_regex(r"[a-z]{1,3}/\d{1,3}/\d{1,3}", fullmatch=True))
@settings(database=None, deadline=None)
def test_one_version_has_one_name(text: str) -> None:
    try:
        version = PolicyVersion.parse(text)
    except ValueError:
        return
    assert str(version) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "demo",
        "demo/1",
        "demo/1/2/3",
        "/1/2",
        "a b/1/2",
        "a/b/1/2",
        "demo/-1/2",
        "demo/1/x",
        "demo/1.0/2",
        "demo/1/2\n",
        " demo/1/2",
        "demo/01/2",
        "demo/1/00",
        "demo/1/1234567890",
        "demo/١/2",
        "d" * 65 + "/1/2",
        "é/1/2",
        "x" * 1_000_000,
    ],
)
def test_what_is_no_policy_version_is_refused_briefly(text: str) -> None:
    with pytest.raises(ValueError, match="run/epoch/step") as caught:
        PolicyVersion.parse(text)
    assert len(str(caught.value)) < 250


def test_versions_order_by_epoch_then_step() -> None:
    texts = ["demo/0/9", "demo/0/10", "demo/1/0", "demo/2/3", "demo/10/0"]
    versions = [PolicyVersion.parse(text) for text in texts]
    assert sorted(reversed(versions)) == versions
    assert max(versions) == PolicyVersion(run="demo", epoch=10, step=0)
    assert versions[0] < versions[1] <= versions[1] < versions[2]


def test_a_policy_version_is_a_constant_key() -> None:
    version = PolicyVersion.parse("demo/1/2")
    assert {version: 1}[PolicyVersion.parse("demo/1/2")] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        version.step = 3  # type: ignore[misc]


def test_offsets_cut_a_group_into_its_samples() -> None:
    lengths = np.array([2, 0, 3], np.int32)
    group = RolloutGroup(
        uid="u",
        actor="a",
        purpose="train",
        temperature=1.0,
        prompt_ids=np.array([7], np.int32),
        lengths=lengths,
        token_ids=np.array([10, 11, 20, 21, 22], np.int32),
        behavior_logprobs=np.zeros(5, np.float32),
        rewards=np.zeros(3, np.float32),
        failed=np.zeros(3, np.bool_),
        finish_reasons=("stop",) * 3,
        spans=((VersionSpan("r/0/0", 2),), (), (VersionSpan("r/0/0", 3),)),
    )
    offsets = group.offsets
    assert offsets.dtype == np.int32
    samples = [group.token_ids[offsets[i] : offsets[i + 1]].tolist() for i in range(len(group))]
    assert samples == [[10, 11], [], [20, 21, 22]]
