"""The part of `findings.md` about recorded routing: use of experts, gating, imbalance. It computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from analysis.device.diagnosis import Diagnosis, layer_shape
from analysis.device.roofline import BYTES


def routing_page(found: Diagnosis) -> str:
    if found.routing is None:
        return (
            "## Routing\n\nNot computable from this input: expert utilisation, gating, dropping, hotspots, "
            "gradient share, the cost of imbalance. Record the routing and pass `trace=FOLDER`."
        )
    return "\n\n".join(["## Routing", *_of_routing(found)])


def _of_routing(found: Diagnosis) -> Iterator[str]:
    routing = found.routing
    assert routing is not None
    together = "one token of as many requests" if routing.is_decode else "consecutive tokens"
    yield (
        f"{len(routing.counts_SLE):,} steps of {routing.tokens:,} tokens ({together}) of "
        f"{routing.source or 'the trace'}: a layer needs {routing.active:.2f} of {routing.card.n_experts} experts "
        "in a step, mean."
    )
    if "utilisation" in found.sections:
        yield "### Expert utilisation\n\n" + _means(found.sections["utilisation"], UTILISATION)
    yield "### Gating\n\n" + _gating(found.sections)
    if found.imbalances:
        yield "### Cost of imbalance\n\n" + "\n".join(
            f"- {one.ranks} rank{'s' if one.ranks > 1 else ''}: busiest {one.max_over_mean:.3f} times the mean; "
            f"products of a step take {one.actual_ns / 1e3:,.1f} µs at the roofline, balanced "
            f"{one.balanced_ns / 1e3:,.1f}: imbalance costs {one.cost_ns / 1e3:+,.1f} µs ({one.cost_share:+.1%})"
            for one in found.imbalances
        )
    yield "### Communication\n\n" + _communication(found)
    if "capacity" in found.sections:
        yield "### Token dropping\n\n" + _dropping(found.sections["capacity"])
    if "hotspots" in found.sections and len(found.sections["hotspots"]):
        rows = found.sections["hotspots"].head(5)
        yield "### Hotspots\n\n" + "\n".join(
            f"- layer {row.layer}, expert {row.expert}: {row.ratio:.2f} times its even share (z {row.z:.1f})"
            for row in rows.itertuples()
        )


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
