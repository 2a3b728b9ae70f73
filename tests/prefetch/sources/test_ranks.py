"""Several processes record one trace: the bytes of a single one; death or failure leaves nothing that looks done."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from routing_traces import random_trace

from prefetch import config
from prefetch.artifacts import Recipe, Store
from prefetch.config import Config
from prefetch.errors import ArtifactError, ConfigError
from prefetch.runs.outputs import Outputs
from prefetch.sources import collect
from prefetch.sources.ranks import Meeting, Rank, in_order
from prefetch.trace.parquet import TraceFiles, TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.tracking import NoTracker
from tests.prefetch.sources.test_huggingface import SENTENCE, saved  # noqa: F401

ENVIRONMENT = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def configured(store: Path, *words: str) -> Config:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["stage=collect", f"store={store}", *words])
    return cast(Config, cfg)


def collected(folder: Path, *words: str) -> Path:
    cfg = configured(folder / "store", *words)
    store = Store(cfg.store, makers=cfg.makers)
    collect.run(cfg, store, Outputs(folder / f"out-{os.environ.get('RANK')}", NoTracker()))
    (made,) = store.sealed("trace")
    return made


def test_two_processes_write_the_bytes_of_one(saved, tmp_path, monkeypatch):  # noqa: F811
    texts = tmp_path / "texts"
    (texts / "prose").mkdir(parents=True)
    (texts / "prose" / "one.txt").write_text(SENTENCE * 3)
    (texts / "notes.txt").write_text(SENTENCE * 2)
    words = (
        "source=huggingface", f"source.model={saved}", f"source.path={texts}", "source.request_tokens=9",
        "source.batch_size=2", "source.new_tokens=3", "source.temperature=1.3", "source.scores=3",
        "source.gate_inputs=true",
    )  # fmt: skip
    alone = collected(tmp_path / "alone", *words)
    code = (
        "from pathlib import Path; from tests.prefetch.sources.test_ranks import collected; "
        f"collected(Path({str(tmp_path / 'two')!r}), *{list(words)!r})"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            **ENVIRONMENT,
            "RANK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    for name, value in {**ENVIRONMENT, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    together = collected(tmp_path / "two", *words)
    assert other.wait(60) == 0
    assert together.name == alone.name, "one key: whoever records it"
    names = sorted(path.name for path in alone.iterdir() if path.name != "manifest.json")
    assert (
        len(names) >= 5
        and [
            name for name in names if (alone / name).read_bytes() != (together / name).read_bytes()
        ]
        == []
    )
    assert TraceReader(alone).n_requests > 6
    left = [path.name for path in together.parent.iterdir() if path != together]
    assert left == [f".{together.name}.lock"]


def met(folder: Path, number: int, of: int = 2, silence_s: float = 20.0) -> Meeting:
    return Meeting(Rank(number, of, number, "run"), folder / "key", silence_s)


def shared(meeting: Meeting, told: Any) -> None:
    meeting.share().mkdir()
    meeting.hand_in(told)


def test_shares_are_put_together_once_all_have_come(tmp_path):
    is_made = tmp_path / "made"

    def other() -> None:
        with met(tmp_path, 1) as meeting:
            assert meeting.wait_for_opening(is_made.exists)
            time.sleep(0.3)
            shared(meeting, {"rows": 5})
            meeting.wait_until(is_made.exists)

    thread = threading.Thread(target=other)
    thread.start()
    with met(tmp_path, 0) as meeting:
        meeting.open()
        shared(meeting, {"rows": 3})
        assert meeting.shares() == [{"rows": 3}, {"rows": 5}]
        is_made.touch()
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_was_made_before_is_not_recorded_again(tmp_path):
    with met(tmp_path, 1) as meeting:
        assert not meeting.wait_for_opening(lambda: True)


def test_what_is_damaged_is_made_again_by_all_of_them(tmp_path, monkeypatch):
    """Whoever takes it for made would wait at the lock of the first process, and that one for a share."""
    cfg = configured(tmp_path, "artifacts.rebuild=true")
    made = Recipe("trace", 1, {}, lambda folder, _: (folder / "a").write_text("a"))
    held, store = Store(tmp_path).make(made), Store(tmp_path, rebuild=True)
    (held.folder / "a").write_text("b")
    source, asked = SimpleNamespace(record_with=lambda *_: None), list[bool]()

    def opening(_: Meeting, is_made: Callable[[], bool]) -> bool:
        asked.append(is_made())
        store.make(made)  # as the first process does
        asked.append(is_made())
        return False

    monkeypatch.setattr(collect, "instantiate", lambda *_: source)
    monkeypatch.setattr(collect, "trace_recipe", lambda *_: made)
    monkeypatch.setattr(Meeting, "wait_for_opening", opening)
    for name, value in {**ENVIRONMENT, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert collect._made(cfg, store).folder == held.folder and asked == [False, True]


def test_what_an_earlier_start_left_opens_nothing(tmp_path):
    """The other process is let in by its own number only."""
    with pytest.raises(KeyboardInterrupt), met(tmp_path, 0) as before:
        before._write("open", '{"0": "old", "1": "old"}')
        shared(before, {"rows": 1})
        raise KeyboardInterrupt
    with (
        pytest.raises(ArtifactError, match="process 0 of 2 failed: KeyboardInterrupt"),
        met(tmp_path, 1) as late,
    ):
        late.wait_for_opening(lambda: False)
    with met(tmp_path, 0):
        assert not before.share().exists()


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_fails_takes_the_others_with_it(tmp_path, number):
    def fails() -> None:
        with contextlib.suppress(OSError), met(tmp_path, number) as meeting:
            if number == 0:
                meeting.open()
            else:
                meeting.wait_for_opening(lambda: False)
            raise OSError("no room left")

    thread = threading.Thread(target=fails)
    with (
        pytest.raises(ArtifactError, match=f"process {number} of 2 failed: OSError: no room"),
        met(tmp_path, 1 - number) as meeting,
    ):
        thread.start()
        if number == 0:
            meeting.wait_for_opening(lambda: False)
            meeting.wait_until(lambda: False)
        else:
            meeting.open()
            meeting.share().mkdir()
            meeting.shares()
    thread.join()


def test_a_process_that_is_killed_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    """It joins, begins its share, and is gone; the first process gives up, and the store holds no trace."""
    code = (
        "import time; from pathlib import Path; from tests.prefetch.sources.test_ranks import met; "
        f"m = met(Path({str(tmp_path / 'store' / 'trace')!r}), 1).__enter__(); "
        "m.wait_for_opening(lambda: False); m.share().mkdir(); (m.share() / 'begun').touch(); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    meeting = met(tmp_path / "store" / "trace", 0, silence_s=30.0)
    with (
        pytest.raises(
            ArtifactError, match=r"process 1 of 2 was not heard of for 1 s .*nothing is kept"
        ),
        meeting,
    ):
        meeting.open()
        while not (meeting.share(1) / "begun").exists():
            time.sleep(0.05)
        other.send_signal(signal.SIGKILL)
        other.wait()
        meeting.silence_s = 1.0
        shared(meeting, {})
        meeting.shares()
    assert Store(tmp_path / "store").sealed("trace") == []
    assert [p.name for p in (tmp_path / "store" / "trace").iterdir()] == [".key-run.unfinished"]


def test_nobody_comes(tmp_path):
    with (
        pytest.raises(ArtifactError, match="process 1 of 2 was not heard of"),
        met(tmp_path, 0, silence_s=0.3) as meeting,
    ):
        meeting.open()


@pytest.mark.parametrize("per_batch", [1, 3, 4])
def test_batches_come_back_in_their_order_whoever_has_them(tmp_path, per_batch):
    trace = random_trace(n_requests=11, tokens=5)
    shares = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = TraceFiles(folder)
        mine = Rank(number, 3, 0, "").takes
        for batch in range(-(-11 // per_batch)):
            if mine(batch):
                files.append(trace.rows(trace.request_T // per_batch == batch))
        if files.columns:
            files.close(trace.card, Provenance("real", "test"))
        shares.append(folder)
    blocks = list(in_order(shares, per_batch))
    assert [int(block.request_T[0]) for block in blocks] == list(range(0, 11, per_batch))
    ids = [block.ids_TLK for block in blocks]
    assert sum(map(len, ids)) == trace.n_tokens
    assert (np.concatenate(ids) == trace.ids_TLK).all()


def test_the_environment_says_who_a_process_is():
    assert Rank.of_environment({}) is None
    assert Rank.of_environment({"WORLD_SIZE": "1", "RANK": "0"}) is None
    told = {**ENVIRONMENT, "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}
    rank = Rank.of_environment(told)
    assert rank is not None and (rank.number, rank.of, rank.on_node) == (5, 8, 1)
    assert [rank.takes(batch) for batch in (4, 5, 13)] == [False, True, True]
    same = Rank.of_environment({**told, "RANK": "6"})
    other = Rank.of_environment({**told, "MASTER_PORT": "1"})
    assert same is not None and other is not None
    assert dataclasses.replace(same, number=5) == rank != dataclasses.replace(other, number=5)
    with pytest.raises(ConfigError, match="expected RANK from 0 to 7, got -1"):
        Rank.of_environment({**ENVIRONMENT, "WORLD_SIZE": "8"})
