"""The part of `findings.md` about recorded routing: use of experts, gating, imbalance. It computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from analysis.device.beside import layer_shape
from analysis.device.diagnosis import Diagnosis
from analysis.device.plain_text import shown
from analysis.device.roofline import BYTES
from analysis.device.step_routing import Imbalance


def routing_page(found: Diagnosis) -> str:
    if found.routing is None:
        return (
            "## Routing\n\nNot computable from this input: expert utilisation, gating, dropping, hotspots, "
            "gradient share, the cost of imbalance. Record the routing and pass `trace=FOLDER`."
        )
    return "\n\n".join(["## Routing", *_of_routing(found)])


def _of_routing(found: Diagnosis) -> Iterator[str]:
    sections = found.sections
    yield _steps(found)
    if "utilisation" in sections:
        yield "### Expert utilisation\n\n" + _means(sections["utilisation"], UTILISATION)
    yield "### Gating\n\n" + _gating(sections)
    if found.imbalances:
        lines = "\n".join(_imbalance(one) for one in found.imbalances)
        yield f"### Cost of imbalance\n\nAll expert products of a step, at the roofline:\n\n{lines}"
    yield "### Communication\n\n" + _communication(found)
    if "capacity" in sections:
        yield "### Token dropping\n\n" + _dropping(sections["capacity"])
    if "hotspots" in sections and len(sections["hotspots"]):
        rows = sections["hotspots"].head(5)
        yield "### Hotspots\n\n" + "\n".join(
            f"- layer {row.layer}, expert {row.expert}: {row.ratio:.2f} times its even share (z {row.z:.1f})"
            for row in rows.itertuples()
        )


def _steps(found: Diagnosis) -> str:
    routing = found.routing
    assert routing is not None
    together = (
        "one token of each of as many requests" if routing.is_decode else "consecutive tokens"
    )
    if routing.is_decode and routing.steps.requests < routing.tokens:
        together = f"of {routing.steps.requests:.1f} requests"
    source = shown(routing.source or "the trace")
    return (
        f"{len(routing.counts_SLE):,} steps of {routing.tokens:,} tokens ({together}) of {source}: a layer needs "
        f"{routing.active:.2f} of {routing.card.n_experts} experts in a step, mean."
    )


def _imbalance(one: Imbalance) -> str:
    took = f"{one.actual_ns / 1e3:,.1f} µs, spread evenly {one.balanced_ns / 1e3:,.1f}"
    if one.cost_ns < 0:
        says = f"uneven routing saves {-one.cost_ns / 1e3:,.1f} µs ({-one.cost_share:.1%}), as fewer experts are read"
    else:
        says = f"imbalance costs {one.cost_ns / 1e3:,.1f} µs ({one.cost_share:.1%})"
    if one.ranks == 1:
        return f"- 1 rank: {took}: {says}"
    busiest = f"the busiest has {one.max_over_mean:.2f} times the mean load"
    return f"- {one.ranks} ranks, {busiest}: {took}: {says}"


UTILISATION = {
    "max_over_mean": "largest load over the mean",
    "normalized_entropy": "entropy of use, over its maximum",
    "gini": "Gini coefficient of use",
    "dead_experts": "dead experts per layer",
    "underused": "underused experts per layer",
    "overused": "overused experts per layer",
    "max_violation_windows": "largest load over the mean, minus 1, step by step",
    "capacity_factor_1pct": "capacity factor that drops 1 % at most",
}
GATING = {
    "confidence_mean": "weight of the first choice",
    "margin_mean": "first choice's lead over the second",
    "boundary_margin_mean": "lead of the last choice over the first that was not taken",
    "entropy_bits_mean": "entropy of a token's scores (bits)",
    "switch_loss": "balancing loss (1 = balanced)",
    "z_loss": "z-loss",
    "gradient_proxy_effective_tokens": "tokens that an expert's gradient comes from (a proxy: weights)",
}


def _means(table: pd.DataFrame, words: Mapping[str, str]) -> str:
    """Per layer, then their mean and their worst: ids are never pooled over layers."""
    lines = []
    for name, text in words.items():
        column = (
            pd.to_numeric(table[name], errors="coerce").dropna()
            if name in table
            else pd.Series(dtype=float)
        )
        if len(column):
            lines.append(
                f"- {text}: {column.mean():.3f} (layers {column.min():.3f} to {column.max():.3f})"
            )
        else:
            lines.append(f"- {text}: not computable from this input")
    return "\n".join(lines)


def _gating(sections: Mapping[str, pd.DataFrame]) -> str:
    if "gating" not in sections:
        return "Not computable from this input: the trace has neither weights nor scores of the router."
    table = sections["gating"]
    return _means(table[table.phase == "all"] if "phase" in table else table, GATING)


def _communication(found: Diagnosis) -> str:
    """What dispatch would send; the way back is as much, in the type of the outputs."""
    shape, routing = layer_shape(found.operations), found.routing
    if shape is None or shape.hidden is None or routing is None:
        return "Not computable from this input: the size of a token is not known."
    size = shape.hidden * BYTES[shape.activation or "bf16"] / 2**20
    lines = [
        f"- {ranks} ranks: {once * size:,.2f} MiB a step, each token once to each rank that it needs; "
        f"{each * size:,.2f} MiB once per expert"
        for ranks, (once, each) in routing.sent_R.items()
    ]
    placed = "Experts in blocks of their ids, tokens round-robin on the ranks (where they lie is not recorded):"
    return f"{placed}\n\n" + "\n".join(lines)


def _dropping(curve: pd.DataFrame) -> str:
    """What-if: a dropless engine drops nothing, and a profile does not say which it was."""
    factors = curve.groupby("capacity_factor").dropped_share.mean()
    lines = [
        f"- capacity factor {factor:g}: {share:.2%} of the choices would be dropped"
        for factor, share in factors.items()
        if factor in (1.0, 1.25, 1.5, 2.0)
    ]
    return (
        "In steps of this size, before any rerouting, if the engine has a capacity:\n\n"
        + "\n".join(lines)
    )
