"""Copies and their fit, the sealed measurement of a machine, and `hardware=measured`, which reads it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from prefetch import config
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.engine.profiling import copies, disk, machine, roofs, whose
from prefetch.engine.profiling.copies import CopyFit, copies_of, fit_copies, fits_of
from prefetch.engine.profiling.device import facts, place_of
from prefetch.engine.profiling.disk import disk_of
from prefetch.engine.profiling.machine import (
    Measured,
    chunk_bytes,
    hardware_recipe,
    latest,
    measured_machine,
    seal,
)
from prefetch.engine.profiling.timing import Clock
from prefetch.errors import ArtifactError, ConfigError
from prefetch.sim.chosen import hardware_of
from prefetch.sim.hardware import Lane, Link, hardware, measured, numeric_fields

SIZES = [4096 * 4**i for i in range(9)]


@given(st.floats(100, 1e6), st.floats(1e8, 1e12))
def test_the_fit_finds_latency_and_bandwidth(latency_ns, rate):
    fit = fit_copies(SIZES, [latency_ns + size * 1e9 / rate for size in SIZES])
    assert fit.median_error < 1e-3
    for size in SIZES:
        assert fit.ns(size) == pytest.approx(latency_ns + size * 1e9 / rate, rel=0.01, abs=1)
    if SIZES[0] * 1e9 / rate < latency_ns < SIZES[-1] * 1e9 / rate:  # neither of the two is hidden
        assert fit.latency_ns == pytest.approx(latency_ns, rel=0.02, abs=1)
        assert fit.bytes_per_s[-1][1] == pytest.approx(rate, rel=0.02)


def test_the_fit_finds_a_rate_that_rises_with_size():
    true = CopyFit(5000, ((0, 4 * 10**9), (512 * 1024, 16 * 10**9)), 0.0)
    fit = fit_copies(SIZES, [true.ns(size) for size in SIZES])
    assert fit.median_error < 0.001 and len(fit.bytes_per_s) == 2
    assert fit.latency_ns == pytest.approx(5000, rel=0.01)
    assert fit.bytes_per_s[-1][1] == pytest.approx(16 * 10**9, rel=0.01)


@given(st.lists(st.floats(1, 1e9), min_size=9, max_size=9))
def test_whatever_was_measured_gives_a_link(times):
    fit = fit_copies(SIZES, times)
    lane = Lane(0, fit.bytes_per_s)  # rates are positive and do not fall, or it refuses
    link = Link(fit.latency_ns, 2**20, lane, lane)
    for size in (1, *SIZES):
        assert link.copy_ns(size) == pytest.approx(fit.ns(size), rel=1e-6, abs=2)
    assert all(fit.ns(a) <= fit.ns(b) for a, b in itertools.pairwise(SIZES))


def test_one_size_is_no_line():
    with pytest.raises(ValueError, match="a line needs two sizes"):
        fit_copies([4096, 4096], [1.0, 2.0])


@given(st.integers(0, 10**6), st.integers(10**8, 10**12))
def test_a_chunk_is_mostly_bytes(latency_ns, rate):
    chunk = chunk_bytes(latency_ns, rate)
    assert chunk & (chunk - 1) == 0
    assert chunk == machine.MOST_CHUNK or chunk / rate >= 8.99 * latency_ns / 1e9 * 0.999


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofs.READ_BYTES, "cpu", 2**20)
    monkeypatch.setitem(roofs.LONG_ENOUGH_NS, "cpu", 10_000)
    monkeypatch.setitem(copies.SIZES, "cpu", [4096, 65536, 2**20])
    monkeypatch.setitem(copies.ARENA_BYTES, "cpu", 2**22)
    monkeypatch.setattr(disk, "FILE_BYTES", 2**20)
    monkeypatch.setattr(machine, "REPEATS", 3)


def clock() -> Clock:
    return Clock(dataclasses.replace(place_of("cpu"), flush_bytes=4096))


def test_copies_of_a_cpu_are_called_by_their_name(quick):
    table = copies_of(clock(), 3)
    assert set(table.kind) == {"memory to memory"} and table.bytes.tolist() == [4096, 65536, 2**20]
    assert (table.median_ns > 0).all() and (table.calls == 3).all()
    assert list(fits_of(table)) == ["memory to memory"]


def test_the_disk_is_read_and_the_file_is_gone(quick, tmp_path):
    found = disk_of(tmp_path / "store")
    assert found.bytes_per_s > 0 and found.latency_ns >= 0
    assert list((tmp_path / "store").iterdir()) == []


def test_a_measured_machine_has_a_source_for_every_number(quick, tmp_path):
    found = measured_machine(clock(), tmp_path)
    one = hardware(**found.fields)
    assert {name for name, _ in numeric_fields(one)} == set(one.sources)
    of_us = [
        text for text in one.sources.values() if text.startswith(("measured", "chosen", "0 on"))
    ]
    assert len(of_us) == len(one.sources) and one.measured_error is None
    assert one.device.bytes_per_s == one.host.bytes_per_s == found.roofs.read_bytes_per_s
    folder = seal(Store(tmp_path), found)
    assert measured(str(folder / "hardware.json")) == dataclasses.replace(one, is_measured=True)
    about = json.loads((folder / "machine.json").read_text())
    assert about == dict(found.machine) and about["torch"] and about["device"] == one.name
    assert len(pd.read_csv(folder / "copies.csv")) == 3


def canned(name: str = "box", rate: int = 10**10) -> Measured:
    """As if measured: the numbers of a datasheet."""
    path = config.CONFIGS / "hardware" / "rtx4090_pcie4.yaml"
    fields: dict[str, Any] = yaml.safe_load(path.read_text())
    del fields["_target_"]
    fields["name"], fields["device"]["bytes_per_s"] = name, rate
    table = pd.DataFrame({"kind": ["pinned"], "bytes": [1], "median_ns": [2]})
    fit = CopyFit(1, ((0, 10**9),), 0.0)
    roof = roofs.Roofs(rate, {"fp32": 1})
    return Measured(fields, {"device": name}, table, {"pinned": fit}, roof)


def configured(folder: Path, *words: str) -> Config:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        overrides = [f"store={folder}", "hardware=measured", *words]
        return cast(Config, compose("config", overrides=overrides))


def test_the_same_numbers_are_the_same_artifact_and_others_are_not(tmp_path):
    store = Store(tmp_path)
    once, again = seal(store, canned()), seal(store, canned())
    other = seal(store, canned(rate=10**10 + 1))
    assert once == again != other
    files = {path.name for path in once.iterdir()}
    assert files == {"hardware.json", "machine.json", "copies.csv", "manifest.json"}


def made_at(folder: Path, made: str) -> None:
    """As if sealed then, by a version whose manifests had no sum of their own."""
    path = folder / "manifest.json"
    told = json.loads(path.read_text()) | {"made": made}
    told.pop("sum", None)
    path.write_text(json.dumps(told))


def test_the_latest_measurement_is_the_machine(tmp_path, caplog):
    cfg, store = configured(tmp_path), Store(tmp_path)
    first, second = seal(store, canned("first")), seal(store, canned("second"))
    made_at(first, "2026-01-02T00:00:00Z")
    made_at(second, "2026-01-01T00:00:00Z")
    assert latest(store) == first
    store = Store(tmp_path, makers=cfg.makers)
    with caplog.at_level("INFO"):
        assert hardware_of(cfg, store).name == "first"
    assert f"first, measured 2026-01-02T00:00:00Z (hardware/{first.name})" in caplog.text
    assert list(store.used) == [f"hardware/{first.name}"]
    made_at(second, "2026-01-03T00:00:00Z")
    found = hardware_of(cfg, Store(tmp_path, makers=cfg.makers))
    assert (found.name, found.kind) == ("second", "measured")


def test_of_one_second_the_file_that_was_written_last(tmp_path):
    store = Store(tmp_path)
    folders = [seal(store, canned(name)) for name in ("a", "b")]
    for folder in folders:
        made_at(folder, "2026-01-01T00:00:00Z")
    os.utime(folders[0] / "hardware.json", ns=(2**62, 2**62))
    assert latest(store) == folders[0]


def test_a_path_wins_over_the_store_and_a_datasheet_stays_one(tmp_path):
    seal(Store(tmp_path / "store"), canned("stored"))
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"kind": "measured", **canned("mine").fields}))
    cfg = configured(tmp_path / "store", f"hardware.path={mine}")
    store = Store(tmp_path / "store", makers=cfg.makers)
    assert hardware_of(cfg, store).name == "mine" and not store.used
    cfg = configured(tmp_path / "store", "hardware=h200_pcie5")
    assert hardware_of(cfg, store).kind == "datasheet" and not store.used


def test_a_machine_that_was_never_measured_is_measured_now(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(machine, "measured_machine", lambda *_: canned("now"))
    cfg = configured(tmp_path)
    with caplog.at_level("INFO"):
        assert hardware_of(cfg, Store(tmp_path, makers=cfg.makers)).name == "now"
    assert "this machine is measured now" in caplog.text
    assert latest(Store(tmp_path)) is not None
    assert hardware_recipe(cfg).kind == "hardware"
    caplog.clear()
    assert hardware_of(cfg, Store(tmp_path, makers=cfg.makers)).name == "now"
    assert "measured now" not in caplog.text


def test_a_damaged_measurement_is_refused(tmp_path):
    cfg = configured(tmp_path)
    folder = seal(Store(tmp_path), canned())
    (folder / "hardware.json").write_text("{}")
    with pytest.raises(ArtifactError, match="sha256 differs"):
        hardware_of(cfg, Store(tmp_path, makers=cfg.makers))
    with pytest.raises(ConfigError, match="expected `kind: measured`"):
        measured(str(folder / "hardware.json"))


def test_a_gpu_is_copied_to_from_the_pinned_memory():
    found = dataclasses.replace(
        canned(), fits={"pageable": CopyFit(1, ((0, 1),), 0), "pinned": CopyFit(2, ((0, 1),), 0)}
    )
    assert found.key_kind == "pinned" and found.key_fit.latency_ns == 2
    table = found.copies_with_fit()
    assert (
        table.fitted_ns.tolist() == [round(found.key_fit.ns(1))]
        and np.isfinite(table.fitted_ns).all()
    )


def of_machine(name: str, here: dict[str, Any], quartiles: tuple[int, int] = (98, 102)) -> Measured:
    copies = pd.DataFrame(
        {"kind": "pinned", "bytes": [4096, 2**20, 2**22], "median_ns": 100, "p25_ns": [1, *[quartiles[0]] * 2],
         "p75_ns": [900, *[quartiles[1]] * 2]}
    )  # fmt: skip
    return dataclasses.replace(canned(name), machine={**here, "load": 7.5}, copies=copies)


def test_of_several_machines_this_ones_is_taken(tmp_path, caplog):
    here = facts(place_of("cpu"))
    own = seal(Store(tmp_path), of_machine("own", here))
    later = seal(Store(tmp_path), of_machine("another", here | {"device": "NVIDIA H200"}))
    made_at(own, "2026-01-01T00:00:00Z")
    made_at(later, "2026-01-02T00:00:00Z")
    cfg = configured(tmp_path, "profile.device=cpu")
    with caplog.at_level("INFO"):
        assert hardware_of(cfg, Store(tmp_path, makers=cfg.makers)).name == "own"
    assert "quartiles of its copies 4.0% apart, 7.5 processes at work as it began" in caplog.text
    assert "another machine" not in caplog.text and "busy" not in caplog.text


@pytest.mark.parametrize("what", ["device", "host", "device_bytes"])
def test_another_machine_is_said_with_what_differs(tmp_path, caplog, what):
    here = facts(place_of("cpu"))
    there = here | {what: "NVIDIA H200"}
    folder = seal(Store(tmp_path), of_machine("another", there))
    cfg = configured(tmp_path, "profile.device=cpu")
    for _ in range(2):
        assert hardware_of(cfg, Store(tmp_path, makers=cfg.makers)).name == "another"
    told = [text for text in caplog.messages if "is of another machine" in text]
    assert len(told) == 1  # once in a process
    assert f"is 'NVIDIA H200', here {here[what]!r}" in told[0]
    assert "stage=profile" in told[0] and f"hardware.path={folder / 'hardware.json'}" in told[0]


def test_a_measurement_of_a_busy_machine_is_said(tmp_path, caplog):
    seal(Store(tmp_path), of_machine("noisy", facts(place_of("cpu")), quartiles=(90, 101)))
    cfg = configured(tmp_path, "profile.device=cpu")
    hardware_of(cfg, Store(tmp_path, makers=cfg.makers))
    assert "measured on a busy machine: quartiles of its copies 11.0% apart" in caplog.text
    assert "where 10 % are quiet" in caplog.text
    here = facts(place_of("cpu"))
    assert "**Not quiet** (from 10% on)" in of_machine("noisy", here, quartiles=(90, 101)).warning
    assert of_machine("quiet", here).warning == canned().warning == ""


def test_a_file_that_names_no_machine_is_said(tmp_path, caplog):
    folder = seal(Store(tmp_path), of_machine("nameless", {}))
    assert whose.about(folder) == {"load": 7.5} and not whose.is_of(folder, facts(place_of("cpu")))
    whose.tell(folder, {})
    assert "does not say which machine it is of" in caplog.text


@pytest.mark.parametrize(
    "copies",
    [
        "bytes,median_ns,p25_ns,p75_ns\nx,y,z,w\n",
        "bytes,median_ns,p25_ns,p75_ns\n1e9,a,1,2\n",
        "a\n1\n",
        "",
    ],
)
@pytest.mark.parametrize("about", ["[" * 100_000, "[1]", '{"device": [[]], "load": {}}'])
def test_odd_files_beside_a_measurement_are_passed_by(
    tmp_path: Path, copies: str, about: str
) -> None:
    (tmp_path / "machine.json").write_text(about)
    (tmp_path / "copies.csv").write_text(copies)
    whose.tell(tmp_path, {"device": "cpu"})
    assert not whose.is_of(tmp_path, {"device": "cpu"})


def test_of_times_beyond_all_numbers_no_spread_is_known(tmp_path):
    rows = [f"{2**22},{10**30},1,{10**30}", f"{2**23},5,4,6"]
    (tmp_path / "copies.csv").write_text("\n".join(["bytes,median_ns,p25_ns,p75_ns", *rows]))
    assert whose.spread_of(pd.read_csv(tmp_path / "copies.csv")) == pytest.approx(0.7)
    (tmp_path / "copies.csv").write_text("bytes,median_ns,p25_ns,p75_ns\n" + "9" * 400 + ",5,4,6\n")
    whose.tell(
        tmp_path, {"device": "cpu", "host": "y"}
    )  # says that it is unknown, and stops nobody
