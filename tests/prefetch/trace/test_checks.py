"""The integrity checks find each kind of damage, and are silent on sound routing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefetch.errors import FormatError
from prefetch.trace.card import plain_card
from prefetch.trace.checks import (
    LOG_CHANCE,
    leading_constant_rows,
    log_chance_of_uniformity,
    permuted_windows,
)
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import id_dtype, trace_of
from prefetch.trace.writer import TraceWriter


def routed(n_tokens: int, n_experts: int, top_k: int, *, skew: float = 1.0, seed: int = 0):
    """[T, E] argsorts of a Zipf router with Gumbel noise: the true ranks of every token."""
    rng = np.random.default_rng(seed)
    logits = -skew * np.log(np.arange(1, n_experts + 1)) + rng.gumbel(size=(n_tokens, n_experts))
    return np.argsort(-logits, axis=1)


def strided(ranks_TE: np.ndarray, top_k: int) -> np.ndarray:
    """What a logger writes that ignores the row stride: later lines are later ranks of the first token."""
    n = len(ranks_TE)
    return ranks_TE.ravel()[: n * top_k].reshape(n, top_k)


def ids_of(rows_TK: np.ndarray, n_experts: int) -> np.ndarray:
    return np.ascontiguousarray(rows_TK[:, None, :].astype(id_dtype(n_experts)))


def test_the_stride_defect_shows_in_25_of_25_blocks_and_a_correct_log_in_none():
    ranks = routed(512, 160, 8)
    bad, good = ids_of(strided(ranks, 8), 160), ids_of(ranks[:, :8], 160)
    assert permuted_windows(bad, 160) == ([25], 25)
    assert permuted_windows(good, 160) == ([0], 25)
    assert log_chance_of_uniformity(bad, 160) < LOG_CHANCE
    assert log_chance_of_uniformity(good, 160) == 0.0


@pytest.mark.parametrize(("n_experts", "top_k"), [(60, 4), (128, 8), (64, 6), (60, 7)])
def test_the_detector_holds_where_k_does_not_divide_the_experts(n_experts, top_k):
    ranks = routed(256, n_experts, top_k)
    assert (
        log_chance_of_uniformity(ids_of(strided(ranks, top_k), n_experts), n_experts) < LOG_CHANCE
    )
    assert log_chance_of_uniformity(ids_of(ranks[:, :top_k], n_experts), n_experts) == 0.0


def test_short_runs_are_judged_over_all_layers_together():
    layers = [routed(4, 160, 8, seed=seed) for seed in range(40)]
    bad = np.stack([strided(ranks, 8) for ranks in layers], axis=1).astype(np.uint8)
    good = np.stack([ranks[:, :8] for ranks in layers], axis=1).astype(np.uint8)
    assert log_chance_of_uniformity(bad, 160) < LOG_CHANCE
    assert log_chance_of_uniformity(good, 160) == 0.0
    assert log_chance_of_uniformity(bad[:, :1], 160) > LOG_CHANCE, "one layer proves nothing"


@given(
    seed=st.integers(0, 10_000), shape=st.sampled_from([(8, 1), (8, 2), (16, 4), (32, 2), (4, 2)])
)
def test_even_a_perfectly_uniform_router_is_not_accused(seed, shape):
    n_experts, top_k = shape
    ids = routed(400, n_experts, top_k, skew=0.0, seed=seed)[:, :top_k]
    assert log_chance_of_uniformity(ids_of(ids, n_experts), n_experts) > LOG_CHANCE


def test_warm_up_rows_end_where_the_first_other_row_stands():
    ids = np.random.default_rng(0).integers(0, 9, (40, 4, 2))
    ids[:20] = ids[0]
    assert leading_constant_rows(ids) == 20
    assert leading_constant_rows(ids[13:]) == 0, "seven equal rows are no evidence"
    assert leading_constant_rows(ids[:, :1]) == 0, "rows of two choices repeat by chance"


CARD = plain_card("toy", n_experts=16, top_k=2, layer_numbers=(4, 5, 6, 7))


def sound(n: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 4, 16)).argsort(-1)[..., :2]


def write(tmp_path, *blocks, max_dropped: float = 0.5, kind: str = "real") -> Provenance:
    writer = TraceWriter(tmp_path, Provenance(kind, "test"), max_dropped=max_dropped)
    writer.begin(CARD)
    for block in blocks:
        writer.append(block)
    return writer.close()


def test_an_expert_named_twice_in_a_row_is_refused_with_its_place(tmp_path):
    ids = sound()
    ids[7, 1] = [3, 3]
    with pytest.raises(
        FormatError, match=r"row 7, layer 5: expected 2 distinct experts, got \[3, 3\]"
    ):
        write(tmp_path, trace_of(CARD, ids))


def test_no_expert_may_stand_twice(tmp_path):
    ids = sound()
    ids[7, 1] = [-1, -1]
    assert write(tmp_path, trace_of(CARD, ids)).dropped_rows == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(tmp_path, bad):
    weights = np.full((64, 4, 2), 0.5)
    weights[9, 2, 1] = bad
    with pytest.raises(FormatError, match="row 9, layer 6: expected finite weights"):
        write(tmp_path, trace_of(CARD, sound(), weights_TLK=weights))


def test_copied_layers_are_refused_even_across_blocks(tmp_path):
    ids = sound()
    ids[:, 2] = ids[:, 0]
    with pytest.raises(FormatError, match="layers 4 and 6 are byte-identical over 64 rows"):
        write(tmp_path, trace_of(CARD, ids[:30]), trace_of(CARD, ids[30:], request_T=1))


def test_layers_that_never_ran_are_no_copies(tmp_path):
    ids = sound()
    ids[:, 1:] = -1
    write(tmp_path, trace_of(CARD, ids))


def test_warm_up_rows_are_dropped_and_counted_across_blocks(tmp_path):
    ids = sound(100)
    ids[:40] = ids[0]
    blocks = [trace_of(CARD, ids[i : i + 20], request_T=i) for i in range(0, 100, 20)]
    provenance = write(tmp_path, *blocks)
    assert provenance.dropped_rows == {"constant warm-up rows at the start of a file": 40}


def test_too_many_dropped_rows_are_an_error_that_says_what_to_type(tmp_path):
    ids = sound(100)
    ids[:80] = ids[0]
    with pytest.raises(
        FormatError, match=r"80 of 100 rows would be dropped.*collect.max_dropped=0.81"
    ):
        write(tmp_path, trace_of(CARD, ids))


def test_a_strided_prompt_is_refused_by_the_writer_whatever_the_source(tmp_path):
    bad = np.stack([strided(routed(64, 16, 2, seed=seed), 2) for seed in range(4)], axis=1)
    with pytest.raises(FormatError, match=r"request 0, prefill: 8 of 8 windows of 16 choices"):
        write(tmp_path, trace_of(CARD, bad))


def test_repeated_requests_and_gaps_are_counted_not_dropped(tmp_path):
    ids = sound()
    gap = np.arange(64) + (np.arange(64) > 5)
    facts = write(
        tmp_path,
        trace_of(CARD, ids),
        trace_of(CARD, ids, request_T=1),
        trace_of(CARD, sound(seed=1), request_T=2, position_T=gap),
    ).facts
    assert (facts["duplicate_requests"], facts["requests_with_gaps"]) == (1, 1)


def test_positions_must_ascend(tmp_path):
    with pytest.raises(FormatError, match="row 3: positions of a request must ascend, got 2"):
        write(tmp_path, trace_of(CARD, sound(5), position_T=[0, 1, 2, 2, 3]))


def test_requests_of_different_files_never_collide(tmp_path):
    writer = TraceWriter(tmp_path, Provenance("real", "test"))
    writer.begin(CARD)
    for name, seed in [("a", 0), ("b", 1)]:
        writer.file(name)
        writer.append(trace_of(CARD, sound(6, seed), request_T=[0, 0, 0, 5, 5, 5]))
        writer.append(trace_of(CARD, sound(2, seed + 2), request_T=5, position_T=[3, 4]))
    writer.close()
    from prefetch.trace.parquet import TraceReader

    assert TraceReader(tmp_path).load().request_T.tolist() == [0] * 3 + [1] * 5 + [2] * 3 + [3] * 5


def test_an_empty_source_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="expected routing, found none"):
        write(tmp_path)


def test_files_of_two_models_are_told_apart_in_a_few_words(tmp_path):
    writer = TraceWriter(tmp_path, Provenance("real", "test"))
    writer.begin(plain_card("one", n_experts=64, top_k=6, layer_numbers=tuple(range(26))))
    with pytest.raises(FormatError, match="but top_k is 4 after 6; collect it on its own"):
        writer.begin(plain_card("one", n_experts=64, top_k=4, layer_numbers=tuple(range(48))))
    with pytest.raises(
        FormatError, match=r"layer_numbers is \[0, ..., 47\] \(48\) after \[0, ..., 25\]"
    ):
        writer.begin(plain_card("one", n_experts=64, top_k=6, layer_numbers=tuple(range(48))))
