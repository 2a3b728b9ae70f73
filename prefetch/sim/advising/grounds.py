"""What an advice stands on: what a reader must know before betting on one of its numbers, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prefetch import __version__
from prefetch.models.cards import load_architecture
from prefetch.sim.advising.study import Study
from prefetch.sim.memory import bytes_of, spoken
from prefetch.sim.settings.placement import ALL
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import CANNOT_RUN


def first_of_all(study: Study, stand_in: str) -> Iterator[str]:
    """What nobody may overlook: it stands above every number."""
    if stand_in:
        yield stand_in
    elif study.bench.reader.provenance.kind == "synthetic":
        yield "the routing is synthetic: no number here is about a model"
    if not study.bench.prior.uses_LE.any():
        yield (
            "no request is left to count uses on: the most used experts are not known, those of small numbers are taken"
        )


def grounds(study: Study, stand_in: str) -> Iterator[str]:
    """`stand_in`: what is said of routing that is another model's, or nobody's."""
    bench = study.bench
    provenance = bench.reader.provenance
    yield stand_in or f"routing: {bench.reader.card.name}, {provenance.kind}, {provenance.source}"
    if not stand_in:
        yield from _other_shape(bench)
    if provenance.kind == "synthetic":
        yield "the routing is synthetic: no number here is about a model"
    yield from _replayed(bench)
    yield from _machine(study)
    guessing = sorted({*study.table.predictor} - {"none"})
    if guessing:
        yield (
            f"guesses tried: {', '.join(guessing)} (advise.predictors names others); policies, predictors and horizons "
            "were chosen on the requests that they are timed on"
        )
    is_here = study.table.memory_bytes == bytes_of(study.memory.amount)
    is_refused = study.table["mark"].str.startswith(CANNOT_RUN) & (study.table.way != ALL) & is_here
    yield from map(str, study.table[is_refused]["mark"].drop_duplicates())
    yield "energy is not simulated, nor are lossy ways (fewer experts, substitutes, lower precision of some)"
    yield f"trace {bench.key}, prefetch {__version__}, seed {bench.cfg.seed}"


def _other_shape(bench: Bench) -> Iterator[str]:
    """A trace that was named, and is of another model than the card."""
    own, name = bench.reader.card, bench.simulator.model_card
    if name is None:
        return
    model = load_architecture(name).card(None, None)
    if (own.n_layers, own.top_k) != (model.n_layers, model.top_k):
        yield (
            f"{model.name} has {model.n_layers} layers and takes {model.top_k} experts; the {own.n_layers} layers and "
            f"{own.top_k} of the routing are simulated, with its sizes: slots and times are of a model so large"
        )


def _replayed(bench: Bench) -> Iterator[str]:
    work, told, units = bench.work, bench.simulator, bench.units
    both_R = np.intersect1d(bench.trace.request_T, bench.others.requests())
    of = "the end of requests on whose beginning counts and guesses were fitted"
    if not len(both_R):
        of = "requests that nothing was fitted on"
    yield (
        f"replayed: the first {work.n_steps:,} steps of {of}, "
        f"{int(work.decode_S.sum()):,} tokens, batch {told.batch}; every way begins with the experts on the GPU that "
        "other requests use most"
    )
    tokens, steps = int(work.decode_S.sum()), int(work.is_decode_S.sum())
    attended = work.context_S[work.is_decode_S].sum() / tokens
    yield (
        f"attention reads what these requests hold, {attended:,.0f} tokens in the mean; memory is kept for "
        f"{told.context:,}"
    )
    if told.batch > 1:
        yield (
            f"a step makes {tokens / steps:.1f} tokens in the mean, and a request waits for the whole step: so many "
            "times the time per token"
        )
    if work.is_teacher_forced:
        yield "prompts are replayed token by token, as if they had been generated (teacher-forced)"
    if units.name != "requests":
        yield f"intervals: {units.name}"
    elif len(np.unique(units.place_S)) < 2:
        yield "intervals: none, there is one request"


def _machine(study: Study) -> Iterator[str]:
    bench, (less, more) = study.bench, study.error
    hardware = bench.hardware
    if hardware.measured_error is not None:
        yield f"{hardware.name} is calibrated: simulated steps were {less:.1%} off measured ones"
    else:
        yield (
            f"{hardware.name} is a {hardware.kind}, nothing was calibrated on it: a real engine may take {less:.0%} "
            f"less or {more:.0%} longer (advise.datasheet_error, from predictions of what others measured)"
        )
    yield (
        f"of the host it is taken that it has {spoken(hardware.host.memory_bytes)} of memory at "
        f"{hardware.host.bytes_per_s / 1e9:.3g} GB/s (hardware.host.*)"
    )
    if study.lacks_host:
        has, room = hardware.host.memory_bytes, str(bench.simulator.host_cache)
        kept = spoken(bytes_of(room)) if room.lower().endswith("b") else room
        yield (
            f"the host's {spoken(has)} cannot hold all experts: what its cache ({kept}) lacks is read from the disk"
        )
