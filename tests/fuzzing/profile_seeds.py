"""Readers of `stage=diagnose`: a profiler's trace, the tables of TraceLens. They are diagnosed and written out."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any, cast

import pandas as pd
from hydra import compose, initialize_config_dir
from profiler_traces import launched, module, operation, span

from analysis.device import doubts, page, rows, seed_files
from analysis.device.names import load_names
from analysis.device.tracelens import TIME
from analysis.diagnose import _diagnosed, check, profile_path
from fuzzing.readers import Files, Reader
from prefetch import config
from prefetch.config import Config
from prefetch.models.cards import load_architecture

DIMS = [[8, 64], [16, 64, 64], [16, 64, 32], [8, 3]]


@cache
def composed() -> Config:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        words = ["stage=diagnose", "tracker=none", "diagnose.hardware=chosen"]
        return cast(Config, compose("config", overrides=words))


@cache
def names() -> Any:
    """Of the project's own files each is read once: they are not what is tried here."""
    doubts.load_architecture = cache(load_architecture)
    return load_names()


def diagnosed(folder: Path, out: Path) -> None:
    """A folder with one profile, or one of TraceLens, as the stage reads them."""
    cfg = composed()
    cfg.profile_trace = str(folder)
    check(cfg)
    found = _diagnosed(cfg, profile_path(cfg.profile_trace), names())
    page.first_line(found)
    page.page(found)
    json.dumps(rows.to_json(found))
    rows.metrics(found)
    seed_files.write(found, out)
    pd.DataFrame([rows.operation_row(op, found.moe_ns) for op in found.operations])


def events(n: int = 3) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        span("user_annotation", "execute_context_1(8)_generation_0(0)", 0, 5000),
        module("Qwen3MoeSparseMoeBlock_0", 1, 900), module("Attention_0", 1000, 100),
    ]  # fmt: skip
    for i in range(n):
        at = 10 + 300 * i
        found += [
            operation("vllm::rocm_aiter_fused_moe", at, 50, DIMS),
            *launched(2 * i + 1, "aiter_fused_moe", at + 5, at + 60, 40),
            operation("aten::mm", at + 120, 9, [[8, 64], [64, 16]]),
            *launched(2 * i + 2, "Cijk_gemm", at + 122, at + 150, 20),
        ]
    return [
        *found,
        operation("vllm::topk_softmax", 1200, 5, [[8, 2], [8, 2], [8, 2], [8, 16]]),
        *launched(99, "topk_softmax", 1201, 1210, 4),
    ]


def chrome_seeds() -> list[Files]:
    meta = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "AMD Instinct MI300X", "totalGlobalMem": 2**37}],
            "distributedInfo": {"rank": 0, "world_size": 2}}  # fmt: skip
    told = {**meta, "traceEvents": events()}
    return [{"t.json": json.dumps(told).encode()}, {"t.json": json.dumps(events(1)).encode()}]


def gzip_seeds() -> list[Files]:
    return [{"t.json.gz": gzip.compress(files["t.json"], mtime=0)} for files in chrome_seeds()]


def tracelens_seeds() -> list[Files]:
    params = (
        "{'num_tokens': 8192, 'hidden_dim': 4096, 'inter_dim': 11008, 'num_experts': 8, 'topk': 1, 'gated': True, "
        "'input_dtype': 'c10::BFloat16', 'weight_dtype': 'c10::BFloat16'}"
    )
    kernels = "[{'name': 'aiter::fmoe_bf16', 'count': 1, 'total_duration_us': np.float64(6500.0)}]"
    newer = {"name": "pseudo_op::moe_aiter_fused_1stage", "operation_count": 1, TIME: 6500.0, "perf_params": params,
             "kernel_details_summary": kernels, "Input Dims": "", "ex_UID": 7}  # fmt: skip
    older = {"name": "pseudo_op::moe_aiter_fused_1stage", "count": 1, TIME: 4000.0, "ex_UID": 8,
             "Input Dims": "((512, 7168), (16, 28672, 7168), (16, 7168, 14336), (512, 2))",
             "Input type": "('c10::BFloat16', 'c10::BFloat16', 'c10::BFloat16', 'float')"}  # fmt: skip
    peaks = {
        "platform": "MI300X",
        "peak_hbm_bw_tbs": 5.3,
        "gpu_utilization": {"total_time_ms": 20.0},
    }
    tree = {"7": {"parent_chain": ["a", {"name": "Qwen3MoeSparseMoeBlock_0"}]}}
    more = {"max_achievable_tflops": {"matrix_bf16": 708, "vector_fp32": None}}
    return [
        _tracelens([newer], {**peaks, **more}, tree),
        _tracelens([older, older], {**peaks, "peak_bf16_maf_tflops": 708}, tree),
    ]


def _tracelens(table: list[dict[str, Any]], peaks: dict[str, Any], tree: dict[str, Any]) -> Files:
    text = pd.DataFrame(table).to_csv(index=False).encode()
    return {
        "category_data/moe_fused_ops.csv": text, "category_data/other_ops.csv": text,
        "category_data/moe_fused_tree_data.json": json.dumps(tree).encode(),
        "metadata/moe_fused_metadata.json": json.dumps(peaks).encode(),
    }  # fmt: skip


READERS = [
    Reader("profile.json", chrome_seeds, diagnosed),
    Reader("profile.json.gz", gzip_seeds, diagnosed),
    Reader("TraceLens", tracelens_seeds, diagnosed),
]
