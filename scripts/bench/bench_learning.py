"""How recall grows with training tokens and with parameters: `mlp` and `memory_mlp`, 4 layers ahead. Prints a table.

    python scripts/bench/bench_learning.py FOLDER ...      folders of traces (stage=collect makes them)

Fold 0 by request; rows of a template are left out; recall is over the layers from the horizon on. Tokens are whole
requests drawn by the seed; the memory of `memory_mlp` holds the tokens that it learns from, so that both grow. Hidden
units grow at the default number of tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from bench_inputs import recall
from machine import describe

from prefetch.predict.memory_mlp import MemoryMlp
from prefetch.predict.mlp import Mlp
from prefetch.predict.part import parts_of, survey_of
from prefetch.trace.parquet import TraceReader

HORIZON = 4
TOKENS = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
Network = Mlp | MemoryMlp
GROWN: dict[str, tuple[Callable[..., Network], tuple[int, ...]]] = {
    "mlp": (Mlp, (16, 32, 64, 128, 256, 512)),
    "memory_mlp": (MemoryMlp, (20, 40, 80, 160, 320)),
}


def main(folders: list[str]) -> None:
    print(describe())
    print("| trace | predictor | tokens | hidden | parameters | recall@k | recall@2k | fit s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for folder in folders:
        reader = TraceReader(folder)
        for name, (make, widths) in GROWN.items():
            default = make((HORIZON,))
            for most in (one for one in TOKENS if one < n_tokens(reader)):
                row(reader, name, make((HORIZON,), most_tokens=most))
            row(reader, name, default)
            for hidden in widths:
                if hidden != default.hidden:
                    row(reader, name, make((HORIZON,), hidden=hidden))


def n_tokens(reader: TraceReader) -> int:
    """To learn from, in this fold."""
    train = parts_of(reader, survey_of(reader).folds(0)[0]).train
    return sum(int(counted_T.sum()) for _, counted_T in train.blocks())


def row(reader: TraceReader, name: str, network: Network) -> None:
    survey = survey_of(reader)
    train, validation, test = parts_of(reader, survey.folds(0)[0])
    started = time.perf_counter()
    network.fit(train, validation)
    seconds = time.perf_counter() - started
    tokens = sum(
        int(counted_T.sum())
        for _, counted_T in train.some(network.most_tokens, network.seed).blocks()
    )
    weights = getattr(network, f"network_h{HORIZON}_").size
    at_k, at_2k = recall(network, test, HORIZON, survey.shared_text())
    print(
        f"| {reader.card.name} | {name} | {tokens} | {network.hidden} | {weights} | {at_k:.3f} | {at_2k:.3f} | "
        f"{seconds:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
