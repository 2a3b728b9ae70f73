"""The stage as a whole: what it prints first, what it leaves, and how it fails."""

import json
from pathlib import Path
from typing import cast

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from profiler_traces import launched, operation, real, written
from routing_traces import random_trace

from analysis.device import seed_files
from analysis.device.machine import device_file
from analysis.device.tracelens import TIME
from analysis.diagnose import run
from prefetch import config
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError, FormatError
from prefetch.runs.outputs import Outputs
from prefetch.trace.provenance import Provenance
from prefetch.trace.writer import TraceWriter
from prefetch.tracking import NoTracker

PROMISED = {
    "kernel_time_us", "moe_kernel_time_us", "moe_share_of_kernel_time", "moe_share_of_elapsed_time", "moe_kernels",
    "moe_layers", "worst_efficiency", "findings",
}  # fmt: skip
DIMS = [[8, 64], [16, 64, 64], [16, 64, 32], [8, 3]]


def ran(folder: Path, *words: str) -> tuple[Path, dict[str, float]]:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        overrides = ["stage=diagnose", f"store={folder / 'store'}", "tracker=none", *words]
        cfg = cast(Config, compose("config", overrides=overrides))
    config.check_values(cfg)
    outputs = Outputs(folder / "out", NoTracker())
    return outputs.folder, run(cfg, Store(cfg.store, makers=cfg.makers), outputs)


def fused(folder: Path, took_us: float = 500.0, **meta: object) -> Path:
    events = [
        operation("vllm::rocm_aiter_fused_moe", 0, 50, DIMS),
        *launched(1, "aiter_fused_moe", 5, 60, took_us),
    ]
    return written(folder, [*events, *launched(2, "other", 55, 700, 100)], **meta)


def test_the_first_line_is_the_status_and_the_folder_holds_what_is_promised(tmp_path, capsys):
    path = fused(tmp_path, deviceProperties=[{"id": 0, "name": "NVIDIA H100 80GB HBM3"}])
    folder, numbers = ran(tmp_path, f"profile_trace={path}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("OK: MoE 500.0 µs, 83.3% of kernel time")
    assert any("hardware=h100_pcie5, the profile's own device" in line for line in lines)
    assert 0 < numbers["resident_use"] < 1 and 0 < numbers["flops_utilisation"] < 0.1
    assert PROMISED <= set(numbers) == set(json.loads((folder / "metrics.json").read_text()))
    assert numbers["findings"] == 1 and 0 < numbers["worst_efficiency"] < 0.4
    findings = json.loads((folder / "findings.json").read_text())
    assert findings["status"] == "OK" and findings["operations"][0]["calls"] == 1
    page = (folder / "findings.md").read_text()
    for heading in (
        "## Time",
        "## Operations",
        "## Bottlenecks",
        "## Routing",
        "## Recommendations",
    ):
        assert heading in page
    for name in ("time", "efficiency", "roofline"):
        assert (folder / f"{name}.png").stat().st_size > 5000 and (folder / f"{name}.svg").exists()
    assert (folder / seed_files.METRICS).exists() and (folder / seed_files.FINDINGS).exists()
    assert "CUDA" not in page and "not computable from this input" in page


def test_without_a_known_device_there_is_no_efficiency_and_it_says_why(tmp_path, capsys):
    folder, numbers = ran(tmp_path, f"profile_trace={fused(tmp_path)}", "diagnose.compatible=false")
    out = capsys.readouterr().out
    assert (
        "the profile names no device; pass hardware=NAME" in out
        and "worst_efficiency" not in numbers
    )
    assert not (folder / "category_data").exists()
    words = ("hardware=h200_pcie5", "diagnose.figures=false")
    _, numbers = ran(tmp_path, f"profile_trace={fused(tmp_path)}", *words)
    assert numbers["worst_efficiency"] > 0


def test_recorded_routing_explains_and_its_remedies_have_numbers(tmp_path, collect_into):
    trace = collect_into(tmp_path / "trace")
    words = (
        f"trace={trace}",
        "hardware=h200_pcie5",
        "diagnose.simulate=false",
        "diagnose.figures=false",
    )
    folder, numbers = ran(tmp_path, f"profile_trace={fused(tmp_path)}", *words)
    assert 3 < numbers["active_experts"] < 16 and "imbalance_cost_us_4_ranks" in numbers
    findings = json.loads((folder / "findings.json").read_text())
    assert any("routing (trace=) is synthetic" in doubt for doubt in findings["doubts"])
    computed = [one for one in findings["recommendations"] if one["is_computed"]]
    assert {one["effort"] for one in findings["recommendations"]} <= {"low", "medium", "high"}
    assert len({one["title"].split(":")[0] for one in computed}) >= 4 and all(
        one["assumption"] for one in computed
    )
    page = (folder / "findings.md").read_text()
    for heading in (
        "## Efficiency", "### Expert utilisation", "### Gating", "### Cost of imbalance", "### Token dropping",
        "### Communication", "### Hotspots",
    ):  # fmt: skip
        assert heading in page
    for name in ("expert_load", "capacity", "remedies"):
        assert (folder / f"{name}.csv").exists()


def test_tables_of_tracelens_are_joined_with_recorded_routing(tmp_path, collect_into, capsys):
    """Its 4 tokens x 3 choices need as many experts as were recorded, not as many as even routing expects."""
    trace, table = collect_into(tmp_path / "trace"), tmp_path / "t.csv"
    params = {
        "num_tokens": 8,
        "hidden_dim": 64,
        "inter_dim": 32,
        "num_experts": 16,
        "topk": 3,
        "gated": True,
    }
    row = {"name": "pseudo_op::moe_aiter_fused_1stage", TIME: 50.0, "perf_params": repr(params)}
    pd.DataFrame([row]).to_csv(table, index=False)
    words = (f"profile_trace={table}", "hardware=h200_pcie5", "diagnose.figures=false")
    _, even = ran(tmp_path / "even", *words)
    folder, told = ran(tmp_path / "told", *words, f"trace={trace}", "diagnose.simulate=false")
    assert "active_experts" not in even
    (op,) = json.loads((folder / "findings.json").read_text())["operations"]
    assert op["is_exact"] and op["active_experts"] == told["active_experts"] < 16 * (
        1 - (13 / 16) ** 8
    )
    assert "imbalance_cost_us_4_ranks" in told and (folder / "capacity.csv").exists()
    with pytest.raises(ConfigError, match="has 16 experts, the profiled one 8"):
        pd.DataFrame([{**row, "perf_params": repr({**params, "num_experts": 8})}]).to_csv(
            table, index=False
        )
        ran(tmp_path / "other", *words, f"trace={trace}")


@pytest.fixture
def collect_into():
    def record(folder: Path) -> Path:
        folder.mkdir()
        writer = TraceWriter(folder, Provenance("synthetic", "test"), max_dropped=0.5)
        trace = random_trace(skew=1.5)
        writer.begin(trace.card)
        writer.append(trace)
        writer.close()
        return folder

    return record


def test_no_moe_ends_well(tmp_path, capsys):
    path = written(tmp_path, [operation("aten::mm", 0, 9), *launched(1, "gemm", 1, 20, 3)])
    folder, numbers = ran(tmp_path, f"profile_trace={path}")
    assert capsys.readouterr().out.startswith("NO_MOE")
    assert numbers["moe_kernel_time_us"] == numbers["moe_layers"] == numbers["findings"] == 0
    assert json.loads((folder / seed_files.METRICS).read_text())["status"] == "NO_DATA"


def test_a_damaged_profile_is_status_error_everywhere(tmp_path, capsys):
    path = fused(tmp_path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(FormatError, match="ends early"):
        ran(tmp_path, f"profile_trace={path}")
    assert capsys.readouterr().out.splitlines()[0] == "ERROR"
    folder = tmp_path / "out"
    assert json.loads((folder / "findings.json").read_text())["status"] == "ERROR"
    assert json.loads((folder / seed_files.METRICS).read_text())["status"] == "ERROR"
    assert (
        "Bottleneck" not in (folder / "findings.md").read_text()
        and not (folder / "metrics.json").exists()
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "profile_trace is missing"),
        (("profile_trace=nowhere.json",), "does not exist"),
        (("diagnose.tokens=0",), "must be at least 1"),
        (("diagnose.weight=fp3",), "must be one of"),
        (("diagnose.phase=both",), "must be one of"),
        (("diagnose.hardware=mine",), "auto or chosen"),
    ],
)
def test_what_is_typed_wrong_is_named(tmp_path, words, says):
    with pytest.raises(ConfigError, match=says):
        ran(tmp_path, *words)


def test_a_folder_with_several_profiles_asks_which(tmp_path):
    inside = tmp_path / "profiles"
    inside.mkdir()
    for name in ("rank0.json", "rank1.json"):
        written(inside, [], name)
    with pytest.raises(ConfigError, match=r"found 2 profiles \(rank0.json, rank1.json\): name one"):
        ran(tmp_path, f"profile_trace={inside}")


def test_a_folder_that_this_stage_left_is_no_profile(tmp_path):
    """It has the folders of TraceLens, without its tables: "no MoE" would be false."""
    folder, _ = ran(tmp_path, f"profile_trace={fused(tmp_path)}", "diagnose.figures=false")
    with pytest.raises(ConfigError, match="is what stage=diagnose left"):
        ran(tmp_path / "again", f"profile_trace={folder}")


def test_devices_are_known_by_name_or_by_what_they_are():
    rows = (
        [{"name": "NVIDIA B200", "numSms": 148}],
        [{"name": "", "numSms": 304, "computeMajor": 9}],
        [{"name": "X"}],
    )
    files = [device_file({"deviceProperties": row}) for row in rows]
    assert files == ["b200_pcie5", "mi300x_pcie5", None]
    assert device_file({}) is None


def test_the_real_profile_runs_through(tmp_path, capsys):
    path = real("b200__eager_trace.json.gz")
    words = ("diagnose.model_card=gpt_oss_120b", "diagnose.tensor_parallel=8")
    folder, numbers = ran(tmp_path, f"profile_trace={path}", *words)
    assert capsys.readouterr().out.startswith(
        "OK: MoE 6,078.4 µs, 56.0% of kernel time, 7.1% of elapsed time"
    )
    assert (
        numbers["moe_layers"] == 36 and numbers["moe_kernels"] == 252 and numbers["findings"] == 3
    )
    assert (folder / "passages.png").exists()
