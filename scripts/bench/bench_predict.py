"""What a guess costs, one event at a time, and how fast predictors are fitted. Prints a table.

    python scripts/bench/bench_predict.py [FOLDER of a trace ...]      default: drawn traces of three models' shapes

One event: the choices of one layer are taken in, and one layer four ahead is scored, through the incremental face (with
Python's share of the call) and in a block (without). "Exported" is the runtime in NumPy; the event that ends a token
answers for the first layers of the next one as well. A predictor is fitted on a few requests, because its recall is not
the question here; memory and network have their default sizes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe
from threadpoolctl import threadpool_limits

from prefetch.predict import export
from prefetch.predict.mlp import Mlp
from prefetch.predict.part import Part, parts_of, survey_of
from prefetch.predict.past import Past
from prefetch.predict.predictor import Predictor, parameter_bytes
from prefetch.predict.route_memory import RouteMemory
from prefetch.predict.runtime import load
from prefetch.predict.scored.timing import EVENTS, event_times
from prefetch.sources.synthetic import Synthetic
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.writer import TraceWriter

SHAPES = {
    "DeepSeek-V2-Lite": (26, 64, 6),
    "gpt-oss-20b": (24, 32, 4),
    "Qwen3-30B-A3B": (48, 128, 8),
}
HORIZON, ROUNDS = 4, 5


def drawn(folder: Path, n_layers: int, n_experts: int, top_k: int) -> TraceReader:
    shape = {"n_layers": n_layers, "n_experts": n_experts, "top_k": top_k}
    source = Synthetic(process="zipf", skew=0.5, n_requests=160, **shape)
    folder.mkdir()
    writer = TraceWriter(folder, Provenance("synthetic", "bench"), max_dropped=0.5)
    source.record(writer, {})
    writer.close()
    return TraceReader(folder)


def predictors() -> dict[str, Predictor]:
    return {
        "mlp, 64 units": Mlp((HORIZON,), hidden=64, epochs=1),
        "mlp, 128 units": Mlp((HORIZON,), epochs=1),
        "route_memory, request only": RouteMemory((HORIZON,), memory_tokens=0),
        "route_memory, 1,024 tokens": RouteMemory((HORIZON,), memory_tokens=1024),
        "route_memory, 16,384 tokens": RouteMemory((HORIZON,)),
    }


def row(name: str, model: str, predictor: Predictor, reader: TraceReader) -> str:
    train, validation, test = parts_of(reader, survey_of(reader).folds(0)[0])
    started = time.perf_counter()
    predictor.fit(train, validation)
    fitted = time.perf_counter() - started
    online = [np.percentile(event_times(predictor, test), [50, 99]) for _ in range(ROUNDS)]
    median, late = np.median(online, axis=0)
    in_block = min(block_us(predictor, test) for _ in range(ROUNDS))
    taken = [np.percentile(exported_us(predictor, reader, test), [50, 99]) for _ in range(ROUNDS)]
    taken_median, taken_late = np.median(taken, axis=0)
    size = parameter_bytes(predictor) / 1e6
    return (
        f"| {model} | {name} | {median:.1f} | {late:.1f} | {min(o[1] for o in online):.1f} | {in_block:.1f} | "
        f"{taken_median:.0f} | {taken_late:.0f} | {size:.1f} | {fitted:.1f} |"
    )


def exported_us(predictor: Predictor, reader: TraceReader, part: Part) -> list[float]:
    """Single events of the runtime that is taken along, which needs NumPy alone."""
    about = {"predictor": "", "settings": {}, "fold": 0, "split": "", "card": reader.card.to_json()}
    with tempfile.TemporaryDirectory() as folder:
        taken = load(export.write(predictor, about, "", Path(folder)))
    block, times = next(part.blocks())[0], list[float]()
    with threadpool_limits(1):
        for t in range(min(block.n_tokens, EVENTS // block.card.n_layers)):
            if t == 0 or block.request_T[t] != block.request_T[t - 1]:
                taken.start()
            for layer, ids_K in enumerate(block.ids_TLK[t]):
                ids = ids_K[ids_K < block.card.n_experts]
                started = time.perf_counter_ns()
                taken.observe(layer, ids)
                for target in taken.ahead():
                    taken.guess(target)
                times.append((time.perf_counter_ns() - started) / 1000)
    return times


def block_us(predictor: Predictor, part: Part) -> float:
    block, _ = next(part.blocks(max_rows=256))
    past = Past(block, HORIZON)
    started = time.perf_counter()
    predictor.scores(past)
    return 1e6 * (time.perf_counter() - started) / (past.n_tokens * past.card.n_layers)


def main(folders: list[str]) -> None:
    print(describe())
    print(
        "| model | predictor | µs median | µs 99 % | 99 %, best round | µs in a block | exported: median | 99 % "
        "| MB | fit s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        readers = {folder: TraceReader(folder) for folder in folders} or {
            model: drawn(Path(temporary) / model, *shape) for model, shape in SHAPES.items()
        }
        for model, reader in readers.items():
            for name, predictor in predictors().items():
                print(row(name, model, predictor, reader), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
