"""A router on an earlier input: equal to its definition, and to the analysis that scores it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recorded_traces import check_causal, check_restored, check_same_bytes, recall, routed
from routing_traces import random_trace

from analysis.routing import gates
from prefetch.errors import FormatError, MissingData
from prefetch.predict.gate_lookahead import GateLookahead
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.writer import TraceWriter


def saved(trace: RoutingTrace, routers_LED: np.ndarray | None, folder: Path) -> Part:
    folder.mkdir()
    writer = TraceWriter(folder, Provenance("synthetic", "test"), max_dropped=0.5)
    writer.begin(trace.card)
    writer.append(trace)
    if routers_LED is not None:
        writer.router_weights(dict(zip(trace.card.layer_numbers, routers_LED, strict=False)))
    writer.close()
    return whole(TraceReader(folder))


def test_scores_equal_the_definition(tmp_path: Path) -> None:
    trace, routers_LED = routed(drift=0.5)
    part = saved(trace, routers_LED, tmp_path / "trace")
    fitted = GateLookahead((1, 2)).fit(part, part)
    for horizon in (1, 2):
        scores_TLE = fitted.scores(Past(trace, horizon))
        for token, layer in ((0, 3), (7, 2), (799, 3)):
            x_D = trace.gate_inputs_TLD[token, layer - horizon].astype(float)
            expected_E = [float(router_D @ x_D) for router_D in routers_LED[layer].astype(float)]
            np.testing.assert_allclose(scores_TLE[token, layer], expected_E, atol=1e-4)


def test_the_analysis_finds_the_same_recall(tmp_path: Path) -> None:
    trace, routers_LED = routed(drift=0.5)
    part = saved(trace, routers_LED, tmp_path / "trace")
    fitted = GateLookahead((1, 3)).fit(part, part)
    table = gates.gate_lookahead(part.trace, horizons=(1, 3))
    for horizon in (1, 3):
        rows = table[(table.phase == "all") & (table.horizon == horizon)]
        ours = recall(fitted.scores(Past(trace, horizon)), trace, horizon)
        assert ours == pytest.approx(rows.recall_at_k.mean(), abs=1e-12)
        assert 0.3 < ours < 0.9


def test_where_inputs_stand_still_the_own_gate_is_the_answer(tmp_path: Path) -> None:
    trace, routers_LED = routed(drift=0.0)
    part = saved(trace, routers_LED, tmp_path / "trace")
    fitted = GateLookahead((1, 3)).fit(part, part)
    for horizon in (1, 3):
        assert recall(fitted.scores(Past(trace, horizon)), trace, horizon) == 1.0


def test_the_first_layers_are_guessed_by_popularity(tmp_path: Path) -> None:
    trace, routers_LED = routed(drift=0.5)
    part = saved(trace, routers_LED, tmp_path / "trace")
    scores_TLE = GateLookahead((2,)).fit(part, part).scores(Past(trace, 2))
    for layer in (0, 1):
        used_E = np.bincount(trace.ids_TLK[:, layer].ravel(), minlength=8)
        assert (scores_TLE[:, layer] == scores_TLE[0, layer]).all()
        order_E = np.argsort(-scores_TLE[0, layer], kind="stable")
        np.testing.assert_array_equal(order_E, np.argsort(-used_E, kind="stable"))


def test_a_layer_without_a_recorded_router_is_guessed_by_popularity(tmp_path: Path) -> None:
    trace, routers_LED = routed()
    part = saved(trace, routers_LED[:3], tmp_path / "trace")
    fitted = GateLookahead((1,)).fit(part, part)
    scores_TLE = fitted.scores(Past(trace, 1))
    np.testing.assert_array_equal(scores_TLE[5, 3], fitted.popular_LE_[3])
    assert (scores_TLE[5, 2] != fitted.popular_LE_[2]).any()


def test_rescaling_undoes_a_change_of_size(tmp_path: Path) -> None:
    """The same state, other factors per dimension at every layer: only with them the router reads it right."""
    trace, routers_LED = routed(drift=0.0)
    factor_LD = np.exp(np.random.default_rng(3).normal(size=(4, 12))).astype(np.float16)
    x_TLD = trace.gate_inputs_TLD * factor_LD
    logits_TLE = np.einsum("tld,led->tle", x_TLD.astype(np.float32), routers_LED)
    trace.gate_inputs_TLD[:] = x_TLD
    trace.ids_TLK[:] = np.argsort(-logits_TLE, axis=2, kind="stable")[:, :, :2]
    part = saved(trace, routers_LED, tmp_path / "trace")
    plain, rescaled = (
        recall(GateLookahead((1,), rescale).fit(part, part).scores(Past(trace, 1)), trace, 1)
        for rescale in (False, True)
    )
    assert plain < 0.8 and rescaled > 0.98  # float16 flips near ties


@pytest.mark.parametrize("rescale", [False, True])
def test_what_every_predictor_owes(tmp_path: Path, rescale: bool) -> None:
    trace, routers_LED = routed(drift=0.5, n_tokens=200)
    part = saved(trace, routers_LED, tmp_path / "trace")
    fitted = GateLookahead((1, 2), rescale).fit(part, part)
    check_same_bytes(fitted, GateLookahead((1, 2), rescale).fit(part, part))
    check_restored(fitted, GateLookahead((1, 2), rescale), trace, tmp_path)
    check_causal(fitted, trace, routed(seed=1, drift=0.5, n_tokens=200)[0])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    trace, routers_LED = routed(n_tokens=200)
    with pytest.raises(MissingData, match="a trace in memory"):
        GateLookahead().fit(whole(trace), whole(trace))
    part = saved(trace, None, tmp_path / "without")
    with pytest.raises(MissingData, match=r"source\.gate_inputs=true"):
        GateLookahead().fit(part, part)
    part = saved(trace, routers_LED, tmp_path / "with")
    fitted = GateLookahead().fit(part, part)
    with pytest.raises(MissingData, match="gate_inputs: not recorded"):
        fitted.scores(Past(random_trace(n_experts=8, top_k=2), 1))
    fitted.routers_LED_ = fitted.routers_LED_[:, :, :5]
    with pytest.raises(FormatError, match="width 5, but the recorded gate inputs have 12"):
        fitted.scores(Past(trace, 1))


def test_the_folder_of_a_trace_will_do(tmp_path: Path) -> None:
    trace, routers_LED = routed(n_tokens=200)
    part = saved(trace, routers_LED, tmp_path / "trace")
    by_path = whole(tmp_path / "trace")
    check_same_bytes(
        GateLookahead().fit(part, part),
        GateLookahead().fit(by_path, by_path),
    )
