"""Half of a run on a phone is predicted from the other half: waiting for experts, token by token.

Recordings: Helldez/BigMoeOnEdge at 2d4f2b1. Its engine reads with four lanes past the page cache while it computes;
memory that it commits and evicts is counted apart, and added here, because reads go on meanwhile. What was measured in
the second half is looked at only by these tests. gpt-oss-120b is held to less: page faults of other weights rule it.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from scipy.optimize import nnls

from prefetch.models.cards import load_card
from prefetch.sim.calibrate import (
    MODELS,
    Calibration,
    Recording,
    calibrate,
    error,
    fit,
    simulated,
)
from prefetch.sim.engines.pool import HIT, OVERSHOOT
from prefetch.sim.engines.run import replay
from prefetch.sim.hardware import Hardware, hardware
from prefetch.sim.policies.lru import Lru
from prefetch.sim.workload import workload_of
from prefetch.sources.route_csv import RouteCsv

HARDWARE = Path(__file__).resolve().parents[3] / "configs" / "hardware" / "rtx4090_pcie4.yaml"
RUNS = {  # MiB of cache, a card with what the recording does not say, precision
    "qwen": (4000, "qwen3_30b_a3b", "q4_k_m"),
    "gptoss": (3000, "gpt_oss_120b", "mxfp4"),
}
CHOSEN = "bytes, layers"
MS = 1e6
Phone = Callable[[str], Recording]


@cache
def base() -> Hardware:
    """Any: copies, computing and fixed costs are fitted, and no other number counts here."""
    fields = yaml.safe_load(HARDWARE.read_text())
    del fields["_target_"]
    return hardware(**fields)


@pytest.fixture
def phone(collect, real_data) -> Phone:
    def load(name: str) -> Recording:
        folder, (mib, lent, precision) = real_data / "traces" / "big-moe-on-edge", RUNS[name]
        work = workload_of(collect(RouteCsv(path=str(folder / f"{name}.route.csv"))).load())
        card = dataclasses.replace(
            work.card,
            hidden_size=load_card(lent).hidden_size,
            expert_precision=precision,
            shared_bytes=0,
            kv_bytes_per_token=load_card(lent).kv_bytes_per_token,
        )
        measured = counters(folder / f"{name}.metrics")
        step_S = np.arange(work.n_steps)  # the prompt is the first, and not among the counters
        return Recording(
            work=work,
            card=card,
            policy=Lru(),
            room_G=[mib << 20],
            base=base(),
            waited_S=np.append(np.nan, measured["stall_ms"] + measured["mgmt_ms"]) * MS,
            computed_S=np.append(np.nan, measured["compute_ms"]) * MS,
            is_fitted_S=(step_S > 0) & (step_S <= work.n_steps // 2),
            semantics=OVERSHOOT,
        )

    return load


def counters(path: Path) -> dict[str, NDArray[np.float64]]:
    lines = path.read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if line and not line.startswith("#")))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def calibrated(run: Recording, *models: str) -> Calibration:
    source = "BigMoeOnEdge at 2d4f2b1, first half of the generated tokens"
    return calibrate(run, source=source, models={name: MODELS[name] for name in models or MODELS})


def test_waiting_in_the_second_half_of_a_run(phone):
    """Asked: 5 % in the median of the steps, 1 % of all together. Reached: 2.6 % and 0.4 %."""
    run = phone("qwen")
    assert (run.is_fitted_S.sum(), run.is_check_S.sum()) == (64, 64)
    found = calibrated(run)
    assert found.model == CHOSEN
    assert found.waited.median < 0.028
    assert abs(found.waited.total) < 0.005
    link = found.hardware.link
    assert link.pinned.bytes_per_s[0][1] == pytest.approx(2.93e9, rel=0.01)
    assert found.numbers.layer_ns == pytest.approx(146_000, rel=0.01)


def test_whole_tokens_of_the_second_half(phone):
    """The phone computes more slowly later on, and at times far more slowly; no simulator of copies knows when."""
    run = phone("qwen")
    found = calibrated(run, CHOSEN)
    assert found.whole.median == found.hardware.measured_error
    assert found.whole.median == pytest.approx(0.073, abs=0.002)
    assert found.whole.total == pytest.approx(-0.19, abs=0.005)
    early, late = run.computed_S[run.is_fitted_S], run.computed_S[run.is_check_S]
    assert np.median(late) == pytest.approx(1.13 * np.median(early), rel=0.01)
    # had computing been known, little would be left
    known_S = simulated(run, found.numbers)[1] - np.median(early) + run.computed_S
    of_whole = error(known_S, run.waited_S + run.computed_S, run.is_check_S)
    assert of_whole.median < 0.01 and abs(of_whole.total) < 0.002


def test_what_is_left_does_not_drift(phone):
    run = phone("qwen")
    waited_S, _ = simulated(run, fit(run, MODELS[CHOSEN]))
    off_S = (waited_S / run.waited_S - 1)[run.is_check_S]
    trend = np.polyfit(np.arange(64), off_S, 1)[0]
    assert abs(64 * trend) < 0.02
    assert abs(np.corrcoef(off_S[1:], off_S[:-1])[0, 1]) < 0.25  # two standard errors of 64 steps
    assert off_S.std() == pytest.approx(0.045, abs=0.002)
    assert abs(off_S.mean()) < 0.005


def test_a_link_needs_what_every_layer_costs_and_no_lanes(phone):
    """Bytes alone miss the goal; a cost of its own for every number of copies, which lanes would make, gains little."""
    run = phone("qwen")
    alone = simulated(run, fit(run, MODELS["bytes"]))[0]
    assert error(alone, run.waited_S, run.is_check_S).median > 0.05
    hit_A = (
        replay(run.work, run.policy, run.room_G, run.card.expert_bytes_L or (), run.semantics)
        == HIT
    )
    loads_SL = np.add.reduceat(~hit_A, run.work.start_V[:-1], dtype=np.int64).reshape(
        run.work.n_steps, -1
    )
    layers_SN = np.stack([(loads_SL == n).sum(axis=1) for n in range(run.card.top_k + 1)], axis=1)
    fitted, waited = run.is_fitted_S, run.waited_S
    cost_N, _ = nnls(layers_SN[fitted] / waited[fitted, None], np.ones(fitted.sum()))
    free = error(layers_SN @ cost_N, waited, run.is_check_S)
    chosen = error(simulated(run, fit(run, MODELS[CHOSEN]))[0], waited, run.is_check_S)
    assert free.median == pytest.approx(chosen.median, abs=0.005)


def test_a_run_ruled_by_page_faults_is_predicted_less_well(phone):
    """4.8 % in the median, 4.8 % too little in all: what comes with a copy takes 19 % longer in the second half."""
    run = phone("gptoss")
    found = calibrated(run, CHOSEN, "bytes, issues, layers")  # of all, the other is chosen here
    assert found.model == "bytes, issues, layers"
    assert found.waited.median == pytest.approx(0.048, abs=0.002)
    assert found.waited.total == pytest.approx(-0.048, abs=0.002)
