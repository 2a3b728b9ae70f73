"""What each input of `mlp` is worth: the same network without it. Prints a table.

    python scripts/bench/bench_inputs.py FOLDER ...      folders of traces (stage=collect makes them)

Fold 0 by request; rows of a template are left out; recall is over the layers from the horizon on. Without this token's
layers the network is fitted at a horizon of all layers: it knows then what a token knows as it begins.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from machine import describe

from prefetch.predict.guesses import ranked
from prefetch.predict.mlp import DECAYS, Mlp
from prefetch.predict.part import Part, parts_of, survey_of
from prefetch.scoring import SharedText
from prefetch.trace.parquet import TraceReader

HORIZONS = (1, 4)
INPUTS: dict[str, tuple[bool, tuple[float, ...]]] = {  # this token's layers?, decays of usage
    "all": (True, DECAYS),
    "without usage averages": (True, (0.0,)),
    "without the token before": (True, (0.8, 0.97)),
    "this token's layers alone": (True, ()),
    "without this token's layers": (False, DECAYS),
    "the token before alone": (False, (0.0,)),
}


def recall(predictor: Mlp, test: Part, horizon: int, shared: SharedText) -> tuple[float, float]:
    """At k and 2k, over the layers from `horizon` on, whatever horizon the predictor was fitted at."""
    right_W, of = np.zeros(2), 0
    for (past, ids_TLK, counted_T), (block, _) in zip(
        test.lessons(predictor.horizons[0]), test.blocks(), strict=True
    ):
        kept_T = counted_T & ~shared.rows(block)
        true_TLK, k = ids_TLK[kept_T][:, horizon:].astype(int), ids_TLK.shape[2]
        best, _ = ranked(predictor.scores(past)[kept_T][:, horizon:], 2 * k)
        is_right = true_TLK[..., None] == best[:, :, None, :]
        right_W += is_right[..., :k].sum(), is_right.sum()
        of += true_TLK.size
    return float(right_W[0] / of), float(right_W[1] / of)


def main(folders: list[str]) -> None:
    print(describe())
    print("| trace | ahead | told | recall@k | recall@2k | fit s |\n|---|---|---|---|---|---|")
    for folder in folders:
        reader = TraceReader(folder)
        survey = survey_of(reader)
        train, validation, test = parts_of(reader, survey.folds(0)[0])
        for name, (knows_token, decays) in INPUTS.items():
            fitted_at = HORIZONS if knows_token else (reader.card.n_layers,)
            for horizon in fitted_at:
                started = time.perf_counter()
                mlp = Mlp((horizon,), decays=decays).fit(train, validation)
                seconds = time.perf_counter() - started
                for asked in (horizon,) if knows_token else HORIZONS:
                    at_k, at_2k = recall(mlp, test, asked, survey.shared_text())
                    print(
                        f"| {reader.card.name} | {asked} | {name} | {at_k:.3f} | {at_2k:.3f} | {seconds:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main(sys.argv[1:])
