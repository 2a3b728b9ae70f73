"""The encoder equals its formula; the published one sees the answer, the honest one nothing that comes later."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from routing_traces import odd_traces, random_trace

from prefetch.errors import ConfigError, MissingData
from prefetch.predict.encoder import Encoder
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Answered, Past
from prefetch.predict.predictor import cheats, restore, save
from prefetch.trace.routing import RoutingTrace

WIDTH = 6  # of a gate input
ODD = odd_traces()


def with_inputs(trace: RoutingTrace, seed: int = 0) -> RoutingTrace:
    shape = (*trace.ids_TLK.shape[:2], WIDTH)
    inputs = np.random.default_rng(seed).normal(size=shape).astype(np.float16)
    return dataclasses.replace(trace, gate_inputs_TLD=inputs)


def small_trace(seed: int = 0) -> RoutingTrace:
    return with_inputs(random_trace(seed, n_requests=4, tokens=7), seed)


def small(leak: bool, horizons: tuple[int, ...] = (1,), **settings: float) -> Encoder:
    given = {"hidden": 8, "heads": 2, "epochs": 1, **settings}
    return Encoder(horizons, leak, **given)


def view(encoder: Encoder) -> type[Past]:
    return Answered if cheats(encoder) else Past


def normed(x_TD: NDArray, scale_D: NDArray, shift_D: NDArray) -> NDArray:
    centred = x_TD - x_TD.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * scale_D + shift_D


def attended(x_TD: NDArray, p: dict[str, NDArray], heads: int, causal: bool) -> NDArray:
    n_tokens, hidden = x_TD.shape
    mixed = x_TD @ p["self_attn.in_proj_weight"].T + p["self_attn.in_proj_bias"]
    q_HTD, k_HTD, v_HTD = mixed.reshape(n_tokens, 3, heads, -1).transpose(1, 2, 0, 3)
    scores_HTT = q_HTD @ k_HTD.transpose(0, 2, 1) / np.sqrt(hidden / heads)
    if causal:
        scores_HTT = np.where(np.tri(n_tokens, dtype=bool), scores_HTT, -np.inf)
    share_HTT = np.exp(scores_HTT - scores_HTT.max(axis=2, keepdims=True))
    share_HTT /= share_HTT.sum(axis=2, keepdims=True)
    out_TD = (share_HTT @ v_HTD).transpose(1, 0, 2).reshape(n_tokens, hidden)
    return out_TD @ p["self_attn.out_proj.weight"].T + p["self_attn.out_proj.bias"]


def formula(encoder: Encoder, which: int, inputs_TLD: NDArray, causal: bool) -> NDArray:
    """[T, L, E] of one request: Vaswani et al. 2017, norms after the sums, ReLU between the two linear layers."""
    p, start = {}, 0
    for name, tensor in encoder._net().named_parameters():
        flat = encoder.parameters_HP_[which, start : start + tensor.numel()]
        p[name], start = (
            flat.reshape(tuple(tensor.shape)).astype(np.float64),
            start + tensor.numel(),
        )
    logits = []
    for layer in range(inputs_TLD.shape[1]):
        x = normed(inputs_TLD[:, layer].astype(np.float64), p["norm.weight"], p["norm.bias"])
        x = x @ p["project.weight"].T + p["project.bias"] + p["layer.weight"][layer]
        for number in range(encoder.n_layers):
            stem = f"encoder.layers.{number}."
            q = {name.removeprefix(stem): value for name, value in p.items()}
            x = normed(
                x + attended(x, q, encoder.heads, causal), q["norm1.weight"], q["norm1.bias"]
            )
            inner = np.maximum(x @ q["linear1.weight"].T + q["linear1.bias"], 0)
            x = x + inner @ q["linear2.weight"].T + q["linear2.bias"]
            x = normed(x, q["norm2.weight"], q["norm2.bias"])
        logits.append(x @ p["experts.weight"].T + p["experts.bias"])
    return np.stack(logits, axis=1)


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("leak", [True, False])
def test_scores_equal_the_formula(leak: bool, horizon: int) -> None:
    train, asked = small_trace(), small_trace(3)
    encoder = small(leak, (1, 2)).fit(whole(train), whole(train))
    scores = encoder.scores(view(encoder)(asked, horizon))
    for rows in (slice(0, 7), slice(14, 21)):
        inputs_TLD = asked.gate_inputs_TLD[rows]
        if not leak:
            inputs_TLD = np.zeros_like(inputs_TLD)
            inputs_TLD[:, horizon:] = asked.gate_inputs_TLD[rows, :-horizon]
        expected = formula(encoder, 0 if leak else horizon - 1, inputs_TLD, causal=not leak)
        np.testing.assert_allclose(scores[rows], expected, atol=1e-5)  # float32 against float64


def changed_after(trace: RoutingTrace, row: int, known: int) -> RoutingTrace:
    """Other choices and inputs from layer `known` of this row on."""
    other, arrays = small_trace(9), {}
    for name in ("ids_TLK", "gate_inputs_TLD"):
        arrays[name] = getattr(trace, name).copy()
        arrays[name][row, known:] = getattr(other, name)[row, known:]
        arrays[name][row + 1 :] = getattr(other, name)[row + 1 :]
    return dataclasses.replace(trace, **arrays)


@pytest.mark.parametrize("leak", [True, False])
def test_only_the_leak_sees_what_comes_later(leak: bool) -> None:
    trace, learnt = small_trace(), whole(small_trace(5))
    encoder = small(leak, (1, 2)).fit(learnt, learnt)
    assert cheats(encoder) == leak and encoder.sees == ("the answer" if leak else "gate inputs")
    for horizon in (1, 2):
        plain = encoder.scores(view(encoder)(trace, horizon))
        for row, layer in ((0, 0), (5, 2), (9, 3), (22, 1)):
            later = changed_after(trace, row, max(0, layer - horizon + 1))
            scores = encoder.scores(view(encoder)(later, horizon))
            first = row - row % 7
            same_before = np.array_equal(scores[first:row], plain[first:row])
            same_here = np.array_equal(scores[row, : layer + 1], plain[row, : layer + 1])
            assert same_here != leak
            assert same_before != leak or row == first


def test_what_later_tokens_alone_change() -> None:
    """The leak's second half: without a mask the tokens to come are read as well."""
    trace = small_trace()
    later = changed_after(trace, 9, trace.card.n_layers)
    for leak in (True, False):
        encoder = small(leak).fit(whole(trace), whole(trace))
        scores, plain = (encoder.scores(view(encoder)(t, 1)) for t in (later, trace))
        assert np.array_equal(scores[7:10], plain[7:10]) != leak


@pytest.mark.parametrize("leak", [True, False])
def test_requests_are_strangers(leak: bool) -> None:
    trace = small_trace()
    encoder = small(leak).fit(whole(trace), whole(trace))
    alone = encoder.scores(view(encoder)(trace.rows(slice(7, 14)), 1))
    plain = encoder.scores(view(encoder)(trace, 1))[7:14]
    np.testing.assert_allclose(alone, plain, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ODD))
@pytest.mark.parametrize("leak", [True, False])
def test_odd_traces(leak: bool, name: str) -> None:
    of_both_stacks = (ODD[name].request_T < 2) | (ODD[name].request_T > 28)
    trace = with_inputs(ODD[name].rows(of_both_stacks & (ODD[name].position_T % 9 < 4)))
    trace.gate_inputs_TLD[0] = np.nan  # a layer that never ran has no input
    encoder = small(leak, (1, 2)).fit(whole(trace), whole(trace))
    scores = encoder.scores(view(encoder)(trace, 2))
    assert scores.shape == Past(trace, 2).shape and np.isfinite(scores).all()


def test_the_leak_learns_what_the_gate_knows() -> None:
    """The choice is in the gate's own input: read there it is nearly always found, a layer earlier by chance only."""
    trace = small_trace()
    inputs_TLD = trace.gate_inputs_TLD
    ids_TLK = np.argsort(-inputs_TLD, axis=2)[:, :, :3].astype(np.uint8)
    trace = dataclasses.replace(trace, ids_TLK=ids_TLK)
    found = {}
    for leak in (True, False):
        encoder = small(leak, hidden=16, epochs=30, learning_rate=0.02)
        scores = encoder.fit(whole(trace), whole(trace)).scores(view(encoder)(small_like(trace), 1))
        guessed = np.argsort(-scores, axis=2)[:, :, :3]
        truth = small_like(trace).ids_TLK
        found[leak] = (guessed[:, :, :, None] == truth[:, :, None, :]).any(axis=3).mean()
    assert found[True] > 0.8 and found[False] < 0.65  # by chance: 0.5


def small_like(trace: RoutingTrace) -> RoutingTrace:
    inputs_TLD = np.random.default_rng(8).normal(size=trace.gate_inputs_TLD.shape)
    ids_TLK = np.argsort(-inputs_TLD.astype(np.float16), axis=2)[:, :, :3].astype(np.uint8)
    half = inputs_TLD.astype(np.float16)
    return dataclasses.replace(trace, ids_TLK=ids_TLK, gate_inputs_TLD=half)


def test_only_rows_that_count_are_learnt() -> None:
    """A split in time: choices of earlier and later rows teach nothing."""
    trace = with_inputs(random_trace(n_requests=1, tokens=20))
    ids_TLK, other = trace.ids_TLK.copy(), random_trace(4, n_requests=1, tokens=20)
    ids_TLK[:5], ids_TLK[12:] = other.ids_TLK[:5], other.ids_TLK[12:]
    learnt = []
    for one in (trace, dataclasses.replace(trace, ids_TLK=ids_TLK), with_inputs(other)):
        part = Part(one, np.array([0]), first=5, stop=12)
        learnt.append(small(True).fit(part, part).parameters_HP_)
    np.testing.assert_array_equal(learnt[0], learnt[1])
    assert not np.array_equal(learnt[0], learnt[2])


def test_long_requests_are_read_in_pieces() -> None:
    trace = small_trace()
    encoder = small(True, context=3).fit(whole(trace), whole(trace))
    plain = encoder.scores(Answered(trace, 1))
    later = encoder.scores(Answered(changed_after(trace, 10, 0), 1))
    np.testing.assert_array_equal(later[7:10], plain[7:10])  # another piece of the same request


def test_a_seed_makes_the_same_net_and_leaves_torch_as_it_was() -> None:
    part = whole(small_trace())
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    one, same, other = (small(True, seed=s).fit(part, part).parameters_HP_ for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("leak", [True, False])
def test_restored_scores_are_the_same(tmp_path: Path, leak: bool) -> None:
    trace = small_trace()
    fitted = small(leak, (1, 2)).fit(whole(trace), whole(trace))
    save(fitted, tmp_path, {}, 0.0)
    again = small(leak, (1, 2))
    restore(again, tmp_path)
    past = view(fitted)(trace, 2)
    np.testing.assert_array_equal(again.scores(past), fitted.scores(past))


def test_gate_inputs_must_be_recorded() -> None:
    trace = random_trace(n_requests=4, tokens=5)
    with pytest.raises(MissingData, match="gate_inputs"):
        Encoder().fit(whole(trace), whole(trace))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="hidden: must be a multiple of heads=4"):
        Encoder(hidden=10)
    for name in ("hidden", "n_layers", "heads", "context", "epochs", "learning_rate"):
        with pytest.raises(ConfigError, match=f"{name}: must be"):
            Encoder(**{name: 0})
    with pytest.raises(ConfigError, match="seed"):
        Encoder(seed=-1)
