"""The stage on a tiny grid: a page with every heading, numbers that are the table's, rows that could not run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from prefetch import config
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.engine.profile import PAGE, run
from prefetch.engine.profiling import copies, disk, roofs
from prefetch.errors import ConfigError, PrefetchError
from prefetch.runs.outputs import Outputs
from prefetch.sources import collect
from prefetch.tracking import NoTracker

# of the page that this stage fills in, in its order
HEADINGS = [
    "# MoE Router Baseline Profiling",
    "## Hardware Configuration",
    "## Performance Metrics",
    "### Router Performance",
    "### Full MoE Layer Performance",
    "## Memory Usage Patterns",
    "### Router Memory Usage",
    "### MoE Layer Memory Usage",
    "## Identified Bottlenecks",
    "### Computational Bottlenecks",
    "### Memory Bottlenecks",
    "## Expert Utilization Analysis",
    "## Next Steps",
]
TINY = (
    "profile.tokens=[1,4,64]", "profile.experts=[4]", "profile.top_k=[2]", "profile.hidden=[16]", "profile.inner=[16]",
    "profile.repeats=2", "profile.threads=1", "profile.device=cpu", "memory=400KB", "profile.figures=false",
)  # fmt: skip
NS = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9}


def configured(folder: Path, *words: str) -> Config:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        overrides = [
            "stage=profile",
            f"store={folder / 'store'}",
            "source=synthetic",
            *TINY,
            *words,
        ]
        cfg = cast(Config, compose("config", overrides=overrides))
    config.check_values(cfg)
    return cfg


@dataclass
class Profile:
    folder: Path
    store: Store
    metrics: dict[str, float]

    @property
    def page(self) -> str:
        return (self.folder / PAGE).read_text()

    def table(self, name: str = "results") -> pd.DataFrame:
        return pd.read_parquet(self.folder / f"{name}.parquet")


def profiled(folder: Path, *words: str) -> Profile:
    cfg = configured(folder, *words)
    store, outputs = Store(cfg.store, makers=cfg.makers), Outputs(folder / "out", NoTracker())
    return Profile(outputs.folder, store, run(cfg, store, outputs))


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """A machine is measured in less than a second: its numbers mean little, and nothing here asks what they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(roofs.READ_BYTES, "cpu", 2**22)
        patch.setitem(roofs.LONG_ENOUGH_NS, "cpu", 100_000)
        patch.setitem(copies.SIZES, "cpu", [4096, 65536, 2**20])
        patch.setitem(copies.ARENA_BYTES, "cpu", 2**23)
        patch.setattr(disk, "FILE_BYTES", 2**20)
        yield


@pytest.fixture(scope="module")
def profile(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("profile")
    cfg = configured(folder)
    Store(cfg.store, makers=cfg.makers).make(collect.trace_recipe(cfg))  # a trace is there
    return profiled(folder, "profile.figures=true")


def test_every_heading_is_filled_in(profile: Profile) -> None:
    lines = profile.page.splitlines()
    places = [lines.index(heading) for heading in HEADINGS]
    assert places == sorted(places)
    sections = re.split(r"^#+ .*\n", profile.page, flags=re.MULTILINE)[1:]
    titles = re.findall(r"^(#+) .*$", profile.page, flags=re.MULTILINE)
    for i, (level, text) in enumerate(zip(titles, sections, strict=True)):
        has_parts = i + 1 < len(titles) and len(titles[i + 1]) > len(level)
        assert text.strip() or has_parts, f"section {i} is empty"
    assert not re.search(r"To be filled|TODO|\bnan\b|<NA>|\bNone\b|\bobject\b", profile.page)


def test_findings_stand_under_each_heading(profile: Profile) -> None:
    for heading in HEADINGS[3:5] + HEADINGS[6:8] + HEADINGS[9:12]:
        text = profile.page.split(f"{heading}\n")[1].split("\n#")[0]
        bullets = [line for line in text.splitlines() if line.startswith("- ")]
        assert bullets and "Nothing of this ran" not in text, heading
        assert all(re.search(r"\d", line) for line in bullets), heading
    assert re.search(r"^1\. ", profile.page.split("## Next Steps")[1], flags=re.MULTILINE)


def one(table: pd.DataFrame, part: str, tokens: int, implementation: str = "ours") -> pd.Series:
    is_one = (table.part == part) & (table.tokens == tokens) & (table.routing == "uniform")
    is_one &= (table.implementation == implementation) & (table.direction == "forward")
    ((_, row),) = table[is_one].iterrows()
    return row


def test_numbers_in_sentences_are_those_of_the_table(profile: Profile) -> None:
    table = profile.table()
    said = re.findall(r"- (\d+) tokens?: one layer takes ([\d.,]+) (\w+) ", profile.page)
    assert [int(tokens) for tokens, _, _ in said] == [1, 64]
    for tokens, number, unit in said:
        expected = one(table, "layer", int(tokens)).median_ns
        assert float(number.replace(",", "")) * NS[unit] == pytest.approx(expected, rel=0.006)
    said = re.findall(
        r"- (\d+) tokens?: the router takes ([\d.,]+) (\w+), ([\d.]+) % of", profile.page
    )
    for tokens, number, unit, share in said:
        router, layer = one(table, "router", int(tokens)), one(table, "layer", int(tokens))
        assert float(number.replace(",", "")) * NS[unit] == pytest.approx(
            router.median_ns, rel=0.006
        )
        assert float(share) == pytest.approx(100 * router.median_ns / layer.median_ns, rel=0.06)
    ((peak, unit),) = re.findall(r"- 64 tokens: ours needs ([\d.]+) (\w+) beside", profile.page)
    assert unit == "KiB"
    assert float(peak) * 1024 == pytest.approx(one(table, "layer", 64).peak_bytes, rel=0.006)


def test_metrics_are_numbers_of_rows(profile: Profile) -> None:
    table, metrics = profile.table(), profile.metrics
    assert json.loads((profile.folder / "metrics.json").read_text()) == metrics
    assert metrics["layer_us/1"] == one(table, "layer", 1).median_ns / 1e3
    assert metrics["rows"] == len(table) == metrics["rows_ran"] + metrics["rows_left_out/memory"]
    ratio = table[(table.part == "layer") & (table.implementation == "grouped_mm")]
    forward = ratio[ratio.direction == "forward"].times_reference
    assert metrics["grouped_mm_times_ours"] == pytest.approx(forward.astype(float).median())


def test_memory_ends_where_it_was_predicted(profile: Profile) -> None:
    table, limits = profile.table(), profile.table("memory_limits")
    out = table[table.status == "not run: memory"]
    assert set(out.implementation) == {"dense_product"} and set(out.tokens) == {64}
    assert out.median_ns.isna().all() and out.peak_bytes.isna().all()
    for _, limit in limits[limits.implementation != "ours"].iterrows():
        rows = table[
            (table.implementation == limit.implementation) & (table.direction == "forward")
        ]
        is_out = rows.tokens >= limit.first_that_does_not_fit
        assert (is_out == rows.status.eq("not run: memory")).all()
        assert ((rows.predicted_bytes > limit.room_bytes) == is_out).all()
        assert (
            limit.needed_bytes > limit.room_bytes
            and limit.most_tokens == limit.first_that_does_not_fit - 1
        )
    assert "dense_product at 64 tokens, 4 experts, k=2" in profile.page
    assert profile.metrics["rows_left_out/memory"] == len(out) == 2


def test_rows_obey_their_laws(profile: Profile) -> None:
    table = profile.table()
    assert (table[["bytes", "flops"]] >= 0).all().all() and (table.bound_ns >= 1).all()
    ran = table[table.status == "ran"]
    assert ran[["median_ns", "p25_ns", "p75_ns", "calls", "peak_bytes"]].notna().all().all()
    assert ((ran.fastest_ns <= ran.p25_ns) & (ran.p25_ns <= ran.median_ns)).all()
    assert ((ran.median_ns <= ran.p75_ns) & (ran.calls >= 1) & (ran.calls <= 2)).all()
    pd.testing.assert_series_equal(
        ran.of_bound.astype(float), (ran.bound_ns / ran.median_ns).astype(float), check_names=False
    )
    own = ran[
        (ran.implementation == "ours")
        | ((ran.implementation == "loop") & (ran.direction == "backward"))
    ]
    assert (own.times_reference == 1).all() and (own.reference == own.implementation).all()
    assert (
        ran[ran.dropped_share == 0].deviation.dropna() < 1e-5
    ).all()  # float32 sums in another order
    assert (
        ran[(ran.part == "layer") & (ran.implementation == "loop")].deviation.dropna() < 1e-5
    ).all()
    pairs = {(row.part, row.implementation, row.direction) for row in table.itertuples()}
    assert pairs >= {
        (part, "ours", "forward") for part in ("router", "dispatch", "experts", "combine", "layer")
    }
    assert pairs >= {("layer", name, "backward") for name in ("loop", "grouped_mm", "dense")}


def test_the_trace_in_the_store_is_looked_at_and_nothing_else_is(profile: Profile) -> None:
    table = profile.table("utilisation")
    traced = table[table.kind == "trace"]
    assert (
        len(traced) > 1
        and (traced.busiest_times_mean >= 1).all()
        and "Trace of synthetic" in profile.page
    )
    drawn = table[table.kind == "drawn"]
    assert set(drawn.source) == {"uniform", "zipf"} and set(drawn.tokens) == {1, 4, 64}
    assert any(key.startswith("trace/") for key in profile.store.used)


def test_figures_and_tables_are_there(profile: Profile) -> None:
    names = ["layer_time", "of_bound", "parts_of_layer", "memory", "copies", "expert_load"]
    for name in names:
        assert (profile.folder / f"{name}.png").stat().st_size > 5000
        assert (profile.folder / f"{name}.svg").exists() and f"({name}.png)" in profile.page
    for name in ("results", "copies", "memory_limits", "utilisation"):
        assert (profile.folder / f"{name}.csv").exists()


@pytest.mark.usefixtures("quick")
def test_without_time_every_row_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        PrefetchError, match=r"no layer of ours ran: not run: time; .*profile.seconds"
    ):
        profiled(tmp_path, "profile.seconds=1e-9")
    table = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(table.status) == {"not run: time", "not run: memory"}
    assert not (tmp_path / "store" / "trace").exists()  # a profile collects nothing


@pytest.mark.usefixtures("quick")
def test_what_a_library_refuses_is_a_marked_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", refuses)
    short = ("profile.tokens=[1]", "profile.routings=[uniform]", "profile.repeats=1")
    done = profiled(tmp_path, *short)
    table = done.table()
    is_refused = table.status == "refused: no such kernel"
    assert set(table[is_refused].implementation) == {"grouped_mm"} and is_refused.sum() == 4
    assert (table[~is_refused].status == "ran").all()
    assert "torch or a compiler refused it: grouped_mm forward (3, from 1 token on)" in done.page
    assert (
        done.metrics["rows_left_out/refused"] == 4 and "grouped_mm_times_ours" not in done.metrics
    )
    monkeypatch.setattr("prefetch.engine.profiling.operations.moe", refuses)
    with pytest.raises(
        PrefetchError, match=r"no layer of ours ran: refused: no such kernel; .*memory"
    ):
        profiled(tmp_path / "again", *short)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile.tokens=[0]"], r"profile.tokens=\[0\]: each must be at least 1"),
        (["profile.tokens=[]"], r"profile.tokens=\[\]: names nothing"),
        (["profile.experts=[4,4]"], "names one twice"),
        (["profile.top_k=[5]"], "no layer of profile.experts"),
        (["profile.dtypes=[fp8]"], "expected fp32, bf16, fp16"),
        (["profile.routings=[normal]"], "expected uniform, zipf"),
        (["profile.skew=-1"], "must be a number from 0 on"),
        (["profile.skew=nan"], "expected a finite number"),
        (["profile.capacity_factor=0"], "must be above 0"),
        (["profile.repeats=0"], "must be at least 1"),
        (["profile.threads=0"], "must be from 1 to 1024"),
        (["profile.seconds=0"], "must be above 0"),
        (["profile.device=tpu"], "expected auto, cpu, cuda"),
        (["profile.device=cuda:x"], "expected auto, cpu, cuda"),
        (["memory=lots"], "memory"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message) as error:
        profiled(tmp_path, *words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there_is_one_clear_error(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"profile.device={name}: .* sees 0 CUDA devices here"):
        profiled(tmp_path, f"profile.device={name}")
