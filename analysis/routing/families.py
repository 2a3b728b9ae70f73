"""Expert families: chains of experts of consecutive layers that call for each other.

A link joins an expert and one of the next layer when each is the other's best partner, beyond chance. It knows pair
counts and how they spread over requests, no tokens. L layers, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.routing.batch import accumulate, for_layers, layer_columns, plan_of
from analysis.routing.coactivation import SIGNIFICANCE
from analysis.routing.pairs import Spread
from analysis.routing.significance import ENOUGH, FEWEST_REQUESTS, q_values, tail, z_values
from analysis.routing.sums import ratio, share_of
from analysis.routing.transitions import Transitions
from prefetch.errors import MissingData
from prefetch.trace.blocks import Traceable
from prefetch.trace.card import ModelCard

SHORTEST = 3  # layers
NONE = -1


def families(
    joint_LEE: NDArray[Any],
    here_LE: NDArray[Any],
    there_LE: NDArray[Any],
    tokens_L: NDArray[Any],
    card: ModelCard,
    *,
    min_lift: float = 2.0,
    spread: Spread | None = None,
) -> pd.DataFrame:
    """One row per family and layer, the longest family first.

    `joint_LEE[l, a, b]` of the `tokens_L[l]` tokens chose a at layer l and b at the next; `here_LE` and `there_LE` say
    how many chose each. `lift_to_next` is NaN at a family's end; `share` is the expert's share of its layer's choices.
    `spread` says how pairs spread over requests, whose tokens are not independent; without it they are taken to be.
    """
    _check(card, spread)
    lift_LEE, next_LE = _links(joint_LEE, here_LE, there_LE, tokens_L, min_lift, spread)
    share_LE = share_of(np.concatenate([here_LE, there_LE[-1:]]))
    rows = []
    for family, chain in enumerate(_chains(next_LE)):
        for layer, expert in chain:
            is_last = (layer, expert) == chain[-1]
            lift = np.nan if is_last else lift_LEE[layer, expert, next_LE[layer, expert]]
            rows.append((family, layer, expert, lift, share_LE[layer, expert], len(chain)))
    frame = pd.DataFrame(rows, columns=["family", "slot", *_NAMES])
    slots = frame.pop("slot").to_numpy(np.int64)
    return frame.assign(**layer_columns(card, slots))[
        ["family", *layer_columns(card, slots), *_NAMES]
    ]


def _check(card: ModelCard, spread: Spread | None) -> None:
    if card.n_layers < SHORTEST:
        raise MissingData(
            f"a family spans {SHORTEST} layers or more; the trace has {card.n_layers}"
        )
    if spread is not None and spread.requests_L.max() < FEWEST_REQUESTS:
        raise MissingData(
            f"with fewer than {FEWEST_REQUESTS} requests no link between experts can be told from chance: "
            "the tokens of one request are not independent"
        )


_NAMES = ("expert", "lift_to_next", "share", "length")


def _links(
    joint_LEE: NDArray[Any],
    here_LE: NDArray[Any],
    there_LE: NDArray[Any],
    tokens_L: NDArray[Any],
    min_lift: float,
    spread: Spread | None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Lifts of all pairs, and for every expert the one of the next layer that it is linked to, or NONE."""
    of_L = np.maximum(tokens_L, 1)[:, None]
    # one division: a lift of just `min_lift` must not be rounded below it
    expected_LEE = here_LE[:, :, None] * there_LE[:, None, :] / of_L[:, :, None]
    absent = (1 - here_LE / of_L)[:, :, None] * (1 - there_LE / of_L)[:, None, :]
    effect_LEE, requests_L = np.ones(expected_LEE.shape), np.full(len(joint_LEE), np.inf)
    if spread is not None:
        counts = joint_LEE, here_LE, there_LE, expected_LEE, tokens_L
        effect_LEE, requests_L = _effects(spread, *counts), spread.requests_L
    z_LEE = z_values(joint_LEE, expected_LEE, expected_LEE * absent) / np.sqrt(effect_LEE)
    is_tested = expected_LEE / effect_LEE >= ENOUGH
    # of meeting more often than by chance
    p_LEE = np.where(is_tested, tail(z_LEE, requests_L[:, None, None]), np.nan)
    q_LEE = q_values(p_LEE.reshape(len(p_LEE), -1)).reshape(p_LEE.shape)
    lift_LEE = ratio(joint_LEE, expected_LEE)
    return lift_LEE, _best(lift_LEE, q_LEE, is_tested, min_lift)


def _effects(spread: Spread, *counts: NDArray[Any]) -> NDArray[np.float64]:
    """Design effects of every pair, layer by layer; NaN where too few requests tell."""
    return np.stack(
        for_layers(
            lambda layer: spread.effects(layer, *(array[layer] for array in counts)),
            len(counts[0]),
        )
    )


def _best(
    lift_LEE: NDArray[Any], q_LEE: NDArray[Any], is_tested: NDArray[Any], min_lift: float
) -> NDArray[np.int64]:
    """For every expert the best partner of the next layer, where that is mutual, strong and sure; or NONE."""
    known_LEE = np.where(is_tested, lift_LEE, -np.inf)
    next_LE = known_LEE.argmax(axis=2)
    back_LE = known_LEE.argmax(axis=1)
    is_mutual = np.take_along_axis(back_LE, next_LE, 1) == np.arange(next_LE.shape[1])
    best = next_LE[:, :, None]
    strong_LE = np.take_along_axis(known_LEE, best, 2)[..., 0] >= min_lift
    sure_LE = np.take_along_axis(q_LEE, best, 2)[..., 0] < SIGNIFICANCE
    return np.where(is_mutual & strong_LE & sure_LE, next_LE, NONE)


def _chains(next_LE: NDArray[np.int64]) -> list[list[tuple[int, int]]]:
    """(layer, expert) chains of three layers or more; every expert is in one at most."""
    reached: set[tuple[int, int]] = set()
    chains = []
    for layer, expert in np.argwhere(next_LE != NONE).tolist():
        if (layer, expert) in reached:
            continue
        chain = [(layer, expert)]
        while layer < len(next_LE) and next_LE[layer, expert] != NONE:
            layer, expert = layer + 1, int(next_LE[layer, expert])
            chain.append((layer, expert))
        reached.update(chain)
        chains.append(chain)
    long_enough = [chain for chain in chains if len(chain) >= SHORTEST]
    return sorted(long_enough, key=lambda chain: (-len(chain), chain))


def expert_families(trace: Traceable, min_lift: float = 2.0) -> pd.DataFrame:
    """Chains of experts over three or more consecutive layers, each the best partner of the one before."""
    plan = plan_of(trace)
    counted = Transitions(plan, (1,))
    accumulate(trace, plan, [counted])
    margins = counted.here(1), counted.there(1), counted.tokens(1)
    spread = counted.spread
    return families(counted.joint(1), *margins, plan.card, min_lift=min_lift, spread=spread)
