"""Ranks against plain sorting, the published baselines of real traces, and a control that finds nothing."""

import numpy as np
import pytest
from routing_traces import odd_traces, random_trace, real_trace

from analysis.routing.batch import Plan, accumulate, batches, plan_of
from analysis.routing.recall import PREDICTORS, Recall, recall_from_counts, smoothed
from analysis.routing.statistics import Usage
from analysis.routing.transitions import Transitions
from prefetch.errors import MissingData
from prefetch.scoring import TEST, TRAIN, bootstrap
from prefetch.trace.card import plain_card
from prefetch.trace.routing import RoutingTrace, trace_of


def scored(
    trace: RoutingTrace, horizons: tuple[int, ...] = (1,), max_rows: int = 1 << 16
) -> Recall:
    plan = plan_of(trace)
    usage, counted = Usage(plan), Transitions(plan, horizons)
    accumulate(trace, plan, [usage, counted], max_rows=max_rows)
    recall = Recall(plan, usage, counted)
    accumulate(trace, plan, [recall], max_rows=max_rows)
    return recall


# pop, markov, shuffled as the traces' README states them, under its split
STATED = {
    "esft-deepseek-v2-lite/esft_deepseek_v2_lite_intent": (0.268, 0.619, 0.269),
    "esft-deepseek-v2-lite/esft_deepseek_v2_lite_law": (0.222, 0.530, 0.204),
    "esft-deepseek-v2-lite/esft_deepseek_v2_lite_summary": (0.248, 0.507, 0.245),
    "gpt-oss-20b/gptoss20b_Polyglot-or-Not_Fact-Completion": (0.371, 0.573, 0.397),
    "gpt-oss-20b/gptoss20b_tulu3_persona_if": (0.328, 0.563, 0.366),
    "gpt-oss-20b/gptoss20b_gpqa_main": (0.297, 0.569, 0.353),
    "gpt-oss-20b/gptoss20b_mmlu_dev": (0.296, 0.571, 0.289),
    "gpt-oss-20b/gptoss20b_mmlu_pro_validation": (0.278, 0.588, 0.280),
}
TEMPLATES = {"intent": 17, "law": 11, "summary": 16}


@pytest.mark.parametrize("name", STATED)
def test_the_baselines_of_the_real_traces_are_reproduced(real_data, name):
    recall = scored(real_trace(real_data / "traces" / f"{name}.npz"))
    k = recall.plan.card.top_k
    popularity, markov, shuffled = STATED[name]
    assert recall.recall("popularity", 1, k).mean() == pytest.approx(popularity, abs=0.001)
    assert recall.recall("markov", 1, k).mean() == pytest.approx(markov, abs=0.001)
    assert recall.recall("markov_shuffled", 1, k).mean() == pytest.approx(shuffled, abs=0.02)
    low, high = recall.interval("markov", 1)
    if recall.request_HPR.shape[2] >= 10:
        assert low < recall.recall("markov", 1, k).mean() < high
    else:
        assert np.isnan(low) and np.isnan(high)
    positions = int(recall.plan.split.is_template_DP.sum())
    assert positions == next((n for task, n in TEMPLATES.items() if name.endswith(task)), 0)


def by_hand(trace: RoutingTrace, plan: Plan, horizon: int) -> dict[str, np.ndarray]:
    """Recall@K per layer pair, by sorting scores."""
    ids, E, K = trace.ids_TLK.astype(int), trace.card.n_experts, trace.card.top_k
    parts_T = plan.split.parts(trace, np.arange(len(ids)))
    one_TLE = np.zeros((*ids.shape[:2], E + 256))
    np.put_along_axis(one_TLE, ids, 1.0, axis=2)
    one_TLE = one_TLE[:, :, :E]
    train, test = parts_T == TRAIN, parts_T == TEST
    recalls: dict[str, list[float]] = {name: [] for name in PREDICTORS[:3]}
    for layer in range(ids.shape[1] - horizon):
        here, there = one_TLE[:, layer], one_TLE[:, layer + horizon]
        popular = there[train].sum(axis=0)
        joint = here[train].T @ there[train]
        chance = smoothed(joint[None], popular[None])[0].astype(np.float32)
        previous = np.zeros_like(there)
        follows = np.diff(trace.request_T, prepend=-1) == 0
        for t in np.flatnonzero(follows):
            for order, expert in enumerate(ids[t - 1, layer + horizon]):
                if expert < E:
                    previous[t, expert] = 1e9 - order
        scores = {
            "popularity": np.broadcast_to(popular, there.shape),
            "previous_token": previous + popular,
            "markov": (here[:, :, None].astype(np.float32) * chance).sum(axis=1, dtype=np.float64),
        }
        for name, score in scores.items():
            guess = np.argsort(-score[test].round(6), axis=1, kind="stable")[:, :K]
            recalls[name].append(
                np.take_along_axis(there[test], guess, axis=1).sum() / there[test].sum()
            )
    return {name: np.array(values) for name, values in recalls.items()}


@pytest.mark.parametrize("name", ["no expert", "k = 1", "wide ids"])
@pytest.mark.parametrize("horizon", [1, 3])
def test_recall_is_that_of_plain_sorting(name, horizon):
    trace = odd_traces()[name]
    recall = scored(trace, (1, 3))
    for predictor, want in by_hand(trace, recall.plan, horizon).items():
        got = recall.recall(predictor, horizon, trace.card.top_k)
        assert got == pytest.approx(want, abs=2e-3), (
            predictor
        )  # float32 sums order near ties otherwise


def test_a_chain_is_predicted_and_its_shuffled_counts_are_not():
    rng = np.random.default_rng(0)
    trace = random_trace(0, n_requests=100, skew=0.0)
    ids = trace.ids_TLK.copy()
    ids[:, 1] = (ids[:, 0] + 5) % 16
    trace = RoutingTrace(**{**vars(trace), "ids_TLK": ids})
    recall = scored(trace)
    assert recall.recall("markov", 1, 3)[0] > 0.99
    assert recall.recall("markov_shuffled", 1, 3)[0] == pytest.approx(3 / 16, abs=0.02)
    assert recall.recall("markov", 1, 3)[1] == pytest.approx(3 / 16, abs=0.03)
    assert rng is not None


def test_the_control_is_the_recall_of_really_permuted_rows():
    trace = random_trace(6, n_requests=60, skew=1.0)
    recall = scored(trace)
    control = recall.recall("markov_shuffled", 1, 3)
    permuted = []
    for seed in range(8):
        ids = trace.ids_TLK.copy()
        ids[:, 1] = ids[np.random.default_rng(seed).permutation(len(ids)), 1]
        permuted.append(
            scored(RoutingTrace(**{**vars(trace), "ids_TLK": ids})).recall("markov", 1, 3)[0]
        )
    assert control[0] == pytest.approx(np.mean(permuted), abs=4 * np.std(permuted) + 0.003)


def test_few_rows_leave_the_control_somebody_to_draw():
    """Of three tokens the first two may have met everybody who is there."""
    ids = np.random.default_rng(0).integers(0, 4, (3, 40, 1))
    card = plain_card("few", n_experts=4, top_k=1, layer_numbers=tuple(range(40)))
    found = scored(trace_of(card, ids, request_T=np.arange(3)))
    assert (found.control[1][1][:, -1] == 1).all()


@pytest.mark.parametrize("max_rows", [1, 130, 5000])
def test_batches_and_merging_change_nothing(max_rows):
    trace = random_trace(7)
    whole = scored(trace, (1, 2))
    assert scored(trace, (1, 2), max_rows).curve().equals(whole.curve())
    plan = plan_of(trace)
    usage, counted = Usage(plan), Transitions(plan, (1, 2))
    accumulate(trace, plan, [usage, counted])
    one, two = (Recall(plan, usage, counted) for _ in range(2))
    parts = list(batches(trace, plan, max_rows=400))
    for part in parts[:2]:
        one.add(part)
    for part in parts[2:]:
        two.add(part)
    one.merge(two)
    assert one.curve().equals(whole.curve()) and one.summary().equals(whole.summary())


def test_an_interval_is_that_of_the_tested_requests_that_have_a_pair(monkeypatch):
    """Popularity by hand, request by request; one tested request has experts in its first layer only."""
    trace = random_trace(9, n_requests=60)
    ids = trace.ids_TLK.astype(int)
    alone, *tested = plan_of(trace).split.test_requests.tolist()
    ids[trace.request_T == alone, 1:] = -1
    trace = trace_of(trace.card, ids, request_T=trace.request_T)
    found, ids = scored(trace), trace.ids_TLK
    is_train_T = found.plan.split.parts(trace, np.arange(len(ids))) == TRAIN
    hits_R, of_R = np.zeros(len(tested), np.int64), np.zeros(len(tested), np.int64)
    for layer in (1, 2, 3):
        used_E = np.bincount(ids[is_train_T, layer].ravel(), minlength=16)
        guess = np.argsort(-used_E, kind="stable")[:3]
        for place, request in enumerate(tested):
            own = ids[trace.request_T == request, layer]
            hits_R[place] += np.isin(own, guess).sum()
            of_R[place] += own.size
    expected = bootstrap(hits_R, of_R, seed=found.plan.seed)
    assert found.interval("popularity", 1) == pytest.approx(expected, abs=1e-12)
    assert found.recall("popularity", 1, 3).mean() == pytest.approx(hits_R.sum() / of_R.sum())
    assert np.isnan(found.interval("markov_shuffled", 1)).all()
    monkeypatch.setattr("analysis.routing.recall.bootstrap", lambda *_, **__: (-0.5, 1.5))
    assert found.interval("popularity", 1) == (0.0, 1.0)


def test_template_and_new_text_are_told_apart():
    """The template is guessed by who is popular there; the rest is drawn anew."""
    ids = random_trace(3, n_requests=40, tokens=40).ids_TLK.copy().reshape(40, 40, 4, 3)
    ids[:, :12] = [[0, 1, 2]] * 4
    card = random_trace().card
    trace = trace_of(card, ids.reshape(-1, 4, 3), request_T=np.arange(1600) // 40)
    rows = scored(trace).summary().query("predictor == 'previous_token'").set_index("part")
    assert rows.recall_at_k["template"] > 0.9 > 0.6 > rows.recall_at_k["new_text"]


def test_widths_are_those_that_there_are():
    assert set(scored(random_trace(8)).table().width) == {3, 6, 12}
    assert set(scored(random_trace(8, n_experts=8)).table().width) == {3, 6, 8}


def test_recall_rises_with_the_width_to_one():
    curve = scored(random_trace(8)).curve()
    for _, rows in curve.groupby(["part", "horizon", "predictor", "layer"]):
        assert rows.recall.is_monotonic_increasing
        assert rows.recall.iloc[-1] == pytest.approx(1.0)


def test_a_part_that_is_empty_is_said():
    with pytest.raises(MissingData, match="empty"):
        recall_from_counts(odd_traces()["one token"])


def test_all_predictors_are_scored_on_the_same_rows_with_their_own_interval() -> None:
    """Where the first layer did not run, nothing is known: such rows count for nobody, in no interval."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, 2400)
    ids = np.stack([first, (first + 1) % 4, (first + 2) % 4], axis=1)[:, :, None]
    ids[::2, 0] = -1
    card = plain_card("holes", n_experts=4, top_k=1, layer_numbers=(0, 1, 2))
    trace = trace_of(card, ids, request_T=np.arange(2400) // 40)
    found = scored(trace, (1, 2))
    plan = found.plan
    rows = found.summary().set_index(["horizon", "predictor"])
    markov = rows.loc[(1, "markov")]
    assert markov.recall_at_k == 1 and (markov.low, markov.high) == (1, 1)
    popular = rows.loc[(2, "popularity")]
    tested = np.isin(trace.request_T, plan.split.test_requests) & (ids[:, 0, 0] >= 0)
    trained = ~np.isin(trace.request_T, plan.split.test_requests)
    best = np.bincount(ids[trained, 2, 0], minlength=4).argmax()
    assert popular.recall_at_k == (ids[tested, 2, 0] == best).mean()
    assert popular.low <= popular.recall_at_k <= popular.high


def test_two_stacks_have_no_pair_between_them() -> None:
    found = scored(odd_traces()["two stacks"], (1, 2))
    table = found.table()
    assert set(zip(table["stack"], table.layer, table.later_layer, strict=True)) == {
        ("encoder", 0, 1),
        ("decoder", 0, 1),
    }
    assert not found.summary().query("horizon > 1").recall_at_k.notna().any()
