"""The compiled loops are the network that was trained; both faces agree; the same seed gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from routing_traces import random_trace

from prefetch.errors import ConfigError
from prefetch.predict.mlp import DECAYS, Mlp
from prefetch.predict.networks import history
from prefetch.predict.networks.history_net import HistoryNet, Rows, right
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past
from prefetch.predict.predictor import restore, save
from prefetch.trace.routing import RoutingTrace


def holes() -> RoutingTrace:
    trace = random_trace(n_requests=8, tokens=12)
    trace.ids_TLK[::5, 1, 2] = 255
    trace.ids_TLK[::7, 2] = 255
    return trace


def small(trace: RoutingTrace, **settings: object) -> Mlp:
    given = {"hidden": 12, "epochs": 2, "batch": 16, **settings}
    return Mlp((1, 3), **given).fit(Part(trace, np.arange(5)), Part(trace, np.arange(5, 8)))


@pytest.mark.parametrize(("horizon", "hidden"), [(1, 12), (3, 12), (2, 5), (2, 32)])
def test_the_compiled_loops_are_the_network(horizon: int, hidden: int) -> None:
    """Fewer units than are taken at once, a few left over, and none left over."""
    trace = holes()
    torch.manual_seed(0)
    net = HistoryNet(torch.full((4, 16), 0.2), len(DECAYS), hidden, horizon, 0.0).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    past = Past(trace, horizon)
    context = np.stack([past.usage(decay) for decay in DECAYS], axis=1).astype(np.float16)
    used, contexts = Rows(trace.ids_TLK, context, np.arange(96)).__getitems__(list(range(96)))
    expected = torch.sigmoid(net(used, contexts)).detach().numpy()
    mlp = Mlp((horizon,), hidden=hidden)
    sizes = history.Sizes(4, 16, hidden, len(DECAYS), horizon, trace.ids_TLK.shape[2], 255)
    setattr(mlp, f"network_h{horizon}_", history.arranged(net.weights(), sizes, DECAYS))
    np.testing.assert_allclose(mlp.scores(past), expected, atol=2e-3)  # usage is kept in float16


def test_both_faces_agree() -> None:
    trace = holes()
    mlp = small(trace)
    for horizon in (1, 3):
        expected = mlp.scores(Past(trace, horizon))
        online = mlp.online(horizon)
        for t in range(trace.n_tokens):
            if t % 12 == 0:
                online.start()
            for layer in range(horizon):
                np.testing.assert_array_equal(online.guess(layer), expected[t, layer])
            for layer in range(4):
                online.observe(layer, trace.ids_TLK[t, layer])
                if layer + horizon < 4:
                    ahead = layer + horizon
                    np.testing.assert_array_equal(online.guess(ahead), expected[t, ahead])


def test_the_same_seed_gives_the_same_bytes_and_survives_the_disk(tmp_path: Path) -> None:
    trace = holes()
    one, two, other = small(trace), small(trace), small(trace, seed=1)
    past = Past(trace, 1)
    np.testing.assert_array_equal(one.scores(past), two.scores(past))
    assert not np.array_equal(one.scores(past), other.scores(past))
    save(one, tmp_path, {}, 0.0)
    again = Mlp((1, 3), hidden=12)
    restore(again, tmp_path)
    np.testing.assert_array_equal(again.scores(past), one.scores(past))
    assert again.network(1).ctypes.data % 64 == 0 and again.network(1) is again.network_h1_
    np.testing.assert_array_equal(again.network_h1_, one.network_h1_)  # moved, not changed


def test_a_request_begins_with_nothing() -> None:
    """A layer that nobody told of is unknown, whatever the request before chose there."""
    trace = holes()
    mlp = small(trace)
    asked_first, asked_later = mlp.online(1), mlp.online(1)
    for layer in range(4):
        asked_later.observe(layer, trace.ids_TLK[3, layer])
    asked_later.start()
    nobody = np.full(trace.ids_TLK.shape[2], 255, trace.ids_TLK.dtype)
    told_nobody = mlp.online(1)
    told_nobody.observe(0, nobody)
    expected = told_nobody.guess(1).copy()
    for online in (asked_first, asked_later):
        np.testing.assert_array_equal(online.guess(1), expected)


def test_it_learns_what_counts_cannot() -> None:
    """Layer 2 is the sum of layers 0 and 1, which are independent: one layer alone tells nothing of it."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, (2, 4000))
    ids = np.stack([first, second, (first + second) % 4], axis=1)[:, :, None]
    from prefetch.trace.card import plain_card
    from prefetch.trace.routing import trace_of

    card = plain_card("xor", n_experts=4, top_k=1, layer_numbers=(0, 1, 2))
    trace = trace_of(card, ids, request_T=np.arange(4000) // 40)
    parts = Part(trace, np.arange(80)), Part(trace, np.arange(80, 90))
    mlp = Mlp((1,), hidden=24, epochs=12, batch=64, dropout=0.0).fit(*parts)
    guessed = mlp.scores(Past(trace.rows(slice(3600, 4000)), 1))[:, 2].argmax(axis=1)
    assert (guessed == ids[3600:, 2, 0]).mean() > 0.95


def test_recall_is_counted_from_the_horizon_on() -> None:
    net = HistoryNet(torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1]]), 1, 2, 1, 0.0).eval()
    used = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    hits, of = right(net, (used, torch.zeros(1, 1, 3, 2)))
    assert (int(hits), int(of)) == (2, 2)


def test_a_network_that_guesses_all_layers_as_a_token_begins_is_scored_on_all() -> None:
    trace = holes()
    n_layers = trace.ids_TLK.shape[1]
    mlp = Mlp((n_layers,), hidden=12, epochs=1, batch=16)
    mlp.fit(Part(trace, np.arange(5)), Part(trace, np.arange(5, 8)))
    assert mlp.curve and all(0 < row["score"] <= 1 for row in mlp.curve)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden: must be at least 1, got 0"):
        Mlp(hidden=0)
    trace = random_trace(n_requests=4, tokens=6)
    with pytest.raises(ConfigError, match="epochs: must be at least 1, got 0"):
        Mlp(epochs=0).fit(whole(trace), whole(trace))
