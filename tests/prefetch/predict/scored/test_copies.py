"""Near copies are found through noise, never by chance, and in whatever batches they come."""

from __future__ import annotations

import numpy as np
import pytest
from routing_traces import odd_traces, random_trace, real_trace

from prefetch.predict.part import survey_of
from prefetch.predict.scored import copies
from prefetch.predict.scored.copies import has_near_copy, sketches_of
from prefetch.trace.routing import RoutingTrace, trace_of


def noisy(ids_TLK: np.ndarray, share: float, n_experts: int, seed: int = 0) -> np.ndarray:
    """Some choices become another expert that the row has not chosen."""
    rng, ids = np.random.default_rng(seed), ids_TLK.astype(int)
    for t, layer, k in np.argwhere(rng.random(ids.shape) < share):
        free = np.setdiff1d(np.arange(n_experts), ids[t, layer])
        ids[t, layer, k] = rng.choice(free)
    return ids


def with_copies(share: float, **shape: int) -> RoutingTrace:
    """Every request, and then all of them again."""
    trace = random_trace(**shape)
    ids = np.concatenate([trace.ids_TLK, noisy(trace.ids_TLK, share, trace.card.n_experts)])
    n = trace.request_T.max() + 1
    return trace_of(
        trace.card, ids, request_T=np.concatenate([trace.request_T, trace.request_T + n])
    )


def copies_among(trace: RoutingTrace) -> list[int]:
    survey = survey_of(trace)
    sketches = sketches_of(trace, survey.shared_text(), survey.domains)
    n = np.array(survey.request_R, np.int64)
    return n[has_near_copy(sketches, n, sketches, n, trace.card.n_layers)].tolist()


@pytest.mark.parametrize("top_k", [1, 3, 8, 20])
@pytest.mark.parametrize("share", [0.0, 0.03])
def test_copies_are_found_through_noise(share: float, top_k: int) -> None:
    trace = with_copies(share, n_requests=10, tokens=60, n_experts=128, top_k=top_k, skew=0.3)
    assert copies_among(trace) == list(range(20))


def test_a_copy_that_goes_on_is_one() -> None:
    trace = with_copies(0.03, n_requests=6, tokens=60)
    kept_T = (trace.request_T >= 6) | (trace.position_T < 25)  # the first six are cut short
    assert copies_among(trace.rows(kept_T)) == list(range(12))


@pytest.mark.parametrize("name", odd_traces())
def test_chance_makes_no_copy(name: str) -> None:
    assert copies_among(odd_traces()[name]) == []


@pytest.mark.parametrize("tokens", [12, 40])
@pytest.mark.parametrize("skew", [0.0, 1.0, 3.0])
def test_few_experts_are_no_copies(skew: float, tokens: int) -> None:
    shape = {"n_requests": 60, "tokens": tokens, "n_layers": 2, "n_experts": 4, "top_k": 2}
    assert copies_among(random_trace(skew=skew, **shape)) == []


def test_a_shared_template_makes_no_copies() -> None:
    trace = random_trace(n_requests=12, tokens=120)
    ids = trace.ids_TLK.reshape(12, 120, 4, 3).copy()
    ids[:, :70], ids[:, -20:] = ids[0, :70], ids[0, -20:]
    assert (
        copies_among(trace_of(trace.card, ids.reshape(-1, 4, 3), request_T=trace.request_T)) == []
    )


def test_a_copy_in_another_trace_is_found() -> None:
    one, other = random_trace(0, n_requests=12), random_trace(1, n_requests=4)
    other.ids_TLK[40:80] = noisy(one.ids_TLK[:40], 0.03, 16)
    survey = survey_of(one)
    known = sketches_of(one, survey.shared_text(), survey.domains)
    asked = sketches_of(other, survey.shared_text(), survey.domains)
    found = has_near_copy(asked, np.arange(4), known, known.request_R, 4)
    assert found.tolist() == [False, True, False, False]


def test_of_too_many_requests_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "MOST_REQUESTS", 8)
    trace = with_copies(0.03, n_requests=10)
    survey = survey_of(trace)
    sketches = sketches_of(trace, survey.shared_text(), survey.domains)
    assert (len(sketches.request_R), sketches.of_requests) == (8, 20)
    assert set(copies_among(trace)) < set(range(20))


def test_what_the_real_traces_hold(real_data) -> None:
    """Two pairs of ESFT's 127 intent requests share 93 % and 79 % of their choices; others share 18 %."""
    folder = real_data / "traces"
    intent = real_trace(folder / "esft-deepseek-v2-lite" / "esft_deepseek_v2_lite_intent.npz")
    assert copies_among(intent) == [19, 21, 29, 63]
    assert copies_among(real_trace(folder / "gpt-oss-20b" / "gptoss20b_mmlu_dev.npz")) == []
