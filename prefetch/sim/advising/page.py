"""The page of an advice: what to do, how fast it will be and how sure that is, in words that take a minute to read.

It runs nothing: every number is in the study.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from prefetch.errors import ConfigError
from prefetch.models.cards import load_architecture
from prefetch.sim.advising.grounds import first_of_all, grounds
from prefetch.sim.advising.pays import MATTERS, Pays
from prefetch.sim.advising.study import GIB, Study, more_of
from prefetch.sim.advising.ways import AHEAD
from prefetch.sim.memory import budget_of, bytes_of, spoken
from prefetch.sim.settings.engines import settings_of
from prefetch.sim.settings.placement import ALL, BOTH, CACHE, HOST, Placement, rooms_of
from prefetch.sim.tables.cell import CHEATS
from prefetch.sim.tables.grid import SPLIT
from prefetch.trace.card import ModelCard

PRECISIONS = ("bf16", "fp8", "q4_k_m", "mxfp4")
MOST_ROWS = 12
DOES = {
    ALL: "keep every expert on the GPU",
    SPLIT: "keep the experts of the first layers on the GPU and compute the others on the host",
    HOST: "keep the most used experts on the GPU and compute the others on the host",
    BOTH: "compute missing experts on the host, and copy some of them into a cache meanwhile",
    CACHE: "copy experts into a cache as they are needed",
    AHEAD: "copy experts into a cache, guessed ones ahead of time",
}


def page(study: Study, stand_in: str) -> str:
    """`stand_in`: what is said of routing that is another model's, or nobody's."""
    bench = study.bench
    title = f"{bench.card.name} on {bench.hardware.name} with {_gib(bytes_of(study.memory.amount))} of GPU memory"
    parts = [
        f"# {title}",
        *(f"> {text[0].upper()}{text[1:]}." for text in first_of_all(study, stand_in)),
        _headline(study),
        "## Where the memory goes",
        _memory(study),
        "## The ways, the fastest first",
        _ways(study),
        "## Does prefetch pay?",
        does_prefetch_pay(study),
        "## What more memory would buy",
        _more(study),
        *_precisions(study),
        "## What to type",
        *_engines(study),
        "## What this stands on",
        "\n".join(f"* {text}" for text in grounds(study, stand_in)),
    ]
    return "\n\n".join(parts) + "\n"


def _headline(study: Study) -> str:
    best = study.best
    words = (
        f"**{best.way.capitalize()}: {DOES[best.way]}.** {_ms(best.tpot_ms)} ms per token, {best.tokens_per_s:.1f} "
        f"tokens/s (simulated{_errors(study)}). {int(best.slots):,} of {_all_experts(study.bench.card):,} experts on "
        f"the GPU, {_on_host(study, float(best.host_bytes))}"
    )
    if best.way in (CACHE, AHEAD, BOTH):
        words += f", policy {best.policy}"
    if best.way == AHEAD:
        words += f", guesses of {best.predictor} {_layers(int(best.horizon))} ahead"
    unused = bytes_of(study.memory.amount) - int(best.memory_bytes)
    words += "."
    if unused and best.way != ALL:
        words += f" It leaves {_gib(unused)} unused: with them it is no faster."
    return f"{words}\n\n{_order(study)}" if study.swings else words


def _on_host(study: Study, n_bytes: float) -> str:
    room = study.bench.machine("wait").disk.room_bytes
    if n_bytes <= room:
        return f"{_gib(n_bytes)} of experts in the host's memory"
    return f"{_gib(room)} of experts in the host's memory, {_gib(n_bytes - room)} on its disk"


def _errors(study: Study) -> str:
    best, error = study.best, study.error
    low, high = between(best)
    is_made_up = study.bench.reader.provenance.kind == "synthetic"
    words = f"; {_ms(low)} to {_ms(high)} ms over requests" if low < high and not is_made_up else ""
    low, high = low * (1 - error[0]), high * (1 + error[1])
    of = "this machine" if study.bench.hardware.measured_error is not None else "a datasheet"
    return f"{words}; {_ms(low)} to {_ms(high)} ms with the error of {of}"


def _order(study: Study) -> str:
    """Does the choice stand on a machine that is not quite the one of the file?"""
    others = [
        f"{name}: {way}, {_ms(ms)} ms"
        for name, (way, ms) in study.swings.items()
        if way != study.best.way
    ]
    tried = ", ".join(study.swings)
    if not others:
        return f"It stays the fastest with each of: {tried}."
    return f"It is not the fastest with {'; '.join(others)} (tried: {tried})."


def between(row: pd.Series) -> tuple[float, float]:
    """Over requests; the value itself where there is no interval."""
    ends = row.tpot_ms_low, row.tpot_ms_high
    return ends if np.isfinite(ends).all() else (row.tpot_ms, row.tpot_ms)


def _memory(study: Study) -> str:
    budget, told = study.budget, study.bench.simulator
    parts = {
        "attention, embeddings, dense layers, routers": budget.dense_bytes,
        "shared experts": budget.shared_bytes,
        f"keys and values of {told.context:,} tokens, batch {told.batch}": budget.kv_bytes,
        "workspace": budget.workspace_bytes,
        "reserve of driver and display": budget.reserve_bytes,
        "experts under way": budget.staging_bytes,
        "the predictor": budget.predictor_bytes,
        f"{budget.experts:,} of {_all_experts(study.bench.card):,} experts": budget.cache_bytes,
        "left over": bytes_of(study.memory.amount) - budget.whole_model_bytes,
    }
    rows = [f"| {name} | {_gib(size)} |" for name, size in parts.items() if size]
    return "\n".join(["| what | size |", "|---|---|", *rows])


def _ways(study: Study) -> str:
    head = "way | policy | guesses | ms per token [95 % over requests] | tokens/s | hits | experts in host memory"
    lines = [f"| {head} |", "|" + "---|" * 7]
    here = study.here
    for _, row in here.head(MOST_ROWS).iterrows():
        low, high = between(row)
        over = f" [{_ms(low)} {_ms(high)}]" if low < high else ""
        ahead = f", {int(row.horizon)} ahead" if row.predictor != "none" else ""
        policy = row.policy if row.way in (CACHE, AHEAD, BOTH) else ""
        guesses, ms = f"{row.predictor}{ahead}" if ahead else "", f"{_ms(row.tpot_ms)}"
        lines.append(
            f"| {row.way} | {policy} | {guesses} | {ms}{over} | {row.tokens_per_s:.1f} "
            f"| {row.hit_rate:.3f} | {_gib(row.host_bytes)} |"
        )
    if len(here) > MOST_ROWS:
        lines.append(f"\nSlower ones: {len(here) - MOST_ROWS} (ways.csv).")
    low, high = between(study.best)
    close = here[here.tpot_ms <= high].drop_duplicates("way").way.tolist()[1:]
    if close and low < high:
        lines.append(f"\nWithin the interval of the first: {', '.join(close)}.")
    return "\n".join(lines)


def does_prefetch_pay(study: Study) -> str:
    found = study.pays
    if found is None:
        if (study.here.way == ALL).any():
            return "No. Every expert is there."
        asked = study.table[study.table.way == AHEAD]
        if (asked["mark"] == CHEATS).any():
            return "Not asked: those that copied ahead know the answer (they cheat). Name others: advise.predictors."
        why = asked["mark"].iloc[0] if len(asked) else "no cache can run at this memory"
        return f"Not asked: {why}."
    return f"{verdict(study, found)} {_break_evens(found)}"


def verdict(study: Study, found: Pays) -> str:
    """Against the same cache without guesses, and against the fastest way without them."""
    others = study.here[study.here.way != AHEAD]
    rival, guesses = others.iloc[0], f"{found.way.predictor}, {_layers(found.way.horizon)} ahead"
    beside = f"{_ms(found.ms)} ms with the guesses of {guesses}, {_ms(found.without_ms)} ms for the same cache without"
    if study.best.way == AHEAD and found.gain > MATTERS:
        beside += f", {_ms(rival.tpot_ms)} ms for the fastest way without guesses ({rival.way})"
        is_sure = all(way == AHEAD for way, _ in study.swings.values())
        word = (
            "Yes" if is_sure else "Barely: on a machine that differs a little another way is faster"
        )
        return (
            f"**{word}**: {beside}." if is_sure else f"**{word}.** {beside[0].upper()}{beside[1:]}."
        )
    if abs(found.gain) <= MATTERS and abs(found.perfect_ms / found.without_ms - 1) <= MATTERS:
        return f"**No, it does not matter**: {beside}; true guesses: {_ms(found.perfect_ms)} ms."
    if found.gain > MATTERS:
        is_even = found.ms <= rival.tpot_ms * (1 + MATTERS)
        word = "as fast" if is_even else "faster"
        return f"**Only beside the same cache**: {beside}. {rival.way.capitalize()} is {word}: {_ms(rival.tpot_ms)} ms."
    if math.isfinite(found.break_even_recall):
        return f"**Only if guesses are better**: {beside}; true ones: {_ms(found.perfect_ms)} ms."
    return f"**No**: {beside}, and not even true guesses are faster ({_ms(found.perfect_ms)} ms)."


def _break_evens(found: Pays) -> str:
    recall, link = found.break_even_recall, found.break_even_gb_s
    words = [
        f"These guesses find {found.recall:.0%} of what the cache misses without them. "
        + (
            f"Drawn ones, right or wrong by chance, pay from {recall:.0%} on (a predictor's errors cost less: it is "
            "often wrong about experts that are there)."
            if math.isfinite(recall)
            else "Drawn ones, right or wrong by chance, pay at no recall on this link."
        )
    ]
    slowest = min(found.by_link) * found.link_gb_s
    fastest = max(found.by_link) * found.link_gb_s
    if not math.isfinite(link):
        words.append(
            f"They win {MATTERS:.0%} on no link from {slowest:.2g} to {fastest:,.0f} GB/s."
        )
    elif link <= slowest:
        words.append(
            f"They win {MATTERS:.0%} even at {slowest:.2g} GB/s (this link: {found.link_gb_s:.3g})."
        )
    else:
        words.append(
            f"They win {MATTERS:.0%} from {link:.3g} GB/s on (this link: {found.link_gb_s:.3g})."
        )
    words.append(
        f"One copy takes {found.copy_us:.0f} us, a layer with its experts there {found.layer_us:.0f} us: to hide it, "
        f"guesses must come {_layers(found.horizon_needed)} ahead."
    )
    return " ".join(words)


def _more(study: Study) -> str:
    if study.best.way == ALL:
        return "Nothing: every expert is there."
    has, lines = study.bench.hardware.device.memory_bytes, list[str]()
    for memory in (study.memory, *more_of(study.memory)):
        n_bytes = bytes_of(memory.amount)
        row = study.within(n_bytes).iloc[0]
        beyond = " (more than this GPU has)" if n_bytes > has else ""
        lines.append(f"| {_gib(n_bytes)}{beyond} | {row.way} | {_ms(row.tpot_ms)} |")
        if row.way == ALL:
            break
    return "\n".join(["| GPU memory | fastest way | ms per token |", "|---|---|---|", *lines])


def _precisions(study: Study) -> Iterator[str]:
    """How many experts fit at other precisions: their quality is not judged here."""
    name = study.bench.simulator.model_card
    if name is None:
        return
    told, lines = study.bench.simulator, list[str]()
    own = study.bench.card.expert_precision
    architecture = load_architecture(name)
    for precision in sorted({*PRECISIONS, str(own)}, key=lambda one: (one != own, one)):
        try:
            card = architecture.card(precision, told.matrix_precision)
        except ConfigError:  # its rows cannot be packed so
            continue
        card = dataclasses.replace(card, top_k=study.bench.card.top_k)
        whole = card.n_experts * sum(card.expert_bytes_L or ())
        lines.append(f"| {precision} | {whole / GIB:.1f} | {slots_of(study, card)} |")
    yield "## Precision of the experts"
    head = f"| precision | all experts, GiB | experts at {_gib(bytes_of(study.memory.amount))} |"
    yield "\n".join([head, "|---|---|---|", *lines])
    yield f"Simulated: {own} (simulator.precision). What fewer bits cost in quality is not judged here."


def slots_of(study: Study, card: ModelCard) -> str:
    told = study.bench.simulator
    try:
        budget = budget_of(
            card,
            study.bench.hardware,
            memory=study.memory.amount,
            scope=told.scope,
            context=told.context,
            batch=told.batch,
            staging=told.staging,
        )
    except ConfigError:
        return "not even what stands beside them"
    return f"{budget.experts:,} of {_all_experts(card):,}"


def placement_of(study: Study) -> Placement:
    """Of the best way, for whoever writes settings."""
    best, bench = study.best, study.bench
    card, name = bench.card, bench.simulator.model_card
    if name is not None:  # the model's own layer numbers, not those of a trace that stands for it
        told = bench.simulator
        lent = load_architecture(name).card(told.precision, told.matrix_precision)
        card = lent if lent.n_layers == card.n_layers else card
    rooms = rooms_of(bench.card, study.budget)
    return Placement(
        card=card,
        way=CACHE if best.way == AHEAD else str(best.way),
        room_G=(sum(rooms),) if best.way == SPLIT else rooms,
        context=bench.simulator.context,
        batch=bench.simulator.batch,
        policy=str(best.policy),
        predictor=str(best.predictor),
        horizon=int(best.horizon),
        width=bench.simulator.width or bench.card.top_k,
        uses_LE=bench.prior.uses_LE,
        host_bytes=int(best.host_bytes),
    )


def _engines(study: Study) -> list[str]:
    blocks = settings_of(placement_of(study))
    return [f"```sh\n{block.text}\n```" for block in blocks]


def _all_experts(card: ModelCard) -> int:
    return card.n_layers * card.n_experts


def _ms(value: float) -> str:
    """So many digits that the ways of a small model differ."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _layers(n: int) -> str:
    return f"{n} layer{'s' * (n != 1)}"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.3g} GiB" if n_bytes >= GIB / 10 else spoken(int(n_bytes))
