"""Every option of every configuration file with values that nobody means: one line says so, or the run takes them.

    python scripts/bench/bench_nonsense.py                       all, an hour or more
    python scripts/bench/bench_nonsense.py --key simulator. --every 5

--notes keeps what was tried: run again, it goes on. A fault is a traceback, no line or several lines, a process that
died, or an error with exit code 0. Values that were taken, some of which mean more work than a minute, are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"

from fuzzing.nonsense import TOO_LONG, Case, cases, run, warm
from machine import describe

FRESH = 200  # runs that share a store: it must not grow without end


def main() -> int:
    asked = _asked()
    notes = asked.notes / "nonsense.jsonl"
    asked.notes.mkdir(parents=True, exist_ok=True)
    done = (
        {line["case"]: line for line in map(json.loads, notes.read_text().splitlines())}
        if notes.exists()
        else {}
    )
    chosen = [
        case
        for case in cases()
        if case.key.startswith(asked.key) and (not asked.choice or case.choice == asked.choice)
    ]
    waiting = [case for case in chosen[:: asked.every] if name_of(case) not in done]
    with tempfile.TemporaryDirectory(prefix="nonsense-") as room, notes.open("a") as file:
        folder = Path(room) / "runs"
        warm(folder)
        for number, case in enumerate(waiting):
            if number % FRESH == FRESH - 1:
                shutil.rmtree(folder / "store", ignore_errors=True)
            ran = run(case.words, folder)
            told = {"case": name_of(case), "code": ran.code, "fault": ran.fault, "seconds": round(ran.seconds, 2),
                    "said": ran.err[-400:] if ran.code else ""}  # fmt: skip
            print(json.dumps(told), file=file, flush=True)
            done[told["case"]] = told
            if ran.fault:
                print(f"{told['case']}: {ran.fault}", file=sys.stderr, flush=True)
    return report(done)


def report(done: dict[str, dict[str, object]]) -> int:
    faults = Counter(str(one["fault"]) for one in done.values() if one["fault"])
    taken = [name for name, one in done.items() if one["code"] in (0, TOO_LONG)]
    print(describe())
    n_faults = sum(faults.values())
    print(
        f"{len(done):,} runs: {len(done) - len(taken) - n_faults:,} refused in one line, {len(taken):,} taken, "
        f"{n_faults:,} faults of {len(faults)} kinds"
    )
    for fault, n in faults.most_common():
        print(f"{n} x {fault}")
    return int(bool(faults))


def name_of(case: Case) -> str:
    return (
        f"{case.group}={case.choice} {case.key}={case.value[:60]}"
        if case.group
        else f"{case.key}={case.value[:60]}"
    )


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--key", default="", help="beginning of the options' names")
    parser.add_argument("--choice", default="", help="of a group, by name")
    parser.add_argument("--every", type=int, default=1, help="only each n-th")
    parser.add_argument("--notes", type=Path, default=Path(tempfile.gettempdir()) / "prefetch-fuzz")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
