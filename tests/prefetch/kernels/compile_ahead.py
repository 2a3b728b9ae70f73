"""Compiles every shipped configuration for sm_90 where no GPU is, and prints what each program needs, as JSON.

    python tests/prefetch/kernels/compile_ahead.py [NAME...]

Run it without TRITON_INTERPRET, in a process of its own: a function that is interpreted cannot be compiled. Constants
come from the code that launches. Registers and stack are cuobjdump's, instructions nvdisasm's; what is spilled goes
through LDL and STL.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prefetch.kernels import (
    combine,
    decode,
    grouped,
    int8,
    int8_kernel,
    plan_kernel,
    route_kernel,
    swapped,
)
from prefetch.kernels.launch import down_constants, options, sum_constants, up_constants
from prefetch.kernels.layout import ExpertLayout
from prefetch.kernels.shipped import (
    DECODE,
    GROUPED,
    GROUPED_EXACT,
    GROUPED_UNEVEN,
    SWAPPED,
    SWAPPED_EXACT,
    Config,
    next_power,
    plan_warps,
    route_tokens,
    route_warps,
    sum_tiles,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SM_90 = GPUTarget("cuda", 90, 32)
OPCODES = ("HGMMA", "HMMA", "LDGSTS", "LDG", "UTMALDG", "LDL", "STL", "ATOMG", "RED")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
QWEN = {dtype: ExpertLayout(2048, 768, dtype) for dtype in SHORT}
GPT_OSS = ExpertLayout(2880, 2880, BF16, "clamped_swiglu", has_bias=True)
MIXTRAL = ExpertLayout(4096, 14336, BF16)


@dataclass(frozen=True)
class Compiled:
    """What is compiled: a function, its arguments' types, its constants, and how it is launched."""

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def cases() -> Iterator[Compiled]:
    yield from layers("qwen3", QWEN[BF16], 8)
    yield from layers("gpt_oss", GPT_OSS, 4)
    yield from layers("mixtral", MIXTRAL, 2, few=True)
    yield from layers("qwen3_fp16", QWEN[FP16], 8, few=True)
    yield from layers("qwen3_fp32", QWEN[FP32], 8)
    yield from in_int8("qwen3", 2048, 768, 8)
    yield from in_int8("odd", 2880, 2880, 4)
    for n_tokens, n_experts, top_k, groups in ((1, 128, 8, 1), (1, 129, 4, 1), (999, 256, 8, 8)):
        yield routing(n_tokens, n_experts, top_k, groups)
    for n_rows, n_experts, block in ((128, 128, 16), (512, 129, 16), (2048, 128, 64), (512, 8, 64)):
        yield planning(n_rows, n_experts, block)
    types = {"rows_TKD": "*fp32", "out_TD": "*bf16", "ids_TK": "*i32", "slots_E": "*i32"}
    sizes = {"D": 2880, "K": 8, "K_PAD": 8, "BD": combine.BLOCK}
    constants = sizes | {"HAS_IDS": True, "HAS_SLOTS": True}
    yield Compiled("combine", combine.sum_rows, types, constants, plain(4))


def layers(name: str, layout: ExpertLayout, top_k: int, few: bool = False) -> Iterator[Compiled]:
    """All paths of one expert's sizes; `few`: one configuration of each path."""
    yield from decoding(name, layout, top_k)
    exact = layout.dtype == FP32
    by_rows = SWAPPED_EXACT if exact else SWAPPED
    for rows, config in list(by_rows.items())[: 1 if few else None]:
        yield from planned("swapped", f"{name}_swapped{rows}", layout, top_k, config)
    tall = GROUPED[128] if layout.hidden % 256 == 0 else GROUPED_UNEVEN
    many = [GROUPED_EXACT] if exact else [GROUPED[64], tall]
    for config in many[-1:] if few else many:
        yield from planned("grouped", f"{name}_grouped{config.up.rows}", layout, top_k, config)


def decoding(name: str, layout: ExpertLayout, top_k: int) -> Iterator[Compiled]:
    w = f"*{SHORT[layout.dtype]}"
    up = {"x_TD": w, "pool_SN": w, "h_RF": w, "ids_R": "*i32", "slots_E": "*i32"}
    of = up_constants("decode", layout, top_k, DECODE.up, False)
    yield Compiled(f"{name}_up_row", decode.up_row, up, of, options(DECODE.up))
    down = {"h_RF": w, "pool_SN": w, "rows_RD": "*fp32", "out_TD": w, "ids_R": "*i32"}
    down |= {"weights_R": "*fp32", "slots_E": "*i32"}
    of = down_constants("decode", layout, DECODE.down, False)
    yield Compiled(f"{name}_down_row", decode.down_row, down, of, options(DECODE.down))
    of = sum_constants(layout, top_k)
    yield Compiled(f"{name}_down_sum", decode.down_sum, down, of, options(sum_tiles(top_k)))


def in_int8(name: str, hidden: int, inner: int, top_k: int) -> Iterator[Compiled]:
    layout = int8.Int8Layout(hidden, inner, BF16)
    types = {
        "x_TD": "*bf16",
        "h_RF": "*bf16",
        "out_TD": "*bf16",
        "pool_SN": "*i8",
        "scales_SM": "*fp32",
    }
    types |= {"ids_R": "*i32", "weights_R": "*fp32", "slots_E": "*i32"}
    of = int8.constants(layout, top_k, down=False)
    yield Compiled(f"{name}_int8_up_row", int8_kernel.up_int8, types, of, options(int8.UP))
    of = int8.constants(layout, top_k, down=True)
    yield Compiled(
        f"{name}_int8_down_sum", int8_kernel.down_int8, types, of, options(sum_tiles(top_k))
    )


def planned(
    path: str, name: str, layout: ExpertLayout, top_k: int, config: Config
) -> Iterator[Compiled]:
    short = SHORT[layout.dtype]
    types = {of: f"*{short}" for of in ("x_TD", "pool_SN", "h_RF")}
    types |= {of: "*fp32" for of in ("rows_RD", "weights_R")}
    types |= {of: "*i32" for of in ("perm_R", "starts_E1", "tile_expert", "tile_slot", "tile_row")}
    module = {"swapped": swapped, "grouped": grouped}[path]
    of = up_constants(path, layout, top_k, config.up, False)
    box = {"matrix": f"tensordesc<{short}[1,{2 * config.up.columns},{config.up.depth}]>"}
    up = getattr(module, f"up_{path}")
    yield Compiled(f"{name}_up", up, types | box, of, options(config.up))
    of = down_constants(path, layout, config.down, False)
    box = {"matrix": f"tensordesc<{short}[1,{config.down.columns},{config.down.depth}]>"}
    down = getattr(module, f"down_{path}")
    yield Compiled(f"{name}_down", down, types | box, of, options(config.down))


def routing(n_tokens: int, n_experts: int, top_k: int, groups: int) -> Compiled:
    types = {"logits_TE": "*fp32", "bias_E": "*fp32", "ids_TK": "*i32", "weights_TK": "*fp32"}
    types |= {"T": "i32", "stride": "i32", "scale": "fp32"}
    constants = {
        "E": n_experts, "K": top_k, "E_PAD": next_power(n_experts), "K_PAD": next_power(top_k),
        "BLOCK_T": route_tokens(n_tokens), "SIGMOID": groups > 1, "HAS_BIAS": groups > 1, "RENORMALISE": True,
        "N_GROUPS": groups, "KEPT": max(1, groups // 2), "P": next_power(groups),
    }  # fmt: skip
    of = plain(route_warps(n_experts))
    return Compiled(f"route_{n_experts}", route_kernel.route_rows, types, constants, of)


def planning(n_rows: int, n_experts: int, block: int) -> Compiled:
    function, rows = plan_kernel.plan_rows, next_power(n_rows)
    types = {name: "*i32" for name in function.arg_names[:10]} | {"R": "i32", "B": "i32"}
    constants = {
        "E": n_experts, "E_PAD": next_power(n_experts), "BLOCK": rows, "BM": block,
        "B_PAD": plan_kernel.tiles_padded(rows, n_experts, block),
    }  # fmt: skip
    of = plain(plan_warps(rows))
    return Compiled(f"plan_{n_rows}_{n_experts}_{block}", function, types, constants, of)


def plain(warps: int) -> dict[str, Any]:
    return {"num_warps": warps, "enable_fp_fusion": False}


def needs(case: Compiled) -> dict[str, Any]:
    """Compile one and say what it needs."""
    names, constants = case.function.arg_names, dict(case.constants)
    types = {name: case.types[name] for name in names if name in case.types}
    if not constants.get("TMA", True):
        types.pop("matrix", None)
        constants["matrix"] = None
    signature = {name: types.get(name, "constexpr") for name in names}
    pointers = [name for name, of in types.items() if of.startswith("*")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(case.function, signature, constants, attrs)
    kernel = triton.compile(source, target=SM_90, options=case.options)
    with tempfile.TemporaryDirectory() as folder:
        return {"shared": kernel.metadata.shared, **inspected(kernel.asm, Path(folder))}


def inspected(asm: dict[str, Any], folder: Path) -> dict[str, Any]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(asm["cubin"])
    usage = tool(TOOLS / "cuobjdump", "--dump-resource-usage", str(cubin))
    sass = tool(TOOLS / "nvdisasm", str(cubin))
    return {
        "registers": int(found(r"REG:(\d+)", usage)),
        "stack": int(found(r"STACK:(\d+)", usage)),
        "opcodes": {op: n for op in OPCODES if (n := len(re.findall(rf"\b{op}\b", sass)))},
        "mma": sorted(set(re.findall(r"m64n\d+k\d+|m16n8k\d+", asm["ptx"]))),
        "wide_loads": len(re.findall(r"(?:LDG|LDGSTS)\.E[.\w]*\.128", sass)),
    }


def tool(path: Path, *arguments: str) -> str:
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(
            f"no {pattern!r} in what a tool of triton {triton.__version__} printed: {text[:400]}"
        )
    return match.group(1)


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for case in cases():
        if not wanted or any(part in case.name for part in wanted):
            print(json.dumps({"name": case.name, **needs(case)}), flush=True)
