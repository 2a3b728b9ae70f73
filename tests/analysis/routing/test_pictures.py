"""Every picture of `analyze` from made-up tables: files by their names, the same bytes again, nothing over anything."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from analysis.routing import gallery, group_pictures, pictures
from prefetch import figures

NOTE = "tiny_moe (real), 25,600 tokens, 8 layers of 32 experts, top 2"
DOMAINS = ("code", "mathematics", "stories_about_$x$_and_$y$", "news", "chat")


@dataclass(frozen=True)
class Size:
    layers: int
    experts: int
    top_k: int
    phases: tuple[str, ...] = ("all", "prefill", "decode")
    first_layer: int = 0


SMALL = Size(3, 32, 4)
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
        use_LE[:, 3:4] = 0  # dead, where there are so many
        self.share_LE = use_LE / use_LE.sum(axis=1, keepdims=True)
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
            [ratio == 0, ratio < 0.5, ratio > 2], ["dead", "underused", "overused"], "balanced"
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
            conditional_entropy_bits=self.wobble(0.7 * bits, 0.03 * bits),
            mutual_information_bits=0.2 * bits,
            mutual_information_shuffled_bits=0.01 * bits,
            horizon=1,
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


Picture = Callable[[Tables, Path], list[Path]]
PICTURES: dict[str, Picture] = {
    "layer_expert_frequency": lambda t, to: pictures.layer_expert_frequency(t.load(), to, NOTE),
    "comparative_layer_statistics": lambda t, to: pictures.comparative_layer_statistics(
        t.statistics(), to, NOTE
    ),
    "expert_selection_traces": lambda t, to: pictures.expert_selection_traces(
        t.paths(), to, NOTE, n_experts=t.size.experts
    ),
    "expert_transition_heatmap": lambda t, to: pictures.expert_transition_heatmap(
        t.transition_counts(), to, NOTE
    ),
    "expert_usage_timeline": lambda t, to: pictures.expert_usage_timeline(
        t.timeline(), to, NOTE, n_experts=t.size.experts
    ),
    "entropy_by_layer": lambda t, to: pictures.entropy_by_layer(
        t.statistics(),
        t.transitions(),
        t.next_token(),
        to,
        NOTE,
        n_experts=t.size.experts,
        top_k=t.size.top_k,
    ),
    "recall_by_horizon": lambda t, to: pictures.recall_by_horizon(
        t.recall(), to, NOTE, top_k=t.size.top_k
    ),
    "cache_curves": lambda t, to: pictures.cache_curves(
        t.cache(), to, NOTE, n_experts=t.size.experts, top_k=t.size.top_k
    ),
    "domain_usage": lambda t, to: group_pictures.domain_usage(
        t.usage(), t.information(), t.transfer(), to, NOTE, n_experts=t.size.experts
    ),
    "coactivation": lambda t, to: group_pictures.coactivation(
        t.pairs(), t.clusters(), to, NOTE, n_experts=t.size.experts
    ),
    "balance_overview": lambda t, to: group_pictures.balance_overview(
        t.health(), t.capacity(), to, NOTE
    ),
    "gate_inputs": lambda t, to: group_pictures.gate_inputs(
        t.gate_distances(), t.lookahead(), to, NOTE
    ),
}
IMPOSSIBLE_WITH_ONE_LAYER = {"expert_transition_heatmap", "recall_by_horizon"}


@dataclass
class Ink:
    """What was written where: the boxes of all text that a PNG shows, and of the axes and legends."""

    texts: list[tuple[str, Bbox]]
    axes: list[Bbox]
    legends: list[Bbox]
    page: Bbox

    @classmethod
    def of(cls, figure: Figure, monkeypatch: pytest.MonkeyPatch) -> Ink:
        texts: list[tuple[str, Bbox]] = []
        write = Text.draw

        def note(text: Text, renderer: Any, *rest: Any, **named: Any) -> None:
            if text.get_visible() and text.get_text():
                texts.append((text.get_text(), text.get_window_extent(renderer)))
            write(text, renderer, *rest, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Text, "draw", note)
            FigureCanvasAgg(figure).draw()
        of_axes = [legend for axes in figure.axes if (legend := axes.get_legend())]
        legends = [legend.get_window_extent() for legend in (*figure.legends, *of_axes)]
        return cls(texts, [axes.bbox for axes in figure.axes], legends, figure.bbox)

    def faults(self) -> list[str]:
        words = [word for word, _ in self.texts]
        boxes = [_shrunk(box) for _, box in self.texts]
        pairs = itertools.combinations(range(len(words)), 2)
        found = [f"{words[a]!r} over {words[b]!r}" for a, b in pairs if boxes[a].overlaps(boxes[b])]
        for word, box in zip(words, boxes, strict=True):
            found += [f"{word!r} over the data" for axes in self.axes if box.overlaps(axes)]
            if not self.page.containsx(box.x0) or not self.page.containsx(box.x1):
                found.append(f"{word!r} beyond the page")
            if not self.page.containsy(box.y0) or not self.page.containsy(box.y1):
                found.append(f"{word!r} beyond the page")
        legends = [(_shrunk(legend), axes) for legend in self.legends for axes in self.axes]
        return found + [
            "a legend over the data" for legend, axes in legends if legend.overlaps(axes)
        ]


def _shrunk(box: Bbox) -> Bbox:
    """A box may touch another by a pixel: they are rounded up."""
    return Bbox.from_extents(
        box.x0 + 1, box.y0 + 1, max(box.x0 + 1, box.x1 - 1), max(box.y0 + 1, box.y1 - 1)
    )


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What overlaps in every figure from now on; no file is written."""
    found: list[str] = []

    def look(figure: Figure, stem: Path) -> list[Path]:
        found.extend(f"{stem.name}: {fault}" for fault in Ink.of(figure, monkeypatch).faults())
        return [stem]

    monkeypatch.setattr(figures, "write", look)
    return found


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of the next picture instead of the picture."""
    found: list[Any] = []

    def keep(stem: Path, title: str, panels: list[Any], **how: Any) -> list[Path]:
        found.extend(panels)
        return [stem] if panels else []

    for file in (pictures, group_pictures):
        monkeypatch.setattr(file, "draw", keep)
    return found


@pytest.mark.parametrize("is_ranked", [True, False])
def test_a_first_choice_that_no_weight_ranked_is_called_so(tmp_path, monkeypatch, is_ranked):
    said: list[str] = []
    monkeypatch.setattr(pictures, "draw", lambda *_, note, **__: said.append(note) or [])
    paths = Tables(Size(2, 8, 2)).paths()
    pictures.expert_selection_traces(paths, tmp_path, NOTE, n_experts=8, is_ranked=is_ranked)
    assert ("No weights were recorded" in said[0]) != is_ranked


def test_what_overlaps_is_seen(tmp_path: Path, faults: list[str]) -> None:
    axis = figures.Axis("x")
    panel = figures.Lines("a title that is far too long for a panel of its size", axis, axis)
    figures.draw(tmp_path / "a", "Title", [panel] * 3, panel_size=(1.5, 1.5))
    assert any("far too long" in fault for fault in faults)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("size", [SMALL, SIZES["1x2"]], ids=["3x32", "1x2"])
def test_nothing_overlaps(name: str, size: Size, tmp_path: Path, faults: list[str]) -> None:
    drawn = PICTURES[name](Tables(size), tmp_path)
    assert bool(drawn) == (size.layers > 1 or name not in IMPOSSIBLE_WITH_ONE_LAYER)
    assert not faults


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("comparative_layer_statistics", "61x256"),
        ("domain_usage", "48x128"),
        ("entropy_by_layer", "6x128"),
    ],
)
def test_nothing_overlaps_at_full_size(
    name: str, size: str, tmp_path: Path, faults: list[str]
) -> None:
    assert PICTURES[name](Tables(SIZES[size]), tmp_path)
    assert not faults


def test_a_picture_per_layer_with_a_name_of_its_own_and_the_same_bytes_again(
    tmp_path: Path,
) -> None:
    load = Tables(Size(2, 32, 4, first_layer=5)).load()
    files = pictures.layer_expert_frequency(load, tmp_path, NOTE)
    names = [f"layer_{n}_expert_frequency.{kind}" for n in (5, 6) for kind in ("svg", "png")]
    assert [path.name for path in files] == names
    assert all(path.stat().st_size > 10_000 for path in files)
    before = [path.read_bytes() for path in files]
    pictures.layer_expert_frequency(load, tmp_path, NOTE)
    assert [path.read_bytes() for path in files] == before


def test_two_stacks_have_names_of_their_own(tmp_path: Path, panels: list[Any]) -> None:
    load = Tables(Size(2, 8, 2)).load()
    both = pd.concat([load.assign(stack="encoder"), load.assign(stack="decoder")])
    stems = pictures.layer_expert_frequency(both, tmp_path, NOTE)
    assert [stem.name for stem in stems] == [
        f"{stack}_layer_{n}_expert_frequency" for stack in ("encoder", "decoder") for n in (0, 1)
    ]
    panels.clear()
    statistics = Tables(Size(2, 8, 2, ("all",))).statistics()
    both = pd.concat([statistics.assign(stack="encoder"), statistics.assign(stack="decoder")])
    pictures.comparative_layer_statistics(both, tmp_path, NOTE)
    assert panels[0].x.names == ("e0", "e1", "d0", "d1")
    np.testing.assert_array_equal(panels[0].lines[0].x, [0, 1, 2, 3])


@pytest.mark.parametrize("empty", [pd.DataFrame(), None], ids=["no columns", "no rows"])
def test_empty_tables_are_no_picture(
    empty: pd.DataFrame | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Tables(SMALL)
    for name in vars(Tables):
        if not name.startswith("_") and name not in ("cells", "by_phase", "wobble"):
            table = getattr(made, name)()
            nothing = [] if isinstance(table, list) else table[:0] if empty is None else empty
            monkeypatch.setattr(Tables, name, lambda _, nothing=nothing: nothing)
    for name, picture in PICTURES.items():
        assert picture(made, tmp_path) == [], name
    assert not list(tmp_path.iterdir())


def test_a_layer_that_nobody_went_through_is_left_out(tmp_path: Path, panels: list[Any]) -> None:
    load = Tables(Size(2, 8, 2)).load()
    load.loc[load["layer"] == 0, "count"] = 0
    load.loc[load["layer"] == 0, "share"] = np.nan
    (stem,) = pictures.layer_expert_frequency(load, tmp_path, NOTE)
    assert stem.name == "layer_1_expert_frequency"


def test_frequency_shows_every_expert_and_what_the_most_used_hold(
    tmp_path: Path, panels: list[Any]
) -> None:
    load = Tables(Size(1, 32, 4)).load()
    pictures.layer_expert_frequency(load.sample(frac=1, random_state=0), tmp_path, NOTE)
    bars, held = panels
    np.testing.assert_allclose(bars.heights_E, 100 * load["share"])
    by_rank, never = bars.lines
    np.testing.assert_allclose(by_rank.y, sorted(bars.heights_E, reverse=True))
    np.testing.assert_array_equal(never.x, [3])
    assert held.lines[0].y[0] == 0 and held.lines[0].y[-1] == pytest.approx(100)
    assert {key.label for key in bars.keys} >= {
        "balanced",
        "by rank",
        "never chosen",
        "uniform use",
    }
    assert "" not in {key.label for key in bars.keys}


def test_layers_are_spread_with_both_ends(tmp_path: Path, panels: list[Any]) -> None:
    PICTURES["expert_usage_timeline"](Tables(Size(58, 4, 1, first_layer=3)), tmp_path)
    titles = [panel.title for panel in panels]
    assert titles == [f"Layer {n}" for n in (3, 14, 26, 37, 49, 60)]


def test_shares_of_maps_add_up(tmp_path: Path, panels: list[Any]) -> None:
    made = Tables(Size(3, 16, 2))
    PICTURES["expert_transition_heatmap"](made, tmp_path)
    assert len(panels) == 2
    for panel in panels:
        assert np.isnan(
            panel.values[3]
        ).all()  # never chosen: nothing can be said of what comes next
        np.testing.assert_allclose(np.delete(panel.values, 3, axis=0).sum(axis=1), 1)
    panels.clear()
    PICTURES["expert_usage_timeline"](made, tmp_path)
    for panel in panels:
        np.testing.assert_allclose(panel.values.sum(axis=0), 100)


def test_what_the_layer_before_tells_stands_at_the_later_layer(
    tmp_path: Path, panels: list[Any]
) -> None:
    PICTURES["entropy_by_layer"](Tables(Size(4, 16, 2, first_layer=10)), tmp_path)
    assert [panel.title for panel in panels] == ["All tokens", "Prefill", "Decode"]
    x_by_label = {line.label: line.x for line in panels[0].lines}
    np.testing.assert_array_equal(x_by_label["given the layer before"], [1, 2, 3])
    np.testing.assert_array_equal(x_by_label["given it, shuffled"], [1, 2, 3])
    np.testing.assert_array_equal(x_by_label["given the token before"], [0, 1, 2, 3])
    assert [mark.value for mark in panels[0].marks] == [4, 1]


def test_a_layer_that_saw_nearly_nothing_is_not_drawn() -> None:
    table = pd.DataFrame({"phase": "all", "layer": [0, 1, 2], "tokens": [1000, 9, 10]})
    assert gallery.well_seen(table).layer.tolist() == [0, 2]
    by_choices = table.rename(columns={"tokens": "mean"})
    assert gallery.well_seen(by_choices).layer.tolist() == [0, 2]
    drift = table.drop(columns="phase")
    assert gallery.well_seen(drift).layer.tolist() == [0, 1, 2]


def test_paths_leave_out_no_expert_and_keep_layers_apart(tmp_path: Path, panels: list[Any]) -> None:
    paths = Tables(Size(2, 8, 2)).paths()
    paths.loc[paths["position"] == 1, "expert"] = -1
    pictures.expert_selection_traces(paths, tmp_path, NOTE, n_experts=8)
    assert [panel.title for panel in panels] == ["Layer 0", "Layer 1"]
    for panel in panels:
        assert [line.label for line in panel.lines] == [f"request {n}" for n in (0, 3, 6, 9)]
        for line in panel.lines:
            assert 1 not in set(line.x) and len(line.x) <= pictures.PATH_TOKENS
            assert min(line.y) >= 0


def test_lift_is_symmetric_in_bits_and_ordered_by_cluster(
    tmp_path: Path, panels: list[Any]
) -> None:
    pairs = pd.DataFrame(
        {"layer": 0, "expert_a": [0, 0, 1], "expert_b": [1, 2, 2], "lift": [0.0, 2.0, 99.0]}
    )
    clusters = pd.DataFrame({"layer": 0, "expert": [0, 1, 2], "cluster": [0, 1, 0]})
    group_pictures.coactivation(pairs, clusters, tmp_path, NOTE, n_experts=3)
    nan = np.nan
    expected = [
        [nan, 1, -3],
        [1, nan, 3],
        [-3, 3, nan],
    ]  # experts 0 and 2, then 1; never together is -3
    np.testing.assert_allclose(panels[0].values, expected)
    assert panels[0].cuts == [1.5]


def test_bands_are_intervals_or_the_range_over_layers(tmp_path: Path, panels: list[Any]) -> None:
    made = Tables(Size(4, 16, 2, ("all",)))
    PICTURES["cache_curves"](made, tmp_path)
    _, lru = panels[0].lines
    by_capacity = made.cache().groupby("capacity")["lru_hit_rate"]
    assert len(lru.y) == len(by_capacity)
    assert (np.asarray(lru.low) <= lru.y).all() and (lru.y <= np.asarray(lru.high)).all()
    assert [mark.value for mark in panels[0].marks] == [12.5, 25]
    panels.clear()
    summary = pd.DataFrame(
        {
            "part": "all",
            "horizon": [1, 2],
            "predictor": "markov",
            "recall_at_k": [0.5, 0.4],
            "low": [0.4, 0.3],
            "high": [0.6, 0.7],
        }
    )
    recall = made.recall().drop(columns=["low", "high"]).assign(part="all")
    pictures.recall_by_horizon(recall, tmp_path, NOTE, top_k=2, summary=summary)
    ahead, wider = panels
    (markov,) = ahead.lines
    assert [list(part) for part in (markov.x, markov.y, markov.low, markov.high)] == [
        [1, 2],
        [0.5, 0.4],
        [0.4, 0.3],
        [0.6, 0.7],
    ]
    assert len(wider.lines) == 3 and np.isnan(wider.lines[0].low).all()


def test_dropped_choices_are_a_family_over_layers(tmp_path: Path, panels: list[Any]) -> None:
    made = Tables(Size(48, 16, 2))
    capacity = made.capacity()
    group_pictures.balance_overview(made.health(), capacity, tmp_path, NOTE)
    family = panels[-1]
    assert len(family.lines) == 48 and family.colours.names[-1] == "47" and not family.keys
    of_last = capacity[capacity["layer"] == 47]
    np.testing.assert_allclose(family.lines[-1].y, 100 * of_last["dropped_share"])
