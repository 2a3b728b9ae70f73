"""Operations, bytes and number type of a matrix product, from what a profile says it was called with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"}
ARITHMETIC = ("fp32", "bf16", "fp16", "fp8", "int8")  # of a matrix product; others as fp32
ELEMENTS = {  # as a profile spells them: bytes, and place in ARITHMETIC
    "float": (4, 0), "double": (8, 0), "c10::BFloat16": (2, 1), "c10::Half": (2, 2), "signed char": (1, 4),
    "c10::Float8_e4m3fn": (1, 3), "c10::Float8_e4m3fnuz": (1, 3), "c10::Float8_e5m2": (1, 3),
}  # fmt: skip
Product = tuple[int, int, int]  # operations, bytes, place in ARITHMETIC
NO_PRODUCT: Product = (0, 0, 0)
LARGEST = 2**62


def product_of(args: Mapping[str, Any]) -> Product:
    """Of one that is read and written once, from what it was called with."""
    dims, types = args.get("Input Dims"), args.get("Input type")
    if not isinstance(dims, list) or not isinstance(types, list):
        return NO_PRODUCT
    pairs = [(d, t) for d, t in zip(dims, types, strict=False) if _is_matrix(d)]
    if len(pairs) < 2:
        return NO_PRODUCT
    (left, kind), (right, _) = pairs[-2:]
    rows, inner = math.prod(left[:-1]), left[-1]
    columns = right[-1]
    flops = 2 * rows * inner * columns
    touched = math.prod(left) + math.prod(right) + rows * columns
    size, arithmetic = ELEMENTS.get(str(kind), (4, 0))
    n_bytes = touched * size
    return (flops, n_bytes, arithmetic) if max(flops, n_bytes) < LARGEST else NO_PRODUCT


def _is_matrix(dims: Any) -> bool:
    return (
        isinstance(dims, list)
        and len(dims) in (2, 3)
        and all(type(size) is int and size >= 0 for size in dims)
    )
