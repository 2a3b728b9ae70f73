"""Joint counts against plain loops, information against a chain whose truth is known, and the control."""

import itertools

import numpy as np
import pytest
from routing_traces import chain, odd_traces, random_trace, real_trace
from scipy.stats import hypergeom, skew

from analysis.routing.batch import accumulate, batches, plan_of
from analysis.routing.pairs import SKIP, control, count_pairs, information, shuffled
from analysis.routing.transitions import NextTokens, Transitions, next_tokens, transitions
from prefetch.errors import MissingData
from prefetch.scoring import TEST, TRAIN
from prefetch.trace.card import plain_card
from prefetch.trace.routing import DECODE, PREFILL, RoutingTrace, trace_of

RNG = np.random.default_rng(0)
MATRIX = RNG.dirichlet(np.full(32, 0.2), size=32)


def truth(matrix_EE: np.ndarray) -> tuple[float, float, float]:
    """Entropy of the next layer, conditional entropy, mutual information; the first layer is even."""
    joint = matrix_EE / len(matrix_EE)
    there = joint.sum(axis=0)
    h_joint = -(joint[joint > 0] * np.log2(joint[joint > 0])).sum()
    h_there, h_here = -(there[there > 0] * np.log2(there[there > 0])).sum(), np.log2(len(matrix_EE))
    return h_there, h_joint - h_here, h_here + h_there - h_joint


def test_a_known_chain_is_measured_within_one_per_cent_at_a_million_tokens():
    row = transitions(chain(1_000_000, MATRIX), horizons=(1,)).iloc[0]
    entropy, conditional, mutual = truth(MATRIX)
    assert row.entropy_bits == pytest.approx(entropy, rel=0.01)
    assert row.conditional_entropy_bits == pytest.approx(conditional, rel=0.01)
    assert row.mutual_information_bits == pytest.approx(mutual, rel=0.01)
    assert abs(row.mutual_information_shuffled_bits) < 0.001


def test_the_correction_matters_at_a_thousand_tokens():
    _, _, mutual = truth(MATRIX)
    tables = [transitions(chain(1000, MATRIX, seed), horizons=(1,)).iloc[0] for seed in range(20)]
    plain = np.mean([row.mutual_information_plugin_bits for row in tables])
    corrected = np.mean([row.mutual_information_bits for row in tables])
    assert plain - mutual > 0.1  # the plug-in estimate finds what is not there
    assert abs(corrected - mutual) < 0.25 * (plain - mutual)
    shuffled_plain = np.mean([row.mutual_information_shuffled_plugin_bits for row in tables])
    shuffled_corrected = np.mean([row.mutual_information_shuffled_bits for row in tables])
    assert shuffled_plain > 0.4 and abs(shuffled_corrected) < 0.25 * shuffled_plain


def uniform(n_experts: int, top_k: int, n_tokens: int, seed: int = 0, n_layers: int = 2):
    """Every token takes any set of experts, whatever was taken elsewhere."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n_tokens, n_layers, n_experts)), axis=2)[:, :, :top_k]
    card = plain_card("u", n_experts=n_experts, top_k=top_k, layer_numbers=tuple(range(n_layers)))
    return card, ids


@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_tokens"), [(256, 1, 2000), (128, 8, 200), (64, 6, 100), (32, 4, 30)]
)
def test_what_tells_nothing_leaves_everything_open_however_few_tokens(n_experts, top_k, n_tokens):
    card, ids = uniform(n_experts, top_k, n_tokens)
    row = transitions(trace_of(card, ids, request_T=np.arange(n_tokens) // 50), (1,)).iloc[0]
    assert row.conditional_entropy_bits == pytest.approx(np.log2(n_experts), abs=0.15)
    assert row.conditional_entropy_bits <= row.entropy_bits
    assert row.conditional_entropy_plugin_bits < row.conditional_entropy_bits
    beyond = row.mutual_information_bits - row.mutual_information_shuffled_bits
    assert row.conditional_entropy_bits == max(0, min(row.entropy_bits, row.entropy_bits - beyond))


def test_a_horizon_is_at_least_one_layer():
    plan = plan_of(random_trace(n_requests=2))
    for horizons in ((), (0,), (2, 0)):
        with pytest.raises(ValueError, match="at least one layer"):
            Transitions(plan, horizons)
    assert Transitions(plan, (3, 9)).horizons == (3,)
    with pytest.raises(MissingData, match="no later layer"):
        Transitions(plan, (4,))


def test_one_token_tells_no_entropy_of_others():
    row = transitions(random_trace(n_requests=1, tokens=1), (1,)).iloc[0]
    told = [name for name in row.index if name.endswith("_bits") and "plugin" not in name]
    assert len(told) == 5 and row[told[:4]].isna().all()


def test_unrelated_tokens_are_expected_to_repeat_as_often_as_they_do():
    tables = []
    for seed in range(40):
        card, ids = uniform(64, 2, 40, seed, n_layers=4)
        tables.append(next_tokens(trace_of(card, ids, request_T=0)).expected_repeat.mean())
    assert np.mean(tables) == pytest.approx(2 / 64, abs=4 * np.std(tables) / np.sqrt(40))


def test_a_row_without_a_first_choice_still_has_its_others():
    card, ids = uniform(8, 2, 200)
    ids[::3, :, 0] = -1
    ids[::10] = -1
    table = next_tokens(trace_of(card, ids, request_T=0))
    for layer in range(2):
        rows = [[e for e in row if e >= 0] for row in ids[:, layer].tolist()]
        steps = [(a, b) for a, b in itertools.pairwise(rows) if a and b]
        shared = sum(len(set(a) & set(b)) for a, b in steps)
        assert table.tokens[layer] == len(steps)
        assert table.repeat_rate[layer] == pytest.approx(shared / sum(len(b) for _, b in steps))
        changed = np.mean([a[0] != b[0] for a, b in steps])
        assert table.transition_rate[layer] == pytest.approx(changed)
        assert table.persistence[layer] == pytest.approx(1 - changed)
        alike = [len(set(a) & set(b)) for a, b in steps]
        assert table.same_set[layer] == pytest.approx(np.mean([n == 2 for n in alike]))
        assert table.jaccard[layer] == pytest.approx(np.mean([n / (4 - n) for n in alike]))


def test_what_is_counted_later_is_in_the_next_table():
    trace = random_trace(n_requests=6, tokens=10)
    plan = plan_of(trace)
    made = [(Transitions(plan, (1,)), NextTokens(plan)) for _ in range(3)]
    parts = list(batches(trace, plan, max_rows=20))
    for batch in parts:
        for one in made[0]:
            one.add(batch)
            one.table()  # what it tells is kept until more is counted
    for place, batch in enumerate(parts):
        for one in made[1 if place < 2 else 2]:
            one.add(batch)
    for mine, later, whole in zip(made[1], made[2], made[0], strict=True):
        mine.table()
        mine.merge(later)
        fresh = type(whole)(plan, (1,)) if isinstance(whole, Transitions) else NextTokens(plan)
        accumulate(trace, plan, [fresh])
        assert mine.table().equals(fresh.table()) and whole.table().equals(fresh.table())


def test_requests_of_one_token_repeat_nothing():
    trace = random_trace(n_requests=6, tokens=1)
    plan = plan_of(trace)
    counted = NextTokens(plan)
    accumulate(trace, plan, [counted])
    assert np.isnan(counted.repeat_rate()) and counted.table().empty


def test_rows_that_do_not_count_are_counted_by_nobody():
    """Also where there are more experts than the number that says so."""
    here_TK = np.array([[1, 2], [3, 4], [5, 299], [7, 511]], np.uint16)
    class_T = np.array([0, SKIP, 3, 0], np.uint8)
    joint_CEE = np.zeros((4, 300, 300), np.int64)
    count_pairs(here_TK, here_TK[::-1].copy(), class_T, 511, joint_CEE)
    found = {tuple(at): int(joint_CEE[tuple(at)]) for at in np.argwhere(joint_CEE)}
    pairs = [(0, 1, 7), (0, 2, 7), (3, 5, 3), (3, 5, 4), (3, 299, 3), (3, 299, 4)]
    assert found == dict.fromkeys([*pairs, (0, 7, 1), (0, 7, 2)], 1)


def ragged(seed: int = 0) -> RoutingTrace:
    """Requests of 1 to 30 rows with prompts of any length, one of them repeated, and holes."""
    rng = np.random.default_rng(seed)
    rows_R = rng.integers(1, 31, 25)
    rows_R[7] = rows_R[3] = 12
    card, ids = uniform(6, 2, rows_R.sum(), seed, n_layers=3)
    ids[rng.random(ids.shape) < 0.1] = -1
    request_T = np.repeat(np.arange(25), rows_R)
    ids[request_T == 7] = ids[request_T == 3]
    prompt_R = rng.integers(0, rows_R + 1)
    place_T = np.concatenate([np.arange(n) for n in rows_R])
    phase_T = np.where(place_T < prompt_R[request_T], PREFILL, DECODE)
    phase_T[request_T == 7] = phase_T[request_T == 3]
    return trace_of(card, ids, request_T=request_T, phase_T=phase_T)


def shifted_by_hand(trace: RoutingTrace, phase: int, layer: int) -> np.ndarray:
    joint = np.zeros((6, 6), int)
    groups = [trace.ids_TLK[(trace.request_T == r) & (trace.phase_T == phase)] for r in range(25)]
    groups = [rows for r, rows in enumerate(groups) if len(rows) and r != 7]
    for here, there in zip(groups, groups[1:] + groups[:1], strict=True):
        for i, row in enumerate(here):
            later = there[(i + len(there) // 2) % len(there)]
            joint += joint_by_hand(row[None, layer], later[None, layer + 1], 6)
    return joint


def test_the_shifted_control_pairs_each_request_with_the_next_from_its_middle_on():
    trace = ragged()
    plan = plan_of(trace)
    assert plan.split.duplicate_requests.tolist() == [7]
    parts = list(batches(trace, plan, max_rows=1))
    whole = Transitions(plan, (1, 2))
    accumulate(trace, plan, [whole])
    table = whole.table()
    assert table[table.horizon == 2].mutual_information_shifted_bits.isna().all()
    for n_first in (1, 12, len(parts) - 1):
        halves = Transitions(plan, (1, 2)), Transitions(plan, (1, 2)), Transitions(plan, (1, 2))
        for i, part in enumerate(parts):
            halves[i >= n_first].add(part)
        halves[2].merge(halves[0])
        halves[2].merge(halves[1])
        assert halves[2].table().equals(table)
    for layer in range(2):
        prompt, answer = (shifted_by_hand(trace, phase, layer) for phase in (PREFILL, DECODE))
        wanted = {"prefill": prompt, "decode": answer, "all": prompt + answer}
        for phase, joint in wanted.items():
            assert (whole.shifted.closed(phase)[0][layer] == joint).all()
    assert table[table.horizon == 1].mutual_information_shifted_bits.notna().all()


def test_runs_of_like_tokens_feign_information_and_the_shifted_control_finds_it_too():
    """Independent layers whose tokens repeat the set of the one before; a permutation sees nothing of it."""
    card, ids = uniform(16, 3, 4000, n_layers=6)
    keeps_TL = np.random.default_rng(1).random((4000, 6)) < 0.95
    keeps_TL[::400] = False
    source_TL = np.where(keeps_TL, 0, np.arange(4000)[:, None])
    ids = ids[np.maximum.accumulate(source_TL, axis=0), np.arange(6)]
    table = transitions(trace_of(card, ids, request_T=np.arange(4000) // 400), (1,))
    found, shifted = table.mutual_information_bits, table.mutual_information_shifted_bits
    assert found.mean() > 0.05 and table.mutual_information_shuffled_bits.abs().max() < 0.005
    assert shifted.mean() == pytest.approx(found.mean(), rel=0.25)


def test_the_shifted_control_finds_nothing_where_tokens_are_independent():
    table = transitions(chain(20_000, MATRIX), (1,))
    assert abs(table.mutual_information_shifted_bits.iloc[0]) < 0.005


def joint_by_hand(here: np.ndarray, there: np.ndarray, n_experts: int) -> np.ndarray:
    joint = np.zeros((n_experts, n_experts), int)
    for row_here, row_there in zip(here.tolist(), there.tolist(), strict=True):
        for a, b in itertools.product(row_here, row_there):
            if a < n_experts and b < n_experts:
                joint[a, b] += 1
    return joint


@pytest.mark.parametrize("name", ["no expert", "wide ids", "two stacks", "k = 1"])
def test_counts_are_those_of_a_plain_loop(name):
    trace = odd_traces()[name]
    plan, E = plan_of(trace), trace.card.n_experts
    counted, following = Transitions(plan, (1, 2)), NextTokens(plan)
    accumulate(trace, plan, [counted, following], max_rows=170)
    ids = trace.ids_TLK
    for horizon in (1, 2):
        for layer in range(4 - horizon):
            want = joint_by_hand(ids[:, layer], ids[:, layer + horizon], E)
            assert (counted.joint(horizon)[layer] == want).all()
    same = np.diff(trace.request_T) == 0
    for layer in range(4):
        want = joint_by_hand(ids[:-1][same, layer], ids[1:][same, layer], E)
        assert (following.joint_CLEE.sum(axis=0)[layer] == want).all()


def test_repeats_are_those_of_a_plain_loop():
    trace = random_trace(1)
    table = next_tokens(trace)
    ids = trace.ids_TLK.astype(int)
    for phase, wanted in (("all", (0, 1)), ("prefill", (0,)), ("decode", (1,))):
        rows = table[table.phase == phase].set_index("layer")
        for layer in range(4):
            shared, changed, steps, jaccard = 0, 0, 0, 0.0
            for t in range(1, len(ids)):
                if trace.request_T[t] != trace.request_T[t - 1] or trace.phase_T[t] not in wanted:
                    continue
                one, two = set(ids[t - 1, layer]), set(ids[t, layer])
                steps, shared = steps + 1, shared + len(one & two)
                changed += ids[t - 1, layer, 0] != ids[t, layer, 0]
                jaccard += len(one & two) / len(one | two)
            row = rows.loc[layer]
            assert row.tokens == steps
            assert row.repeat_rate == pytest.approx(shared / steps / 3, abs=1e-12)
            assert row.transition_rate == pytest.approx(changed / steps, abs=1e-12)
            assert row.persistence == pytest.approx(1 - changed / steps, abs=1e-12)
            assert row.jaccard == pytest.approx(jaccard / steps, abs=1e-12)


def test_what_is_drawn_as_shuffled_is_what_a_permutation_gives():
    """Mean and spread of every cell, and the information left, over 200 of each."""
    trace = random_trace(2, n_requests=10)
    here, there = trace.ids_TLK[:, 0], trace.ids_TLK[:, 1]
    here_E = np.bincount(here.ravel(), minlength=16)
    there_E = np.bincount(there.ravel(), minlength=16)
    rng, zeros = np.random.default_rng(0), np.zeros(400, np.uint8)
    permuted, bits = [], []
    for _ in range(200):
        joint = np.zeros((1, 16, 16), np.int32)
        count_pairs(here, there[rng.permutation(400)], zeros, 255, joint)
        permuted.append(joint[0])
        bits.append(information(joint[0], here_E, there_E)["mutual_information_plugin_bits"])
    drawn = [shuffled(here_E, there_E, 400, rng) for _ in range(200)]
    controls = [control(here_E, there_E, 400, rng) for _ in range(200)]
    spread = np.std(permuted, axis=0)
    assert np.abs(np.mean(permuted, axis=0) - np.mean(drawn, axis=0)).max() < 0.5 * spread.max()
    assert np.std(drawn, axis=0).mean() == pytest.approx(spread.mean(), rel=0.05)
    plugin = np.mean([row["mutual_information_shuffled_plugin_bits"] for row in controls])
    assert plugin == pytest.approx(np.mean(bits), rel=0.05)
    corrected = [row["mutual_information_shuffled_bits"] for row in controls]
    assert abs(np.mean(corrected)) < 0.15 * plugin


def test_counts_that_vary_much_are_drawn_as_a_permutation_would_give_them():
    """Mean, variance and skewness of every cell are those of its hypergeometric law."""
    here_E, there_E, n = np.array([4000, 9000]), np.array([700, 3000, 9500]), 10_000
    rng = np.random.default_rng(0)
    drawn = np.stack([shuffled(here_E, there_E, n, rng) for _ in range(20_000)])
    for a, here in enumerate(here_E):
        for b, there in enumerate(there_E):
            law, cell = hypergeom(n, there, here), drawn[:, a, b]
            mean, variance, skewness = law.stats("mvs")
            assert law.var() > 40  # both ways of drawing stand in this table
            assert cell.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / len(cell)))
            assert cell.var() == pytest.approx(variance, rel=0.05)
            assert skew(cell) == pytest.approx(skewness, abs=0.08)


def test_information_of_the_real_traces_is_that_of_their_readme(real_data):
    """Plug-in bits, and in brackets the bias: what is left after shuffling."""
    stated = {
        "esft-deepseek-v2-lite/esft_deepseek_v2_lite_intent": (0.870, 0.008, 5.60, 0.262),
        "esft-deepseek-v2-lite/esft_deepseek_v2_lite_law": (0.689, 0.008, 5.76, 0.290),
        "gpt-oss-20b/gptoss20b_mmlu_dev": (0.526, 0.001, 4.58, 0.432),
        "gpt-oss-20b/gptoss20b_gpqa_main": (0.503, 0.003, 4.41, 0.458),
    }
    for name, (mutual, bias, entropy, repeat) in stated.items():
        trace = real_trace(real_data / "traces" / f"{name}.npz")
        table = transitions(trace, horizons=(1,))
        assert table.mutual_information_plugin_bits.mean() == pytest.approx(mutual, abs=0.002)
        assert table.mutual_information_shuffled_plugin_bits.mean() == pytest.approx(
            bias, abs=0.001
        )
        assert table.entropy_plugin_bits.mean() == pytest.approx(entropy, abs=0.05)
        assert next_tokens(trace).repeat_rate.mean() == pytest.approx(repeat, abs=0.001)


@pytest.mark.parametrize("max_rows", [1, 40, 400, 5000])
def test_batches_and_merging_change_nothing(max_rows):
    trace = random_trace(3)
    plan = plan_of(trace)
    whole = Transitions(plan, (1, 2)), NextTokens(plan)
    accumulate(trace, plan, whole)
    cut = Transitions(plan, (1, 2)), NextTokens(plan)
    accumulate(trace, plan, cut, max_rows=max_rows)
    for one, two in zip(whole, cut, strict=True):
        assert one.table().equals(two.table())
    assert whole[0].sparse().equals(cut[0].sparse())


def test_merged_halves_are_the_whole():
    trace = random_trace(4)
    plan = plan_of(trace)
    whole, one, two = (Transitions(plan, (1,)) for _ in range(3))
    parts = list(batches(trace, plan, max_rows=600))
    assert len(parts) == 2
    for part, accumulator in zip(parts, (one, two), strict=True):
        whole.add(part)
        accumulator.add(part)
    one.merge(two)
    assert one.table().equals(whole.table())


def test_the_sparse_counts_are_the_counts():
    trace = random_trace(5)
    plan = plan_of(trace)
    counted = Transitions(plan, (1, 3))
    accumulate(trace, plan, [counted])
    rows = counted.sparse()
    dense = np.zeros((3, 16, 16), int)
    near = rows[rows.horizon == 1]
    dense[near.layer, near.expert, near.later_expert] = near["count"]
    assert (dense == counted.joint(1)).all()
    assert (rows.later_layer - rows.layer == rows.horizon).all()
    assert rows.train_count.sum() == sum(counted.joint(h, part=TRAIN).sum() for h in (1, 3))
    assert counted.joint(1, part=TEST).sum() > 0


def test_one_layer_has_no_later_one():
    with pytest.raises(MissingData, match="one layer"):
        transitions(random_trace(n_layers=1))


@pytest.mark.parametrize(
    "name", [name for name in odd_traces() if name not in ("one layer", "one of one")]
)
def test_odd_traces_have_transitions(name):
    table = transitions(odd_traces()[name])
    assert (table.tokens > 0).all() and len(table)
    assert (table.mutual_information_plugin_bits > -1e-9).all()
