"""The README is true: its commands run as they are written, one after the other, and its layout exists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prefetch.config import choices, stage_names
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import RoutingTrace

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every line of the bash blocks that calls the entry."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python scripts/run.py")]


def run(line: str, folder: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "run.py"), *line.split()[2:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, line + "\n" + done.stdout + done.stderr


@pytest.mark.long
def test_the_commands_run_as_they_are_written_and_the_default_trace_holds_what_is_said(tmp_path):
    assert len(commands()) >= 4
    for line in commands():
        run(line, tmp_path)
    found = [TraceReader(path.parent) for path in tmp_path.glob("artifacts/trace/*/trace.json")]
    (reader,) = [reader for reader in found if reader.provenance.source == "tiny_moe"]
    trace = reader.load("weights")
    assert reader.provenance.kind == "real" and reader.n_tokens >= 20_000
    assert {"python", "prose", "maths", "cpp", "data"} == set(reader.domains)
    assert set(trace.phase_T.tolist()) == {0, 1}
    popularity, markov = recalls(trace)
    assert markov >= 2 * popularity
    analyzed = [
        json.loads(path.read_text()) for path in tmp_path.glob("outputs/analyze/*/metrics.json")
    ]
    assert analyzed[0]["popularity_recall_at_k"] == pytest.approx(popularity, abs=1e-3)
    assert analyzed[0]["markov_recall_at_k"] == pytest.approx(markov, abs=1e-3)
    assert analyzed[0]["own_gate_recall_at_k"] > 0.999
    for folder in tmp_path.glob("outputs/analyze/*"):
        assert (folder / "summary.md").read_text().startswith("# What the routing of tiny_moe")
        assert (folder / "layer_7_expert_frequency.svg").exists()
    metrics = [
        json.loads(path.read_text()) for path in tmp_path.glob("outputs/collect/*/metrics.json")
    ]
    assert any(
        m["tokens"] == reader.n_tokens and m.get("own_gate_agreement") == 1.0 for m in metrics
    )


def recalls(trace: RoutingTrace) -> tuple[float, float]:
    """Recall@K of popularity and of first-order Markov counts, by request 70 to 30, mean over layer pairs."""
    ids, n_experts, top_k = trace.ids_TLK.astype(int), trace.card.n_experts, trace.card.top_k
    requests = np.random.default_rng(0).permutation(np.unique(trace.request_T))
    is_train_T = np.isin(trace.request_T, requests[: int(0.7 * len(requests))])
    one_TLE = np.zeros((*ids.shape[:2], n_experts))
    np.put_along_axis(one_TLE, ids, 1.0, axis=2)
    pairs = []
    for layer in range(ids.shape[1] - 1):
        here_TE, there_TE = one_TLE[:, layer], one_TLE[:, layer + 1]
        popular_E = there_TE[is_train_T].mean(axis=0)
        counts_EE = here_TE[is_train_T].T @ there_TE[is_train_T] + 0.5 * popular_E
        chance_EE = counts_EE / (here_TE[is_train_T].sum(axis=0)[:, None] + 0.5)
        scores = (np.broadcast_to(popular_E, there_TE.shape), here_TE @ chance_EE)
        guesses = [np.argsort(-score[~is_train_T], axis=1)[:, :top_k] for score in scores]
        hits = [
            np.take_along_axis(there_TE[~is_train_T], guess, axis=1).mean() for guess in guesses
        ]
        pairs.append(hits)
    popularity, markov = np.mean(pairs, axis=0)
    return float(popularity), float(markov)


def test_every_stage_and_source_stands_in_the_readme():
    for name in stage_names():
        assert f"| `{name}` |" in README, f"stage {name}"
    for name in choices("source"):
        assert f"`{name}`" in README, f"source {name}"


def test_results_are_rows_of_the_benchmarks():
    """Of the two real traces: hits and times with their intervals, digit by digit."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    page = page[page.index("## Every policy and cheap predictor") :]
    measured = page[: page.index("Commands, ")].split("**gpt-oss-20b**")
    rows = [
        numbers
        for line in README.splitlines()
        if (numbers := re.findall(r"\d*\.\d+", line))
        if len(numbers) == 12
    ]
    assert len(rows) >= 10
    for row in rows:
        for part, told in zip((row[:6], row[6:]), measured, strict=True):
            hits, ms = [f"{float(number):.3f}" for number in part[:3]], part[3:]
            cells = f"{hits[0]} [{hits[1]} {hits[2]}] |", f"| {ms[0]} [{ms[1]} {ms[2]}] |"
            assert any(all(cell in line for cell in cells) for line in told.splitlines()), cells


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
