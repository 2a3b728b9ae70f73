"""The stage `traces` as a user types it: every deed, every refusal, and results that other stages take as they are."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from whole_traces import assert_same_bytes, assert_same_rows, everything, write

from prefetch import config, leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ArtifactError, ConfigError, FormatError, PrefetchError
from prefetch.runs.outputs import Outputs
from prefetch.sources.described import BESIDE, ON_ITS_OWN, missing_of
from prefetch.sources.traces import READS, run
from prefetch.trace import migrate as migration
from prefetch.trace.counts import load_counts
from prefetch.trace.parquet import TraceReader
from prefetch.tracking import NoTracker

ROOT = Path(__file__).resolve().parents[3]
SMALL = (
    "source=synthetic", "source.n_requests=12", "source.prompt_tokens=6", "source.new_tokens=10", "source.n_layers=3",
    "source.n_experts=8",
)  # fmt: skip


def configured(tmp_path: Path, *words: str) -> Config:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        overrides = [f"store={tmp_path / 'store'}", *SMALL, *words]
        if not any(word.startswith("stage=") for word in words):
            overrides.append("stage=traces")
        cfg = cast(Config, compose("config", overrides=overrides))
    config.check_values(cfg)
    return cfg


def do(tmp_path: Path, deed: str, *words: str) -> tuple[dict[str, float], Path]:
    """Its metrics, and the run's folder."""
    cfg = configured(tmp_path, f"traces.do={deed}", *words)
    folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    store = Store(cfg.store, makers=cfg.makers)
    metrics = run(cfg, store, Outputs(folder, NoTracker()))
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    return metrics, folder


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole", everything([4, 3, 7, 5, 9]), routers=True).folder


def test_what_is_split_by_words_and_merged_is_what_it_was(tmp_path, whole, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    do(tmp_path, "subset", f"trace={whole}", "traces.requests=0-1", f"traces.to={a}")
    do(tmp_path, "subset", f"trace={whole}", "traces.requests=[2,3-4]", f"traces.to={b}")
    to = f"traces.to={tmp_path / 'm'}"
    metrics, folder = do(tmp_path, "merge", f"traces.inputs=[{a},{b}]", to)
    assert_same_bytes(whole, tmp_path / "m")
    assert metrics["tokens"] == 28 and metrics["requests"] == 5
    assert f"{tmp_path / 'm'}: 28 tokens, 5 requests" in capsys.readouterr().out
    assert (folder / "said.txt").read_text().startswith(str(tmp_path / "m"))


def test_a_domain_for_each_input_and_columns_left_out(tmp_path, whole):
    a = tmp_path / "a"
    words = ("traces.domains=[law]", "traces.leave_out=[scores,gate_inputs,pre_attention]")
    do(tmp_path, "subset", f"trace={whole}", *words, f"traces.to={a}")
    b = tmp_path / "b"
    do(tmp_path, "subset", f"trace={whole}", "traces.domains=[code]", f"traces.to={b}")
    inputs = f"traces.inputs=[{a},{b}]"
    _, folder = do(
        tmp_path, "merge", inputs, "traces.domains=[null,x]", f"traces.to={tmp_path / 'm'}"
    )
    merged = TraceReader(tmp_path / "m")
    assert merged.domains == ("law", "x") and set(merged.columns) == {"experts", "weights"}
    assert f"left out: scores, which {a} has not recorded" in (folder / "said.txt").read_text()


def test_converting_gives_what_collect_collects_and_copies_what_is_there(tmp_path):
    fresh, copied = tmp_path / "fresh", tmp_path / "copied"
    do(tmp_path, "convert", f"traces.to={fresh}")
    assert not (tmp_path / "store" / "trace").exists(), "it stands where the user wants it, once"
    do(tmp_path, "describe")
    do(tmp_path, "convert", f"traces.to={copied}")
    assert_same_bytes(fresh, copied)
    (kept,) = (path.parent for path in tmp_path.glob("store/trace/*/trace.json"))
    for path in fresh.iterdir():
        assert path.read_bytes() == (kept / path.name).read_bytes()
    with pytest.raises(ConfigError, match="trace= is one already"):
        do(tmp_path, "convert", f"trace={fresh}", f"traces.to={tmp_path / 'x'}")


def test_a_foreign_file_becomes_another_foreign_file(tmp_path, whole):
    npz, back = tmp_path / "x.npz", tmp_path / "y.parquet"
    do(tmp_path, "export", f"trace={whole}", f"traces.to={npz}")
    arrays = ("source=arrays", "source.n_experts=16", f"source.path={npz}")
    cfg = configured_plain(tmp_path, *arrays, "traces.do=export", f"traces.to={back}")
    run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(tmp_path / "run", NoTracker()))
    frame = pd.read_parquet(back)
    ids = np.array([[list(row) for row in rows] for rows in frame["expert_ids"]])
    np.testing.assert_array_equal(ids, TraceReader(whole).load().ids_TLK)


def configured_plain(tmp_path: Path, *words: str) -> Config:
    """Without the settings of the synthetic source."""
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        overrides = ["stage=traces", f"store={tmp_path / 'store'}", *words]
        return cast(Config, compose("config", overrides=overrides))


def test_counts_go_in_and_out(tmp_path, capsys):
    given = {"num_experts": 4, "counts": {"1": [5, 0, 3, 8], "3": [9, 0, 7, 0]}}
    (tmp_path / "in.json").write_text(json.dumps(given))
    counts = ("source=counts", f"source.path={tmp_path / 'in.json'}")
    for deed, to in (("convert", "folder"), ("export", "out.json")):
        cfg = configured_plain(tmp_path, *counts, f"traces.do={deed}", f"traces.to={tmp_path / to}")
        run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(tmp_path / f"run {to}", NoTracker()))
    told = capsys.readouterr().out
    assert f"{tmp_path / 'folder'}: counts of 32 choices, 2 layers of 4 experts" in told
    assert "counts are no trace" in told and "0 requests" not in told.split("out.json")[0]
    assert load_counts(tmp_path / "folder").counts_LE.tolist() == [[5, 0, 3, 8], [9, 0, 7, 0]]
    assert json.loads((tmp_path / "out.json").read_text())["counts"] == given["counts"]


def test_a_damaged_trace_is_told_line_by_line_and_ends_in_an_error(tmp_path, whole, capsys):
    metrics, _ = do(tmp_path, "check", f"trace={whole}")
    assert metrics == {"findings": 0, "damaged": 0}
    assert f"whole    {whole}: not sealed by a store" in capsys.readouterr().out
    (whole / "scores-00000.parquet").write_bytes(b"PAR1")
    (whole / "gate_inputs-00000.parquet").unlink()
    with pytest.raises(FormatError, match="whole: damaged in 2 places; the first: damaged  "):
        do(tmp_path, "check", f"trace={whole}")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == [
        "damaged  scores-00000.parquet", "damaged  gate_inputs-00000.parquet"
    ]  # fmt: skip
    table = pd.read_csv(tmp_path / "run1" / "findings.csv")
    assert table.file[table.is_damage].tolist() == [
        "scores-00000.parquet",
        "gate_inputs-00000.parquet",
    ]
    assert json.loads((tmp_path / "run1" / "metrics.json").read_text())["damaged"] == 2
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        do(tmp_path, "check", "trace=nowhere")


def test_what_was_sealed_and_then_changed_is_not_merged(tmp_path, whole):
    do(tmp_path, "describe")
    (sealed,) = (path.parent for path in tmp_path.glob("store/trace/*/trace.json"))
    with (sealed / "transitions.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ArtifactError, match="its sha256 differs from the manifest"):
        do(tmp_path, "merge", f"traces.inputs=[{sealed},{whole}]", f"traces.to={tmp_path / 'm'}")


def test_a_sealed_artifact_and_counts_are_checked_too(tmp_path, capsys):
    do(tmp_path, "describe")
    (sealed,) = (path.parent for path in tmp_path.glob("store/trace/*/trace.json"))
    assert do(tmp_path, "check", f"trace={sealed}")[0]["findings"] == 0
    seal = hashlib.sha256((sealed / "manifest.json").read_bytes()).hexdigest()
    assert f"every file as it was sealed; sha256 of the seal {seal}" in capsys.readouterr().out
    (tmp_path / "counts").mkdir()
    (tmp_path / "counts" / "counts.json").write_text('{"schema": "prefetch.counts/1"}')
    with pytest.raises(FormatError, match=r"damaged in 1 places.*counts\.json"):
        do(tmp_path, "check", f"trace={tmp_path / 'counts'}")


def test_a_description_says_what_it_is_lacks_and_serves(tmp_path, whole, capsys):
    metrics, folder = do(tmp_path, "describe", f"trace={whole}")
    assert metrics["tokens"] == 28 and metrics["domains"] == 2 and metrics["experts"] == 16
    table = pd.read_parquet(folder / "domains.parquet").set_index("domain")
    assert table.tokens.to_dict() == {"law": 12, "code": 7, "(no domain)": 9, "all": 28}
    text = (folder / "description.txt").read_text()
    assert "lacks: card: score_function" in text and "gate_lookahead" in text
    assert "not these, which need" not in text
    assert "toy/model" in capsys.readouterr().out


def test_a_bare_trace_serves_less_and_the_predictors_agree(tmp_path):
    bare = {f"{n}_TLD": None for n in ("gate_inputs", "pre_attention")}
    reader = write(tmp_path / "bare", everything([4, 3], **bare))
    missing = missing_of(reader)
    assert missing["gate_lookahead"] == ["gate_inputs", "router_weights"]
    assert missing["pre_attention"] == ["pre_attention"] and missing["markov"] == []
    assert set(missing) == set(config.choices("predictor")) - set(ON_ITS_OWN)
    assert set(BESIDE) <= set(config.choices("predictor"))
    _, folder = do(tmp_path, "describe", f"trace={reader.folder}")
    text = (folder / "description.txt").read_text()
    assert "gate_lookahead (gate_inputs, router_weights)" in text
    assert "2 requests: too few to hold some out" in text


def test_a_predictor_whose_module_is_not_at_hand_stops_no_description(tmp_path, monkeypatch):
    reader = write(tmp_path / "bare", everything([4, 3]))
    (tmp_path / "configs" / "predictor").mkdir(parents=True)
    for name, target in (("mine", "nomodule.Mine"), ("markov", "prefetch.predict.markov.Markov")):
        (tmp_path / "configs" / "predictor" / f"{name}.yaml").write_text(f"_target_: {target}\n")
    monkeypatch.setattr(config, "CONFIGS", tmp_path / "configs")
    assert missing_of(reader) == {
        "mine": ["nomodule.Mine, which cannot be imported"],
        "markov": [],
    }


def test_an_older_version_is_brought_up_through_the_stage(tmp_path, whole, monkeypatch):
    about = json.loads((whole / "trace.json").read_text())
    (whole / "trace.json").write_text(json.dumps({**about, "schema": "prefetch.trace/0"}))
    with pytest.raises(FormatError, match=r"it is older: stage=traces traces\.do=migrate"):
        do(tmp_path, "describe", f"trace={whole}")
    to = f"traces.to={tmp_path / 'new'}"
    with pytest.raises(FormatError, match="that version was never published"):
        do(tmp_path, "migrate", f"trace={whole}", to)
    step = migration.step_of_description(lambda about: {**about, "schema": "prefetch.trace/1"})
    monkeypatch.setitem(cast(dict, migration.STEPS), 0, step)
    do(tmp_path, "migrate", f"trace={whole}", to)
    assert_same_rows(TraceReader(tmp_path / "new").load(), everything_bare([4, 3, 7, 5, 9]))


def everything_bare(lengths):
    names = ("weights_TLK", "scores_TLM", "gate_inputs_TLD", "pre_attention_TLD")
    trace = everything(lengths)
    return type(trace)(**{**vars(trace), **dict.fromkeys(names)})


def test_every_result_is_a_trace_for_the_other_stages(tmp_path):
    """Analyze runs on a merged part of a trace."""
    parts = []
    for number in range(2):
        parts.append(tmp_path / f"part{number}")
        words = (f"traces.requests={6 * number}-{6 * number + 5}", f"traces.to={parts[-1]}")
        do(tmp_path, "subset", "traces.layers=0-1", *words)
    merged = tmp_path / "merged"
    inputs = f"traces.inputs=[{parts[0]},{parts[1]}]"
    do(tmp_path, "merge", inputs, "traces.domains=[one,two]", f"traces.to={merged}")
    cfg = configured(tmp_path, "stage=analyze", f"trace={merged}", "analyze.figures=false")
    outputs, store = (
        Outputs(tmp_path / "analysis", NoTracker()),
        Store(cfg.store, makers=cfg.makers),
    )
    metrics = leaves.locate(cfg.stage._target_)(cfg, store, outputs)
    assert metrics["tokens"] == 192
    assert (tmp_path / "analysis" / "statistics.parquet").exists()
    (key,) = store.used
    assert key.startswith("trace/")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("traces.do=split",), "expected one of describe, check, subset"),
        (("traces.do=subset", "traces.first=1"), r"pass traces\.to=PLACE"),
        (("traces.do=subset", "traces.to=x"), "of what"),
        (("traces.do=merge", "traces.to=x"), r"pass traces\.inputs="),
        (("traces.do=merge", "traces.to=x", "traces.inputs=[a]", "trace=b"), r"pass traces\.inputs="),
        (("traces.do=merge", "traces.to=x", "traces.inputs=[a,b]"), "a/trace.json: not found"),
        (("traces.do=check",), "pass trace=DIR"),
        (("traces.do=migrate", "traces.to=x"), "pass trace=DIR"),
        (("traces.do=describe", "traces.to=x"), r"traces\.to: traces\.do=describe does not read it"),
        (("traces.do=export", "traces.to=x.npz", "traces.drawn=2"), r"it reads traces\.to, traces\.format"),
        (("traces.do=export", "traces.to=x.doc"), "which format"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly_is_said(tmp_path, words, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = configured(tmp_path, *words)
    with pytest.raises(PrefetchError, match=message):
        run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(tmp_path / "run", NoTracker()))
    assert not list(tmp_path.glob("x*"))


def test_every_deed_is_in_the_line_of_the_stage():
    line = (config.CONFIGS / "stage" / "traces.yaml").read_text().splitlines()[0]
    assert f"traces.do={'|'.join(READS)}" in line


def test_a_stop_in_the_middle_leaves_nothing(tmp_path):
    words = (
        "stage=traces",
        "traces.do=convert",
        "traces.to=big",
        "source=synthetic",
        "tracker=none",
    )
    command = [
        sys.executable,
        str(ROOT / "scripts" / "run.py"),
        *words,
        "source.n_requests=1000000",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE
    ) as process:
        while not list(tmp_path.glob(".big.building-*/*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in said
    assert not list(tmp_path.glob("*big*"))
