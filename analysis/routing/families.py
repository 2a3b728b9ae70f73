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

    def link(layer: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        counts = joint_LEE[layer], here_LE[layer], there_LE[layer], int(max(tokens_L[layer], 1))
        return _link(layer, *counts, min_lift, spread)

    lift_LEE, next_LE = zip(*for_layers(link, len(joint_LEE)), strict=True)
    return np.stack(lift_LEE), np.stack(next_LE)


def _link(
    layer: int,
    joint_EE: NDArray[Any],
    here_E: NDArray[Any],
    there_E: NDArray[Any],
    tokens: int,
    min_lift: float,
    spread: Spread | None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    # one division: a lift of just `min_lift` must not be rounded below it
    expected_EE = here_E[:, None] * there_E[None, :] / tokens
    absent_EE = (1 - here_E / tokens)[:, None] * (1 - there_E / tokens)[None, :]
    effect_EE, requests = np.ones(expected_EE.shape), np.inf
    if spread is not None:
        counts = joint_EE, here_E, there_E, expected_EE, tokens
        effect_EE, requests = spread.effects(layer, *counts), spread.requests_L[layer]
    z_EE = z_values(joint_EE, expected_EE, expected_EE * absent_EE) / np.sqrt(effect_EE)
    is_tested = expected_EE / effect_EE >= ENOUGH
    p_EE = np.full(z_EE.shape, np.nan)
    p_EE[is_tested] = tail(z_EE[is_tested], requests)  # of meeting more often than by chance
    q_EE = q_values(p_EE.reshape(1, -1)).reshape(p_EE.shape)
    lift_EE = ratio(joint_EE, expected_EE)
    return lift_EE, _best(lift_EE, q_EE, is_tested, min_lift)


def _best(
    lift_EE: NDArray[Any], q_EE: NDArray[Any], is_tested: NDArray[Any], min_lift: float
) -> NDArray[np.int64]:
    """For every expert the best partner of the next layer, where that is mutual, strong and sure; or NONE."""
    known_EE = np.where(is_tested, lift_EE, -np.inf)
    everyone, next_E = np.arange(len(lift_EE)), known_EE.argmax(axis=1)
    is_mutual_E = known_EE.argmax(axis=0)[next_E] == everyone
    is_strong_E = known_EE[everyone, next_E] >= min_lift
    is_sure_E = q_EE[everyone, next_E] < SIGNIFICANCE
    return np.where(is_mutual_E & is_strong_E & is_sure_E, next_E, NONE)


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
