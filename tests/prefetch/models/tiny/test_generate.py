"""Generation: what decode recorded is what a plain pass over the same text would do."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from prefetch.models.tiny.generate import generate, own_gate_choices, sample
from prefetch.models.tiny.net import Shape, TinyMoE

SHAPE = Shape(layers=3, experts=8, top_k=2, d=32, ff=8, context=24, vocabulary=40)
NET = TinyMoE(SHAPE, torch.Generator().manual_seed(0)).requires_grad_(False)


def run(temperature: float = 1.0, seed: int = 0):
    prompts = torch.randint(40, (5, 10), generator=torch.Generator().manual_seed(1))
    return generate(NET, prompts, 14, temperature, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decode_equals_teacher_forcing(temperature):
    done = run(temperature)
    _, routed_L = NET(done.tokens_BS)
    for layer, routed in enumerate(routed_L):
        recorded = done.routed.ids[:, :, layer].flatten(0, 1)
        assert torch.equal(recorded, routed.ids)
        assert_close(done.routed.gate_inputs[:, :, layer].flatten(0, 1), routed.gate_inputs)


def test_every_sampled_token_is_run_and_no_more():
    done = run()
    assert done.tokens_BS.shape == (5, 24)
    assert done.routed.ids.shape == (5, 24, 3, 2)
    assert done.routed.logits.shape == (5, 24, 3, 8)


def test_the_generator_decides_the_continuation():
    a, b, c = run(seed=0).tokens_BS, run(seed=0).tokens_BS, run(seed=1).tokens_BS
    assert torch.equal(a, b)
    assert torch.equal(a[:, :10], c[:, :10]) and not torch.equal(a, c)


def test_sampling_follows_the_distribution():
    logits_BV = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    drawn = sample(logits_BV, 1.0, torch.Generator().manual_seed(0)).flatten()
    share = drawn.bincount() / len(drawn)
    assert_close(share, torch.tensor([0.1, 0.2, 0.7]), atol=0.015, rtol=0)  # 4 standard errors
    assert sample(logits_BV, 0.0, torch.Generator()).unique().tolist() == [2]


def test_the_own_gate_control_finds_every_choice_and_misses_foreign_ones():
    routed = run().routed
    assert own_gate_choices(NET, routed) == routed.ids.numel()
    foreign = replace(routed, gate_inputs=-routed.gate_inputs)
    assert own_gate_choices(NET, foreign) < routed.ids.numel() / 2
