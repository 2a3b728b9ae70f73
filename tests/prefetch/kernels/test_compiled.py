"""What a GPU would refuse or do slowly is found without one: every shipped configuration, compiled for sm_90.

Shared memory above the limit compiles, and fails only when it is launched.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefetch.kernels.shipped import GROUPED, SHARED_LIMIT, SWAPPED

SCRIPT = Path(__file__).with_name("compile_ahead.py")
ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is only packaged for Linux")


@functools.cache
def compiled() -> dict[str, dict[str, Any]]:
    """By name. In a process without the interpreter, which cannot compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def of_path(part: str, *without: str) -> dict[str, dict[str, Any]]:
    rows = {name: row for name, row in compiled().items() if part in name}
    rows = {name: row for name, row in rows.items() if not any(no in name for no in without)}
    assert rows
    return rows


def test_everything_fits_and_nothing_spills() -> None:
    swapped = {f"{dtype}_swapped{rows}_up" for rows in SWAPPED for dtype in ("qwen3", "qwen3_fp32")}
    grouped = {f"{name}_grouped{rows}_up" for rows in GROUPED for name in ("qwen3", "gpt_oss")}
    few = {"gpt_oss_down_sum", "qwen3_up_row", "qwen3_int8_up_row", "qwen3_int8_down_sum"}
    assert swapped | grouped | few <= set(compiled())
    for name, row in compiled().items():
        assert row["shared"] <= SHARED_LIMIT, name
        assert row["stack"] == 0 and not {"LDL", "STL"} & set(row["opcodes"]), f"{name} spills"


def test_products_are_matrix_instructions_of_the_expected_shape() -> None:
    for name, row in of_path("_swapped", "fp32").items():
        rows = name.partition("_swapped")[2].partition("_")[0]
        assert row["mma"] == [f"m64n{rows}k16"] and "HGMMA" in row["opcodes"], name
    for name, row in of_path("_grouped", "fp32").items():
        assert "HGMMA" in row["opcodes"] and "HMMA" not in row["opcodes"], name
    assert compiled()["qwen3_grouped128_up"]["mma"] == ["m64n256k16"]
    for name, row in of_path("fp32").items():
        assert not row["mma"], f"{name}: float32 is multiplied exactly, not as tf32"


def test_weights_come_in_sixteen_byte_pieces() -> None:
    for name, row in (of_path("_row") | of_path("_sum")).items():
        assert row["wide_loads"] >= 2, name
    for name, row in of_path("_swapped").items():
        assert row["opcodes"]["LDGSTS"] and row["wide_loads"], f"{name}: copies are not ahead"
    for name, row in of_path("_grouped", "fp32").items():
        assert "UTMALDG" in row["opcodes"], f"{name}: not by the tensor copy engine"


def test_nothing_adds_to_memory_that_another_program_adds_to() -> None:
    for name, row in compiled().items():
        assert not {"ATOMG", "RED"} & set(row["opcodes"]), f"{name}: sums would differ by run"
