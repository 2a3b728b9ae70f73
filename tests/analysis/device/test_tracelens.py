"""Folders that TraceLens writes, of both eras, and the files that are written for its readers."""

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.device import seed_files
from analysis.device.diagnosis import Beside, Diagnosis, diagnose_tables
from analysis.device.findings import NO_MOE, OK
from analysis.device.names import load_names
from analysis.device.shapes import Known
from analysis.device.tracelens import TIME, is_output, read_output, read_table
from prefetch.errors import FormatError

NAMES = load_names()
DIMS = "((512, 7168), (16, 28672, 7168), (16, 7168, 14336), (512, 2))"
PARAMS = (
    "{'num_tokens': 8192, 'hidden_dim': 4096, 'inter_dim': 11008, 'num_experts': 8, 'topk': 1, 'gated': True, "
    "'input_dtype': 'c10::BFloat16', 'weight_dtype': 'c10::BFloat16'}"
)
KERNELS = "[{'name': 'aiter::fmoe_bf16', 'count': 1, 'total_duration_us': np.float64(6500.0)}]"
NEWER = {"platform": "MI300X", "peak_hbm_bw_tbs": 5.3, "max_achievable_tflops": {"matrix_bf16": 708},
         "gpu_utilization": {"total_time_ms": 20.0, "idle_time_percent": 30.0}}  # fmt: skip
OLDER = {"platform": "MI300X", "peak_hbm_bw_tbs": 5.3, "peak_bf16_maf_tflops": 708,
         "gpu_utilization": {"total_time_ms": 20.0}}  # fmt: skip
ROWS = {
    "newer": {"name": "pseudo_op::moe_aiter_fused_1stage", "operation_count": 1, TIME: 6500.0, "perf_params": PARAMS,
              "kernel_details_summary": KERNELS, "Input Dims": ""},
    "older": {"name": "pseudo_op::moe_aiter_fused_1stage", "count": 1, TIME: 4000.0, "Input Dims": DIMS,
              "Input type": "('c10::BFloat16', 'c10::BFloat16', 'c10::BFloat16', 'float')"},
}  # fmt: skip


def folder_of(folder: Path, rows: list[dict], metadata: dict | None) -> Path:
    (folder / "category_data").mkdir(parents=True)
    (folder / "metadata").mkdir()
    pd.DataFrame(rows).to_csv(folder / "category_data" / "moe_fused_ops.csv", index=False)
    if metadata is not None:
        (folder / "metadata" / "moe_fused_metadata.json").write_text(json.dumps(metadata))
    return folder


def diagnosed(folder: Path) -> Diagnosis:
    return diagnose_tables(read_output(folder, Known(NAMES)), Known(NAMES), Beside())


@pytest.mark.parametrize(("era", "metadata"), [("newer", NEWER), ("older", OLDER)])
def test_both_eras_give_the_same_roofline_as_its_own_results(tmp_path, era, metadata):
    """Of its unit traces 02 and 04: 3130.28 and 1864.09 µs."""
    found = diagnosed(folder_of(tmp_path / "out", [ROWS[era]], metadata))
    (op,) = found.operations
    assert is_output(tmp_path / "out") and found.status == OK
    assert op.judged.roofline_ns / 1e3 == pytest.approx(
        3130.2778 if era == "newer" else 1864.0911, abs=1e-3
    )
    assert found.total_ms == 20.0 and found.times is None
    if era == "newer":
        assert op.kernels == {"aiter::fmoe_bf16": (1, 6_500_000)}


def test_only_name_and_kernel_time_are_needed(tmp_path):
    rows = [{"name": "vllm::moe_forward", TIME: 12.5}]
    found = diagnosed(folder_of(tmp_path / "out", rows, OLDER))
    assert found.status == "MOE_UNMODELED" and found.moe_ns == 12_500
    path = tmp_path / "bare.csv"
    path.write_text("name,time\na,1\n")
    with pytest.raises(FormatError, match=r"expected the columns name and 'Kernel Time"):
        read_table(path, Known(NAMES), None)
    path.write_text(f"name,{TIME}\na,-1\n")
    with pytest.raises(FormatError, match="row 2: expected a kernel time"):
        read_table(path, Known(NAMES), None)


def test_told_costs_serve_where_no_shape_is_told(tmp_path):
    row = {"name": "pseudo_op::moe_fused_x", TIME: 100.0, "operation_count": 2, "GFLOPS": 5.0,
           "Data Moved (MB)": 64.0, "Compute Spec": "matrix_bf16"}  # fmt: skip
    (op,) = diagnosed(folder_of(tmp_path / "out", [row], NEWER)).operations
    assert (op.cost.flops, op.cost.n_bytes, op.calls) == (5e9, 64 * 2**20, 2)


def test_a_folder_without_tables_is_no_data_with_a_warning(tmp_path):
    (tmp_path / "category_data").mkdir()
    found = diagnosed(tmp_path)
    assert found.status == NO_MOE and any(
        "Diagnose the profile itself" in note for note in found.notes
    )
    seed_files.write(found, tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / seed_files.METRICS).read_text())
    assert metrics == {
        "category": "moe_fused", "status": "NO_DATA", "message": seed_files.NOT_FOUND, "total_time_ms": 0,
        "percent_of_compute": 0, "operation_count": 0, "operations": [], "category_specific": {},
    }  # fmt: skip
    assert (
        "No MoE operations found in trace" in (tmp_path / "out" / seed_files.FINDINGS).read_text()
    )


@pytest.mark.parametrize("damage", ["missing", "no JSON", "a list"])
def test_metadata_that_are_missing_or_broken_are_an_error(tmp_path, damage):
    folder = folder_of(tmp_path / "out", [ROWS["newer"]], None)
    path = folder / "metadata" / "moe_fused_metadata.json"
    if damage != "missing":
        path.write_text("{" if damage == "no JSON" else "[1]")
    with pytest.raises(FormatError, match=r"moe_fused_metadata\.json"):
        read_output(folder, Known(NAMES))


def test_the_metrics_file_has_the_schema_that_its_readers_know(tmp_path):
    found = diagnosed(folder_of(tmp_path / "in", [ROWS["newer"], ROWS["older"]], NEWER))
    seed_files.write(found, tmp_path)
    metrics = json.loads((tmp_path / seed_files.METRICS).read_text())
    assert set(metrics) == {
        "category", "status", "total_time_ms", "percent_of_compute", "operation_count", "average_efficiency_percent",
        "operations", "category_specific",
    }  # fmt: skip
    assert metrics["total_time_ms"] == 10.5 and metrics["percent_of_compute"] == 52.5
    assert metrics["category_specific"] == {"peak_maf_tflops": 708, "peak_hbm_bw_tbs": 5.3}
    first = metrics["operations"][0]
    assert set(first) == {
        "name",
        "count",
        "time_ms",
        "percent_of_category",
        "efficiency",
        "classification",
    }
    assert set(first["efficiency"]) == {
        "tflops_achieved", "tb_s_achieved", "efficiency_percent", "bound_type", "flops_per_byte", "compute_spec",
        "warning", "is_anomaly",
    }  # fmt: skip
    assert first["efficiency"]["efficiency_percent"] == 48.16 and first["classification"] == {
        "moe_type": "fused"
    }
    page = (tmp_path / seed_files.FINDINGS).read_text()
    order = [
        page.index(f"## {title}")
        for title in ("Operations", "Bottlenecks", "Recommendations", "Detailed Analysis")
    ]
    assert order == sorted(order)


def test_an_error_carries_no_bottleneck(tmp_path):
    seed_files.write_error("it broke", tmp_path)
    metrics = json.loads((tmp_path / seed_files.METRICS).read_text())
    assert metrics == {"category": "moe_fused", "status": "ERROR", "error": "it broke"}
    page = (tmp_path / seed_files.FINDINGS).read_text()
    assert "**Status:** ERROR" in page and "## Bottlenecks" not in page and "CUDA" not in page


def test_the_older_eras_tree_says_who_called(tmp_path):
    folder = folder_of(tmp_path / "out", [{**ROWS["older"], "ex_UID": 17}], OLDER)
    tree = folder / "category_data" / "moe_fused_tree_data.json"
    tree.write_text(
        json.dumps({"17": {"op_name": "x", "parent_chain": ["layer 3", {"name": "model"}]}})
    )
    assert diagnosed(folder).operations[0].modules == ("layer 3", "model")
    tree.write_text("[]")
    with pytest.raises(FormatError, match=r"moe_fused_tree_data\.json.*mapping of ids"):
        diagnosed(folder)


def test_moe_that_tracelens_files_elsewhere_is_found_there(tmp_path):
    """As it does with `vllm::moe_forward` where it does not know the kernels."""
    (tmp_path / "category_data").mkdir()
    rows = [{"name": "vllm::moe_forward", TIME: 12.5}, {"name": "aten::mm", TIME: 99.0}]
    pd.DataFrame(rows).to_csv(tmp_path / "category_data" / "other_ops.csv", index=False)
    found = diagnosed(tmp_path)
    assert found.status == "MOE_UNMODELED" and found.moe_ns == 12_500


@pytest.mark.parametrize("took", ["inf", "abc", "-1", ""])
def test_a_time_that_is_none_is_named(tmp_path, took):
    path = tmp_path / "t.csv"
    path.write_text(f"name,{TIME}\na,{took}\n")
    with pytest.raises(FormatError, match=r"t\.csv, row 2: expected a kernel time"):
        read_table(path, Known(NAMES), None)


@pytest.mark.parametrize(
    "row",
    [{"operation_count": "inf"}, {"kernel_details_summary": "[{'name': 'k', 'count': 'x', 'total_duration_us': 'y'}]"},
     {"perf_params": "{'num_tokens': '12.5', 'hidden_dim': -3, 'inter_dim': 'abc', 'num_experts': 8, 'topk': 1}"},
     {"GFLOPS": -1, "Data Moved (MB)": "x"}],
)  # fmt: skip
def test_cells_that_are_no_numbers_cost_nothing_but_the_model(tmp_path, row):
    row = {"name": "pseudo_op::moe_aiter_fused_1stage", TIME: 5.0, **row}
    found = diagnosed(folder_of(tmp_path / "out", [row], NEWER))
    assert found.moe_ns == 5_000 and found.status == "MOE_UNMODELED"


@pytest.mark.parametrize(
    "bad", [{"peak_hbm_bw_tbs": "fast"}, {"peak_hbm_bw_tbs": 0}, {"peak_hbm_bw_tbs": 1e308},
            {"max_achievable_tflops": [1]}, {"max_achievable_tflops": {"matrix_bf16": -5}}]
)  # fmt: skip
def test_peaks_that_are_none_are_named(tmp_path, bad):
    with pytest.raises(FormatError, match=r"metadata.*(expected a number over 0)"):
        diagnosed(folder_of(tmp_path / "out", [ROWS["newer"]], {**NEWER, **bad}))


def test_a_second_product_does_not_say_that_its_experts_are_not_gated(tmp_path):
    """TraceLens tells of the row: the second product is never gated, its expert has three matrices."""
    params = PARAMS.replace("'gated': True", "'gated': False")
    row = {**ROWS["newer"], "name": "pseudo_op::moe_triton_unfused_down", "perf_params": params}
    (op,) = diagnosed(folder_of(tmp_path / "out", [row], NEWER)).operations
    assert op.role == "down" and op.is_modelled and op.shape.gated is None


def test_a_share_without_a_whole_is_null(tmp_path):
    rows = [{"name": "vllm::moe_forward", TIME: 12.5}]
    found = diagnosed(folder_of(tmp_path / "out", rows, {**NEWER, "gpu_utilization": {}}))
    assert seed_files.metrics_of(found)["percent_of_compute"] is None


def test_ids_of_operations_are_found_though_a_cell_is_empty(tmp_path):
    rows = [{**ROWS["older"], "ex_UID": 17}, {**ROWS["older"], "ex_UID": None}]
    folder = folder_of(tmp_path / "out", rows, OLDER)
    tree = folder / "category_data" / "moe_fused_tree_data.json"
    tree.write_text(json.dumps({"17": {"parent_chain": ["layer 3"]}}))
    assert [op.modules for op in diagnosed(folder).operations] == [("layer 3",), ()]
