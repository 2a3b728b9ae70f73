"""Readers of traces, counts, guesses and fitted predictors, and what the project itself writes of them."""

from __future__ import annotations

import dataclasses
import io
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from fuzzing.readers import Files, Reader
from prefetch.errors import FormatError, PrefetchError
from prefetch.predict import export
from prefetch.predict.imported import Imported
from prefetch.predict.markov import Markov
from prefetch.predict.networks.interrupted import NOTE, seconds_before
from prefetch.predict.networks.training import _is_whole
from prefetch.predict.part import Part
from prefetch.predict.popularity import Popularity
from prefetch.predict.predictor import restore, save
from prefetch.predict.route_memory import RouteMemory
from prefetch.predict.runtime import load as load_exported
from prefetch.trace.card import plain_card
from prefetch.trace.checks import check_trace
from prefetch.trace.counts import ExpertCounts, load_counts
from prefetch.trace.describe import describe
from prefetch.trace.migrate import migrate
from prefetch.trace.parquet import TraceReader
from prefetch.trace.predictions import (
    Predictions,
    PredictionsCard,
    PredictionsReader,
    PredictionsWriter,
)
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, trace_of
from prefetch.trace.writer import TraceWriter

E, K, T, L, H, P = 16, 2, 24, 4, 2, 3
CARD = plain_card("toy", n_experts=E, top_k=K, layer_numbers=(4, 5, 6, 7))
ORIGIN = Provenance(
    "real", "fuzz", versions={"tool": "1"}, inputs={"a": "sha"}, facts={"own_gate_agreement": 1.0}
)


def routing(seed: int = 0, **more: Any) -> RoutingTrace:
    ids = np.random.default_rng(seed).random((T, L, E)).argsort(-1)[..., :K]
    return trace_of(
        CARD,
        ids,
        request_T=np.repeat(np.arange(4), 6),
        phase_T=np.tile([0, 0, 0, 1, 1, 1], 4),
        domain="law",
        **more,
    )


def files_of(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def made(write: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return files_of(Path(folder))


def trace_seeds() -> list[Files]:
    rng = np.random.default_rng(1)
    wide = {"weights_TLK": np.full((T, L, K), 0.5, np.float16), "scores_TLM": rng.random((T, L, E)).astype(np.float16),
            "gate_inputs_TLD": rng.random((T, L, 3)).astype(np.float16), "token_T": np.arange(T)}  # fmt: skip

    def write(folder: Path, **more: Any) -> None:
        writer = TraceWriter(folder, ORIGIN)
        writer.begin(CARD)
        writer.append(routing(**more))
        writer.close()
        if more:
            save_file(
                {f"layer.{n}": np.ones((E, 3), np.float32) for n in CARD.layer_numbers},
                folder / "router_weights.safetensors",
            )

    return [made(write), made(lambda folder: write(folder, **wide))]


def read_trace(folder: Path, out: Path) -> None:
    reader = TraceReader(folder)
    wanted = [name for name in reader.columns if name != "experts"]
    for _ in reader.batches(*wanted, max_rows=7):
        pass
    for _ in reader.small():
        pass
    if (folder / "router_weights.safetensors").exists():
        reader.router_weights()
    describe(reader)
    check_trace(reader)


def older_seeds() -> list[Files]:
    return [
        {
            **files,
            "trace.json": files["trace.json"].replace(b"prefetch.trace/1", b"prefetch.trace/0"),
        }
        for files in trace_seeds()
    ]


def migrated(folder: Path, out: Path) -> None:
    def step(old: Path, new: Path) -> None:
        for path in old.iterdir():
            shutil.copyfile(path, new / path.name)
        about = (new / "trace.json").read_bytes()
        (new / "trace.json").write_bytes(about.replace(b"prefetch.trace/0", b"prefetch.trace/1"))

    migrate(folder, out / "new", steps={0: step})


def counts_seeds() -> list[Files]:
    counts = ExpertCounts(CARD, np.arange(1, L * E + 1).reshape(L, E), ORIGIN)
    return [made(counts.save)]


GUESSES = PredictionsCard(
    trace="abc", predictor="toy", n_experts=E, n_layers=L, width=P, horizons=(1, 4), causality="decode", score="p",
    requests=(0, 1, 2, 3), fitted_requests=(7,),
)  # fmt: skip


def write_guesses(folder: Path) -> None:
    asked = routing()
    ids = np.random.default_rng(3).random((T, H, L, E)).argsort(-1)[..., :P].astype(np.uint8)
    scores = np.full(ids.shape, 0.5, np.float16)
    writer = PredictionsWriter(folder, GUESSES)
    writer.append(Predictions(GUESSES, asked.request_T, asked.position_T, ids, scores))
    writer.close()


def read_guesses(folder: Path, _: Path) -> None:
    reader = PredictionsReader(folder)
    reader.check_fits(trace="abc", n_experts=E, n_layers=L, requests=[0])
    for _block in reader.batches():
        pass


@cache
def part() -> Part:
    return Part(routing(), np.arange(4))


def ask(predictor: Imported) -> None:
    predictor.check_fits("abc", part())
    predictor.fit(part(), part())
    for horizon in predictor.horizons:
        for lesson in part().lessons(horizon):
            predictor.scores(lesson.past)


def read_imported_folder(folder: Path, _: Path) -> None:
    ask(Imported(path=str(folder), horizons=(1, 4)))


def read_imported_npz(folder: Path, _: Path) -> None:
    ask(Imported(path=str(folder / "a.npz"), horizons=(1,)))


def imported_seeds() -> list[Files]:
    ids = np.random.default_rng(3).random((T, L, E)).argsort(-1)[..., :P].astype(np.int16)
    asked = routing()
    full = {"ids": np.stack([ids, ids], axis=1), "scores": np.full((T, 2, L, P), 0.5, np.float32),
    "horizons": np.array([1, 4]),
            "request": asked.request_T, "position": asked.position_T}  # fmt: skip
    found: list[Files] = []
    for arrays, saved in ((full, np.savez), ({"ids": ids}, np.savez), (full, np.savez_compressed)):
        file = io.BytesIO()
        saved(file, **arrays)  # type: ignore[arg-type]
        found.append({"a.npz": file.getvalue()})
    return found


@cache
def fitted() -> dict[str, Any]:
    chosen = {"markov": Markov(horizons=(1, 3)), "popularity": Popularity(horizons=(1, 3)),
              "route_memory": RouteMemory(horizons=(1, 3), memory_tokens=8)}  # fmt: skip
    return {name: one.fit(part(), part()) for name, one in chosen.items()}


def exported_seeds() -> list[Files]:
    told = {
        "predictor": "x",
        "settings": {},
        "fold": 0,
        "split": "requests",
        "card": CARD.to_json(),
    }
    found = []
    for one in fitted().values():
        files = made(lambda folder, one=one: export.write(one, told, "key", folder))
        found.append({"predictor.safetensors": files["predictor.safetensors"]})
    return found


def read_exported(folder: Path, _: Path) -> None:
    """NumPy alone reads it, so that its errors are ValueError; it is asked as an engine asks."""
    path = folder / "predictor.safetensors"
    try:
        predictor = load_exported(path)
        told_sizes = (predictor.n_layers, predictor.n_experts)
    except (ValueError, OSError) as error:
        raise FormatError(str(error)) from error
    assert max(told_sizes) < 2**40, told_sizes
    predictor.start()
    for layer in range(min(8, predictor.n_layers)):
        for target in predictor.ahead():
            predictor.guess(target)
        predictor.observe(layer, np.arange(min(2, predictor.n_experts)))


def fitted_seeds() -> list[Files]:
    about = {"card": CARD.to_json(), "horizons": [1, 3]}
    return [
        made(lambda folder, one=one: save(one, folder, about, 1.5)) for one in fitted().values()
    ]


def read_fitted(folder: Path, _: Path) -> None:
    """Into a predictor of the kind that it says it is."""
    text = (
        (folder / "predictor.json").read_text(errors="replace")
        if (folder / "predictor.json").is_file()
        else ""
    )
    kind = next(
        (one for one in fitted().values() if type(one).__name__ in text), fitted()["markov"]
    )
    restore(dataclasses.replace(kind) if dataclasses.is_dataclass(kind) else type(kind)(), folder)


def interrupted_seeds() -> list[Files]:
    state = {
        "state_dict": {"net.weight": torch.zeros(3, 2)},
        "epoch": 1,
        "global_step": 5,
        "callbacks": {"a": {"b": 1.0}},
    }
    file = io.BytesIO()
    torch.save(state, file)
    return [{NOTE: b'{"seconds": 1.5, "began": 1700000000.0}\n', "0123.ckpt": file.getvalue()}]


def read_interrupted(folder: Path, out: Path) -> None:
    """The note is written anew where it was read: in a copy."""
    shutil.copytree(folder, out / "fit")
    try:
        seconds_before(out / "fit")
    except PrefetchError as error:
        raise type(error)(str(error).replace(str(out / "fit"), str(folder))) from error
    finally:
        _is_whole(folder / "0123.ckpt")


READERS = [
    Reader("trace", trace_seeds, read_trace),
    Reader("trace, migrated", older_seeds, migrated),
    Reader("trace counts", counts_seeds, lambda folder, _: load_counts(folder)),
    Reader("predictions", lambda: [made(write_guesses)], read_guesses),
    Reader("imported folder", lambda: [made(write_guesses)], read_imported_folder),
    Reader("imported npz", imported_seeds, read_imported_npz),
    Reader("exported predictor", exported_seeds, read_exported),
    Reader("fitted predictor", fitted_seeds, read_fitted),
    Reader("interrupted fit", interrupted_seeds, read_interrupted),
]
