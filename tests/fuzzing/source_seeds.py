"""Readers of what engines and servers log or return, and files as they write them, a dozen tokens each."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from router_logs import zipf_passes

from fuzzing.readers import Files, Reader
from prefetch.sources.esft import Esft
from prefetch.sources.llama_csv import LlamaCsv
from prefetch.sources.llama_eval_callback import LlamaEvalCallback
from prefetch.sources.llama_imatrix import LlamaImatrix
from prefetch.sources.llama_server import LlamaServer
from prefetch.sources.route_csv import RouteCsv
from prefetch.sources.sglang import Sglang
from prefetch.sources.source import Source
from prefetch.sources.specmoe import SpecMoE
from prefetch.sources.texts import Fields, file_texts
from prefetch.sources.vllm import Vllm
from prefetch.trace.provenance import Provenance
from prefetch.trace.writer import TraceWriter

E, K, T, L = 8, 2, 12, 2
Ids = NDArray[np.int32]


def recorded(source: Source, out: Path) -> None:
    """As stage=collect calls it."""
    if source.gives == "counts":
        source.count(Provenance("real", "fuzz"))
        return
    writer = TraceWriter(out, Provenance("real", "fuzz"), max_dropped=1.0)
    source.record(writer, {})
    writer.close()


def reads(
    made: Callable[..., Source], pattern: str = "", **settings: Any
) -> Callable[[Path, Path], object]:
    def read(folder: Path, out: Path) -> None:
        recorded(made(path=str(folder / pattern) if pattern else str(folder), **settings), out)

    return read


def ids_of(seed: int = 0, n_experts: int = E, layers: int = L) -> Ids:
    noise = np.random.default_rng(seed).random((T, layers, n_experts))
    return noise.argsort(axis=2)[..., :K].astype(np.int32)


def written(save: Callable[[Any], object]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def esft_seeds() -> list[Files]:
    def text(seed: int) -> bytes:
        ids = ids_of(seed, layers=1)[:, 0]
        lines = [
            "\t".join(map(str, part.ravel())) + "\t\t" + "\t".join(["0.5"] * part.size)
            for part in (ids[:5], ids[5:])
        ]
        return ("\n".join(lines) + "\n").encode()

    plain = {f"law/expert_weights_{layer}.txt": text(layer) for layer in (1, 2)}
    return [plain, {"expert_weights_1.txt.gz": gzip.compress(text(3), mtime=0)}]


def llama_lines(sizes: list[int], layers: tuple[int, ...] = (3, 4)) -> list[tuple[int, list[int]]]:
    passes = zipf_passes(sizes, n_experts=E, k=K, layers=layers)
    return [
        (layer, row)
        for one in passes
        for layer, rows in zip(layers, one, strict=True)
        for row in rows.tolist()
    ]


def llama_server_seeds() -> list[Files]:
    rows = llama_lines([5, 1, 1, 3, 1])
    plain = "layer_id,expert_ids\n" + "".join(
        f"{layer},{' '.join(map(str, ids))}\n" for layer, ids in rows
    )
    other = "Layer,Token,ExpertIDs,ExpertWeights\n" + "".join(
        f'{layer},0,"[{" ".join(map(str, ids))}]","[0.5 0.5]"\n'
        for layer, ids in llama_lines([1, 1, 1])
    )
    texts = {"run.log": plain, "other.csv": other}
    packed: Files = {"run.log.gz": gzip.compress(plain.encode(), mtime=0)}
    return [{name: text.encode()} for name, text in texts.items()] + [packed]


def gate_input_seeds() -> list[Files]:
    lines = ["layer_id,expert_ids\n"]
    for one in zipf_passes([3, 1], n_experts=E, k=K, layers=(3, 4)):
        for layer, rows in zip((3, 4), one, strict=True):
            lines += [f"gate_input,{layer},{t},0.5 0.25 -1e-3\n" for t in range(len(rows))]
            lines += [f"{layer},{' '.join(map(str, ids))}\n" for ids in rows.tolist()]
    return [{"run.log": "".join(lines).encode()}]


def llama_csv_seeds() -> list[Files]:
    text = "layer,expert\n" + "".join(
        f"{layer},{e}\n" for layer, ids in llama_lines([4, 1, 1]) for e in ids
    )
    return [{"a.csv": text.encode()}, {"a.csv.gz": gzip.compress(text.encode(), mtime=0)}]


def eval_callback_seeds() -> list[Files]:
    def tensor(name: str, kind: str, rows: NDArray[Any], number: str) -> str:
        n, k = rows.shape
        body = "".join(
            f"      [{', '.join(format(x, number) for x in row)}],\n" for row in rows.tolist()
        )
        shape = f"{k}, {n}, 1, 1" if kind == "i32" else f"1, {k}, {n}, 1"
        origin = f"VIEW({name.replace('topk', 'argsort')}{{{E}, {n}, 1, 1}}, }})"
        head = f"common_debug_cb_eval:   {name} = ({kind})  {origin} = {{{shape}}}\n"
        return f"{head}    [\n     [\n{body}     ],\n    ]\n    sum = 1.0\n"

    text = "llama_context: n_ctx = 512\n"
    for one in zipf_passes([5, 1], n_experts=E, k=K, layers=(1, 2)):
        for layer, rows in zip((1, 2), one, strict=True):
            text += tensor(f"ffn_moe_topk-{layer}", "i32", rows, "6d")
            text += tensor(f"ffn_moe_weights-{layer}", "f32", np.full(rows.shape, 0.5), "8.4f")
    return [{"a.txt": text.encode()}, {"a.log.gz": gzip.compress(text.encode(), mtime=0)}]


def imatrix_seeds() -> list[Files]:
    import gguf

    told = {"blk.1.ffn_gate_exps.weight": [5, 0, 3, 8], "blk.1.ffn_down_exps.weight": [5, 0, 3, 8],
            "blk.2.ffn_up_exps.weight": [4, 4, 4, 4], "blk.1.attn_q.weight": [16]}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer = gguf.GGUFWriter(path, arch="")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["a.txt", "b.txt"])
        writer.add_uint32("imatrix.chunk_count", 7)
        for name, values in told.items():
            writer.add_tensor(f"{name}.in_sum2", np.ones((len(values), 4), np.float32))
            writer.add_tensor(f"{name}.counts", np.array(values, np.float32).reshape(-1, 1))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [{"a.gguf": path.read_bytes()}]


def route_csv_seeds() -> list[Files]:
    ids = ids_of()
    head = f"# route_trace v1\n# model=m n_layer={L} n_expert={E} n_expert_used={K}\n"
    head += "".join(f"# layer={layer} expert_bytes=9 dense_bytes=9\n" for layer in range(L))
    cells = [
        (0 if t < 8 else 1, int(t >= 4), t, layer, k)
        for t in range(T)
        for layer in range(L)
        for k in range(K)
    ]
    rows = [
        f"{turn},{phase},{t},{layer},{k},{ids[t, layer, k]}" for turn, phase, t, layer, k in cells
    ]
    names = "turn,phase,step,layer,slot,expert"
    plain = head + names + ",weight\n" + "".join(f"{row},0.5\n" for row in rows)
    full = (
        head
        + names
        + ",weight,residency,expert_bytes\n"
        + "".join(f"{row},0.5,1,9\n" for row in rows)
    )
    return [
        {"a.csv": plain.encode()},
        {"a.csv": full.encode()},
        {"a.csv": (head + names + "\n" + "\n".join(rows) + "\n").encode()},
    ]


def vllm_seeds() -> list[Files]:
    ids = ids_of()
    packed = base64.b64encode(written(lambda f: np.save(f, ids))).decode()
    raw = {
        "data": base64.b64encode(ids.tobytes()).decode(),
        "shape": list(ids.shape),
        "dtype": "int32",
        "start": 0,
    }
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    told = [
        {"prompt_routed_experts": ids[:5].tolist(), "choices": [{"routed_experts": ids[5:].tolist(), "token_ids": [1,
        2]}],
         "prompt_token_ids": list(range(5))},
        {"choices": [{"routed_experts": packed}], "usage": usage}, {"routed_experts": raw, "usage": usage},
        {"prompt_routed_experts": ids.tolist()},
    ]  # fmt: skip
    lines = [json.dumps(one) for one in told]
    return [{"a.jsonl": line.encode() + b"\n"} for line in lines] + [
        {"a.jsonl.gz": gzip.compress("\n".join(lines[:2]).encode(), mtime=0)}, {"a.npy": written(lambda f: np.save(f,
        ids))},
    ]  # fmt: skip


def vllm_log_seeds() -> list[Files]:
    ids = ids_of()
    rows = [
        {"layer": la, "token_idx": t, "topk_ids": ids[t, la].tolist(), "topk_weights": [0.5, 0.5]}
        for t in range(T)
        for la in range(L)
    ]
    lines = [json.dumps(row) for row in rows]
    return [
        {"log.jsonl": ("\n".join(lines) + "\n").encode()},
        {"log.jsonl": ("\n".join(['{"model": "m"}', *lines]) + "\n").encode()},
    ]


def sglang_seeds() -> list[Files]:
    def record(
        number: int, positions: list[int], lengths: list[int] | None, mode: int
    ) -> dict[str, Any]:
        topk = torch.full((L + 1, len(positions), K + 1), -1, dtype=torch.int32)
        topk[1:, :, :K] = torch.tensor(ids_of(number)[: len(positions)].transpose(1, 0, 2).copy())
        return {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "input_ids": [7] * len(positions),
                "positions": positions, "extend_seq_lens": lengths, "forward_mode": mode, "topk_ids_of_layer": topk,
                "misc_objects": []}  # fmt: skip

    records = [
        record(0, [0, 1, 2, 3, 0, 1], [4, 2], 1),
        record(1, [4, 2], None, 2),
        record(2, [5, 3], None, 2),
    ]
    own = torch.arange(E).repeat(L + 1, 1)
    return [{"a.pt": written(lambda f: torch.save({"records": records}, f))},
            {"a.pt": written(lambda f: torch.save({"records": records[:1], "last_physical_to_logical_map": own},
            f))}]  # fmt: skip


def sglang_served_seeds() -> list[Files]:
    ids = ids_of()
    raw = base64.b64encode(ids.tobytes()).decode()
    about = {"prompt_tokens": 5, "completion_tokens": 8, "cached_tokens": 1}
    told = [
        {"meta_info": {**about, "routed_experts": raw}},
        {"choices": [{"sgl_ext": {"routed_experts": raw}}], "usage": about},
    ]
    return [{"a.jsonl": (json.dumps(one) + "\n").encode()} for one in told]


def pickle_seeds() -> list[Files]:
    ids = ids_of()
    scores = np.full((T, E), 1 / E, np.float32)
    fields = {
        "target_routing": scores,
        "sample_id": "law_0",
        "dataset_name": "law",
        "sequence_length": T,
    }
    plain = [
        {**fields, "layer_id": la, "target_top_k": ids[:, la], "token_ids": np.arange(T)}
        for la in range(L)
    ]
    tensors = [{**fields, "layer_id": la, "target_routing": torch.tensor(scores), "target_top_k": torch.tensor(ids[:,
    la].copy())}
               for la in range(L)]  # fmt: skip
    return [{"a.pkl": pickle.dumps(plain, protocol)} for protocol in (0, 2, 4, 5)] + [
        {"a.pkl": pickle.dumps(tensors, 4)}
    ]


def text_seeds() -> list[Files]:
    lines = "".join(
        json.dumps({"text": text, "kind": "law"}) + "\n" for text in ("one two", "three", "\u00e9")
    )
    return [
        {"a.jsonl": lines.encode()},
        {"law/a.txt": b"three words here\n", "code/b.txt": b"x = 1\n"},
    ]


def read_texts(folder: Path, _: Path) -> None:
    from prefetch.sources.files import find_files

    for fields in (Fields(), Fields("text", "kind")):
        list(file_texts(find_files(str(folder), (".txt", ".jsonl")), fields))


READERS = [
    Reader("esft", esft_seeds, reads(Esft, n_experts=E, top_k=K)),
    Reader("llama_server", llama_server_seeds, reads(LlamaServer, n_experts=E)),
    Reader(
        "llama_server, gate inputs",
        gate_input_seeds,
        reads(LlamaServer, n_experts=E, gate_inputs=True),
    ),
    Reader("llama_csv", llama_csv_seeds, reads(LlamaCsv, n_experts=E, top_k=K)),
    Reader("llama_eval_callback", eval_callback_seeds, reads(LlamaEvalCallback)),
    Reader("llama_imatrix", imatrix_seeds, reads(LlamaImatrix, top_k=K)),
    Reader("route_csv", route_csv_seeds, reads(RouteCsv)),
    Reader("vllm", vllm_seeds, reads(Vllm, n_experts=E, prompt_tokens=5, n_layers=L, top_k=K)),
    Reader("vllm log", vllm_log_seeds, reads(Vllm, n_experts=E)),
    Reader("sglang recorder", sglang_seeds, reads(Sglang, n_experts=E, ids="logical")),
    Reader("sglang recorder, physical", sglang_seeds, reads(Sglang, n_experts=E, ids="physical")),
    Reader(
        "sglang responses",
        sglang_served_seeds,
        reads(Sglang, n_experts=E, ids="logical", n_layers=L, top_k=K),
    ),
    Reader("specmoe", pickle_seeds, reads(SpecMoE)),
    Reader("texts", text_seeds, read_texts),
]
