"""Domains: counts equal those taken by hand, information its truth, and what transfers equals the README's formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from routing_traces import odd_traces, random_trace, real_trace
from scipy.stats import binomtest, chi2, false_discovery_control, power_divergence
from sklearn.metrics import mutual_info_score
from sklearn.naive_bayes import MultinomialNB

from analysis.routing import domains as module
from analysis.routing import transfer
from analysis.routing.batch import Plan, accumulate, batches, plan_of
from analysis.routing.domains import (
    Domains,
    domain_accuracy,
    domain_information,
    domain_usage,
)
from analysis.routing.transfer import DomainTransfer, domain_transfer
from prefetch.errors import MissingData
from prefetch.scoring import TEST, TRAIN
from prefetch.trace.card import plain_card
from prefetch.trace.parquet import concat
from prefetch.trace.routing import RoutingTrace, trace_of

NAMES = ("code", "prose", "maths", "law")
TABLES = ("usage", "specialisation", "information", "accuracy")


def named(trace: RoutingTrace, domain_T: NDArray[Any], names: tuple[str, ...]) -> RoutingTrace:
    return replace(trace, domain_T=domain_T.astype(np.int32), domains=names)


def drawn(seed: int = 0, n_domains: int = 3, n_requests: int = 30, **of: Any) -> RoutingTrace:
    """Whole requests of one domain each; some of none; some choices missing."""
    trace = random_trace(seed, n_requests=n_requests, **{"tokens": 12, **of})
    rng = np.random.default_rng(seed)
    ids = trace.ids_TLK.astype(int)
    ids[rng.random(ids.shape) < 0.05] = -1
    domain_R = np.r_[np.arange(n_domains).repeat(3), rng.integers(-1, n_domains, n_requests)]
    made = trace_of(trace.card, ids, request_T=trace.request_T)
    return named(made, domain_R[trace.request_T], NAMES[:n_domains])


def tasteful(
    taste_DE: NDArray[Any], n_requests: int, tokens: int = 30, seed: int = 0, n_layers: int = 1
) -> RoutingTrace:
    """k = 1: every request draws from its domain's distribution."""
    rng, (n_domains, n_experts) = np.random.default_rng(seed), taste_DE.shape
    domain_T = np.repeat(np.arange(n_requests) % n_domains, tokens)
    cdf_TE = np.cumsum(taste_DE, axis=1)[domain_T]
    ids = (rng.random((len(domain_T), n_layers, 1)) > cdf_TE[:, None]).sum(axis=2)[:, :, None]
    numbers = tuple(range(n_layers))
    card = plain_card("tasteful", n_experts=n_experts, top_k=1, layer_numbers=numbers)
    trace = trace_of(card, ids, request_T=np.arange(len(domain_T)) // tokens)
    return named(trace, domain_T, tuple(f"d{i}" for i in range(n_domains)))


def counted(trace: RoutingTrace, plan: Plan | None = None, **of: Any) -> Domains:
    found = Domains(plan or plan_of(trace), **of)
    accumulate(trace, found.plan, [found])
    return found


def transferred(trace: RoutingTrace, found: Domains, max_rows: int = 1 << 16) -> DomainTransfer:
    scored = DomainTransfer(found.plan, found)
    accumulate(trace, found.plan, [scored], max_rows=max_rows)
    return scored


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_counts_are_those_taken_by_hand(seed: int) -> None:
    trace = drawn(seed, n_requests=12, n_layers=3, n_experts=5, top_k=2)
    plan = plan_of(trace)
    found = counted(trace, plan)
    usage, pairs, sampled = (
        np.zeros_like(a) for a in (found.usage_CDLE, found.pairs_DLEE, found.usage_RLE)
    )
    parts_T = plan.split.parts(trace, np.arange(trace.n_tokens))
    template_T = plan.split.is_template(trace)
    for t, row_LK in enumerate(trace.ids_TLK.tolist()):
        if trace.domain_T[t] < 0 or parts_T[t] not in (TRAIN, TEST):
            continue
        d = found.domains.index(trace.domains[trace.domain_T[t]])
        r = found.request_R.tolist().index(trace.request_T[t])
        assert found.domain_R[r] == d
        for layer, row_K in enumerate(row_LK):
            for a in (e for e in row_K if e < 5):
                usage[2 * parts_T[t] + template_T[t], d, layer, a] += 1
                sampled[r, layer, a] += not template_T[t]
                if parts_T[t] == TRAIN and layer < 2:
                    for b in (e for e in row_LK[layer + 1] if e < 5):
                        pairs[d, layer, a, b] += 1
    np.testing.assert_array_equal(found.usage_CDLE, usage)
    np.testing.assert_array_equal(found.pairs_DLEE, pairs)
    np.testing.assert_array_equal(found.usage_RLE, sampled)


def test_no_batch_changes_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where only some requests are kept, and only some rows are scored."""
    monkeypatch.setattr(module, "MOST_REQUESTS", 17)
    monkeypatch.setattr(transfer, "SCORED_ROWS", 20)
    trace = drawn(5, n_requests=40)
    plan = plan_of(trace)
    whole = counted(trace, plan)
    scored = transferred(trace, whole)
    assert len(whole.request_R) == 17
    assert (scored.rows_D < whole.test_rows_D).any() and scored.rows_D.all()
    parts = list(batches(trace, plan, max_rows=1))
    halves = [Domains(plan), Domains(plan)]
    for i, batch in enumerate(parts):
        halves[i >= 10].add(batch)
    halves[0].merge(halves[1])
    tests = [DomainTransfer(plan, halves[0]), DomainTransfer(plan, halves[0])]
    for i, batch in enumerate(parts):
        tests[i >= 10].add(batch)
    tests[0].merge(tests[1])
    for name in ("usage_CDLE", "pairs_DLEE", "usage_RLE", "test_rows_D", "request_R"):
        np.testing.assert_array_equal(getattr(halves[0], name), getattr(whole, name))
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(halves[0], name)(), getattr(whole, name)())
    pd.testing.assert_frame_equal(tests[0].table(), scored.table())
    pd.testing.assert_frame_equal(transferred(trace, whole, 1).table(), scored.table())


def test_which_requests_are_kept_depends_on_the_seed_and_on_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_REQUESTS", 10)
    trace = drawn(5, n_requests=40)
    kept = [set(Domains(plan_of(trace, seed=seed)).request_R.tolist()) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    some = counted(trace)
    monkeypatch.setattr(module, "MOST_REQUESTS", 100)
    every = counted(trace)
    own_R = np.isin(every.request_R, some.request_R)  # what others use is nobody's
    np.testing.assert_array_equal(every.usage_RLE[own_R], some.usage_RLE)


def test_usage_is_every_domains_own() -> None:
    trace = drawn(2)
    rows = domain_usage(trace)
    np.testing.assert_allclose(rows.groupby(["domain", "layer"]).share.sum(), 1)
    one = trace.rows(trace.domain_T == 1).ids_TLK[:, 2]
    counts = rows[(rows.domain == "prose") & (rows.layer == 2)].set_index("expert")["count"]
    assert counts.to_dict() == {e: n for e in range(16) if (n := int((one == e).sum()))}


def test_only_the_largest_domains_are_compared() -> None:
    trace = tasteful(np.full((4, 6), 1 / 6), 22)
    found = counted(trace, most=3)
    assert found.domains == ("d0", "d1", "d2")
    assert "the 3 largest are compared; the other 1 (150 rows) are not" in found.notes[0]
    assert set(found.usage().domain) == set(found.domains)
    assert not counted(trace).notes and not counted(trace, most=4).notes


def test_transitions_are_kept_for_as_many_domains_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 2 * 8 * 6 * 6 + 1)
    trace = tasteful(np.full((4, 6), 1 / 6), 40, n_layers=2)
    found = counted(trace)
    assert "kept for the 2 largest of 4" in found.notes[0]
    table = transferred(trace, found).table()
    pairs = table.groupby("measure").size()
    assert pairs["popularity"] == 16 and pairs["markov"] == 4


def test_domains_that_share_no_expert_are_told_by_one_choice() -> None:
    taste = np.kron(np.eye(3), np.full(4, 0.25))
    rows = domain_information(tasteful(taste, 30))
    # the truth is log2(3); Miller and Madow's bias is zero here: no expert is of two domains
    np.testing.assert_allclose(rows.mutual_information_bits, np.log2(3), atol=0.002)
    np.testing.assert_allclose(rows.domain_entropy_bits, np.log2(3), atol=1e-9)
    assert (rows.shuffled_bits < 0.5).all()


def test_information_is_that_of_sklearn_and_its_bias_is_taken_off() -> None:
    """Independent draws: the truth is 0, the plug-in estimate is not."""
    taste = np.tile(np.random.default_rng(1).dirichlet(np.full(40, 5.0)), (3, 1))
    taste = np.hstack([taste, np.zeros((3, 20))])  # nobody ever takes the last twenty
    trace = tasteful(taste, 60, n_layers=20)
    rows = domain_information(trace)
    domain_T = trace.domain_T
    plugin = [mutual_info_score(domain_T, ids_T) / np.log(2) for ids_T in trace.ids_TLK[:, :, 0].T]
    np.testing.assert_allclose(rows.plugin_bits, plugin, rtol=1e-9)
    assert rows.plugin_bits.mean() > 0.02
    # 20 layers of 1800 tokens: the bias is .03 bits, its own spread a few thousandths, the mean's a quarter of that
    assert abs(rows.mutual_information_bits.mean()) < 0.003
    assert abs(rows.shuffled_bits.mean()) < 0.003


def test_specialisation_is_the_divergence_over_its_most() -> None:
    taste = np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.5, 0.0, 0.5]])
    found = counted(tasteful(taste, 90, tokens=40))
    rows = found.specialisation().set_index("expert")
    count_DE = found.usage_CDLE.sum(axis=0)[:, 0]
    share_D = count_DE.sum(axis=1) / count_DE.sum()
    given_D = count_DE[:, 1] / count_DE[:, 1].sum()
    np.testing.assert_allclose(
        rows.loc[1, "specialisation"], np.log(1 / share_D[0]) / np.log(1 / share_D.min())
    )
    assert given_D[0] == 1 and rows.loc[1, "domain"] == found.domains[0]
    np.testing.assert_allclose(rows.loc[1, "lift"], 1 / share_D[0])
    assert rows.loc[0, "specialisation"] < 0.01 and rows.loc[0, "q_value"] > 0.001
    assert rows.loc[1, "q_value"] < 1e-6 and (rows.specialisation.between(0, 1)).all()


def slow_effect(found: Domains, layer: int, expert: int) -> float:
    """By how much an expert's counts spread over requests of a domain, more than independent choices of its share."""
    spread, alone = 0.0, 0.0
    for d in range(len(found.domains)):
        of_R = found.usage_RLE[found.domain_R == d, layer].astype(float)
        share = of_R[:, expert].sum() / of_R.sum()
        spread += ((of_R[:, expert] - of_R.sum(axis=1) * share) ** 2).sum()
        alone += of_R.sum() * share * (1 - share)
    free = len(found.request_R) - len(found.domains)
    return max(1.0, spread / alone * len(found.request_R) / free)


def test_q_values_are_those_of_a_g_test() -> None:
    """Nobody takes the last expert; one domain makes a single choice at the last layer."""
    trace = drawn(4, n_requests=40)
    ids = trace.ids_TLK.astype(int)
    ids[(ids == 15) | (ids > 16)] = -1
    rare = trace.domain_T == 2
    ids[rare, 3] = -1
    ids[np.flatnonzero(rare & (trace.position_T == 11))[0], 3, 0] = 9
    made = trace_of(trace.card, ids, request_T=trace.request_T)
    found = counted(named(made, trace.domain_T, NAMES[:3]))
    rows = found.specialisation()
    assert (rows["count"] > 0).all() and len(rows) == 60
    assert found.usage_RLE[found.domain_R == found.domains.index("maths"), 3].sum() == 1
    for layer in range(4):
        count_DE = found.usage_RLE[:, layer].astype(int)
        count_DE = np.stack([count_DE[found.domain_R == d].sum(axis=0) for d in range(3)])[:, :15]
        chance_DE = count_DE.sum(axis=1, keepdims=True) * count_DE.sum(axis=0) / count_DE.sum()
        effect_E = [slow_effect(found, layer, e) for e in range(15)]
        np.testing.assert_allclose(found._design_effects()[layer, :15], effect_E, rtol=1e-9)
        told_E = power_divergence(count_DE, chance_DE, lambda_=0)[0]
        p_E = chi2.sf(told_E / effect_E, 2)
        q_E = rows[rows.layer == layer].q_value
        np.testing.assert_allclose(q_E, false_discovery_control(p_E), rtol=1e-6)


def test_a_domain_that_skips_a_layer_is_nobodys_there() -> None:
    """What the layer tells of the others is what it tells where there are no others."""
    trace = tasteful(np.random.default_rng(5).dirichlet(np.ones(6), 3), 60, n_layers=2)
    ids = trace.ids_TLK.astype(int)
    ids[trace.domain_T == 1, 1] = -1
    trace = named(trace_of(trace.card, ids, request_T=trace.request_T), trace.domain_T, NAMES[:3])
    rows = counted(trace).specialisation().query("layer == 1").reset_index(drop=True)
    others = named(trace, np.where(trace.domain_T == 1, -1, trace.domain_T), NAMES[:3])
    alone = counted(others).specialisation().query("layer == 1").reset_index(drop=True)
    told = ["expert", "count", "domain", "lift", "specialisation"]
    pd.testing.assert_frame_equal(rows[told], alone[told])


def test_a_request_per_domain_does_not_tell_how_much_requests_differ() -> None:
    taste = np.random.default_rng(0).dirichlet(np.ones(8), 2)
    assert counted(tasteful(taste, 2)).specialisation().q_value.isna().all()
    assert (counted(tasteful(taste, 4)).accuracy().requests == 4).all()  # two of each can be told


def test_one_choice_tells_nothing() -> None:
    told_LE, most_L, lift_DLE = module._divergence(np.array([[[1, 0]], [[0, 0]]]))
    assert told_LE.tolist() == [[0, 0]] and most_L.tolist() == [0]
    assert lift_DLE.tolist() == [[[1, 0]], [[0, 0]]]


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_bias_taken_off_is_that_of_miller_and_madow(top_k: int) -> None:
    """Cells less margins: where k choices come together, what is known of a domain is known of k."""
    trace = drawn(6, n_requests=8, tokens=6, top_k=top_k)
    ids = trace.ids_TLK.astype(int)
    ids[ids > 15] = -1
    ids[trace.domain_T == 1, 2] = -1
    ids[trace.domain_T == 2, 3] = -1
    ids[np.flatnonzero(trace.domain_T == 2)[-1], 3, 0] = 15
    made = trace_of(trace.card, ids, request_T=trace.request_T)
    found = counted(named(made, trace.domain_T, NAMES[:3]))
    for row in found.information().itertuples():
        counts = [found.usage_RLE[found.domain_R == d, row.layer].sum(axis=0) for d in range(3)]
        cells = sum(int((count_E > 0).sum()) for count_E in counts)
        experts, domains = int((sum(counts) > 0).sum()), sum(bool(one.any()) for one in counts)
        bias = (cells - experts - top_k * (domains - 1)) / (2 * np.log(2) * np.sum(counts))
        assert row.plugin_bits - row.mutual_information_bits == pytest.approx(bias, abs=1e-12)


def test_usage_of_long_requests_is_counted_wide() -> None:
    plan = plan_of(drawn())
    for rows, kind in ((2**16 - 1, np.uint16), (2**16, np.int32)):
        plan.survey.n_rows_R[0] = rows
        assert Domains(plan).usage_RLE.dtype == kind


def test_requests_that_stick_to_one_subject_do_not_make_specialists() -> None:
    """Every request has a taste of its own, whatever its domain: tokens taken one by one would call most special."""
    rng = np.random.default_rng(0)
    taste_RE = rng.dirichlet(np.full(30, 0.5), 80)
    trace = tasteful(taste_RE, 80, tokens=60, n_layers=4)
    trace = named(trace, trace.request_T % 4, NAMES)
    rows = counted(trace).specialisation()
    assert (rows.q_value < 0.01).mean() < 0.05
    information = domain_information(trace)
    # what is told is no more than what shuffled requests tell: half as much again, for 80 requests
    assert (information.mutual_information_bits < 1.5 * information.shuffled_bits).all()


def test_accuracy_is_that_of_sklearn_on_the_requests_themselves() -> None:
    taste = np.random.default_rng(3).dirichlet(np.full(8, 4.0), 3)
    found = counted(tasteful(taste, 40, tokens=10))
    usage_RF = found.usage_RLE.reshape(len(found.usage_RLE), -1)
    guess_R = np.empty_like(found.domain_R)
    folds = module.StratifiedKFold(5, shuffle=True, random_state=0)
    for train, test in folds.split(usage_RF, found.domain_R):
        model = MultinomialNB().fit(usage_RF[train], found.domain_R[train])
        guess_R[test] = model.predict(usage_RF[test])
    rows = found.accuracy().set_index("classifier")
    assert rows.loc["naive_bayes", "accuracy"] == (guess_R == found.domain_R).mean()
    interval = binomtest(int((guess_R == found.domain_R).sum()), 40).proportion_ci(method="wilson")
    assert rows.loc["naive_bayes", ["low", "high"]].tolist() == pytest.approx(interval, abs=1e-6)
    assert rows.index.tolist() == ["naive_bayes", "majority", "shuffled_labels"]
    assert rows.loc["majority", "balanced_accuracy"] == pytest.approx(1 / 3)
    assert (rows.low < rows.accuracy).all() and (rows.accuracy < rows.high).all()
    assert (rows.requests == 40).all() and (rows.classes == 3).all()


def test_routing_tells_domains_with_tastes_of_their_own_and_no_others() -> None:
    taste = np.random.default_rng(0).dirichlet(np.ones(12), 4)
    rows = domain_accuracy(tasteful(taste, 80, n_layers=3)).set_index("classifier")
    assert rows.loc["naive_bayes", "low"] > 0.9
    assert rows.loc["shuffled_labels", "accuracy"] < 0.45
    rows = domain_accuracy(tasteful(np.tile(taste[0], (4, 1)), 80)).set_index("classifier")
    assert rows.loc["naive_bayes", "low"] < 0.25 < rows.loc["naive_bayes", "high"]


def test_a_prompt_template_does_not_give_the_domain_away() -> None:
    """Ten rows that every request of a domain shares, then text that has nothing to do with the domain."""
    trace = tasteful(np.full((2, 16), 1 / 16), 60, tokens=30)
    near_T = trace.position_T < 10
    ids = trace.ids_TLK.copy()
    ids[near_T, 0, 0] = trace.position_T[near_T] + 5 * trace.domain_T[near_T]
    found = counted(replace(trace, ids_TLK=ids))
    assert found.plan.split.is_template_DP.sum() == 20
    accuracy = found.accuracy().set_index("classifier").accuracy
    assert accuracy["naive_bayes"] < 0.7  # 60 requests: two standard errors above one half
    assert found.usage_RLE.sum() == 60 * 20 and found.usage_CDLE.sum() == 60 * 30
    assert found.specialisation()["count"].sum() == 60 * 20


def test_repeated_requests_are_left_out() -> None:
    trace = tasteful(np.full((2, 16), 1 / 16), 20)
    ids = trace.ids_TLK.copy()
    ids[trace.request_T == 7] = ids[trace.request_T == 3]
    found = counted(replace(trace, ids_TLK=ids))
    assert 7 not in found.request_R and len(found.request_R) == 19
    assert found.usage_CDLE.sum() == 19 * 30


def test_what_cannot_be_told_says_why() -> None:
    with pytest.raises(MissingData, match="names 0"):
        domain_usage(random_trace())
    one = named(random_trace(), np.zeros(1200), ("only",))
    with pytest.raises(MissingData, match="names 1"):
        domain_information(one)
    lonely = tasteful(np.full((2, 6), 1 / 6), 10)
    lonely = named(lonely, lonely.request_T == 4, NAMES[:2])
    with pytest.raises(MissingData, match="'prose' has 1 request"):
        domain_accuracy(lonely)
    with pytest.raises(MissingData, match="one layer"):
        domain_transfer(lonely)


def slow_markov(
    trace: RoutingTrace, plan: Plan, train_domain: int, test_domain: int, n_experts: int
) -> tuple[float, float]:
    """Popularity and Markov recall, token by token, as the README of the traces states them."""
    parts_T = plan.split.parts(trace, np.arange(trace.n_tokens))
    rows = [
        [[e for e in ids_K if e < n_experts] for ids_K in row] for row in trace.ids_TLK.tolist()
    ]
    train = [rows[t] for t in np.flatnonzero((parts_T == TRAIN) & (trace.domain_T == train_domain))]
    test = [rows[t] for t in np.flatnonzero((parts_T == TEST) & (trace.domain_T == test_domain))]
    k, popular_recall, markov_recall = trace.card.top_k, [], []
    for layer in range(trace.card.n_layers - 1):
        pop_E, pairs_EE = np.zeros(n_experts), np.zeros((n_experts, n_experts))
        for row in train:
            np.add.at(pop_E, row[layer + 1], 1)
            for a in row[layer]:
                pairs_EE[a, row[layer + 1]] += 1
        chance_EE = (pairs_EE + 0.5 * pop_E / pop_E.sum()) / (
            pairs_EE.sum(axis=1, keepdims=True) + 0.5
        )
        favourites = set(np.argsort(-pop_E, kind="stable")[:k].tolist())
        hits, markov_hits, of, markov_of = 0, 0, 0, 0
        for row in test:
            of += len(row[layer + 1])
            hits += len(favourites & set(row[layer + 1]))
            if row[layer]:
                score_E = chance_EE.astype(np.float32)[row[layer]].sum(axis=0, dtype=np.float32)
                guesses = set(np.argsort(-score_E, kind="stable")[:k].tolist())
                markov_of += len(row[layer + 1])
                markov_hits += len(guesses & set(row[layer + 1]))
        popular_recall.append(hits / of)
        markov_recall.append(markov_hits / markov_of)
    return float(np.mean(popular_recall)), float(np.mean(markov_recall))


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("template", [0, 4])
def test_transfer_is_the_formula_of_the_readme(top_k: int, template: int) -> None:
    """Rows of a template are rows like all others here."""
    trace = drawn(1, n_requests=24, n_layers=3, n_experts=7, top_k=top_k)
    ids = trace.ids_TLK.copy()
    ids[trace.position_T < template] = np.arange(top_k)
    trace = replace(trace, ids_TLK=ids)
    plan = plan_of(trace)
    assert plan.split.is_template_DP.any() == (template > 0)
    found = counted(trace, plan)
    table = transferred(trace, found).table()
    assert len(table) == 18
    for row in table.itertuples():
        a, b = trace.domains.index(row.train_domain), trace.domains.index(row.test_domain)
        told = slow_markov(trace, plan, a, b, 7)[row.measure == "markov"]
        # sums of a few float32 in another order can part two experts that are all but equal
        assert row.recall == pytest.approx(told, abs=1e-9 if row.measure == "popularity" else 0.01)
    rows_B = table.set_index(["measure", "train_domain", "test_domain"]).tokens
    assert rows_B["markov", "code", "law" if "law" in trace.domains else "maths"] > 0


def test_a_domain_without_tested_requests_is_scored_on_by_nobody() -> None:
    trace = tasteful(np.full((2, 6), 1 / 6), 20, n_layers=2)
    trained = np.setdiff1d(trace.request_T, plan_of(trace).split.test_requests)[0]
    trace = named(trace, np.where(trace.request_T == trained, 2, trace.domain_T), NAMES[:3])
    table = transferred(trace, counted(trace)).table()
    assert set(table.train_domain) == set(NAMES[:3]) and set(table.test_domain) == set(NAMES[:2])


def test_guesses_are_the_best_and_of_equal_ones_the_lower() -> None:
    """Chances of few different values, also where all of them are equal."""
    rng, nobody = np.random.default_rng(0), 99
    ids_TLK = np.argsort(rng.random((80, 2, 9)), axis=2)[:, :, :3]
    ids_TLK[rng.random(ids_TLK.shape) < 0.2] = nobody
    chance_EE = rng.integers(0, 2, (9, 9)).astype(np.float32) * (np.arange(9) % 2)[:, None]
    domain_T, expected, found = rng.integers(0, 3, 80), np.zeros((2, 3), int), np.zeros((2, 3), int)
    for (here, there), domain in zip(ids_TLK.tolist(), domain_T, strict=True):
        known = [a for a in here if a != nobody]
        score_E = chance_EE[known].sum(axis=0)
        guesses = sorted(range(9), key=lambda e: (-score_E[e], e))[:3] if known else []
        chosen = [b for b in there if b != nobody] if known else []
        expected[:, domain] += len(set(chosen) & set(guesses)), len(chosen)
    transfer._score(ids_TLK[:, 0], ids_TLK[:, 1], domain_T, nobody, chance_EE, *found)
    np.testing.assert_array_equal(found, expected)


def test_rows_are_drawn_by_splitmix64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first numbers of Vigna's C code, begun at 0."""
    monkeypatch.setattr(transfer, "hash_of_request", lambda seed, request: 0)
    told = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)
    assert transfer._unit(np.arange(1, 5), 0).tolist() == [(x >> 11) / 2**53 for x in told]


def test_transitions_that_every_domain_shares_carry_over_and_popularity_does_not() -> None:
    """Each domain has its own half of the first layer's experts; the next layer's follow from them, one to one."""
    rng = np.random.default_rng(0)
    domain_T = np.repeat(np.arange(40) % 2, 50)
    first_T = rng.integers(0, 4, 2000) + 4 * (domain_T & (rng.random(2000) < 0.8))
    ids = np.stack([first_T, (first_T + 3) % 8], axis=1)[:, :, None]
    card = plain_card("c", n_experts=8, top_k=1, layer_numbers=(0, 1))
    trace = trace_of(card, ids, request_T=np.arange(2000) // 50)
    table = domain_transfer(named(trace, domain_T, ("low", "high")))
    recall = table.set_index(["measure", "train_domain", "test_domain"]).recall
    assert recall["markov", "high", "low"] == 1
    assert recall["markov", "low", "high"] < 0.4  # low has never seen the other half
    assert recall["popularity", "high", "low"] < 0.1


@pytest.mark.parametrize("name", odd_traces())
def test_odd_traces_work(name: str) -> None:
    plain = odd_traces()[name]
    trace = named(plain, plain.request_T % 2, ("even", "odd"))
    if len(np.unique(trace.request_T)) == 1:
        with pytest.raises(MissingData, match="names 1"):
            Domains(plan_of(trace))
        return
    found = counted(trace)
    usage, special, told = found.usage(), found.specialisation(), found.information()
    assert len(told) == trace.card.n_layers
    assert ("stack" in usage) == ("stack" in special) == ("stack" in told) == (name == "two stacks")
    if found.usage_RLE.any():
        assert found.accuracy().accuracy.between(0, 1).all()
    else:  # all rows alike: nothing but template
        with pytest.raises(MissingData, match="text of their own"):
            found.accuracy()
    if trace.card.n_layers > 1:
        table = transferred(trace, found).table()
        assert len(table) == 8 and table.recall.between(0, 1).all()


def test_a_split_in_time_can_leave_nothing_to_score() -> None:
    trace = tasteful(np.full((2, 6), 1 / 6), 2, tokens=1, n_layers=2)
    plan = plan_of(trace, train_share=0.0)
    with pytest.raises(MissingData, match="one part of the split is empty"):
        DomainTransfer(plan, counted(trace, plan))


def esft(folder: Path) -> RoutingTrace:
    """Three task sets of one model as three domains of one trace."""
    parts, names, first = [], ("intent", "law", "summary"), 0
    for code, name in enumerate(names):
        one = real_trace(
            folder / "traces/esft-deepseek-v2-lite" / f"esft_deepseek_v2_lite_{name}.npz"
        )
        card = replace(one.card, name="deepseek-v2-lite")
        moved = replace(one, card=card, request_T=one.request_T + np.int32(first))
        parts.append(named(moved, np.full(one.n_tokens, code), names))
        first += int(one.request_T.max()) + 1
    return concat(parts)


def test_between_real_task_sets_popularity_does_not_transfer_and_transitions_partly_do(
    real_data: Path,
) -> None:
    """Its README, counted on all of one set and scored on all of another: popularity .081-.134, Markov .290-.347.

    Here on 70 % and 30 % of the requests. Summary has 13, so four or so decide what is scored on it: requests differ by
    some .03, their mean by .015. Measured: popularity .079-.137, Markov .303-.343.
    """
    table = domain_transfer(esft(real_data))
    is_home = table.train_domain == table.test_domain
    for measure, low, high in (("popularity", 0.081, 0.134), ("markov", 0.290, 0.347)):
        away = table[(table.measure == measure) & ~is_home].recall
        assert len(away) == 6
        assert low - 0.02 < away.min() and away.max() < high + 0.02
    # within a set, as the README's own split has it: .268 .222 .248 and .619 .530 .507
    home = table[is_home].set_index(["measure", "test_domain"]).recall
    for measure, told in (("popularity", (0.268, 0.222, 0.248)), ("markov", (0.619, 0.530, 0.507))):
        measured = [home[measure, name] for name in ("intent", "law", "summary")]
        np.testing.assert_allclose(measured, told, atol=0.03)


def test_real_task_sets_are_told_apart_by_routing_alone(real_data: Path) -> None:
    """Measured: all 173 requests right without their templates; .11 to .26 bits per choice against .01 shuffled."""
    found = counted(esft(real_data))
    rows = found.accuracy().set_index("classifier")
    assert rows.loc["naive_bayes", "accuracy"] > 0.97
    assert rows.loc["majority", "accuracy"] == pytest.approx(127 / 173)
    told = found.information()
    assert told.mutual_information_bits.between(0.08, 0.27).all()
    assert (told.shuffled_bits < 0.02).all()
