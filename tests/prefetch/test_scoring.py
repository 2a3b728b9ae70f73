"""Splits, duplicates and template rows are decided by the requests alone, in whatever batches they come."""

import numpy as np
import pytest

from prefetch.scoring import LEFT_OUT, TEST, TRAIN, SharedText, Survey, bootstrap
from prefetch.trace.card import plain_card
from prefetch.trace.routing import RoutingTrace, trace_of

CARD = plain_card("x", n_experts=16, top_k=2, layer_numbers=(0, 1, 2))


def trace(lengths: list[int], seed: int = 0, **known: object) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permuted(np.arange(16))[:2] for _ in range(sum(lengths) * 3)])
    request_T = np.repeat(np.arange(len(lengths)), lengths)
    return trace_of(CARD, ids.reshape(-1, 3, 2), request_T=request_T, **known)


def survey(block: RoutingTrace, cuts: tuple[int, ...] = ()) -> Survey:
    found = Survey()
    for first, stop in zip((0, *cuts), (*cuts, block.n_tokens), strict=True):
        found.add(block.rows(slice(first, stop)))
    return found


def test_the_split_is_by_request_and_the_one_that_the_readme_of_the_traces_states():
    block = trace([10] * 20)
    split = survey(block).split(0.7, 0)
    mixed = np.random.default_rng(0).permutation(np.arange(20))
    assert split.kind == "requests"
    assert split.test_requests.tolist() == sorted(mixed[14:])
    parts_T = split.parts(block, np.arange(200))
    assert set(zip(block.request_T.tolist(), parts_T.tolist(), strict=True)) == {
        (r, TEST if r in split.test_requests else TRAIN) for r in range(20)
    }


def test_turns_of_a_conversation_stay_on_one_side():
    """Each request holds the one before it: guesses must not be learnt on one turn and scored on the next."""
    block = trace([48] * 20)
    turns = [block.rows(slice(48 * c, 48 * c + 12 * n)) for c in range(20) for n in range(1, 5)]
    ids = np.concatenate([turn.ids_TLK for turn in turns])
    lengths = [turn.n_tokens for turn in turns]
    grown = trace_of(CARD, ids, request_T=np.repeat(np.arange(80), lengths))
    found = survey(grown)
    np.testing.assert_array_equal(found.groups(), np.arange(80) // 4 * 4)
    assert found.duplicates().size == 0
    test = found.split(0.7, 0).test_requests
    assert len(test) == 24 and set(np.bincount(test // 4, minlength=20)) == {0, 4}
    for fold in found.folds(0):
        for part in (fold.train, fold.validation, fold.test):
            assert set(np.bincount(part // 4, minlength=20)) <= {0, 4}
    halves = survey(grown, (int(np.flatnonzero(grown.request_T == 41)[0]),))
    first, second = Survey(), Survey()
    first.add(grown.rows(grown.request_T < 41))
    second.add(grown.rows(grown.request_T >= 41))
    first.merge(second)
    np.testing.assert_array_equal(first.groups(), halves.groups())


def test_a_shared_template_is_no_conversation():
    block = trace([30] * 12)
    ids = block.ids_TLK.copy().reshape(12, 30, 3, 2)
    ids[:, :12] = ids[0, :12]
    found = survey(trace_of(CARD, ids.reshape(-1, 3, 2), request_T=block.request_T))
    np.testing.assert_array_equal(found.groups(), np.arange(12))


@pytest.mark.parametrize("n_own", [24, 60])
def test_a_long_shared_prompt_groups_nobody(n_own):
    """A prompt of more than half of every request made one group of all of them, and a split in time."""
    block = trace([64 + n_own] * 20)
    ids = block.ids_TLK.copy().reshape(20, -1, 3, 2)
    ids[:, :64] = ids[0, :64]
    ids[1, 64:84] = ids[
        0, 64:84
    ]  # a real pair goes on together, and still may be parted: near copies are found later
    found = survey(trace_of(CARD, ids.reshape(-1, 3, 2), request_T=block.request_T))
    assert (found.groups() == 0).all()
    np.testing.assert_array_equal(found.groups(beyond_template=True), np.arange(20))
    folds = found.folds(0)
    assert [fold.kind for fold in folds] == ["requests"] * 5
    assert [fold.number for fold in folds] == list(range(5))
    assert np.sort(np.concatenate([fold.test for fold in folds])).tolist() == list(range(20))
    assert found.split(0.7, 0).kind == "requests"


def test_one_conversation_is_still_split_in_time():
    block = trace([200])
    grown = np.concatenate([block.ids_TLK[: 10 * n] for n in range(1, 21)])
    request_T = np.repeat(np.arange(20), 10 * np.arange(1, 21))
    (fold,) = survey(trace_of(CARD, grown, request_T=request_T)).folds(0)
    assert (fold.number, fold.kind, fold.cuts) == (0, "time", (1260, 1470))
    for part in (fold.train, fold.validation, fold.test):
        assert part.tolist() == list(range(20))


def test_what_requests_end_with_is_shared_text():
    rng = np.random.default_rng(0)
    block = trace(rng.integers(30, 60, 12).tolist())
    ids, stops = block.ids_TLK.copy(), np.append(block.starts_R[1:], block.n_tokens)
    for start, stop in zip(block.starts_R, stops, strict=True):
        ids[stop - 3 : stop] = ids[-3:]
        ids[start : start + 5] = ids[:5]
    changed = trace_of(CARD, ids, request_T=block.request_T)
    shared = survey(changed).shared_text()
    assert np.flatnonzero(shared.end_DP[-1]).tolist() == [0, 1, 2]
    is_shared_T = shared.rows(changed)
    assert is_shared_T.sum() == 12 * 8
    assert is_shared_T[stops - 3].all() and not is_shared_T[stops - 4].any()
    cut = survey(changed, (int(block.starts_R[4]),)).shared_text()
    first, second = (
        survey(changed.rows(block.request_T < 7)),
        survey(changed.rows(block.request_T >= 7)),
    )
    first.merge(second)
    for other in (cut, first.shared_text()):
        np.testing.assert_array_equal(other.end_DP, shared.end_DP)


def test_a_long_system_prompt_is_a_template():
    block = trace([700] * 4)
    ids = block.ids_TLK.copy().reshape(4, 700, 3, 2)
    ids[:, :600] = ids[0, :600]
    found = survey(trace_of(CARD, ids.reshape(-1, 3, 2), request_T=block.request_T))
    assert np.flatnonzero(found.template()[-1]).tolist() == list(range(600))


def test_many_requests_have_the_interval_that_drawing_would_give():
    rng = np.random.default_rng(0)
    of_R = rng.integers(1, 50, 20_001)
    hits_R = rng.binomial(of_R, rng.beta(2, 3, 20_001))
    low, high = bootstrap(hits_R, of_R, seed=0)
    drawn = bootstrap(hits_R[:20_000], of_R[:20_000], seed=0)
    assert (low, high) == pytest.approx(drawn, abs=4e-4)


def test_few_requests_are_split_in_time():
    block = trace([10, 10, 10])
    split = survey(block).split(0.7, 0)
    parts_T = split.parts(block, np.arange(30))
    assert split.kind == "time" and parts_T.tolist() == [TRAIN] * 21 + [TEST] * 9
    assert split.test_requests.size == 0


def test_somebody_is_always_learnt_from():
    assert len(survey(trace([10] * 5)).split(0.1, 0).test_requests) == 4
    assert len(survey(trace([10] * 4)).split(0.5, 0).test_requests) == 2


@pytest.mark.parametrize("row", [0, 7, 8, 17])
def test_a_request_that_differs_in_one_row_is_no_repetition(row):
    block = trace([18] * 6)
    ids = block.ids_TLK.copy()
    ids[90:] = ids[:18]
    assert survey(trace_of(CARD, ids, request_T=block.request_T)).duplicates().tolist() == [5]
    ids[90 + row] = (ids[row] + 1) % 16
    found = survey(trace_of(CARD, ids, request_T=block.request_T))
    assert found.duplicates().size == 0
    assert found.groups()[5] == (0 if row > 15 else 5), "alike for 16 of 18 rows, or not"


@pytest.mark.parametrize(("n", "validated"), [(20, 2), (5, 1), (4, 1), (13, 1)])
def test_a_fold_tests_its_part_validates_on_half_of_the_next_and_learns_from_the_rest(n, validated):
    folds = survey(trace([10] * n)).folds(3)
    assert sorted(r for fold in folds for r in fold.test.tolist()) == list(range(n))
    for fold, later in zip(folds, [*folds[1:], folds[0]], strict=True):
        parts = [set(part.tolist()) for part in (fold.train, fold.validation, fold.test)]
        assert sum(map(len, parts)) == n == len(set.union(*parts))
        assert parts[1] <= set(later.test.tolist()) and len(parts[1]) >= validated
        assert abs(2 * len(parts[1]) - len(later.test)) <= 1


def test_where_nobody_was_chosen_nothing_is_shared():
    ids = trace([30] * 6).ids_TLK.astype(int).reshape(6, 30, 3, 2)
    ids[:, :5] = -1
    found = survey(trace_of(CARD, ids.reshape(-1, 3, 2), request_T=np.arange(180) // 30))
    assert not found.template().any()


def test_shared_rows_are_those_of_the_domains_that_are_given():
    """Two requests of four rows; domain 0 begins with two such rows, domain 1 ends with one."""
    block = trace([4, 4])
    start_DP = np.array([[True, True, False], [False] * 3, [False] * 3])
    end_DP = np.array([[False, False], [True, False], [False, False]])
    shared = SharedText(start_DP, end_DP)
    assert not shared.rows(block).any()
    domain_T = np.repeat([0, 1], 4)
    assert np.flatnonzero(shared.rows(block, domain_T)).tolist() == [0, 1, 7]
    unplaced = trace_of(CARD, block.ids_TLK, request_T=block.request_T, position_T=np.full(8, -1))
    assert not shared.rows(unplaced, domain_T).any()


def test_a_repeated_request_is_left_out_and_a_short_one_is_not():
    block = trace([10] * 6)
    ids = block.ids_TLK.copy()
    ids[50:60] = ids[0:10]
    found = survey(trace_of(CARD, ids, request_T=block.request_T))
    assert found.duplicates().tolist() == [5]
    assert (found.split(0.7, 0).parts(block, np.arange(60))[50:] == LEFT_OUT).all()
    short = np.concatenate([ids[:7], ids[:7]])
    assert survey(trace_of(CARD, short, request_T=[0] * 7 + [1] * 7)).duplicates().size == 0


def test_positions_that_neighbouring_requests_share_are_a_template():
    block = trace([30] * 12)
    ids = block.ids_TLK.copy().reshape(12, 30, 3, 2)
    ids[:, :7] = ids[0, :7]
    block = trace_of(CARD, ids.reshape(-1, 3, 2), request_T=block.request_T)
    split = survey(block).split(0.7, 0)
    assert np.flatnonzero(split.is_template_DP[-1]).tolist() == list(range(7))
    assert split.is_template(block).sum() == 12 * 7


def test_a_template_of_one_domain_is_none_of_another():
    one = trace([30] * 8, domain="a")
    ids = one.ids_TLK.reshape(8, 30, 3, 2).copy()
    ids[:, :5] = ids[0, :5]
    found = Survey()
    block = trace_of(CARD, ids.reshape(-1, 3, 2), request_T=one.request_T, domain="a")
    found.add(RoutingTrace(**{**vars(block), "domains": ("a", "b")}))
    other = trace([30] * 8, seed=1, domain="b")
    moved = {
        "domains": ("a", "b"),
        "domain_T": other.domain_T + 1,
        "request_T": other.request_T + 8,
    }
    found.add(RoutingTrace(**{**vars(other), **moved}))
    is_template_DP = found.split(0.7, 0).is_template_DP
    assert is_template_DP.sum(axis=1).tolist() == [5, 0, 0]


@pytest.mark.parametrize("cuts", [(50,), (10, 20, 30, 40, 50)])
def test_batches_and_merging_change_nothing(cuts):
    ids = trace([10] * 6).ids_TLK.copy().reshape(6, 10, 3, 2)
    ids[:, :4], ids[:, 8:] = ids[0, :4], ids[0, 8:]
    block = trace_of(CARD, ids.reshape(-1, 3, 2), request_T=np.arange(60) // 10, phase_T=1)
    whole, cut = survey(block), survey(block, cuts)
    merged, late = survey(block.rows(slice(0, 20))), Survey()
    merged.merge(survey(block.rows(slice(20, 60))))
    late.merge(whole)
    assert np.flatnonzero(whole.template()[-1]).tolist() == [0, 1, 2, 3, 8, 9]
    for other in (cut, merged, late):
        for name in ("request_R", "n_rows_R", "ran_R", "heads_R", "digest_R", "first_position_R"):
            assert getattr(other, name) == getattr(whole, name), name
        assert (other.rows, other.executed_rows, other.decode_rows) == (60, 60, 60)
        assert (other.template() == whole.template()).all()
        assert (other.shared_text().end_DP == whole.shared_text().end_DP).all()
        one, two = other.split(0.7, 3), whole.split(0.7, 3)
        assert (one.test_requests == two.test_requests).all()


def test_rows_never_run_are_not_counted_as_executed():
    block = trace([10] * 4, executed_T=np.arange(40) % 2 == 0, phase_T=1)
    found = survey(block)
    assert (found.rows, found.executed_rows, found.decode_rows) == (40, 20, 20)


def test_an_interval_holds_the_ratio_and_needs_two_requests():
    rng = np.random.default_rng(0)
    of_R = rng.integers(50, 100, 40)
    hits_R = rng.binomial(of_R, 0.3)
    low, high = bootstrap(hits_R, of_R, seed=0)
    assert low < hits_R.sum() / of_R.sum() < high and high - low < 0.06
    assert bootstrap(hits_R, of_R, seed=0, draws=1000, level=0.95) == (low, high)
    assert bootstrap(np.array([1, 3]), np.array([4, 4]), seed=0) == (0.25, 0.75)
    with pytest.raises(ValueError, match="two"):
        bootstrap(hits_R[:1], of_R[:1], seed=0)
