"""What runs survive: every stage killed, stopped, and given a disk that is full, read-only, gone or in the past.

One table, a row per stage and fault: harm at changes that the run makes to its store or its folder (as many as asked
for, evenly over the run, and the last), and signals at random moments. A trial is bad if what tests/faults.py asks for
does not hold. It needs Linux and a C compiler.

    python scripts/bench/bench_faults.py --points 20 --moments 12 [STAGE ...]
"""

from __future__ import annotations

import argparse
import errno
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from machine import describe

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from fault_cases import CASES, STAGES
from faults import Fault, Trials, library, sharp, warmed

CODES = {"clock": 40 * 86400, "fail_once": errno.EIO}
HARMS = ("kill", "torn", "term", "full", "read_only", "vanish", "clock", "fail_once")
STOPS = (signal.SIGKILL, signal.SIGTERM)


def at_changes(trials: Trials, harm: str, n: int) -> list[Fault]:
    changes = trials.whole.changes
    places = [at for at in sharp(changes) if harm != "torn" or " write " in changes[at - 1]]
    step = max(1.0, len(places) / n)
    few = [places[int(i * step)] for i in range(int(len(places) / step))]
    few += places[-1:] if places and places[-1] not in few else []
    return [Fault(harm, at, CODES.get(harm, 0)) for at in few]


def at_moments(trials: Trials, stop: signal.Signals, n: int, drawn: random.Random) -> list[Fault]:
    """Up to a tenth later than an undisturbed run ends."""
    return [Fault(stop=stop, after_s=drawn.random() * 1.1 * trials.whole.seconds) for _ in range(n)]


def row(trials: Trials, name: str, faults: list[Fault]) -> int:
    """Prints it, and on the other stream what is bad."""
    began, bad = time.perf_counter(), 0
    for fault in faults:
        wrong = trials.trial(fault)
        bad += bool(wrong)
        for line in wrong[:5]:
            print(f"{trials.case.name}: {fault}: {line}", file=sys.stderr, flush=True)
    seconds = (time.perf_counter() - began) / max(1, len(faults))
    print(f"| {trials.case.name} | {name} | {len(faults)} | {bad} | {seconds:.1f} |", flush=True)
    return bad


def rows(trials: Trials, points: int, moments: int, drawn: random.Random) -> Iterator[int]:
    whole = trials.whole
    print(
        f"| {trials.case.name} | none ({len(whole.changes)} changes, {len(trials.same)} of {len(trials.expected)} "
        f"results alike in two runs) | 2 | 0 | {whole.seconds:.1f} |", flush=True,
    )  # fmt: skip
    for harm in HARMS:
        yield row(trials, harm, at_changes(trials, harm, points))
    for stop in STOPS:
        yield row(trials, f"{stop.name} at random", at_moments(trials, stop, moments, drawn))
    for line in sorted(trials.said):
        print(f"{trials.case.name} said: {line}", file=sys.stderr, flush=True)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("stages", nargs="*", choices=[*CASES, []], metavar="STAGE")
    asked.add_argument("--points", type=int, default=3, help="changes per stage and fault")
    asked.add_argument("--moments", type=int, default=3, help="random moments per signal")
    told = asked.parse_args()
    print(f"{describe()}; {told.moments} random moments per signal, seed 0\n")
    print("| stage | fault | trials | bad | seconds per trial |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        counter = library(Path(made))
        if counter is None:
            sys.exit("needs Linux and a C compiler (cc)")
        bad, drawn = 0, random.Random(0)
        with warmed(Path(made), counter, *STAGES, "lightning.pytorch") as warm:
            for name in told.stages or CASES:
                trials = Trials(warm, CASES[name], Path(made) / name)
                bad += sum(rows(trials, told.points, told.moments, drawn))
    print(f"\n{bad} bad")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
