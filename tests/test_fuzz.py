"""Hostile files for every reader, and options with nonsense: only the project's own errors come out, in one line.

The same inputs as those of scripts/bench/bench_fuzz.py and bench_nonsense.py, which go on for hours; the first of them
here. What is watched stands in fuzzing/watch.py. An audit hook stays for good: so both run in processes of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from entry import ROOT, environment
from fuzzing.readers import readers

INPUTS = 30
SLOW = {"report: page": 2, "profile.json": 4, "profile.json.gz": 4, "TraceLens": 20}
NONSENSE = {  # options of every kind, with values of every kind
    "seed": ("abc", "1" + "0" * 30),
    "source.top_k": ("0",),
    "simulator.cache": ("'\u00e9\u202e\x1b[31m\x07'", "[null]"),
    "train.horizons": ("[1.5]", "'" + "x" * 3000 + "'"),
}
FILES = """
import json, sys, warnings
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, {tests!r})
from fuzzing.loop import here
from fuzzing.readers import readers
warnings.simplefilter("ignore")
known = readers()
for name, inputs in json.loads(sys.argv[1]).items():
    print("TOLD", json.dumps(asdict(here(known[name], 0, inputs, Path({folder!r}, str(list(known).index(name)))))))
"""
OPTIONS = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from fuzzing.nonsense import Case, run, write_files
folder = Path({folder!r})
write_files(folder)
for key, value in json.loads(sys.argv[1]):
    ran = run(Case("", "", key, value).words, folder)
    print("TOLD", json.dumps([key, value, ran.code, ran.fault, ran.err]))
"""


def ran(code: str, asked: Any, folder: Any) -> list[Any]:
    """What a process with this code told, line by line."""
    line = [
        sys.executable,
        "-c",
        code.format(tests=str(ROOT / "tests"), folder=str(folder)),
        json.dumps(asked),
    ]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [text for text in done.stdout.splitlines() if text.startswith("TOLD ")]
    return [json.loads(text.removeprefix("TOLD ")) for text in lines]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Reader -> what came of its inputs."""
    found = ran(
        FILES, {**dict.fromkeys(readers(), INPUTS), **SLOW}, tmp_path_factory.mktemp("notes")
    )
    return {one["reader"]: one for one in found}


@pytest.mark.parametrize("name", readers())
def test_a_reader_of_hostile_files_says_what_is_wrong_or_reads_them(
    told: dict[str, Any], name: str
) -> None:
    one = told[name]
    assert one["inputs"] == SLOW.get(name, INPUTS)
    assert not one["defects"], json.dumps(one["defects"], indent=1).replace("\\n", "\n")
    assert one["accepted"] + one["refused"] == one["inputs"]


def test_options_with_nonsense_are_refused_in_one_line(tmp_path: Any) -> None:
    pairs = [(key, value) for key, values in NONSENSE.items() for value in values]
    every = ran(OPTIONS, pairs, tmp_path)
    assert len(every) == len(pairs)
    for key, value, exit_code, fault, said in every:
        assert (exit_code, fault) == (2, None), f"{key}={value[:60]}: {said}"
        assert key.rpartition(".")[2] in said
