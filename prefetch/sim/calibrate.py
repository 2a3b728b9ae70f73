"""Fits a machine's numbers to what a device measured in every step, until the simulator tells the same times.

It reads no recordings and decides no hits: the timed engine replays the routing with numbers that are tried, and what
it says of the fitted steps is compared with what was measured in them. All other steps check: no number depends on
them. Whole steps tell apart costs per byte, per copy and per layer, and how much computing hides copies; not lanes that
read side by side, which count as one link at their joint rate. S steps, A accesses, N numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from prefetch.errors import ConfigError
from prefetch.sim.costs import machine_of
from prefetch.sim.engines.machine import Machine
from prefetch.sim.engines.pool import ATOMIC, HIT
from prefetch.sim.engines.run import Timed, timed_replay
from prefetch.sim.hardware import NS_PER_S, Hardware, Lane
from prefetch.sim.limits.bounds import compute_S, layers_of
from prefetch.sim.policy import Policy
from prefetch.sim.workload import Workload
from prefetch.trace.card import ModelCard

TOLERANCE = 0.05  # a step further off pulls with its error, no longer with its square
SLOPE_STEP = 1e-3  # of where the search begins: far above whole nanoseconds
PRECISE = 1e-5  # the search ends when it gains no more than this share
PARTS = 4  # runs of consecutive steps, each predicted from the others when models are compared
ENDLESS = 10**15  # bytes per second of what takes no time
MODELS: Mapping[str, tuple[str, ...]] = {
    "bytes": ("byte_ns",),
    "bytes, copies": ("byte_ns", "copy_ns"),
    "bytes, layers": ("byte_ns", "layer_ns"),
    "bytes, copies, layers": ("byte_ns", "copy_ns", "layer_ns"),
    "bytes, issues, layers": ("byte_ns", "issue_ns", "layer_ns"),
    "bytes, layers, hidden": ("byte_ns", "layer_ns", "hidden"),
}


@dataclass(frozen=True)
class Numbers:
    """What may be fitted; none is negative."""

    byte_ns: float = 0.0
    copy_ns: float = 0.0  # the link's latency
    issue_ns: float = 0.0  # the host's per copy: the first of a layer waits for it, others hardly
    layer_ns: float = 0.0  # of every layer, copies or not: looking up, handing out work
    hidden: float = 0.0  # share of the computing that is of experts, which goes on beside copies


@dataclass(frozen=True, eq=False)
class Recording:
    """One run on a device, and how the simulator replays it. Times are nanoseconds; NaN where none was measured."""

    work: Workload
    card: ModelCard  # with the sizes of what ran
    policy: Policy
    room_G: Sequence[int]  # bytes
    base: Hardware  # whatever is not fitted
    waited_S: NDArray[np.float64]  # for copies, and for whatever comes with them
    computed_S: NDArray[np.float64]  # all other time of the step
    is_fitted_S: NDArray[np.bool_]  # the other measured steps check
    semantics: int = ATOMIC

    @property
    def is_check_S(self) -> NDArray[np.bool_]:
        return np.isfinite(self.waited_S + self.computed_S) & ~self.is_fitted_S

    @property
    def step_A(self) -> NDArray[np.int64]:
        event_A = np.repeat(np.arange(len(self.work.start_V) - 1), np.diff(self.work.start_V))
        return np.asarray(event_A // self.card.n_layers)

    def __post_init__(self) -> None:
        measured_S = np.isfinite(self.waited_S + self.computed_S)
        if (self.is_fitted_S & ~measured_S).any():
            step = int(np.flatnonzero(self.is_fitted_S & ~measured_S)[0])
            raise ConfigError(f"step {step} is to be fitted, and no time was measured in it")


@dataclass(frozen=True)
class Error:
    """Of simulated against measured times, as shares of the measured."""

    median: float  # of the steps' absolute errors
    mean: float
    total: float  # of all of the steps together, with its sign


@dataclass(frozen=True)
class Calibration:
    """Numbers that were fitted on some steps; the errors are those of the others."""

    model: str
    numbers: Numbers
    hardware: Hardware  # its measured error is that of whole steps
    waited: Error
    whole: Error
    crossed: dict[str, float]  # of every model: its mean error on parts predicted from the others


def calibrate(
    run: Recording, *, source: str, models: Mapping[str, tuple[str, ...]] = MODELS
) -> Calibration:
    """Of the models the one that predicts four parts of the fitted steps best, each from the other three; fitted."""
    if run.is_fitted_S.sum() < 2 * PARTS or not run.is_check_S.any():
        raise ConfigError(
            f"{run.is_fitted_S.sum()} steps to fit on and {run.is_check_S.sum()} to check: expected at least "
            f"{2 * PARTS} and 1"
        )
    crossed = {name: _crossed(run, free) for name, free in models.items()}
    model = min(crossed, key=lambda name: crossed[name])
    numbers = fit(run, models[model])
    waited_S, whole_S = simulated(run, numbers)
    whole = error(whole_S, run.waited_S + run.computed_S, run.is_check_S)
    machine = hardware_of(run, numbers, source)
    sources = {**machine.sources, "measured_error": source}
    return Calibration(
        model=model,
        numbers=numbers,
        hardware=dataclasses.replace(machine, measured_error=whole.median, sources=sources),
        waited=error(waited_S, run.waited_S, run.is_check_S),
        whole=whole,
        crossed=crossed,
    )


def fit(run: Recording, free: Sequence[str]) -> Numbers:
    """Least squares of the fitted steps' relative errors, those beyond the tolerance counted less (Huber 1964)."""
    start = _start(run, free)
    most = np.array([1 / start[name] if name == "hidden" else np.inf for name in free])

    def errors(units_N: NDArray[np.float64]) -> NDArray[np.float64]:
        waited_S, _ = simulated(run, _numbers(units_N, start, free))
        return (waited_S / run.waited_S - 1)[run.is_fitted_S]

    def slopes(units_N: NDArray[np.float64]) -> NDArray[np.float64]:
        step_N = np.where(units_N + SLOPE_STEP > most, -SLOPE_STEP, SLOPE_STEP)
        moved = np.stack([errors(at) for at in units_N + np.diag(step_N)], axis=1)
        return np.asarray((moved - errors(units_N)[:, None]) / step_N)

    begin, tolerances = np.ones(len(free)), {"ftol": PRECISE, "xtol": PRECISE}
    found = least_squares(
        errors, begin, slopes, (0, most), loss="huber", f_scale=TOLERANCE, **tolerances
    )
    return _numbers(found.x, start, free)


def simulated(run: Recording, numbers: Numbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[S] of waiting, and of the whole step."""
    machine = machine_of(run.card, hardware_of(run, numbers, "tried"), run.work)
    timed = _replayed(run, machine)
    handling = round(numbers.layer_ns) * run.card.n_layers
    whole_S = timed.time_S.astype(np.float64)
    return whole_S - compute_S(run.work, machine) + handling, whole_S


def _replayed(run: Recording, machine: Machine) -> Timed:
    sizes = machine.bytes_L.tolist()
    return timed_replay(run.work, run.policy, run.room_G, sizes, machine, semantics=run.semantics)


def hardware_of(run: Recording, numbers: Numbers, source: str) -> Hardware:
    """The base with these numbers. Computing is the median of the fitted steps, in every step."""
    card, base = run.card, run.base
    computed_ns = float(np.median(run.computed_S[run.is_fitted_S]))
    size_A = np.array(card.expert_bytes_L)[layers_of(run.work)]
    experts_S = np.bincount(run.step_A, size_A, run.work.n_steps)
    read = float(np.median(experts_S[run.is_fitted_S])) + (card.dense_bytes or 0)
    beside_ns = numbers.hidden * computed_ns
    layer_ns = (computed_ns - beside_ns) / card.n_layers + numbers.layer_ns
    pinned = Lane(round(numbers.issue_ns), ((0, _rate(numbers.byte_ns)),))
    link = dataclasses.replace(base.link, latency_ns=round(numbers.copy_ns), pinned=pinned)
    device = dataclasses.replace(
        base.device, bytes_per_s=_rate(beside_ns / read), fixed_ns_per_layer=round(layer_ns)
    )
    fitted = ("link.latency_ns", "link.pinned.host_ns_per_copy", "link.pinned.bytes_per_s",
              "device.bytes_per_s", "device.fixed_ns_per_layer")  # fmt: skip
    sources = {**base.sources, **dict.fromkeys(fitted, source)}
    return dataclasses.replace(base, link=link, device=device, sources=sources)


def error(
    simulated_S: NDArray[np.float64],
    measured_S: NDArray[np.float64],
    is_judged_S: NDArray[np.bool_],
) -> Error:
    ours, theirs = simulated_S[is_judged_S], measured_S[is_judged_S]
    off = np.abs(ours / theirs - 1)
    return Error(float(np.median(off)), float(off.mean()), float(ours.sum() / theirs.sum() - 1))


def _crossed(run: Recording, free: Sequence[str]) -> float:
    off = list[float]()
    for part in np.array_split(np.flatnonzero(run.is_fitted_S), PARTS):
        is_rest_S = run.is_fitted_S.copy()
        is_rest_S[part] = False
        rest = dataclasses.replace(run, is_fitted_S=is_rest_S)
        waited_S, _ = simulated(rest, fit(rest, free))
        off += np.abs(waited_S[part] / run.waited_S[part] - 1).tolist()
    return float(np.mean(off))


def _start(run: Recording, free: Sequence[str]) -> dict[str, float]:
    """Every number as large as if all explained equal shares of the waiting. What is counted comes from the replay."""
    work, n_layers = run.work, run.card.n_layers
    machine = machine_of(run.card, hardware_of(run, Numbers(), "tried"), work)
    timed = _replayed(run, machine)
    is_load_A = (timed.outcome_A != HIT) & run.is_fitted_S[run.step_A]
    if not is_load_A.any():
        raise ConfigError("nothing is copied in the steps to fit on: there is no link to calibrate")
    event_A = np.repeat(np.arange(len(work.start_V) - 1), np.diff(work.start_V))
    counts = {
        "byte_ns": machine.bytes_L[layers_of(work)][is_load_A].sum(),
        "copy_ns": is_load_A.sum(),
        "issue_ns": len(np.unique(event_A[is_load_A])),
        "layer_ns": run.is_fitted_S.sum() * n_layers,
    }
    share = run.waited_S[run.is_fitted_S].sum() / len(free)
    start = {name: float(share / count) for name, count in counts.items()}
    return {**start, "hidden": 0.5}


def _numbers(
    units_N: NDArray[np.float64], start: Mapping[str, float], free: Sequence[str]
) -> Numbers:
    return Numbers(**{name: float(units_N[i]) * start[name] for i, name in enumerate(free)})


def _rate(byte_ns: float) -> int:
    """Bytes per second."""
    return min(ENDLESS, max(1, round(NS_PER_S / max(byte_ns, NS_PER_S / ENDLESS))))
