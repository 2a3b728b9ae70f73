"""What an analysis says in sentences, each with its number: `summary.md`. It computes nothing that no table holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from analysis.routing.everything import Findings
from analysis.routing.headline import where
from analysis.routing.recall import ENOUGH_REQUESTS
from prefetch.trace.card import ModelCard
from prefetch.trace.provenance import Provenance

Numbers = Mapping[str, float]
TOO_EVEN = (
    1e-4  # chance that even draws of independent tokens would be so even; for all layers together
)


def summary(found: Findings, card: ModelCard, provenance: Provenance, numbers: Numbers) -> str:
    """The page: where the routing is from, what it says, what looks wrong, what it cannot say."""
    lines = [f"# What the routing of {card.name} says", "", *_origin(found, card, provenance), ""]
    lines += ["## Findings", "", *(f"- {line}" for line in _findings(found, card, numbers)), ""]
    lines += ["## What looks wrong", "", *_or_none(_doubts(found, card, provenance)), ""]
    lines += ["## Notes", "", *_or_none([*found.notes, *provenance.notes]), ""]
    lines += ["## What this cannot tell", ""]
    reasons: dict[str, list[str]] = {}
    for name, why in found.missing.items():
        reasons.setdefault(why, []).append(f"`{name}`")
    lines += [f"- {', '.join(names)}: {why}" for why, names in reasons.items()]
    lines += [f"- {line}" for line in NEVER]
    return "\n".join(lines) + "\n"


NEVER = (
    "gradients of the experts: a trace has routing only; `router` has a proxy from the weights where they are recorded",
    "communication and arithmetic on a real machine: that takes a profile of a run",
    "whether a higher hit rate makes a run faster: that takes the simulator and its clock",
)


def for_terminal(text: str) -> str:
    """The findings alone."""
    return text.partition("## Findings")[2].partition("## What looks wrong")[0].strip()


def _or_none(lines: list[str] | Iterator[str]) -> list[str]:
    return [f"- {line}" for line in lines] or ["- nothing"]


def _origin(found: Findings, card: ModelCard, provenance: Provenance) -> Iterator[str]:
    shape = f"{card.n_layers} layers, {card.n_experts} experts, {card.top_k} chosen per token"
    yield f"{provenance.kind.capitalize()} routing, source {provenance.source}; {shape}."
    if found.plan is not None:
        survey, split = found.plan.survey, found.plan.split
        phases = (
            f"{survey.decode_rows:,} of them generated" if survey.decode_rows else "all of prompts"
        )
        requests = _several(len(survey.request_R), "request")
        yield f"{_several(survey.executed_rows, 'token')} of {requests}, {phases}."
        how = {
            "requests": "Guesses are learnt on some requests and scored on others: "
            f"{_several(len(split.test_requests), 'request')}.",
            "time": "Too few requests to split by: guesses are learnt on the first rows and scored on the last.",
        }
        if "recall_summary" in found.tables:
            yield how[split.kind]
        if "prefill" in found.plan.phases or not survey.decode_rows:
            yield "Prompt rows are replayed token by token (teacher-forced decode), as an engine would not run them."


def _findings(found: Findings, card: ModelCard, numbers: Numbers) -> Iterator[str]:
    for sentence in SENTENCES:
        text = sentence(found, card, numbers)
        if text:
            yield text


def _use(found: Findings, card: ModelCard, numbers: Numbers) -> str:
    rows = where(found.tables["statistics"], phase="all", choices="all")
    rows = rows[rows.total_usage > 0]
    busiest = rows.iloc[int(rows.max_over_mean.argmax())]
    return (
        f"**Use**: the busiest expert of a layer takes {rows.max_over_mean.mean():.2f} times its even share on average "
        f"({busiest.max_over_mean:.1f} times in layer {busiest.layer}); half of the choices go to "
        f"{rows.coverage_50.mean():.1f} of {card.n_experts} experts, 90 % to {rows.coverage_90.mean():.1f} "
        f"(means over layers)."
    )


def _entropy(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "normalized_entropy" not in numbers:
        return None  # one expert
    return (
        f"**Entropy**: {numbers['entropy_bits']:.2f} of {math.log2(card.n_experts):.2f} bits "
        f"({_share(numbers['normalized_entropy'])}), as if {numbers['effective_experts']:.1f} experts were used evenly."
    )


def _information(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "mutual_information_bits" not in numbers:
        return None
    shifted = ""
    if "mutual_information_shifted_bits" in numbers:
        found_there = numbers["mutual_information_shifted_bits"]
        shifted = f"; between a layer and the next request's later layer, {found_there:.3f}"
    return (
        f"**From layer to layer**: an expert tells {numbers['mutual_information_bits']:.3f} bits about one of the next "
        f"layer's; {numbers['conditional_entropy_bits']:.2f} bits stay open. Shuffled, the same estimate gives "
        f"{round(numbers['mutual_information_shuffled_bits'], 3) + 0:.3f}{shifted}."
    )


def _recall(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "markov_recall_at_k" not in numbers:
        return None
    interval = ""
    if "markov_recall_at_k_low" in numbers:
        low, high = numbers["markov_recall_at_k_low"], numbers["markov_recall_at_k_high"]
        interval = f" (95 % over requests: {_share(low)} to {_share(high)})"
    return (
        f"**Predictable**: {card.top_k} guesses from counts of the layer before hold "
        f"{_share(numbers['markov_recall_at_k'])} of the next layer's choices{interval}; the most popular experts hold "
        f"{_share(numbers['popularity_recall_at_k'])}, the previous token's "
        f"{_share(numbers['previous_token_recall_at_k'])}, counts after shuffling "
        f"{_share(numbers['markov_recall_at_k_shuffled'])}. Routing history only."
    )


def _far(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "markov_recall_at_k_horizon_4" not in numbers:
        return None
    return (
        f"**Far ahead**: four MoE layers before they are needed, counts still hold "
        f"{_share(numbers['markov_recall_at_k_horizon_4'])} of the choices (popularity "
        f"{_share(numbers['popularity_recall_at_k_horizon_4'])})."
    )


def _repeats(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "next_tokens" not in found.tables:
        return None
    rows = where(found.tables["next_tokens"], phase="all")
    if rows.expected_repeat.isna().all():
        return None
    changes = ""
    if knows_ranks(found, card) and rows.transition_rate.notna().any():
        changes = (
            f"; the first choice changes at {_share(rows.transition_rate.mean())} of the steps"
        )
    return (
        f"**From token to token**: {_share(rows.repeat_rate.mean())} of a token's choices repeat the token before it, "
        f"where unrelated tokens would repeat {_share(rows.expected_repeat.mean())}{changes}."
    )


def _cache(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "cache_curves" not in found.data:
        return None
    if "lru_hit_rate_25" not in numbers:
        too_small = f"a quarter of the experts ({card.n_experts // 4}) has no room for the {card.top_k} of one token"
        return f"**Cache**: {too_small}. {_ninety(found)}"
    return (
        f"**Cache**: with room for a quarter of every layer's experts ({card.n_experts // 4} of {card.n_experts}), "
        f"kept warm from request to request, LRU hits {_share(numbers['lru_hit_rate_25'])} of the accesses, and no "
        f"cache that must hold what it serves, loaded on demand, hits more than "
        f"{_share(numbers['optimal_hit_rate_25'])}. {_ninety(found)}"
    )


def _ninety(found: Findings) -> str:
    if "cache_for_90" not in found.tables:
        return ""
    rows = where(found.tables["cache_for_90"], phase="all")
    parts = []
    for policy, column in (("LRU", "lru_capacity"), ("the optimum", "optimal_capacity")):
        reached = rows[column].dropna()
        never = len(rows) - len(reached)
        words = (
            f"{reached.mean():.1f} experts a layer for {policy}"
            if len(reached)
            else f"more than all experts for {policy} (first uses alone miss more)"
        )
        parts.append(
            words + (f" ({never} layers never reach it)" if never and len(reached) else "")
        )
    return f"To hit 90 % takes {' and '.join(parts)} (means over layers)."


def _working_set(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "working_sets" not in found.tables:
        return None
    table = where(found.tables["working_sets"], phase="all")
    window = table.window[table.window <= 64].max()
    rows = where(table, window=window)
    return (
        f"**Working set**: {window} tokens in a row of one request use {rows.mean_experts.mean():.1f} of "
        f"{card.n_experts} experts of a layer; unrelated tokens of the same popularity would use "
        f"{rows.independent_experts.mean():.1f}."
    )


def _drift(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "drift" not in found.tables:
        return None
    table = found.tables["drift"]
    if table.divergence.isna().all():
        return None
    return (
        f"**Drift**: a {1 / table.slice.nunique():.1%} slice of the trace, in its order, differs from the rest by "
        f"{table.divergence.mean():.3f} bits (Jensen-Shannon) on average, where the same tokens in random order would "
        f"differ by {table.divergence_even.mean():.3f}."
    )


def _balance(found: Findings, card: ModelCard, numbers: Numbers) -> str:
    health = where(found.tables["health"], phase="all")
    over, under = int(health.overused.sum()), int(health.underused.sum())
    dead, unknown = int(health.dead_experts.sum()), int(health.unused_experts.sum())
    silent = "; every one was used"
    if dead or unknown:
        too_few = (
            f" ({unknown} of them in layers with too few tokens to call them dead)"
            if unknown
            else ""
        )
        silent = f"; {dead + unknown} were never used{too_few}"
    total = card.n_layers * card.n_experts
    return (
        f"**Balance**: of {total:,} experts {over} are overused and {under} underused by more than chance would show "
        f"if tokens were independent{silent}."
    )


def _together(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "coactivation_summary" not in found.tables:
        return None
    rows = where(found.tables["coactivation_summary"], phase="all")
    if rows.pairs_significant.isna().all():
        return None  # too few requests to tell
    return (
        f"**Together**: {int(rows.pairs_significant.sum()):,} of {int(rows.pairs_possible.sum()):,} pairs of experts "
        f"of one layer are chosen together more or less often than chance, both in the requests that guesses are "
        f"learnt on and in those that they are scored on."
    )


def _domains(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "domain_information" not in found.tables:
        return None
    rows = found.tables["domain_information"]
    text = (
        f"**Domains**: an expert tells {rows.mutual_information_bits.mean():.3f} bits about the domain "
        f"(shuffled {rows.shuffled_bits.mean():.3f})"
    )
    if "domain_accuracy" in found.tables:
        accuracy = found.tables["domain_accuracy"].set_index("classifier").accuracy
        others = ", ".join(f"{name} {_share(value)}" for name, value in accuracy.iloc[1:].items())
        text += f"; routing alone names the domain of a request in {_share(accuracy.iloc[0])} of cases ({others})"
    return text + "."


def _transfer(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "domain_transfer" not in found.tables:
        return None
    table = found.tables["domain_transfer"]
    table = table.assign(same=table.train_domain == table.test_domain)
    means = table.groupby(["measure", "same"]).recall.mean()
    parts = [
        f"{measure} {_share(means[measure, True])} at home and {_share(means[measure, False])} elsewhere"
        for measure in ("popularity", "markov")
        if (measure, True) in means.index and (measure, False) in means.index
    ]
    return f"**Across domains**: {'; '.join(parts)} (recall@{card.top_k})." if parts else None


def _gates(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "lookahead_recall_at_k" not in numbers:
        return None
    return (
        f"**Gate lookahead**: the next layer's gate, given this layer's input, names "
        f"{_share(numbers['lookahead_recall_at_k'])} of its choices (its own input: "
        f"{_share(numbers['own_gate_recall_at_k'])}, the control)."
    )


def _router(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if "router" not in found.tables:
        return None
    rows = where(found.tables["router"], phase="all")
    confidence, level = rows.confidence_mean.mean(), rows.level.iloc[0]
    if math.isnan(confidence):
        return None
    text = (
        f"**Router**: its highest score has {_share(confidence)} of the weight on average ({level})"
    )
    if rows.switch_loss.notna().any():
        text += (
            f"; the balancing loss is {rows.switch_loss.mean():.3f} per layer, where 1 is balance"
        )
    return text + "."


def _template(found: Findings, card: ModelCard, numbers: Numbers) -> str | None:
    if (
        found.plan is None
        or not found.plan.split.is_template_DP.any()
        or "recall_summary" not in found.tables
    ):
        return None
    rows = found.tables["recall_summary"]
    rows = rows[(rows.horizon == rows.horizon.min()) & (rows.predictor == "markov")]
    parts = rows.set_index("part").recall_at_k
    return (
        f"**Template**: {int(found.plan.split.is_template_DP.sum())} positions hold a text that the requests share; "
        f"counts hold {_share(parts['template'])} of the choices there and {_share(parts['new_text'])} everywhere else."
    )


SENTENCES: tuple[Callable[[Findings, ModelCard, Numbers], str | None], ...] = (
    _use,
    _entropy,
    _information,
    _recall,
    _far,
    _repeats,
    _cache,
    _working_set,
    _drift,
    _balance,
    _together,
    _domains,
    _transfer,
    _gates,
    _router,
    _template,
)


def _doubts(found: Findings, card: ModelCard, provenance: Provenance) -> Iterator[str]:
    for why, rows in provenance.dropped_rows.items():
        yield f"{rows:,} rows were dropped when the trace was made: {why}"
    if provenance.kind == "synthetic":
        yield "the routing is synthetic: it says nothing about a model"
    health = where(found.tables["health"], phase="all")
    even = health[health.too_even_p_value < TOO_EVEN / max(1, len(health))]
    if len(even) and card.top_k < card.n_experts:
        layers = ", ".join(map(str, even.layer[:8]))
        yield (
            f"layers {layers}{' ...' if len(even) > 8 else ''}: use is more even than chance would make it; a logger "
            "that writes ranks instead of choices does that"
        )
    collapsed = health[health.is_collapsed.astype(bool)]
    if len(collapsed):
        layers = ", ".join(map(str, collapsed.layer))
        yield (
            f"layers {layers}: most choices go to few experts; a collapsed router does that, and so does one "
            "narrow text"
        )
    if found.plan is not None:
        yield from _doubts_about_rows(found, card)


def _doubts_about_rows(found: Findings, card: ModelCard) -> Iterator[str]:
    assert found.plan is not None
    survey, split = found.plan.survey, found.plan.split
    if len(split.duplicate_requests):
        same = _several(len(split.duplicate_requests), "request")
        yield f"left out of every score, because an earlier one has the same routing: {same}"
    if survey.rows > survey.executed_rows:
        yield f"{survey.rows - survey.executed_rows:,} rows were never run (prefix cache) and count nowhere"
    assert found.usage is not None
    empty = card.top_k * survey.executed_rows * card.n_layers - int(found.usage.counts().sum())
    if empty:
        share = empty / (card.top_k * survey.executed_rows * card.n_layers)
        yield f"{share:.1%} of the choices name no expert (dropped tokens, layers that did not run)"
    few = len(split.test_requests)
    if len(grouped := np.flatnonzero(survey.groups() != np.arange(len(survey.request_R)))):
        yield (
            f"{_several(len(grouped), 'request')} hold most of another one's routing (turns of a conversation): they "
            "stay on one side of the split, and count as independent in intervals"
        )
    if split.kind == "requests" and few < ENOUGH_REQUESTS and "recall_summary" in found.tables:
        yield f"scored on {_several(few, 'request')} only, too few for an interval: others may give other numbers"
    if split.kind == "time" and "recall_summary" in found.tables:
        yield "guesses were learnt and scored within the same few requests: believe them less"


def knows_ranks(found: Findings, card: ModelCard) -> bool:
    """Is it known which of a token's choices is the first? By weight; not from ids alone."""
    return card.top_k == 1 or (found.plan is not None and "weights" in found.plan.columns)


def _several(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
