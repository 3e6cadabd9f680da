"""The demo's task and its careless teacher."""

from __future__ import annotations

import random

from aspo_cli.demo_task import MAX_COMPLETION_TOKENS, correct_sum, demonstrate, is_held_out, make_problem


def test_problems_are_right_and_the_two_sets_are_apart() -> None:
    rng = random.Random(0)
    for held_out in (False, True):
        for _ in range(200):
            problem = make_problem(rng, held_out=held_out)
            a, b = map(int, problem["prompt"].rstrip("=").split("+"))
            assert problem["answer"] == str(a + b)
            assert is_held_out(a, b) == held_out


def test_a_careful_teacher_is_right_and_a_careless_one_only_without_carries() -> None:
    rng = random.Random(0)
    right = 0
    for _ in range(500):
        problem = make_problem(rng, held_out=False)
        careful = demonstrate(problem["prompt"], rng, forget=0.0)
        careless = demonstrate(problem["prompt"], rng, forget=1.0)
        assert correct_sum(careful, answer=problem["answer"]) == 1.0
        assert len(careful) < MAX_COMPLETION_TOKENS
        right += careless == careful
        assert (careless == careful) == (correct_sum(careless, answer=problem["answer"]) == 1.0)
    assert 0.1 < right / 500 < 0.35


def test_the_scratchpad_reads_as_documented() -> None:
    assert demonstrate("37+485=", random.Random(0), forget=0.0) == "7+5+0=12,3+8+1=12,0+4+1=05,#522"
    assert demonstrate("37+485=", random.Random(0), forget=1.0) == "7+5+0=12,3+8+0=11,0+4+0=04,#412"


def test_the_reward_wants_exactly_one_answer() -> None:
    for completion, reward in (
        ("7+5+0=12,#522", 1.0),
        ("#522", 1.0),
        ("#0522", 0.0),
        ("#52#522", 0.0),
        ("522", 0.0),
        ("#522,", 0.0),
        ("", 0.0),
    ):
        assert correct_sum(completion, answer="522") == reward
