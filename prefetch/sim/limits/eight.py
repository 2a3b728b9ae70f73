"""The optimum's stacks of eight layers at once: every number of `stacks.OptimalStacks`, in less than half the time.

An event at one layer takes unforeseeable turns, which cost more than its work. Eight layers that take the same steps
without a turn fit one vector register per row: whoever waits is kept sorted, and every place gets the least of all that
wait and its own. It knows no trace. T events, D places, K members, 8 layers (W), C classes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

LAYERS = 8
MOST_MEMBERS = 8
NEVER = np.int32(2**31 - 1)
NOBODY = np.int32(-1)  # waits below everyone, until the first places are taken
# rows of the one array that all is computed in, so that the compiler sees what is apart: those who wait, largest
# first; how many members were found; eight places and where members were found in them
FOUND, PLACES, HITS, ROWS = 8, 16, 24, 32


@njit(cache=True, nogil=True)
def replay_eight(next_TKW, class_T, first_event, hist_CDW, next_DW):  # type: ignore[no-untyped-def]
    """Adds hits to `hist_CDW`, whose last row counts those that were never there. D is a multiple of eight."""
    n_members, n_places = next_TKW.shape[1], next_DW.shape[0]
    rows = np.zeros(ROWS * LAYERS, np.int32)
    for t in range(len(next_TKW)):
        event, hist_DW = np.int32(first_event + t), hist_CDW[class_T[t]]
        _clear(rows, n_members)
        for first in range(0, n_places, 8):
            _take_places(rows, event, next_DW[first : first + 8], hist_DW[first : first + 8])
            if first == 0:
                for k in range(n_members):
                    for w in range(LAYERS):
                        next_DW[k, w] = next_TKW[t, k, w]
            if _fewest(rows) == n_members:
                break
        for w in range(LAYERS):
            hist_DW[n_places, w] += n_members - rows[FOUND * LAYERS + w]


@njit(cache=True, nogil=True)
def _clear(rows, n_members):  # type: ignore[no-untyped-def]
    for i in range(MOST_MEMBERS):
        for w in range(LAYERS):
            rows[i * LAYERS + w] = NEVER if i < MOST_MEMBERS - n_members else NOBODY
    for w in range(LAYERS):
        rows[FOUND * LAYERS + w] = 0


@njit(cache=True, nogil=True)
def _take_places(rows, event, next_8W, hist_8W):  # type: ignore[no-untyped-def]
    """The next eight. Each by its number: only then is it known to lie apart from the rows of those who wait."""
    now, hits = next_8W.reshape(-1), hist_8W.reshape(-1)
    for i in range(len(now)):
        rows[PLACES * LAYERS + i] = now[i]
    _take_place(rows, PLACES, event)
    _take_place(rows, PLACES + 1, event)
    _take_place(rows, PLACES + 2, event)
    _take_place(rows, PLACES + 3, event)
    _take_place(rows, PLACES + 4, event)
    _take_place(rows, PLACES + 5, event)
    _take_place(rows, PLACES + 6, event)
    _take_place(rows, PLACES + 7, event)
    for i in range(len(now)):
        hits[i] += rows[HITS * LAYERS + i]
    for i in range(len(now)):
        now[i] = rows[PLACES * LAYERS + i]


@njit(forceinline=True, nogil=True)
def _take_place(rows, place, event):  # type: ignore[no-untyped-def]
    """A place where a member is found is free: as if whoever is never needed stood there."""
    for w in range(LAYERS):
        due = rows[place * LAYERS + w]
        hit = np.int32(1) if due == event else np.int32(0)
        rows[(place + HITS - PLACES) * LAYERS + w] = hit
        rows[FOUND * LAYERS + w] += hit
        due = NEVER if due == event else due
        due, rows[w] = _both(rows[w], due)
        due, rows[8 + w] = _both(rows[8 + w], due)
        due, rows[16 + w] = _both(rows[16 + w], due)
        due, rows[24 + w] = _both(rows[24 + w], due)
        due, rows[32 + w] = _both(rows[32 + w], due)
        due, rows[40 + w] = _both(rows[40 + w], due)
        due, rows[48 + w] = _both(rows[48 + w], due)
        due, rows[56 + w] = _both(rows[56 + w], due)
        rows[place * LAYERS + w] = due


@njit(forceinline=True, nogil=True)
def _both(other, due):  # type: ignore[no-untyped-def]
    """The sooner goes on, the later waits here."""
    return (due if other > due else other), (other if other > due else due)


@njit(cache=True, nogil=True)
def _fewest(rows):  # type: ignore[no-untyped-def]
    fewest = rows[FOUND * LAYERS]
    for w in range(LAYERS):
        fewest = min(fewest, rows[FOUND * LAYERS + w])
    return fewest
