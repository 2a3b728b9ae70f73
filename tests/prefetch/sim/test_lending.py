"""Sizes of a shipped card mean the same times, by whichever option they were lent."""

import dataclasses

import pytest

from prefetch.config import SimulatorConfig
from prefetch.models.cards import load_architecture, load_card
from prefetch.sim.costs import UNKNOWN, beside_of
from prefetch.sim.lending import replayed_with


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "gpt_oss_20b", "qwen3_30b_a3b"])
def test_a_card_lent_to_the_trace_is_the_same_as_one_lent_to_the_simulator(name):
    own = load_card(name)
    of_trace = replayed_with(own, SimulatorConfig())
    assert of_trace == replayed_with(own, SimulatorConfig(model_card=name))
    assert of_trace[1] == beside_of(load_architecture(name)) != UNKNOWN


@pytest.mark.parametrize(
    "change", [{"name": "another"}, {"dense_bytes": 1}, {"expert_precision": "fp8"}]
)
def test_sizes_of_its_own_say_nothing_beside_them(change):
    own = dataclasses.replace(load_card("gpt_oss_20b"), **change)
    assert replayed_with(own, SimulatorConfig()) == (own, UNKNOWN)
