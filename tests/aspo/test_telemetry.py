"""Gauges: one for each metric of the table, or one for each label of it."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from aspo.telemetry import Gauges


def test_a_metric_with_a_label_has_a_gauge_for_each_value() -> None:
    gauges = Gauges("learner", {"step": "Steps", "reward_part/part": "Parts"})
    gauges.set({"step": 3, "reward_part/format": 0.5, "reward_part/right": 0.25})
    text = generate_latest(gauges.registry).decode()
    for line in (
        "aspo_learner_step 3.0",
        'aspo_learner_reward_part{part="format"} 0.5',
        'aspo_learner_reward_part{part="right"} 0.25',
    ):
        assert line in text.splitlines()
    with pytest.raises(KeyError):
        gauges.set({"unheard_of": 1})
