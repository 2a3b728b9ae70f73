"""Readers of routing and counts that somebody saved as arrays or tables: npz, npy, safetensors, Parquet, JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as safetensors_of

from fuzzing.readers import Files, Reader
from fuzzing.source_seeds import E, K, L, T, ids_of, reads, written
from prefetch.sources.arrays import Arrays
from prefetch.sources.counts import Counts
from prefetch.sources.flame import Flame


def columns(seed: int = 0) -> dict[str, Any]:
    return {
        "expert_ids": ids_of(seed), "weights": np.full((T, L, K), 0.5, np.float32),
        "request": np.repeat([3, 4], T // 2).astype(np.int32), "position": np.tile(np.arange(T // 2), 2),
        "phase": np.tile([0, 0, 0, 1, 1, 1], 2).astype(np.uint8), "token": np.arange(T),
    }  # fmt: skip


def npz_seeds() -> list[Files]:
    full = columns() | {"layer_ids": np.array([3, 7])}
    few = {"ids": ids_of(1).astype(np.uint8), "gate_weights": np.full((T, L * K), 0.5)}
    deflated = written(lambda f: np.savez_compressed(f, **full))
    return [{"a.npz": written(lambda f: np.savez(f, **full))}, {"a.npz": written(lambda f: np.savez(f, **few))},
            {"law/a.npz": written(lambda f: np.savez(f, **full)), "code/a.npz": deflated}]  # fmt: skip


def npy_seeds() -> list[Files]:
    return [{"a.npy": written(lambda f: np.save(f, ids_of()))},
            {"a.npy": written(lambda f: np.save(f, np.asfortranarray(ids_of(1).astype(np.int64))))}]  # fmt: skip


def safetensors_seeds() -> list[Files]:
    named = {name: np.ascontiguousarray(array) for name, array in columns().items()}
    return [
        {"a.safetensors": safetensors_of(named)},
        {"a.safetensors": safetensors_of({"topk_ids": ids_of(2)})},
    ]


def parquet_of(table: dict[str, Any], **how: Any) -> bytes:
    return written(lambda f: pq.write_table(pa.table(table), f, **how))


def parquet_seeds() -> list[Files]:
    lists = {name: array.tolist() for name, array in columns().items()} | {
        "domain": ["law"] * 6 + ["code"] * 6
    }
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(ids_of().ravel()), K)
    nested = pa.FixedSizeListArray.from_arrays(fixed, L)
    return [{"a.parquet": parquet_of(lists)}, {"a.parquet": parquet_of({"expert_ids": nested}, compression="zstd")},
            {"a.parquet": parquet_of({"ids": ids_of(3).tolist(), "layer_ids": [[3, 7]] * T})}]  # fmt: skip


def counts_seeds() -> list[Files]:
    rows = [
        np.bincount(layer.ravel(), minlength=E).tolist() for layer in ids_of().transpose(1, 0, 2)
    ]
    sparse = {str(i): {str(e): n for e, n in enumerate(row) if n} for i, row in enumerate(rows)}
    events = {str(i): {"frequency": {str(e): n for e, n in enumerate(row)}, "event_count": T,
    "expert_demand_count": T * K}
              for i, row in enumerate(rows)}  # fmt: skip
    told = [
        {"statistics": sparse, "num_experts": E},
        {"expert_usage_by_layer": sparse},
        {"all_workloads": events},
        {"counts": rows},
    ]
    return [{"a.json": json.dumps(one).encode()} for one in told]


def counts_npz_seeds() -> list[Files]:
    counts = np.stack(
        [np.bincount(layer.ravel(), minlength=E) for layer in ids_of().transpose(1, 0, 2)]
    )
    return [{"a.npz": written(lambda f: np.savez(f, counts=counts, layer_ids=np.array([1, 5])))}]


def flame_seeds() -> list[Files]:
    def layer(seed: int) -> bytes:
        ids = ids_of(seed, layers=1)[:, 0]
        return parquet_of(
            {"indices": ids.tolist(), "scores": np.full((T, K), 0.5, np.float32).tolist()}
        )

    samples = parquet_of({"token_id": np.arange(T)})
    return [
        {"layer_01.parquet": layer(0)},
        {"layer_01.parquet": layer(0), "layer_02.parquet": layer(1), "samples/a.parquet": samples},
    ]


READERS = [
    Reader("arrays.npz", npz_seeds, reads(Arrays, n_experts=E)),
    Reader("arrays.npz, experts not given", npz_seeds, reads(Arrays)),
    Reader("arrays.npy", npy_seeds, reads(Arrays, n_experts=E)),
    Reader("arrays.safetensors", safetensors_seeds, reads(Arrays, n_experts=E)),
    Reader("arrays.parquet", parquet_seeds, reads(Arrays, n_experts=E)),
    Reader("counts.json", counts_seeds, reads(Counts)),
    Reader("counts.npz", counts_npz_seeds, reads(Counts)),
    Reader("flame", flame_seeds, reads(Flame, n_experts=E)),
]
