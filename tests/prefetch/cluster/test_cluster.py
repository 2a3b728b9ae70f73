"""A cluster tells what one process tells, byte for byte; workers die and are replaced; errors are named."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from routing_traces import random_trace

from analysis import analyze
from prefetch import config, manifest
from prefetch.artifacts import UNFINISHED, Store
from prefetch.cluster import connect, worker
from prefetch.cluster.mapping import Cluster, ClusterError, Dask, InProcess, cluster_of
from prefetch.config import Config
from prefetch.errors import ConfigError, FormatError
from prefetch.leaves import instantiate
from prefetch.predict.part import whole
from prefetch.predict.recipes import predictor_recipe
from prefetch.runs.outputs import Outputs
from prefetch.sim import evaluate
from prefetch.sim.limits.curves import hit_rate_curves
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.sweep import Kept
from prefetch.stock import drop_unfinished
from prefetch.trace import parquet
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.stretch import Stretch, cut
from prefetch.trace.writer import TraceWriter
from prefetch.tracking import NoTracker

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two worker processes for all tests: they take seconds to start."""
    cluster = Cluster(
        Dask(workers=2, retries=1, shard_rows=100), tmp_path_factory.mktemp("cluster")
    )
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    """Many row groups and shards, domains, weights, scores, gate inputs, words."""
    n, rng = 30 * 40, np.random.default_rng(0)
    recorded = {
        "weights_TLK": rng.random((n, 4, 3)),
        "scores_TLM": rng.normal(size=(n, 4, 16)),
        "gate_inputs_TLD": rng.normal(size=(n, 4, 8)),
        "token_T": rng.integers(0, 50, n),
    }
    drawn = random_trace(**recorded)
    names = {"domain_T": drawn.request_T % 3, "domains": ("a", "b", "c")}
    folder = tmp_path_factory.mktemp("trace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "GROUP_BYTES", 9_000)
        patch.setattr(parquet, "SHARD_BYTES", 50_000)
        writer = TraceWriter(folder, Provenance("synthetic", "test"))
        writer.begin(drawn.card)
        writer.append(dataclasses.replace(drawn, **names))
        writer.close()
    assert len(TraceReader(folder).shards) > 2
    return folder


@dataclasses.dataclass(eq=False)
class Deadly(Cluster):
    """The worker that begins the second shard of any map is killed at once, the first `times` times."""

    inner: Any = None
    times: int = 1

    def map(self, work, items, state=None, **told):
        lives, victim, times = self.folder, items[min(1, len(items) - 1)], self.times
        lives.mkdir(exist_ok=True)

        def deadly(state, item):
            if item == victim and (deaths := len(list(lives.iterdir()))) < times:
                (lives / str(deaths)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return work(state, item)

        return self.inner.map(deadly, items, state, **told)

    def n_shards(self, rows):
        return self.inner.n_shards(rows)


def configured(folder: Path, *words: str) -> Config:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = cast(Config, compose("config", overrides=[f"store={folder}", *words]))
    config.check_values(cfg)
    return cfg


def written(stage: Any, folder: Path, *words: str) -> dict[str, bytes]:
    """What a stage leaves for a person."""
    cfg = configured(folder / "store", *words)
    out = folder / f"out{len(list(folder.glob('out*')))}"
    stage.run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(out, NoTracker()))
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != "lineage.json"}


def choose(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    """Stages that are told `cluster=dask` get this one."""
    monkeypatch.setattr("prefetch.cluster.mapping._kept", {})
    monkeypatch.setattr("prefetch.cluster.mapping.Cluster", lambda settings, folder: cluster)


# ---- same bytes


@pytest.fixture(scope="module")
def tables(tmp_path_factory, trace):
    return written(analyze, tmp_path_factory.mktemp("here"), *ANALYZE, f"trace={trace}")


ANALYZE = ("stage=analyze", "analyze.figures=false", "analyze.window_tokens=64")


@pytest.mark.parametrize("kills", [0, 1])
def test_tables_are_equal_byte_for_byte_also_when_a_worker_is_killed(
    two, trace, tables, tmp_path, monkeypatch, kills
):
    cluster = Deadly(two.settings, tmp_path / "lives", two, times=kills)
    choose(monkeypatch, cluster)
    found = written(analyze, tmp_path, *ANALYZE, f"trace={trace}", "cluster=dask")
    assert len(found) > 60 and set(found) == set(tables)
    assert [name for name in found if found[name] != tables[name]] == []
    assert len(list((tmp_path / "lives").iterdir())) == kills


@pytest.mark.parametrize("name", ["popularity", "markov", "markov2", "token_table"])
def test_a_predictor_counted_on_workers_is_the_same_predictor(
    two, trace, tmp_path, monkeypatch, name
):
    words = ("stage=train", f"predictor={name}", f"trace={trace}", "train.horizons=[1,2]")
    calls = []
    monkeypatch.setattr(
        "prefetch.predict.part.cut", lambda *given: calls.append(given) or cut(*given)
    )
    choose(monkeypatch, two)
    states = []
    for place, more in enumerate((words, (*words, "cluster=dask"))):
        cfg = configured(tmp_path / str(place), *more)
        made = Store(cfg.store, makers=cfg.makers).make(predictor_recipe(cfg))
        states.append((made.key, (made.folder / "state.safetensors").read_bytes()))
    assert states[0] == states[1] and calls, "and it was counted in stretches"


def test_a_grid_on_workers_has_the_same_rows_and_keeps_them(two, tmp_path, monkeypatch):
    words = (
        "stage=evaluate", "source=synthetic", "source.n_requests=12", "source.prompt_tokens=6", "source.new_tokens=20",
        "source.n_layers=4", "source.n_experts=8", "source.top_k=2", "simulator.model_card=mixtral_8x7b",
        "train.horizons=[1,2]", "simulator.horizon=2", "simulator.cache=0.5", "evaluate.figures=false",
        "predictor=markov", "evaluate.policies=[lru,sieve]",
    )  # fmt: skip
    here = written(evaluate, tmp_path, *words)
    cells = tmp_path / "store" / "cells"
    kept = {path.name: path.read_bytes() for path in cells.rglob("*.json")}
    shutil.rmtree(cells)  # the guesses stay: how long they take is measured
    choose(monkeypatch, two)
    there = written(evaluate, tmp_path, *words, "cluster=dask")
    assert {"results.parquet", "required_recall.parquet"} <= here.keys()
    assert [name for name in here if here[name] != there.get(name)] == []
    assert kept and {path.name: path.read_bytes() for path in cells.rglob("*.json")} == kept
    curves = []
    for more in ((), ("cluster=dask",)):
        cfg = configured(tmp_path / "store", *words, *more)
        bench = Bench(cfg, Store(cfg.store, makers=cfg.makers))
        curves.append(hit_rate_curves(bench, Kept(tmp_path / f"curves{len(curves)}")))
    pd.testing.assert_frame_equal(*curves, check_exact=True)


def test_stretches_hold_every_request_once_wherever_they_are_cut(trace):
    reader = TraceReader(trace)
    whole_trace = reader.load("weights")
    for n in (1, 2, 7, 30, 400):
        read, rows = [], []
        for start, stop in cut(reader, n):
            for row, block in Stretch(trace, start, stop).numbered("weights", max_rows=50):
                assert start <= row < stop
                read.append(block)
                rows.append(np.arange(row, row + block.n_tokens))
        assert (np.concatenate(rows) == np.arange(reader.n_tokens)).all()
        joined = parquet.concat(read)
        assert (joined.ids_TLK == whole_trace.ids_TLK).all()
        assert (joined.weights_TLK == whole_trace.weights_TLK).all()


def test_a_stretch_reads_the_groups_that_it_needs_and_no_more(trace, monkeypatch):
    read = []
    group = TraceReader._group
    monkeypatch.setattr(
        TraceReader, "_group", lambda self, *given: read.append(given[1]) or group(self, *given)
    )
    n = TraceReader(trace).n_tokens
    list(Stretch(trace, n // 2, n // 2 + 1).batches())
    few = len(read)
    list(TraceReader(trace).batches())
    assert few <= 3 < len(read) - few


def test_in_one_process_nothing_of_dask_is_imported(tmp_path):
    text = (
        "import sys, analysis.analyze, prefetch.sim.evaluate, prefetch.predict.recipes; "
        "print(sorted({'dask', 'distributed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert cluster_of(configured(tmp_path)) is None


# ---- workers that die, fail, or are not ours


def test_a_shard_that_kills_every_worker_is_named_with_the_number_of_tries(two, tmp_path):
    deadly = Deadly(two.settings, tmp_path / "lives", two, times=99)
    with pytest.raises(ClusterError, match=r"counting, part b: gave up, 2 workers died .*=1"):
        list(deadly.map(_twice, [1, 2], title="counting", names=["part a", "part b"]))
    assert len(list((tmp_path / "lives").iterdir())) == 2
    told = two.map(_local(_twice), [1, 2, 3], title="after", names="abc")
    assert list(told) == [(0, 2), (1, 4), (2, 6)], "and the cluster works on"


def _twice(state: Any, item: Any) -> Any:
    return 2 * item


def _local(function: Any) -> Any:
    """Of no module that a worker could import: pickled by value."""

    def run(state: Any, item: Any) -> Any:
        return 2 * item

    assert function is _twice
    return run


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ZeroDivisionError("by nought"), ClusterError, r"counting, b: failed on a worker; ZeroDiv.*nought"),
        (FormatError("x.parquet: bad"), FormatError, r"x\.parquet: bad \(counting, b\)"),
    ],
)  # fmt: skip
def test_a_shard_that_always_fails_is_an_error_by_its_name(two, error, kind, message):
    def fails(state: Any, item: Any) -> Any:
        if item == 1:
            raise error
        return item

    with pytest.raises(kind, match=message):
        list(two.map(fails, [0, 1, 2], title="counting", names="abc"))
    assert not list(two.folder.iterdir()), "what shards shared is removed"


def test_results_come_in_order_or_as_they_are_done(two):
    def slow_first(state: Any, item: Any) -> Any:
        import time

        time.sleep(0.5 * (item == 0))
        return state + item

    told: dict[str, Any] = {"title": "t", "names": "abcdef"}
    assert [place for place, _ in two.map(slow_first, range(6), 10, **told)] == [0, 1, 2, 3, 4, 5]
    found = list(two.map(slow_first, range(6), 10, in_order=False, **told))
    assert sorted(found) == [(i, 10 + i) for i in range(6)] and found[0][0] != 0


def test_an_interrupted_map_takes_back_what_was_not_done(two):
    def slow(state: Any, item: Any) -> Any:
        import time

        time.sleep(0.3)
        return item

    results = two.map(slow, range(50), title="t", names=[str(i) for i in range(50)], in_order=False)
    next(results)
    results.close()  # as KeyboardInterrupt would
    began = time.monotonic()
    assert next(two.map(_local(_twice), [5], title="t", names="a")) == (0, 10)
    assert time.monotonic() - began < 7, "fifty shards of 0.3 s on two workers did not go on"


def test_workers_have_one_thread_each_unless_told(two):
    def threads(state: Any, item: Any) -> Any:
        import os

        import numpy  # noqa: F401
        from threadpoolctl import threadpool_info

        from prefetch.cluster.worker import n_threads

        pools = {pool["num_threads"] for pool in threadpool_info()}
        return n_threads(), os.environ["OMP_NUM_THREADS"], sorted(pools)

    assert [found for _, found in two.map(threads, [0], title="t", names="a")] == [(1, "1", [1])]


def test_a_worker_of_another_version_is_refused_by_name(two, monkeypatch):
    monkeypatch.setattr("prefetch.cluster.worker.__version__", "9.9")
    with pytest.raises(ConfigError, match=r"worker .*: prefetch is .* there and 9\.9 here"):
        list(two.map(_local(_twice), [1], title="t", names="a"))


@pytest.mark.parametrize("changed", ["prefetch/sim/engines/timed.py", "analysis/routing/pairs.py"])
def test_the_code_of_both_packages_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    for package in manifest.PACKAGES:
        shutil.copytree(
            manifest.ROOT / package,
            tmp_path / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    digest = manifest.code_digest.__wrapped__
    here = digest()
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    assert digest() == here
    (tmp_path / changed).write_text("changed")
    assert digest() != here


def test_a_worker_of_two_maps_in_turn_has_the_threads_of_each(monkeypatch):
    had: list[int] = []
    monkeypatch.setattr("threadpoolctl.threadpool_limits", had.append)
    for name in (worker.THREADS, *worker.OF_LIBRARIES):
        monkeypatch.setenv(name, "0")
    if "torch" in sys.modules:
        monkeypatch.setattr(sys.modules["torch"], "set_num_threads", lambda _: None)
    worker.limit_threads.cache_clear()
    for threads in (1, 1, 2, 1):
        worker.limit_threads(threads)
    assert had == [1, 2, 1] and os.environ[worker.THREADS] == "1"
    worker.limit_threads.cache_clear()


class Seen:
    """A client as far as it is asked how many there are."""

    def __init__(self, status: str, answer: Any) -> None:
        self.status, self.answer, self.cluster, self.is_closed = status, answer, None, False
        self.scheduler = self

    address = "tcp://host:1"

    def nthreads(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self) -> None:
        self.is_closed = True


def test_a_scheduler_that_is_back_is_asked_again(monkeypatch, tmp_path):
    """By the next job of a sweep, which shares the process; a client that lost it does not find it by itself."""
    cluster = Cluster(Dask(address="tcp://host:1"), tmp_path)
    lost, back = Seen("closed", AttributeError("None")), Seen("running", {"a": 1, "b": 1})
    cluster.__dict__["_client"] = lost
    monkeypatch.setattr(connect, "connected", lambda _: back)
    assert cluster.n_shards(10**9) == 4 and lost.is_closed
    back.answer = ConnectionError("closed")
    with pytest.raises(ClusterError, match=r"scheduler at tcp://host:1 went away; run again"):
        cluster.n_shards(10**9)
    cluster.close()


def test_what_a_map_shares_is_locked_before_it_is_there(tmp_path, monkeypatch):
    """Otherwise `artifacts.remove=unused` may take it away as it begins."""
    found: list[list[str]] = []

    def begun(path: Path, state: Any) -> None:
        drop_unfinished(Store(tmp_path))
        found.append([one.name for one in path.parent.parent.iterdir()])

    made = Path.mkdir

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        made(path, *args, **kwargs)
        if path.name.endswith(UNFINISHED):
            drop_unfinished(Store(tmp_path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr("prefetch.cluster.mapping.write_state", begun)
    with Cluster(Dask(), tmp_path / "cluster")._written(None) as path:
        assert path.parent.is_dir() and len(found[0]) == 2
    assert not list((tmp_path / "cluster").iterdir())


def test_the_code_of_workers_elsewhere_is_compared(monkeypatch):
    known = worker.versions()
    worker.check_versions(known)
    with pytest.raises(ConfigError, match=r"code of the project is .* there and old here"):
        worker.check_versions({**known, worker.CODE: "old"})
    assert worker.CODE in Cluster(Dask(address="tcp://host:1"), Path())._versions
    assert worker.CODE not in Cluster(Dask(), Path())._versions


def test_what_a_worker_cannot_see_is_said(two, trace, tmp_path):
    gone = tmp_path / "gone"
    gone.symlink_to(trace, target_is_directory=True)
    part = dataclasses.replace(whole(TraceReader(gone)), cluster=two)
    object.__setattr__(part.trace, "folder", tmp_path / "elsewhere")  # as on a machine without it
    with pytest.raises(ConfigError, match=r"elsewhere/trace\.json: not seen from worker"):
        list(part.counted(_nothing, "counting"))


def _nothing(part: Any) -> None:
    raise AssertionError("never called here")


# ---- clusters that are not there


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_address_where_nobody_answers_is_one_line_within_seconds(tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    cluster = Cluster(Dask(address=address, timeout_s=1.0), tmp_path)
    began = time.monotonic()
    with pytest.raises(
        ClusterError, match=rf"cluster\.address={address}: no Dask scheduler answers"
    ):
        cluster.n_shards(4)
    assert time.monotonic() - began < 20


def test_a_scheduler_without_workers_is_said_and_two_run_side_by_side(two, tmp_path):
    """A fixed port would be taken: pytest makes Dask's warning of it an error."""
    with distributed.LocalCluster(
        n_workers=0, dashboard_address=None, scheduler_kwargs=connect._of_scheduler(Dask())
    ) as nobody:
        at = Cluster(Dask(address=nobody.scheduler_address, timeout_s=0.5), tmp_path)
        with pytest.raises(ClusterError, match=r"the scheduler has no workers, and none came"):
            at.n_shards(4)


def test_a_cluster_of_an_address_is_used_and_left_alone(two, tmp_path, monkeypatch):
    monkeypatch.setattr(Cluster, "_versions", {})  # files may change while tests run
    at = Cluster(Dask(address=two._client.scheduler.address), tmp_path)
    assert list(at.map(_local(_twice), [4], title="t", names="a")) == [(0, 8)]
    at.close()
    assert list(two.map(_local(_twice), [4], title="t", names="a")) == [(0, 8)]


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"needs the package distributed: pip install"):
        Cluster(Dask(), tmp_path).n_shards(3)
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ConfigError, match="dask-jobqueue"):
        connect.slurm(Dask(slurm={}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cluster.address=localhost",), "cluster: address=localhost: expected tcp://HOST:PORT"),
        (("cluster.address=tcp://a:1", "cluster.workers=2"), "address and workers"),
        (("cluster.workers=0",), "workers=0, threads=1.*at least 1"),
        (("cluster.retries=-1",), "retries=-1: must not be negative"),
        (("cluster.threads=two",), "cluster.threads: expected int, got 'two'"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        cluster_of(configured(tmp_path, "cluster=dask", *words))


def test_settings_choose_and_share_a_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr("prefetch.cluster.mapping._kept", {})
    assert instantiate(configured(tmp_path).cluster, "cluster") == InProcess()
    one, same = (cluster_of(configured(tmp_path, "cluster=dask")) for _ in range(2))
    assert one is same and one is not None and one.folder == tmp_path / "cluster"
    other = cluster_of(configured(tmp_path, "cluster=dask", "cluster.workers=3"))
    assert other is not one


def test_jobs_of_slurm_ask_for_what_was_written(tmp_path):
    jobqueue = pytest.importorskip("dask_jobqueue")
    cfg = configured(tmp_path, "cluster=slurm", "cluster.threads=2", "cluster.slurm.queue=short")
    chosen = instantiate(cfg.cluster, "cluster")
    asked: dict[str, Any] = {}

    class Fake:
        def __init__(self, **given: Any) -> None:
            asked.update(given)

        def scale(self, jobs: int) -> None:
            asked["jobs"] = jobs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobqueue, "SLURMCluster", Fake)
        patch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
        connect.slurm(chosen)
    assert asked["jobs"] == 2 and (asked["cores"], asked["processes"], asked["job_cpu"]) == (
        4,
        4,
        8,
    )
    assert asked["queue"] == "short" and "account" not in asked


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("cluster.slurm.workers_per_job=abc", r"workers_per_job=abc: must be at least 1"),
        ("cluster.slurm.workers_per_job=true", r"workers_per_job=True: must be at least 1"),
        ("cluster.slurm.memory=abc", r"cluster\.slurm=.*dask_jobqueue cannot use it"),
    ],
)
def test_what_slurm_cannot_be_asked_for_is_said_before_a_job_is(tmp_path, word, said):
    jobqueue = pytest.importorskip("dask_jobqueue")
    chosen = instantiate(configured(tmp_path, "cluster=slurm", word).cluster, "cluster")

    def refuses(**given: Any) -> None:
        raise ValueError(f"Could not interpret {given['memory']!r} as a byte unit")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobqueue, "SLURMCluster", refuses)
        patch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
        with pytest.raises(ConfigError, match=said):
            connect.slurm(chosen)
        patch.setattr("shutil.which", lambda _: None)
        with pytest.raises(ConfigError, match="no sbatch"):
            connect.slurm(chosen)
