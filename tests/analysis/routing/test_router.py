"""What scores and weights tell, against torch and plain numpy; pooled losses as a trap; and no batch that matters."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.routing import router
from analysis.routing.batch import batches, plan_of
from analysis.routing.router import QUANTILES, RouterStatistics, router_statistics
from analysis.routing.sums import Sums
from prefetch.errors import FormatError, MissingData
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of

RECORDED = ("weights", "scores", "score_ids")


def toy(n_tokens=300, n_layers=3, n_experts=8, top_k=2, n_requests=20, seed=0, bias=0.0, **known):
    """Logits by chance, rounded as they are recorded; choices by the best k of logits and bias."""
    rng = np.random.default_rng(seed)
    logits_TLE = (2 * rng.standard_normal((n_tokens, n_layers, n_experts))).astype(np.float16)
    bias_E = bias * rng.standard_normal(n_experts)
    ids_TLK = np.argsort(-(logits_TLE + bias_E), axis=-1, kind="stable")[..., :top_k]
    chosen_TLK = np.take_along_axis(logits_TLE.astype(float), ids_TLK, -1)
    weights_TLK = np.exp(chosen_TLK) / np.exp(chosen_TLK).sum(-1, keepdims=True)
    known = {"score_function": "softmax", "weights_normalised": True, **known}
    return trace_of(
        plain_card(
            "toy", n_experts=n_experts, top_k=top_k, layer_numbers=tuple(range(n_layers)), **known
        ),
        ids_TLK,
        request_T=np.sort(rng.integers(0, n_requests, n_tokens)),
        phase_T=rng.integers(0, 2, n_tokens),
        weights_TLK=weights_TLK,
        scores_TLM=logits_TLE,
    )


def only_best(trace, m):
    ids = np.argsort(-trace.scores_TLM.astype(float), axis=-1, kind="stable")[..., :m]
    best = np.take_along_axis(trace.scores_TLM, ids, -1)
    return replace(trace, scores_TLM=best, score_ids_TLM=ids.astype(np.uint8))


def counted(trace, plan, *cuts, max_rows=1 << 16, meaning=None):
    parts = [RouterStatistics(plan, meaning) for _ in range(len(cuts) + 1)]
    for i, batch in enumerate(batches(trace, plan, *plan.recorded(*RECORDED), max_rows=max_rows)):
        parts[int(np.searchsorted(cuts, i, side="right"))].add(batch)
    for later in parts[1:]:
        parts[0].merge(later)
    return parts[0]


def brute(p_TE, logits_TE, ids_TK, top_k):
    """One layer, in numpy."""
    n_experts = p_TE.shape[1]
    best_TE = -np.sort(-p_TE, axis=1)
    load_E = np.bincount(ids_TK.ravel(), minlength=n_experts) / ids_TK.size
    mean_E = p_TE.mean(axis=0)
    entropy_T = -(p_TE * np.log2(p_TE)).sum(axis=1)
    chosen_T = np.take_along_axis(p_TE, ids_TK.astype(int), 1).sum(axis=1)
    values = {
        "confidence": best_TE[:, 0],
        "margin": best_TE[:, 0] - best_TE[:, 1],
        "boundary_margin": best_TE[:, top_k - 1] - best_TE[:, top_k],
        "topk_mass": best_TE[:, :top_k].sum(axis=1),
    }
    expected = {f"{name}_mean": value_T.mean() for name, value_T in values.items()}
    loss = n_experts * (load_E * mean_E).sum()
    return values, {
        **expected,
        "entropy_bits_mean": entropy_T.mean(),
        "switch_loss": loss,
        "excess": loss - 1,
        "load_probability_correlation": np.corrcoef(load_E, mean_E)[0, 1],
        "z_loss": (np.log(np.exp(logits_TE).sum(axis=1)) ** 2).mean(),
        "chosen_differs_share": (chosen_T < values["topk_mass"] - 1e-9).mean(),
        "score_lost_mean": (values["topk_mass"] - chosen_T).mean(),
        "token_expert_information_bits": -(mean_E * np.log2(mean_E)).sum() - entropy_T.mean(),
    }


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "softmax_after_topk", None])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_all_scores_against_torch(function, bias):
    trace = toy(score_function=function, bias=bias)
    table = router_statistics(trace)
    assert table.phase.unique().tolist() == ["all", "prefill", "decode"]
    for row in table.itertuples():
        of_T = slice(None) if row.phase == "all" else trace.phase_T == (row.phase == "decode")
        logits_TE = torch.from_numpy(trace.scores_TLM[of_T, row.layer].astype(float))
        scores_TE = logits_TE.sigmoid() if function == "sigmoid" else logits_TE.softmax(-1)
        p_TE = (scores_TE / scores_TE.sum(-1, keepdim=True)).numpy()
        values, expected = brute(p_TE, logits_TE.numpy(), trace.ids_TLK[of_T, row.layer], 2)
        expected["z_loss"] = float((logits_TE.logsumexp(-1) ** 2).mean())
        assert (row.tokens, row.level) == (len(p_TE), "all scores")
        for name, value in expected.items():
            assert getattr(row, name) == pytest.approx(value, rel=1e-11, abs=1e-14), name
        for name, value_T in values.items():
            for label, share in QUANTILES.items():
                true = np.quantile(value_T, share, method="inverted_cdf")
                assert getattr(row, f"{name}_{label}") == pytest.approx(true, abs=1 / router.BINS)
    assert table.chosen_differs_share.gt(0).all() == (bias > 0)


def test_the_sigmoid_is_not_taken_twice():
    """Scores that were recorded after it say the same as those before, but for what only logits tell."""
    before = toy(score_function="sigmoid")
    after_TLE = torch.from_numpy(before.scores_TLM.astype(float)).sigmoid().numpy()
    after = router_statistics(replace(before, scores_TLM=after_TLE.astype(np.float16)))
    table = router_statistics(before)
    assert after.z_loss.isna().all() and table.z_loss.notna().all()
    for name in ("confidence_mean", "entropy_bits_mean", "switch_loss", "topk_mass_mean"):
        np.testing.assert_allclose(after[name], table[name], rtol=2e-3)


def test_recorded_probabilities_are_not_taken_for_logits():
    trace = toy()
    p_TLE = torch.from_numpy(trace.scores_TLM.astype(float)).softmax(-1).numpy()
    given_p = replace(trace, scores_TLM=p_TLE.astype(np.float16))
    plan = plan_of(given_p)
    statistics = counted(given_p, plan)
    table, logits = statistics.table(), router_statistics(trace)
    assert statistics.meaning == "probabilities" and table.z_loss.isna().all()
    for name in ("confidence_mean", "entropy_bits_mean", "switch_loss", "topk_mass_mean"):
        np.testing.assert_allclose(table[name], logits[name], rtol=1e-3)  # float16
    told = counted(given_p, plan, meaning="logits").table()
    assert (told.confidence_mean < table.confidence_mean).all() and told.z_loss.notna().all()
    assert plan_of(trace).columns and counted(trace, plan_of(trace)).meaning == "logits"


def test_pooling_layers_would_hide_a_collapse():
    """Two layers of four experts, each of which uses only two: a loss that pools the layers calls that perfect."""
    logits_TLE = np.full((40, 2, 4), -9.0)
    for layer in range(2):
        for t in range(40):
            logits_TLE[t, layer, 2 * layer + t % 2] = 9.0
    ids_TLK = logits_TLE.argmax(-1)[..., None]
    card = plain_card("c", n_experts=4, top_k=1, layer_numbers=(0, 1), score_function="softmax")
    trace = trace_of(card, ids_TLK, scores_TLM=logits_TLE)
    p_NE = torch.from_numpy(logits_TLE).softmax(-1).reshape(-1, 4).numpy()
    load_E = np.bincount(ids_TLK.ravel(), minlength=4) / ids_TLK.size
    assert 4 * (load_E * p_NE.mean(0)).sum() == pytest.approx(1.0)
    table = router_statistics(trace)
    np.testing.assert_allclose(table.switch_loss, [2, 2], rtol=1e-6)
    np.testing.assert_allclose(table.token_expert_information_bits, [1, 1], atol=1e-4)


def test_balance_is_a_loss_of_one():
    rng = np.random.default_rng(0)
    logits_TLE = np.zeros((16, 1, 4))
    ids_TLK = np.array([rng.permutation(4)[:2] for _ in range(8)])
    ids_TLK = np.concatenate([ids_TLK, 3 - ids_TLK])[:, None]
    card = plain_card("b", n_experts=4, top_k=2, layer_numbers=(0,))
    row = router_statistics(trace_of(card, ids_TLK, scores_TLM=logits_TLE)).iloc[0]
    assert row.switch_loss == pytest.approx(1, abs=1e-12)
    assert row.chosen_differs_share == 0, "equal scores are no difference"
    assert np.isnan(row.load_probability_correlation), "P is the same for all"
    assert row.entropy_bits_mean == pytest.approx(2) and row.margin_mean == 0


def test_batches_and_merges_change_nothing(monkeypatch):
    whole_trace = toy(n_tokens=600, n_requests=60, bias=0.5)
    for trace in (whole_trace, only_best(whole_trace, 3), replace(whole_trace, scores_TLM=None)):
        plan = plan_of(trace)
        whole = counted(trace, plan)
        for cuts, max_rows in (((), 1), ((), 100), ((30,), 1), ((10, 20, 40), 1), ((0,), 300)):
            parts = counted(trace, plan, *cuts, max_rows=max_rows)
            for name in ("table", "mean_probability"):
                one, other = getattr(whole, name)(), getattr(parts, name)()
                pd.testing.assert_frame_equal(one, other, rtol=1e-12, atol=1e-15)
            assert parts.notes == whole.notes
        monkeypatch.setattr(router, "CHUNK_SCORES", 50)
        pd.testing.assert_frame_equal(counted(trace, plan).table(), whole.table(), rtol=1e-12)
        monkeypatch.undo()


def test_the_best_scores_give_shares_of_themselves():
    trace = toy(bias=1.0)
    best = only_best(trace, 3)
    statistics = counted(best, plan_of(best))
    table, whole = statistics.table(), router_statistics(trace)
    assert table.level.eq("best 3 scores").all()
    p_TM = torch.from_numpy(best.scores_TLM[:, 0].astype(float)).softmax(-1).numpy()
    assert table.confidence_mean[0] == pytest.approx(p_TM[:, 0].mean(), rel=1e-11)
    assert table.boundary_margin_mean[0] == pytest.approx(
        (p_TM[:, 1] - p_TM[:, 2]).mean(), rel=1e-11
    )
    np.testing.assert_array_equal(table.chosen_differs_share, whole.chosen_differs_share)
    unknown = ["topk_mass_mean", "entropy_bits_mean", "switch_loss", "z_loss", "score_lost_mean"]
    assert table[unknown].isna().all(axis=None)
    assert "confidence and margins are shares of the 3 recorded scores" in statistics.notes
    one = only_best(trace, 1)
    assert router_statistics(one).chosen_differs_share.isna().all(), "k = 2 cannot be compared"


def test_the_best_probabilities_are_what_they_are():
    trace = toy()
    p_TLE = torch.from_numpy(trace.scores_TLM.astype(float)).softmax(-1).numpy().astype(np.float16)
    whole = replace(trace, scores_TLM=p_TLE)
    table = router_statistics(only_best(whole, 4))
    expected = np.sort(p_TLE[:, 0].astype(float))[:, ::-1]
    assert table.confidence_mean[0] == pytest.approx(expected[:, 0].mean(), rel=1e-12)
    assert table.topk_mass_mean[0] == pytest.approx(expected[:, :2].sum(1).mean(), rel=1e-12)


def test_weights_alone():
    trace = replace(toy(), scores_TLM=None)
    statistics = counted(trace, plan_of(trace))
    table = statistics.table()
    w_TK = np.sort(trace.weights_TLK[:, 1].astype(float))[:, ::-1]
    share_TK = w_TK / w_TK.sum(axis=1, keepdims=True)
    assert table.level.eq("weights").all()
    assert table.confidence_mean[1] == pytest.approx(share_TK[:, 0].mean(), rel=1e-12)
    assert table.margin_mean[1] == pytest.approx(
        (share_TK[:, 0] - share_TK[:, 1]).mean(), rel=1e-12
    )
    unknown = ["boundary_margin_q50", "topk_mass_mean", "chosen_differs_share", "switch_loss"]
    assert table[unknown].isna().all(axis=None)
    assert "no scores: confidence and margin are over the 2 logged weights" in statistics.notes
    unsure = replace(trace, card=replace(trace.card, weights_normalised=None))
    notes = counted(unsure, plan_of(unsure)).notes
    assert "the card does not say whether the k weights sum to one" in notes


def test_weights_that_were_never_normalised_are_probabilities():
    trace = toy(top_k=1, weights_normalised=False)
    p_TL1 = torch.from_numpy(trace.scores_TLM.astype(float)).softmax(-1).amax(-1, keepdim=True)
    raw = replace(trace, scores_TLM=None, weights_TLK=p_TL1.numpy().astype(np.float16))
    row = router_statistics(raw).iloc[0]
    mean = raw.weights_TLK[:, 0].astype(float).mean()
    assert row.confidence_mean == row.topk_mass_mean == pytest.approx(mean, rel=1e-12)
    assert np.isnan(row.margin_mean)
    normalised = replace(trace, scores_TLM=None, card=replace(trace.card, weights_normalised=True))
    statistics = counted(normalised, plan_of(normalised))
    assert statistics.table().confidence_mean.isna().all(), "always 1"
    assert any("gives the router no gradient" in note for note in statistics.notes)
    scaled = replace(raw, weights_TLK=(16 * raw.weights_TLK).astype(np.float16))
    assert router_statistics(scaled).topk_mass_mean.isna().all()


def test_the_gradient_proxy_counts_tokens_that_share_an_expert():
    trace = toy()
    table = router_statistics(trace)
    ids_TK, w_TK = trace.ids_TLK[:, 2], trace.weights_TLK[:, 2].astype(float)
    effective = []
    for expert in np.unique(ids_TK):
        g = w_TK[ids_TK == expert]
        effective.append(g.sum() ** 2 / (g**2).sum())
    assert table.gradient_proxy_effective_tokens[2] == pytest.approx(np.mean(effective), rel=1e-12)
    without = replace(trace, weights_TLK=None)
    assert router_statistics(without).gradient_proxy_effective_tokens.isna().all()


def test_mean_probability_and_load_of_every_expert():
    trace = toy()
    table = counted(trace, plan_of(trace)).mean_probability().query("phase == 'all' and layer == 1")
    p_TE = torch.from_numpy(trace.scores_TLM[:, 1].astype(float)).softmax(-1).numpy()
    np.testing.assert_allclose(table.probability, p_TE.mean(axis=0), rtol=1e-12)
    load_E = np.bincount(trace.ids_TLK[:, 1].ravel(), minlength=8) / trace.ids_TLK[:, 1].size
    np.testing.assert_array_equal(table.load, load_E)


def test_rows_that_did_not_run_and_choices_that_were_dropped():
    trace = toy()
    trace.ids_TLK[:50, 1] = 255
    trace.scores_TLM[:50, 1] = 0  # did not run
    trace.ids_TLK[60:70, 1] = 255  # ran, and was dropped
    table = router_statistics(trace).query("phase == 'all'")
    assert table.tokens.tolist() == [300, 250, 300]
    p_TE = torch.from_numpy(trace.scores_TLM[50:, 1].astype(float)).softmax(-1).numpy()
    assert table.confidence_mean[1] == pytest.approx(p_TE.max(axis=1).mean(), rel=1e-12)
    assert table.chosen_differs_share[1] == 0
    trace.ids_TLK[:, 2], trace.scores_TLM[:, 2] = 255, 0
    row = router_statistics(trace).query("phase == 'all'").iloc[2]
    assert row.tokens == 0 and row.drop(["phase", "layer", "tokens", "level"]).isna().all()


def test_a_first_choice_that_was_dropped_is_overruled():
    trace = toy()
    trace.ids_TLK[:30, 0, 0] = 255
    table = router_statistics(trace).query("phase == 'all'")
    assert table.chosen_differs_share.tolist() == [0.1, 0, 0]


def test_unknown_score_functions_have_no_probabilities():
    trace = toy(score_function="other", bias=1.0)
    statistics = counted(trace, plan_of(trace))
    table = statistics.table()
    for name in ("confidence_mean", "switch_loss", "entropy_bits_mean", "score_lost_mean"):
        assert table[name].isna().all()
    known = router_statistics(toy(bias=1.0))
    np.testing.assert_array_equal(table.chosen_differs_share, known.chosen_differs_share)
    assert any("not a known one" in note for note in statistics.notes)


@pytest.mark.parametrize("top_k", [1, 4])
def test_one_layer_one_token_and_every_expert_chosen(top_k):
    trace = toy(n_tokens=1, n_layers=1, n_experts=4, top_k=top_k)
    row = router_statistics(trace).iloc[0]
    p_E = torch.from_numpy(trace.scores_TLM[0, 0].astype(float)).softmax(-1).numpy()
    assert row.confidence_mean == pytest.approx(p_E.max())
    assert row.topk_mass_mean == pytest.approx(np.sort(p_E)[-top_k:].sum())
    assert np.isnan(row.boundary_margin_mean) == (top_k == 4)
    assert row.token_expert_information_bits == pytest.approx(0, abs=1e-12)


def test_what_is_missing_is_named():
    bare = replace(toy(), scores_TLM=None, weights_TLK=None)
    with pytest.raises(MissingData, match=r"neither scores nor weights; source\.scores=all"):
        router_statistics(bare)
    trace = toy()
    plan = plan_of(trace)
    with pytest.raises(MissingData, match="were not read"):
        RouterStatistics(plan).add(next(batches(bare, plan)))
    with pytest.raises(FormatError, match="one part of the trace seems to hold logits"):
        RouterStatistics(plan, "logits").merge(RouterStatistics(plan, "probabilities"))


def test_a_real_trace_of_weights(real_data):
    with np.load(
        real_data / "traces/esft-deepseek-v2-lite/esft_deepseek_v2_lite_summary.npz"
    ) as file:
        ids, weights, request = file["expert_ids"], file["gate_weights"], file["seq_id"]
    card = plain_card(
        "v2-lite",
        n_experts=64,
        top_k=6,
        layer_numbers=tuple(range(1, 27)),
        weights_normalised=False,
    )
    table = router_statistics(trace_of(card, ids, request_T=request, weights_TLK=weights))
    assert table.layer.tolist() == list(range(1, 27))
    assert 0.33 <= table.topk_mass_mean.mean() <= 0.4, "as its README says"
    np.testing.assert_allclose(
        table.topk_mass_mean, weights.astype(float).sum(-1).mean(0), rtol=1e-12
    )


rows = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=60)


@settings(deadline=None)  # the first example may compile
@given(rows, st.lists(st.integers(0, 60), max_size=4))
def test_sums_are_exact_however_they_are_cut(values, cuts):
    parts = []
    for part in np.split(np.array(values), sorted(min(cut, len(values)) for cut in cuts)):
        sums = Sums(1, 1, 1)
        sums.add(0, part[:, None], np.zeros(len(part), np.int64))
        parts.append(sums)
    for later in parts[1:]:
        parts[0].merge(later)
    exact = float(sum(map(Fraction, values)))
    assert parts[0].counts(slice(None)) == len(values)
    assert parts[0].sums(slice(None))[0, 0] == pytest.approx(exact, rel=1e-15, abs=1e-20)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(8)))
def test_the_names_of_experts_do_not_matter(new_names):
    trace = toy(n_tokens=40, bias=0.5)
    order = np.argsort(new_names)
    renamed = replace(
        trace,
        ids_TLK=np.array(new_names, np.uint8)[trace.ids_TLK],
        scores_TLM=np.ascontiguousarray(trace.scores_TLM[..., order]),
    )
    one, other = router_statistics(trace), router_statistics(renamed)
    pd.testing.assert_frame_equal(one, other, rtol=1e-9, atol=1e-12)
