"""Laws of copy times, the shipped machines, and what a wrong file says."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from prefetch.errors import ConfigError
from prefetch.sim.hardware import Hardware, Lane, Link, hardware, measured, numeric_fields

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "hardware"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "measured")


def plain(name: str = "rtx4090_pcie4") -> dict[str, Any]:
    fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert fields.pop("_target_") == "prefetch.sim.hardware.hardware"
    return fields


@st.composite
def links(draw: st.DrawFn) -> Link:
    """Any latency, up to four pieces, rates from 1 byte/s to 1 TB/s that do not fall."""
    n_pieces = draw(st.integers(1, 4))
    sizes = draw(st.sets(st.integers(1, 2**24), min_size=n_pieces - 1, max_size=n_pieces - 1))
    rates = draw(st.lists(st.integers(1, 10**12), min_size=n_pieces, max_size=n_pieces))
    lane = Lane(0, tuple(zip([0, *sorted(sizes)], sorted(rates), strict=True)))
    return Link(draw(st.integers(0, 10**6)), 2**20, lane, lane)


@given(links(), st.integers(0, 2**26), st.integers(0, 2**26))
def test_a_larger_copy_never_takes_less_time(link, n_bytes, more):
    assert link.copy_ns(n_bytes) <= link.copy_ns(n_bytes + more)


@given(links(), st.integers(0, 2**26))
def test_a_copy_takes_at_least_the_latency_and_the_best_rate(link, n_bytes):
    best = link.pinned.bytes_per_s[-1][1]
    assert link.copy_ns(n_bytes) >= link.latency_ns + n_bytes * 10**9 // best
    assert link.copy_ns(0) == link.latency_ns


@given(links(), st.lists(st.integers(0, 2**22), min_size=1, max_size=8))
def test_copying_in_chunks_is_never_faster(link, chunks):
    assert sum(map(link.copy_ns, chunks)) >= link.copy_ns(sum(chunks))


def test_a_curve_by_hand():
    """1,000 bytes at 1 GB/s, then 2 GB/s: 3,001 bytes are 1,000 ns and 1,000.5, rounded up."""
    link = Link(10, 2**20, Lane(0, ((0, 10**9), (1000, 2 * 10**9))), Lane(0, ((0, 10**9),)))
    assert [link.copy_ns(n) for n in (0, 1, 1000, 3000, 3001)] == [10, 11, 1010, 2010, 2011]
    assert link.copy_ns(3000, is_pinned=False) == 3010


@pytest.mark.parametrize("name", NAMES)
def test_shipped_machines_load(name):
    machine = hardware(**plain(name))
    assert (machine.name, machine.kind, machine.measured_error) == (name, "datasheet", None)
    assert instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml")) == machine
    assert hash(machine) == hash(hardware(**plain(name)))


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name):
    machine = hardware(**plain(name))
    paths = [path for path, _ in numeric_fields(machine)]
    assert len(paths) >= 17
    assert set(paths) == set(machine.sources)
    for path in paths:
        fields = plain(name)
        fields["sources"][path] = None
        with pytest.raises(ConfigError, match=f"sources must say where {path} is from"):
            hardware(**fields)


@pytest.mark.parametrize("name", NAMES)
def test_pageable_is_slower_and_the_link_is_slower_than_the_device(name):
    machine = hardware(**plain(name))
    n_bytes = 9 * 2**20
    assert machine.link.copy_ns(n_bytes) < machine.link.copy_ns(n_bytes, is_pinned=False)
    assert machine.link.pinned.bytes_per_s[-1][1] < machine.host.bytes_per_s
    assert machine.host.bytes_per_s <= machine.device.bytes_per_s  # equal where it is one memory


def test_a_qwen3_expert_on_pcie_4():
    """9 MiB at 24 GB/s are 393,216 ns, after 2,800 ns of latency."""
    assert hardware(**plain()).link.copy_ns(9 * 2**20) == 2_800 + 393_216


def test_plain_values_come_back():
    machine = hardware(**plain())
    assert hardware(**machine.to_dict()) == machine
    assert hardware(**json.loads(json.dumps(machine.to_dict()))) == machine
    assert isinstance(machine, Hardware)


def test_a_measured_error_makes_a_calibrated_file():
    fields = plain() | {"measured_error": 0.03}
    with pytest.raises(ConfigError, match="sources must say where measured_error is from"):
        hardware(**fields)
    fields["sources"]["measured_error"] = "stage validate, 2026-01-01"
    assert hardware(**fields).kind == "calibrated"


WRONG = [
    ("link.latency_ns", -1, "hardware.link.latency_ns must be positive"),
    ("link.latency_ns", 2.5, "hardware.link.latency_ns must be int; found 2.5"),
    ("link.latency_ns", "10us", "hardware.link.latency_ns must be int; found '10us'"),
    ("link.latency_ns", True, "hardware.link.latency_ns must be int; found True"),
    ("link.latency_ns", None, "hardware.link.latency_ns must be int; found None"),
    ("link.chunk_bytes", 0, "hardware.link.chunk_bytes must be positive"),
    ("link.speed", 1, "hardware.link.speed: no such field"),
    ("link.pinned", 24, "hardware.link.pinned must be a mapping"),
    ("link.pinned.bytes_per_s", 24, r"must be a list of \[size, bytes per second\]"),
    ("link.pinned.bytes_per_s", [], r"must be a list of \[size, bytes per second\]"),
    ("link.pinned.bytes_per_s", [[0, 1.5]], r"must be a list of \[size, bytes per second\]"),
    ("link.pinned.bytes_per_s", [[1, 5]], "must have rising sizes, the first 0"),
    ("link.pinned.bytes_per_s", [[0, 5], [0, 6]], "must have rising sizes, the first 0"),
    ("link.pinned.bytes_per_s", [[0, 5], [9, 4]], "hardware.link.pinned.bytes_per_s .* not fall"),
    ("link.pinned.bytes_per_s", [[0, 0]], "must be positive"),
    ("device.operations_per_s.bf16", None, "operations_per_s.bf16 must be int; found None"),
    ("device.memory_bytes", 2**30, "hardware.reserve_bytes must be less than device.memory_bytes"),
    ("measured_error", "small", "hardware.measured_error must be float; found 'small'"),
    ("sources", ["datasheet"], "hardware.sources must be a mapping"),
    ("sources.device.tflops", "x", "hardware.sources names device.tflops"),
    ("name", 4090, "hardware.name must be str; found 4090"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_what_is_wrong_is_named_in_one_line(path, value, message):
    fields = copy.deepcopy(plain())
    head, _, rest = path.partition(".")
    if head == "sources" and rest:
        fields["sources"][rest] = value
    else:
        part, *inner = path.split(".")
        target = fields
        for name in inner:
            target, part = target[part], name
        target[part] = value
    with pytest.raises(ConfigError, match=message) as error:
        hardware(**fields)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named():
    fields = plain()
    del fields["storage"]["latency_ns"]
    with pytest.raises(ConfigError, match=r"hardware.storage.latency_ns is missing"):
        hardware(**fields)


def test_a_negative_copy_is_refused():
    with pytest.raises(ValueError, match="a copy of -1 bytes"):
        hardware(**plain()).link.copy_ns(-1)


@pytest.mark.parametrize("error", [float("nan"), float("inf"), -0.1])
def test_an_error_that_is_no_number_is_no_calibration(error):
    fields = plain()
    fields["measured_error"] = error
    fields["sources"]["measured_error"] = "x"
    with pytest.raises(ConfigError, match="measured_error must be positive"):
        hardware(**fields)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_measured_machine_is_read_from_its_file(tmp_path, suffix):
    fields, file = plain() | {"kind": "measured"}, tmp_path / f"mine.{suffix}"
    file.write_text(json.dumps(fields) if suffix == "json" else yaml.safe_dump(fields))
    found = measured(str(file))
    assert (found.kind, found.is_measured) == ("measured", True)
    assert dataclasses.replace(found, is_measured=False) == hardware(**plain())
    assert hardware(**found.to_dict()) == found
    cfg = OmegaConf.load(CONFIGS / "measured.yaml")
    assert instantiate(cfg, path=str(file)) == found
    fields |= {"measured_error": 0.02}
    fields["sources"]["measured_error"] = "stage validate"
    file.write_text(json.dumps(fields) if suffix == "json" else yaml.safe_dump(fields))
    assert measured(str(file)).kind == "calibrated"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "datasheet"}, "expected `kind: measured` beside .*, found 'datasheet'"),
        ({"reserve_bytes": -1}, r"mine.yaml: hardware.reserve_bytes must be positive; found -1"),
        ({"storage": {"latency_ns": 1}}, "mine.yaml: hardware.storage.bytes_per_s is missing"),
        ({"device": None}, "mine.yaml: hardware.device must be a mapping; found None"),
        ({"speed": 3}, "mine.yaml: hardware.speed: no such field"),
    ],
)
def test_what_is_wrong_with_a_measured_file_is_named(tmp_path, change, message):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(plain() | {"kind": "measured"} | change))
    with pytest.raises(ConfigError, match=message) as error:
        measured(str(file))
    assert "\n" not in str(error.value)


def test_a_measured_file_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"pass hardware.path=FILE"):
        measured()
    with pytest.raises(ConfigError, match=r"gone.json: cannot be read as JSON or YAML"):
        measured(str(tmp_path / "gone.json"))
    for text, message in (("[1", "cannot be read"), ("a list", "found 'a list'"), ("", "None")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            measured(str(tmp_path / "bad.yaml"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 9,
        "kind: measured\n1: 2\n",
        "kind: measured\n? [a]\n: 1\n",
        "&a [*a]",
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_hostile_file_of_a_machine_is_refused_with_its_name(tmp_path, text, suffix):
    path = tmp_path / f"machine{suffix}"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"machine\{suffix}"):
        measured(str(path))
