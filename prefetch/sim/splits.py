"""How caches per layer share what there is: equal, as given, or as loses least by each layer's own curve of misses.

It knows no trace and no policy. AdapMoE (Zhong et al. 2024, 2408.10284) splits by a dynamic program over what a layer
loses at every size; here that loss is counted, and layers' experts may differ in size.
L layers, C = 0 to E experts of a layer, G groups of layers whose experts are of one size, P ways that are not worse
than another in both bytes and misses. Rooms and sizes are in units: experts where sizes are 1, else bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError

Counts = NDArray[np.int64]


def given(
    slots_L: Sequence[int], room_L: Sequence[int], size_L: Sequence[int], n_experts: int
) -> tuple[int, ...]:
    """Rooms of so many experts per layer, which must be what the equal rooms are together."""
    told = f"simulator.split={list(slots_L)}"
    if len(slots_L) != len(room_L):
        raise ConfigError(
            f"{told}: {len(slots_L)} numbers for {len(room_L)} layers; give one per layer"
        )
    if any(type(slots) is not int or not 0 <= slots <= n_experts for slots in slots_L):
        raise ConfigError(f"{told}: each must be a whole number from 0 to {n_experts} experts")
    rooms = tuple(slots * size for slots, size in zip(slots_L, size_L, strict=True))
    spent, there = sum(rooms), sum(room_L)
    is_even = len(set(size_L)) == 1
    if spent > there or (is_even and spent != there):
        unit = "experts" if size_L[0] == 1 else "bytes"
        raise ConfigError(
            f"{told}: together {spent} {unit}, and the cache has {there}; change the numbers or simulator.cache"
        )
    return rooms


def fitted(
    misses_LC: NDArray[np.int64], room_L: Sequence[int], size_L: Sequence[int]
) -> tuple[int, ...]:
    """The split of all rooms together with the fewest misses, exactly; what nobody gains by goes to the smallest."""
    n_layers, most = misses_LC.shape[0], misses_LC.shape[1] - 1
    whole, slots_L = sum(room_L), np.zeros(n_layers, np.int64)
    groups = [
        (size, [layer for layer in range(n_layers) if size_L[layer] == size])
        for size in sorted(set(size_L))
    ]
    tables = []
    for size, layers in groups:
        n_slots = min(whole // size, most * len(layers))
        tables.append(_within(misses_LC[layers], n_slots))
    spent_G = _between([size for size, _ in groups], [best_S for best_S, _ in tables], whole)
    for (_, layers), (_, taken_LS), slots in zip(groups, tables, spent_G, strict=True):
        for place in range(len(layers) - 1, -1, -1):
            slots_L[layers[place]] = taken_LS[place, slots]
            slots -= taken_LS[place, slots]
    _spend_rest(slots_L, whole, size_L, most)
    return tuple(int(slots * size) for slots, size in zip(slots_L, size_L, strict=True))


def _within(misses_LC: Counts, most: int) -> tuple[Counts, Counts]:
    """[S] fewest misses of layers of one size with exactly S experts, and [L, S] how many of those the last one has."""
    never = np.iinfo(np.int64).max // 4
    best_S = np.where(np.arange(most + 1) == 0, 0, never).astype(np.int64)
    taken_LS = np.zeros((len(misses_LC), most + 1), np.int64)
    for layer, misses_C in enumerate(misses_LC):
        new_S = np.full(most + 1, never, np.int64)
        for slots, misses in enumerate(misses_C[: most + 1].tolist()):
            with_S = best_S[: most + 1 - slots] + misses
            is_better = with_S < new_S[slots:]
            new_S[slots:][is_better] = with_S[is_better]
            taken_LS[layer, slots:][is_better] = slots
        best_S = new_S
    return best_S, taken_LS


def _between(size_G: Sequence[int], best_GS: Sequence[Counts], whole: int) -> list[int]:
    """How many experts each group of layers gets, of those ways that fit the one with the fewest misses."""
    units_P, misses_P = np.zeros(1, np.int64), np.zeros(1, np.int64)
    steps: list[tuple[Counts, Counts]] = []
    for size, best_S in zip(size_G, best_GS, strict=True):
        units_PS = units_P[:, None] + size * np.arange(len(best_S))
        misses_PS = misses_P[:, None] + best_S
        before_P, slots_P = np.nonzero(units_PS <= whole)
        units_P, misses_P = units_PS[before_P, slots_P], misses_PS[before_P, slots_P]
        order = np.lexsort((misses_P, units_P))
        fewest_P = np.minimum.accumulate(misses_P[order])
        keep = order[np.diff(fewest_P, prepend=fewest_P[0] + 1) < 0]
        units_P, misses_P = units_P[keep], misses_P[keep]
        steps.append((before_P[keep], slots_P[keep]))
    at, spent = len(units_P) - 1, list[int]()
    for before_P, slots_P in reversed(steps):
        spent.append(int(slots_P[at]))
        at = int(before_P[at])
    return spent[::-1]


def _spend_rest(slots_L: Counts, whole: int, size_L: Sequence[int], most: int) -> None:
    left = whole - int((slots_L * np.array(size_L)).sum())
    while True:
        may = [i for i, slots in enumerate(slots_L) if slots < most and size_L[i] <= left]
        if not may:
            return
        layer = min(may, key=lambda i: slots_L[i])
        slots_L[layer] += 1
        left -= size_L[layer]
