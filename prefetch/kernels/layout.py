"""How one expert lies in memory: one block, so that one copy moves all of it. The pool is blocks one after another.

It knows no device and no kernel. A block is [gate and up rows in turn, G x D | down, D x F | biases G | D], its start
aligned. In turn, because one matrix product of width 2b then gives b gates with their ups.
S slots, N elements of a block, D hidden, F inner, G = 2F.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefetch.errors import ConfigError

ALIGNMENT = 1024  # bytes: of a TMA box and of whole memory pages' parts
ACTIVATIONS = ("silu", "gelu", "clamped_swiglu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Weights(NamedTuple):
    """The parts of all slots, as views of the pool: what is written there is written here."""

    w13_SGD: Tensor  # rows gate 0, up 0, gate 1, up 1, ...
    w2_SDF: Tensor
    b13_SG: Tensor | None
    b2_SD: Tensor | None


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes of one expert. `gelu` is the exact one; `clamped_swiglu` is gpt-oss's (limit 7, slope 1.702):
    (up + 1) * gate * sigmoid(slope * gate)."""

    hidden: int
    inner: int
    dtype: torch.dtype
    activation: str = "silu"
    has_bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.inner < 1:
            raise ConfigError(f"an expert needs sizes above 0; found {self.hidden} x {self.inner}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation {self.activation!r} is not known; use one of {known}")
        if self.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise ConfigError(f"experts of {self.dtype} cannot be computed; use one of {known}")

    @property
    def down_start(self) -> int:
        """Elements before the down matrix: the gate and up rows."""
        return 2 * self.inner * self.hidden

    @property
    def bias_start(self) -> int:
        return 3 * self.inner * self.hidden

    @property
    def used(self) -> int:
        """Elements that mean something; the rest of a block is padding."""
        biases = 2 * self.inner + self.hidden if self.has_bias else 0
        return self.bias_start + biases

    @property
    def numel(self) -> int:
        """Elements of a block: from one slot's start to the next one's."""
        unit = ALIGNMENT // self.dtype.itemsize
        return -(-self.used // unit) * unit

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def pack(
        self,
        gate_FD: Tensor,
        up_FD: Tensor,
        down_DF: Tensor,
        gate_bias_F: Tensor | None = None,
        up_bias_F: Tensor | None = None,
        down_bias_D: Tensor | None = None,
    ) -> Tensor:
        """One expert's block, where its weights are. A bias that is not given is 0."""
        given = (gate_bias_F, up_bias_F, down_bias_D)
        self._check(gate_FD, up_FD, down_DF, *given)
        block_N = torch.zeros(self.numel, dtype=self.dtype, device=gate_FD.device)
        part = self.views(block_N[None])
        part.w13_SGD[0, 0::2], part.w13_SGD[0, 1::2], part.w2_SDF[0] = gate_FD, up_FD, down_DF
        if part.b13_SG is not None and part.b2_SD is not None:
            places = part.b13_SG[0, 0::2], part.b13_SG[0, 1::2], part.b2_SD[0]
            for place, bias in zip(places, given, strict=True):
                if bias is not None:
                    place.copy_(bias)
        return block_N

    def views(self, pool_SN: Tensor) -> Weights:
        """The parts of every slot, without a copy."""
        if pool_SN.ndim != 2 or pool_SN.shape[1] != self.numel or pool_SN.stride(1) != 1:
            raise ConfigError(
                f"a pool of this layout is [slots, {self.numel}] with rows in one piece; "
                f"found {list(pool_SN.shape)}, strides {list(pool_SN.stride())}"
            )
        D, G = self.hidden, 2 * self.inner
        w13_SGD = pool_SN[:, : self.down_start].unflatten(1, (G, D))
        w2_SDF = pool_SN[:, self.down_start : self.bias_start].unflatten(1, (D, self.inner))
        if not self.has_bias:
            return Weights(w13_SGD, w2_SDF, None, None)
        bias = pool_SN[:, self.bias_start : self.used]
        return Weights(w13_SGD, w2_SDF, bias[:, :G], bias[:, G:])

    def random(self, n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
        """A pool of n drawn experts whose outputs are about as large as their inputs. Padding is 0."""
        generator = torch.Generator(device).manual_seed(seed)
        pool_SN = torch.zeros(n, self.numel, dtype=self.dtype, device=device)
        parts = self.views(pool_SN)
        parts.w13_SGD.normal_(0, self.hidden**-0.5, generator=generator)
        parts.w2_SDF.normal_(0, 2 * self.inner**-0.5, generator=generator)
        for bias in parts[2:]:
            if bias is not None:
                bias.normal_(0, 0.1, generator=generator)
        return pool_SN

    def _check(self, gate: Tensor, up: Tensor, down: Tensor, *biases: Tensor | None) -> None:
        D, F = self.hidden, self.inner
        expected = [(F, D), (F, D), (D, F)]
        if [tuple(of.shape) for of in (gate, up, down)] != expected:
            found = [tuple(of.shape) for of in (gate, up, down)]
            raise ConfigError(f"gate, up and down must be {expected}; found {found}")
        if any(bias is not None for bias in biases) and not self.has_bias:
            raise ConfigError("this layout has no room for biases; make it with has_bias=True")
        for bias, size in zip(biases, (F, F, D), strict=True):
            if bias is not None and tuple(bias.shape) != (size,):
                raise ConfigError(f"a bias must be ({size},); found {tuple(bias.shape)}")
