"""Every picture of `analyze` from made-up tables: files by their names, same bytes for same tables, nothing overlaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.routing import pictures

NOTE = "tiny_moe (real), 25,600 tokens, 8 layers of 32 experts, top 2"
DOMAINS = ("code", "mathematics", "stories_about_$x$_and_$y$", "news", "chat")


@dataclass(frozen=True)
class Size:
    layers: int
    experts: int
    top_k: int
    phases: tuple[str, ...] = ("all", "prefill", "decode")
    first_layer: int = 0


SMALL = Size(6, 32, 4)
SIZES = {
    "6x128": Size(6, 128, 1),
    "48x128": Size(48, 128, 8),
    "61x256": Size(58, 256, 8, first_layer=3),
    "1x2": Size(1, 2, 1, ("all",)),
}


class Tables:
    """Plausible numbers for a model of any size."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.rng = np.random.default_rng(7)
        skew = np.arange(1, size.experts + 1) ** -0.6
        order = np.argsort(self.rng.random((size.layers, size.experts)), axis=1)
        noise = self.rng.gamma(4, 0.25, (size.layers, size.experts))
        use_LE = skew[order] * noise
        self.share_LE = use_LE / use_LE.sum(axis=1, keepdims=True)
        if size.experts > 8:
            self.share_LE[:, 3] = 0
        self.numbers = np.arange(size.layers) + size.first_layer

    def cells(self, values: np.ndarray, column: str, axes: tuple[str, ...]) -> pd.DataFrame:
        places = np.indices(values.shape).reshape(values.ndim, -1)
        frame = pd.DataFrame(dict(zip(axes, places, strict=True))).assign(
            **{column: values.ravel()}
        )
        return frame.assign(layer=self.numbers[frame["layer"]]) if "layer" in axes else frame

    def load(self) -> pd.DataFrame:
        count_LE = np.round(self.share_LE * 1e6)
        frame = self.cells(count_LE, "count", ("layer", "expert"))
        ratio = self.share_LE.ravel() * self.size.experts
        states = np.select(
            [ratio == 0, ratio < 0.5, ratio > 2], ["dead", "underused", "overused"], "normal"
        )
        return frame.assign(share=self.share_LE.ravel(), ratio=ratio, state=states)

    def statistics(self) -> pd.DataFrame:
        frames = []
        for shift, phase in enumerate(self.size.phases):
            share_LE = self.share_LE ** (1 - 0.1 * shift)
            share_LE = share_LE / share_LE.sum(axis=1, keepdims=True)
            entropy = -(share_LE * np.log2(np.where(share_LE > 0, share_LE, 1))).sum(axis=1)
            ratio = share_LE * self.size.experts
            falling = -np.sort(-share_LE, axis=1).cumsum(axis=1)
            columns = {
                "layer": self.numbers,
                "normalized_entropy": entropy / np.log2(self.size.experts),
                "entropy_bits": entropy,
                "effective_experts": 2**entropy,
                "active_experts": (share_LE > 0).sum(axis=1),
                "coefficient_of_variation": ratio.std(axis=1),
                "gini": 0.4 + 0.1 * ratio.std(axis=1),
                "max_over_mean": ratio.max(axis=1),
                "skewness": (ratio**3).mean(axis=1),
                "kurtosis": (ratio**4).mean(axis=1) - 3,
                **{
                    f"coverage_{n}": (falling < n / 100).sum(axis=1) + 1.0 for n in (50, 80, 90, 95)
                },
            }
            frames.append(pd.DataFrame(columns).assign(phase=phase, choices="all"))
        table = pd.concat(frames, ignore_index=True)
        return pd.concat([table, table.assign(choices="first")], ignore_index=True)

    def paths(self) -> pd.DataFrame:
        size = self.size
        lengths = (90, 40, 140, 60, 30)
        frames = []
        for request, length in enumerate(lengths):
            ids = self.rng.integers(0, size.experts, (size.layers, length))
            frame = self.cells(ids, "expert", ("layer", "position"))
            frames.append(frame.assign(request=3 * request))
        return pd.concat(frames, ignore_index=True)

    def transition_counts(self) -> list[tuple[int | str, int | str, np.ndarray]]:
        n = self.size.experts
        mixing = self.rng.dirichlet(np.full(n, 0.05), n)
        pairs = [(int(a), int(a) + 1) for a in self.numbers[:-1]]
        return [
            (a, b, np.round(1e5 * self.share_LE[i][:, None] * mixing))
            for i, (a, b) in enumerate(pairs)
        ]

    def timeline(self) -> pd.DataFrame:
        drift = self.rng.gamma(6, 1 / 6, (self.size.layers, 40, self.size.experts))
        counts_LSE = np.round(1e4 * self.share_LE[:, None] * drift)
        return self.cells(counts_LSE, "count", ("layer", "slice", "expert"))

    def by_phase(self, **columns: float | np.ndarray) -> pd.DataFrame:
        frames = [
            pd.DataFrame({"layer": self.numbers, **columns}).assign(phase=p)
            for p in self.size.phases
        ]
        return pd.concat(frames, ignore_index=True)

    def wobble(self, middle: float, width: float) -> np.ndarray:
        return (
            middle
            + width * np.sin(np.arange(self.size.layers) / 5)
            + 0.3 * width * self.rng.standard_normal(self.size.layers)
        )

    def transitions(self) -> pd.DataFrame:
        bits = np.log2(self.size.experts)
        rows = self.by_phase(
            conditional_entropy_bits=self.wobble(0.7 * bits, 0.03 * bits), horizon=1
        )
        rows = rows.assign(later_layer=rows["layer"] + 1)
        return rows[rows["layer"] < self.numbers[-1]]

    def next_token(self) -> pd.DataFrame:
        bits = np.log2(self.size.experts)
        return self.by_phase(
            conditional_entropy_bits=self.wobble(0.8 * bits, 0.04 * bits), repeat_rate=0.2
        )

    def recall(self) -> pd.DataFrame:
        rows = []
        k, n = self.size.top_k, self.size.experts
        for part in ("test", "template"):
            for horizon in range(1, min(5, self.size.layers)):
                for layer in self.numbers[:-horizon]:
                    for width in (k, 2 * k, 4 * k) if horizon == 1 else (k,):
                        for predictor, power in (
                            ("popularity", 0.55),
                            ("markov", 0.35),
                            ("markov_shuffled", 0.56),
                        ):
                            recall = (width / n) ** (
                                power + 0.02 * horizon
                            ) + 0.03 * self.rng.random()
                            rows.append(
                                (part, horizon, layer, layer + horizon, width, predictor, recall)
                            )
        names = ["part", "horizon", "layer", "later_layer", "width", "predictor", "recall"]
        table = pd.DataFrame(rows, columns=names)
        return table.assign(low=table["recall"] - 0.02, high=table["recall"] + 0.02)

    def cache(self) -> pd.DataFrame:
        frames = []
        for phase in self.size.phases:
            capacity = np.arange(self.size.experts + 1)
            share = capacity / self.size.experts
            for layer in self.numbers:
                lru = share ** (0.5 + 0.1 * self.rng.random())
                best = np.minimum(1, share ** (0.3 + 0.1 * self.rng.random()))
                columns = {
                    "capacity": capacity,
                    "share": share,
                    "lru_hit_rate": lru,
                    "optimal_hit_rate": best,
                }
                frames.append(pd.DataFrame(columns).assign(phase=phase, layer=layer))
        return pd.concat(frames, ignore_index=True)

    def usage(self) -> pd.DataFrame:
        taste = self.rng.gamma(2, 0.5, (len(DOMAINS), self.size.layers, self.size.experts))
        share = taste * self.share_LE
        frame = self.cells(
            share / share.sum(axis=2, keepdims=True), "share", ("domain", "layer", "expert")
        )
        return frame.assign(domain=np.array(DOMAINS)[frame["domain"]])

    def information(self) -> pd.DataFrame:
        told = np.abs(self.wobble(0.2, 0.05))
        return pd.DataFrame(
            {"layer": self.numbers, "mutual_information_bits": told, "shuffled_bits": 0.01 * told}
        )

    def transfer(self) -> pd.DataFrame:
        rows = [
            (
                measure,
                a,
                b,
                0.3 + 0.1 * (measure == "markov") + 0.2 * (a == b) + 0.05 * self.rng.random(),
            )
            for measure in ("popularity", "markov")
            for a in DOMAINS
            for b in DOMAINS
        ]
        return pd.DataFrame(rows, columns=["measure", "train_domain", "test_domain", "recall"])

    def pairs(self) -> pd.DataFrame:
        n = self.size.experts
        cluster = np.arange(n) % 6
        lift = np.where(cluster[:, None] == cluster, 1.8, 0.7) * self.rng.gamma(
            5, 0.2, (self.size.layers, n, n)
        )
        frame = self.cells(lift, "lift", ("layer", "expert_a", "expert_b"))
        return frame[frame["expert_a"] < frame["expert_b"]]

    def clusters(self) -> pd.DataFrame:
        cluster = np.tile(np.arange(self.size.experts) % 6, (self.size.layers, 1))
        return self.cells(cluster, "cluster", ("layer", "expert"))

    def health(self) -> pd.DataFrame:
        n = self.size.experts
        busiest = n * self.share_LE.max(axis=1)
        columns = {
            "max_over_mean": busiest,
            "max_violation_windows": busiest * 1.2 - 1,
            "gini": self.wobble(0.45, 0.05),
            "dead_experts": self.rng.integers(0, 1 + n // 32, self.size.layers),
            "underused": self.rng.integers(n // 8, 1 + n // 4, self.size.layers),
            "overused": self.rng.integers(0, 1 + n // 8, self.size.layers),
        }
        return pd.DataFrame({"layer": self.numbers, **columns})

    def capacity(self) -> pd.DataFrame:
        factor = np.array([1, 1.1, 1.25, 1.5, 2, 3, 4, 8])
        dropped = np.exp(-factor * (1 + self.rng.random((self.size.layers, 1))))
        frame = self.cells(dropped, "dropped_share", ("layer", "capacity_factor"))
        return frame.assign(capacity_factor=factor[frame["capacity_factor"]])

    def gate_distances(self) -> pd.DataFrame:
        measures = {}
        for name, middle in {
            "cosine_similarity": 0.8,
            "euclidean": 12,
            "l2_normalized": 0.2,
            "pearson": 0.8,
            "mean_absolute_difference": 0.5,
        }.items():
            measures |= {
                f"{name}_mean": self.wobble(middle, 0.1 * middle),
                f"{name}_std": 0.05 * middle,
            }
        rows = self.by_phase(**measures)
        rows = rows.assign(next_layer=rows["layer"] + 1)
        return rows[rows["layer"] < self.numbers[-1]]

    def lookahead(self) -> pd.DataFrame:
        frames = [
            self.by_phase(recall_at_k=self.wobble(0.97 - 0.12 * h, 0.03), horizon=h)
            for h in range(min(5, self.size.layers))
        ]
        return pd.concat(frames, ignore_index=True)


def draw_one(name: str, made: Tables, folder: Path) -> list[Path]:
    experts, top_k = made.size.experts, made.size.top_k
    calls: dict[str, Callable[[], list[Path]]] = {
        "layer_expert_frequency": lambda: pictures.layer_expert_frequency(
            made.load(), folder, NOTE
        ),
        "comparative_layer_statistics": lambda: pictures.comparative_layer_statistics(
            made.statistics(), folder, NOTE
        ),
        "expert_selection_traces": lambda: pictures.expert_selection_traces(
            made.paths(), folder, NOTE, n_experts=experts
        ),
        "expert_transition_heatmap": lambda: pictures.expert_transition_heatmap(
            made.transition_counts(), folder, NOTE
        ),
        "expert_usage_timeline": lambda: pictures.expert_usage_timeline(
            made.timeline(), folder, NOTE, n_experts=experts
        ),
        "entropy_by_layer": lambda: pictures.entropy_by_layer(
            made.statistics(),
            made.transitions(),
            made.next_token(),
            folder,
            NOTE,
            n_experts=experts,
            top_k=top_k,
        ),
        "recall_by_horizon": lambda: pictures.recall_by_horizon(
            made.recall(), folder, NOTE, top_k=top_k
        ),
        "cache_curves": lambda: pictures.cache_curves(
            made.cache(), folder, NOTE, n_experts=experts, top_k=top_k
        ),
        "domain_usage": lambda: pictures.domain_usage(
            made.usage(), made.information(), made.transfer(), folder, NOTE, n_experts=experts
        ),
        "coactivation": lambda: pictures.coactivation(
            made.pairs(), made.clusters(), folder, NOTE, n_experts=experts
        ),
        "balance_overview": lambda: pictures.balance_overview(
            made.health(), made.capacity(), folder, NOTE
        ),
        "gate_inputs": lambda: pictures.gate_inputs(
            made.gate_distances(), made.lookahead(), folder, NOTE
        ),
    }
    return calls[name]()
