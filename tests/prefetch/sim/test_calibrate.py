"""Numbers are found again from times that the simulator itself told, and steps that are to check are not looked at."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sticky_workloads import sticky

from prefetch.errors import ConfigError
from prefetch.models.cards import load_card
from prefetch.sim.calibrate import Numbers, Recording, calibrate, error, fit, simulated
from prefetch.sim.costs import machine_of
from prefetch.sim.engines.run import timed_replay
from prefetch.sim.hardware import Hardware, hardware
from prefetch.sim.policies.lru import Lru

HARDWARE = Path(__file__).resolve().parents[3] / "configs" / "hardware" / "rtx4090_pcie4.yaml"
N_STEPS, N_LAYERS, N_EXPERTS = 48, 6, 32
COMPUTED = 5e6
TRUE = Numbers(byte_ns=0.5, copy_ns=40_000.0, layer_ns=25_000.0)
FREE = ("byte_ns", "copy_ns", "layer_ns")


def base() -> Hardware:
    fields = yaml.safe_load(HARDWARE.read_text())
    del fields["_target_"]
    return hardware(**fields)


def recording(told: Numbers = TRUE, seed: int = 0) -> Recording:
    """What a device with these numbers would have measured; sizes differ by layer, as bytes and copies need it."""
    work = sticky(seed, N_STEPS, N_LAYERS, N_EXPERTS, 4)
    sizes = tuple(100_000 * (1 + layer % 4) for layer in range(N_LAYERS))
    card = dataclasses.replace(
        load_card("qwen3_30b_a3b"),
        n_experts=N_EXPERTS,
        top_k=4,
        layer_numbers=work.card.layer_numbers,
        layer_stacks=work.card.layer_stacks,
        expert_bytes_L=sizes,
        dense_bytes=10_000_000,
    )
    run = Recording(
        work=work,
        card=card,
        policy=Lru(),
        room_G=[16 * 100_000 * N_LAYERS],
        base=base(),
        waited_S=np.ones(N_STEPS),
        computed_S=np.full(N_STEPS, COMPUTED),
        is_fitted_S=np.arange(N_STEPS) < N_STEPS // 2,
    )
    return dataclasses.replace(run, waited_S=simulated(run, told)[0])


@pytest.mark.parametrize("told", [TRUE, Numbers(byte_ns=0.2, copy_ns=90_000.0)])
def test_numbers_are_found_again(told):
    found = fit(recording(told), FREE)
    assert found.byte_ns == pytest.approx(told.byte_ns, rel=0.01)
    assert found.copy_ns == pytest.approx(told.copy_ns, rel=0.02)
    assert found.layer_ns == pytest.approx(told.layer_ns, rel=0.02, abs=50)


def test_computing_that_hides_copies_is_found_again():
    told = Numbers(byte_ns=0.5, layer_ns=25_000.0, hidden=0.4)
    run = recording(told)
    assert (run.waited_S < simulated(run, dataclasses.replace(told, hidden=0.0))[0]).any()
    found = fit(run, ("byte_ns", "layer_ns", "hidden"))
    assert found.hidden == pytest.approx(0.4, rel=0.05)
    assert found.byte_ns == pytest.approx(0.5, rel=0.02)


def test_the_model_that_was_true_is_chosen_and_predicts_the_other_steps():
    calibration = calibrate(recording(), source="told by the test")
    assert calibration.model == "bytes, copies, layers"
    assert calibration.crossed["bytes"] > 10 * calibration.crossed[calibration.model]
    assert calibration.waited.median < 0.001 and abs(calibration.waited.total) < 0.001


def test_what_is_found_is_a_machine_that_takes_so_long():
    """The hardware goes the same way as any hardware file."""
    run = recording()
    found = calibrate(run, source="told by the test").hardware
    assert found.kind == "calibrated"
    assert found.sources["link.pinned.bytes_per_s"] == "told by the test"
    machine = machine_of(run.card, hardware(**found.to_dict()), run.work)
    sizes = machine.bytes_L.tolist()
    time_S = timed_replay(run.work, Lru(), run.room_G, sizes, machine).time_S
    np.testing.assert_allclose(time_S, run.waited_S + run.computed_S, rtol=0.002)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_steps_that_check_are_not_looked_at(seed):
    run, rng = recording(), np.random.default_rng(seed)
    other = np.where(run.is_fitted_S, run.waited_S, rng.random(N_STEPS) * 1e9)
    assert fit(run, FREE) == fit(dataclasses.replace(run, waited_S=other), FREE)


def test_one_step_that_is_far_off_does_not_move_the_others():
    run = recording()
    run.waited_S[5] *= 20
    found = fit(run, FREE)
    assert found.byte_ns == pytest.approx(TRUE.byte_ns, rel=0.05)


def test_errors_by_hand():
    ours, theirs = np.array([11.0, 18.0, 30.0, 99.0]), np.array([10.0, 20.0, 30.0, 1.0])
    found = error(ours, theirs, np.array([True, True, True, False]))
    assert found.median == pytest.approx(0.1)
    assert found.mean == pytest.approx(0.2 / 3)
    assert found.total == pytest.approx(-1 / 60)


def test_what_cannot_be_fitted_is_said():
    run = recording()
    with pytest.raises(ConfigError, match="3 steps to fit on and 45 to check: expected at least 8"):
        calibrate(dataclasses.replace(run, is_fitted_S=np.arange(N_STEPS) < 3), source="")
    large = dataclasses.replace(run, room_G=[10**9])
    is_idle_S = simulated(large, Numbers(byte_ns=0.5))[0] == 0
    nothing = dataclasses.replace(large, is_fitted_S=is_idle_S)
    with pytest.raises(ConfigError, match="nothing is copied in the steps to fit on"):
        fit(nothing, FREE)
    unmeasured = np.where(np.arange(N_STEPS) == 3, np.nan, 1.0)
    with pytest.raises(ConfigError, match="step 3 is to be fitted, and no time was measured"):
        dataclasses.replace(run, waited_S=unmeasured)
