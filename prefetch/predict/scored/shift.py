"""Domain shift: recall by the domain that is tested, beside which domains were learnt from.

The same requests are tested whatever was learnt from, so that rows of different runs can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prefetch.predict.scored import measures as m
from prefetch.predict.scored.results import Scored, recalls


def by_domain(scored: Sequence[Scored], learnt: Sequence[str] | None) -> pd.DataFrame:
    """Recall on new text of every domain, mean over the layers from the horizon on, and over folds."""
    rows = list[dict[str, Any]]()
    for one in scored:
        names = sorted({name for counts in one.folds for name in counts.domain_U})
        for h, horizon in enumerate(one.horizons):
            for name in names if len(names) > 1 else ():
                of_folds = [_sums(counts, h, name)[horizon:] for counts in one.folds]
                at_k, at_2k = recalls(of_folds)
                rows.append(
                    {
                        "predictor": one.name,
                        "horizon": horizon,
                        "domain": name,
                        "was_learnt": learnt is None or name in learnt,
                        "choices": sum(int(sum_LM[:, m.CHOICES].sum()) for sum_LM in of_folds),
                        "recall_at_k": at_k,
                        "recall_at_2k": at_2k,
                    }
                )
    return pd.DataFrame(rows)


def _sums(counts: m.Counts, h: int, domain: str) -> NDArray[np.int64]:
    """[L, M] over the units of one domain."""
    is_U = np.array([name == domain for name in counts.domain_U], bool)
    sums_LM: NDArray[np.int64] = counts.unit_HYULM[h, 0, is_U].sum(axis=0, dtype=np.int64)
    return sums_LM


def headline(table: pd.DataFrame, chosen: str) -> dict[str, float]:
    """Of the chosen predictor at the shortest horizon: where it learnt, and where it did not; means over domains."""
    if table.empty or table.was_learnt.all():
        return {}
    rows = table[(table.predictor == chosen) & (table.horizon == table.horizon.min())]
    told = {
        "recall_at_k_learnt_domains": float(rows[rows.was_learnt].recall_at_k.mean()),
        "recall_at_k_other_domains": float(rows[~rows.was_learnt].recall_at_k.mean()),
    }
    return {name: value for name, value in told.items() if math.isfinite(value)}
