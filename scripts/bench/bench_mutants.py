"""Is there a test for it? Small wrong changes to the code that numbers rest on, each run against the tests of its file.

    python scripts/bench/bench_mutants.py [FILE ...] [--most 60] [--seed 0] [--inside] [--again] [--table] [--out FILE]

FILE: a part of the paths in `mutant_tests.yaml`, which names the tests of every file; without one, all of them. Runs on
a copy of the tree in a temporary folder, hours of one core. Outcomes are added to `--out`: the next run goes on
there; `--again` runs what survived once more, `--table` nothing. Survivors that change no result stand with their
reasons in `mutants_explained.yaml`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from hypothesis import Phase, settings
from machine import describe
from mutant_runs import KILLED, SURVIVED, TIMED_OUT, UNFIT, Group, named, run
from mutations import Mutant, mutants_of

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
COPIED = ("prefetch", "analysis", "configs", "tests", "scripts", "docs", "pyproject.toml", "README.md")  # fmt: skip
COMPILED = Path(".cache") / "expert-prefetch"  # engines of policies: half a minute each
EXPLAINED = "explained"
OUTCOMES = (KILLED, TIMED_OUT, EXPLAINED, SURVIVED, UNFIT)
Chosen = list[tuple[Group, dict[str, Mutant]]]


def groups(words: list[str]) -> list[Group]:
    """Only the files whose path holds one of the words."""
    found = []
    for told in yaml.safe_load((HERE / "mutant_tests.yaml").read_text()):
        files = [file for file in told["files"] if not words or any(word in file for word in words)]
        found += [Group(**told | {"files": files})] if files else []
    return found


def drawn(file: str, most: int, seed: int) -> dict[str, Mutant]:
    """So many of the file's mutants by chance, in the order of its text; an edited line moves no other one."""
    text = (ROOT / file).read_text()
    every = named(file, list(mutants_of(ast.parse(text))), text.splitlines())
    mixed = sorted(every, key=lambda name: sha256(f"{seed} {name}".encode()).digest())
    chosen = set(mixed[:most])
    return {name: mutant for name, mutant in every.items() if name in chosen}


def chosen(words: list[str], most: int, seed: int) -> Chosen:
    found = []
    for group in groups(words):
        mutants = dict[str, Mutant]()
        for file in group.files:
            mutants |= drawn(file, most, seed)
        found.append((group, mutants))
    return found


def known(out: Path) -> dict[str, dict[str, Any]]:
    """The last outcome of every mutant that was ever run."""
    rows = map(json.loads, out.read_text().splitlines()) if out.exists() else ()
    return {row["name"]: row for row in rows}


def explained() -> dict[str, str]:
    """Why a mutant changes no result, by its name without the file's."""
    told = yaml.safe_load((HERE / "mutants_explained.yaml").read_text()) or {}
    return {
        f"{file} | {mutant}": group["why"]
        for file, groups in told.items()
        for group in groups
        for mutant in group["mutants"]
    }


def copied(folder: Path) -> None:
    """The tree, with what is compiled: times of files are kept, because compiled code is known by them."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy2(ROOT / name, folder / name)
    if (Path.home() / COMPILED).is_dir():
        shutil.copytree(Path.home() / COMPILED, folder / COMPILED)


def run_all(waiting: Chosen, out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name) / "main"
        folder.mkdir()
        copied(folder)
        os.chdir(folder)
        os.environ.pop("NUMBA_CACHE_DIR", None)  # no mutant's code is kept
        os.environ |= {"XDG_CACHE_HOME": str(folder / ".cache"), "OMP_NUM_THREADS": "1"}
        sys.dont_write_bytecode = True
        sys.path[:0] = [str(folder), str(folder / "tests")]
        settings.register_profile(
            "mutants",
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.explicit, Phase.generate),
        )
        settings.load_profile("mutants")
        for group, mutants in waiting:
            run(group, mutants, out, Path(name) / "log")


def table(every: Chosen, out: Path) -> Iterator[str]:
    """Of all that was ever run and is still there."""
    found, reasons, used = known(out), explained(), set[str]()
    by_file, by_operator, left = dict[str, Counter[str]](), dict[str, Counter[str]](), list[str]()
    for name, mutant in [pair for _, mutants in every for pair in mutants.items()]:
        if (row := found.get(name)) is None:
            continue
        outcome, file = str(row["outcome"]), name.partition(" | ")[0]
        if outcome == SURVIVED and name in reasons:
            outcome = EXPLAINED
            used.add(name)
        elif outcome == SURVIVED:
            left.append(f"{file}:{mutant.line}: {name.partition(' | ')[2]}")
        by_file.setdefault(file, Counter())[outcome] += 1
        by_operator.setdefault(mutant.operator, Counter())[outcome] += 1
    head = ("mutants", *OUTCOMES)
    for title, rows in (("file", by_file), ("operator", by_operator)):
        yield f"| {title} | {' | '.join(head)} |\n|---|{'---:|' * len(head)}"
        yield from (row_of(name, counts) for name, counts in rows.items())
        yield row_of("all", sum(rows.values(), Counter())) + "\n"
    yield from [f"Left: {len(left)}", *left]
    stale = [name for name in reasons if name in found and name not in used]
    yield from [f"explained, and does not survive: {name}" for name in stale]


def row_of(name: str, counts: Counter[str]) -> str:
    return f"| {name} | {counts.total()} | {' | '.join(str(counts[one]) for one in OUTCOMES)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("--most", type=int, default=10**6, help="mutants per file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--inside", action="store_true", help="only of functions: the others take long"
    )
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument(
        "--again", action="store_true", help="only what survived, and is not explained"
    )
    parser.add_argument("--table", action="store_true", help="of what has been run")
    given = parser.parse_args()
    out = given.out.absolute()
    every = chosen(given.files, 10**6, 0)
    if not given.table:
        some = every if given.again else chosen(given.files, given.most, given.seed)
        before, reasons = known(out), explained()
        is_left = {n for n, row in before.items() if row["outcome"] != KILLED and n not in reasons}

        def waits(name: str, mutant: Mutant) -> bool:
            is_asked = name in is_left if given.again else name not in before
            return is_asked and bool(mutant.scope or not given.inside)

        waiting = [(group, {n: m for n, m in ms.items() if waits(n, m)}) for group, ms in some]
        run_all([(group, mutants) for group, mutants in waiting if mutants], out)
    print(describe(), *table(every, out), sep="\n")


if __name__ == "__main__":
    main()
