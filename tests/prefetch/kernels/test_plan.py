"""A plan orders every row once, its tiles cover each expert exactly, and making it waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from prefetch.errors import ConfigError
from prefetch.kernels.plan import most_tiles, plan, plan_torch


@given(
    st.integers(0, 2**31),
    st.integers(0, 70),
    st.integers(1, 5),
    st.integers(1, 140),
    st.sampled_from([1, 4, 16, 64]),
)
def test_a_plan_is_what_a_loop_says(
    seed: int, n_tokens: int, top_k: int, n_experts: int, block: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(-1, n_experts, (n_tokens, top_k), generator=draw)
    slot_E = torch.randint(-1, n_experts, (n_experts,), generator=draw).int()
    found = plan(ids_TK, slot_E, block)
    flat = ids_TK.flatten().tolist()
    order, starts, tiles = list[int](), [0], list[tuple[int, int, int]]()
    for e in range(n_experts):
        rows = [r for r, of in enumerate(flat) if of == e]
        tiles += [(e, int(slot_E[e]), len(order) + at) for at in range(0, len(rows), block)]
        order += rows
        starts.append(len(order))
    nobody = [r for r, of in enumerate(flat) if of < 0]
    assert found.perm_R.tolist() == order + nobody and found.starts_E1.tolist() == starts
    listed = [found.tile_expert_B, found.tile_slot_B, found.tile_row_B]
    assert list(zip(*(of[: len(tiles)].tolist() for of in listed), strict=True)) == tiles
    assert found.n_tiles_1.tolist() == [len(tiles)] and len(listed[0]) >= len(tiles)
    assert len(listed[0]) == most_tiles(len(flat), n_experts, block)
    for of, unused in zip(listed, (-1, -1, 0), strict=True):
        assert (of[len(tiles) :] == unused).all()
    missing = [e for e in sorted(set(flat) - {-1}) if slot_E[e] < 0]
    assert found.missing_E.tolist() == missing + [-1] * (n_experts - len(missing))
    assert found.n_missing_1.tolist() == [len(missing)]


class NothingWaits(TorchDispatchMode):
    """Fails at whatever makes the host wait for a device: reading a value, or a size that depends on values."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "unique",
        "masked_select",
        "bincount",
        "is_nonzero",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_definition_waits_for_nothing_so_that_it_is_the_path_of_long_lists() -> None:
    ids_TK, slot_E = torch.randint(0, 40, (500, 8)), torch.arange(40).int()
    with NothingWaits():
        plan_torch(ids_TK, slot_E, 64)
    with pytest.raises(AssertionError, match="waits"), NothingWaits():
        ids_TK.unique()


def test_no_routing_needs_more_tiles() -> None:
    """The worst one has a single row at every expert but one, and there a single row in the last tile."""
    for n_rows, n_experts, block in ((1, 5, 4), (65, 5, 4), (7, 40, 16)):
        spread = min(n_rows, n_experts) - 1
        ids = list(range(1, spread + 1)) + [0] * (n_rows - spread)
        found = plan(torch.tensor(ids)[:, None], torch.arange(n_experts), block)
        most = most_tiles(n_rows, n_experts, block)
        assert most - 1 <= int(found.n_tiles_1) <= most


def test_what_cannot_be_is_refused() -> None:
    ids_TK, slot_E = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    for ids, slots, block, message in (
        (ids_TK[0], slot_E, 16, r"\[tokens, choices\]"),
        (ids_TK.float(), slot_E, 16, "integers"),
        (ids_TK, slot_E[:0], 16, "one entry per expert"),
        (ids_TK, slot_E, 0, "at least one row"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(ids, slots, block)
