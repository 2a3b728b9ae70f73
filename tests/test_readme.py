"""The README is true: its commands run as they are written, one after the other, and its layout exists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefetch.config import choices, stage_names
from prefetch.trace.parquet import TraceReader

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every line of the bash blocks that calls the entry."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python scripts/run.py")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


def test_there_are_commands():
    assert len(commands()) >= 4


@pytest.mark.parametrize("line", commands())
def test_a_command_runs_as_it_is_written(line, workplace):
    words = [sys.executable, str(ROOT / "scripts" / "run.py"), *line.split()[2:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words,
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_default_trace_has_what_the_readme_says(workplace):
    found = [TraceReader(path.parent) for path in workplace.glob("artifacts/trace/*/trace.json")]
    (reader,) = [reader for reader in found if reader.provenance.source == "tiny_moe"]
    trace = reader.load("weights")
    assert reader.provenance.kind == "real" and reader.n_tokens >= 20_000
    assert {"python", "prose", "maths", "cpp", "data"} == set(reader.domains)
    assert set(trace.phase_T.tolist()) == {0, 1}
    metrics = [
        json.loads(path.read_text()) for path in workplace.glob("outputs/collect/*/metrics.json")
    ]
    assert any(m["tokens"] == reader.n_tokens and m["own_gate_agreement"] == 1.0 for m in metrics)


def test_every_stage_and_source_stands_in_the_readme():
    for name in stage_names():
        assert f"| `{name}` |" in README, f"stage {name}"
    for name in choices("source"):
        assert f"`{name}`" in README, f"source {name}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
