"""Activations as Triton computes them, in float32, and the number that names each at compile time."""
# mypy: disable-error-code="no-untyped-def"
# a kernel's arguments are typed by Triton when it is called

import triton
import triton.language as tl

from prefetch.kernels.experts import LIMIT, SLOPE
from prefetch.kernels.layout import ACTIVATIONS

SILU = tl.constexpr(ACTIVATIONS.index("silu"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
TOP = tl.constexpr(LIMIT)
STEEP = tl.constexpr(SLOPE)


@triton.jit
def gated(gate, up, ACT: tl.constexpr):
    if ACT == SILU:
        out = gate * tl.sigmoid(gate) * up
    elif ACT == GELU:
        out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        gate = tl.minimum(gate, TOP)
        up = tl.maximum(tl.minimum(up, TOP), -TOP)
        out = (up + 1.0) * (gate * tl.sigmoid(gate * STEEP))
    return out
