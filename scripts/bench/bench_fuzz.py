"""Hostile files for every reader of the project: what comes out but the project's own errors, and what it costs.

    python scripts/bench/bench_fuzz.py                                 a hundred thousand inputs for every reader: hours
    python scripts/bench/bench_fuzz.py --inputs 2000 --reader arrays   of the readers whose names begin so
    python scripts/bench/bench_fuzz.py --table                         the rows of what was done so far

Inputs follow from --seed: small sound files of every format, changed in bytes and in meaning; those that reach new
lines of the project are changed again. Each reader has a process of its own, which a hang or a crash ends and another
goes on from. --notes keeps counts, and the inputs of every defect; run again, it goes on. A defect is: an error that is
not ours, names no file or takes several lines; more than five seconds of computing; more memory than twice the file and
200 MB; a process, a connection, or a file outside the input. tests/test_fuzz.py runs a few hundred inputs per reader.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzzing.loop import Loop, Told, quick_folder
from fuzzing.readers import Reader, readers
from fuzzing.watch import DEFECT, Outcome
from machine import describe

STILL_S = 40.0  # of computing without a new input: native code does not come back
ASLEEP_S = (
    600.0  # without a new input: it waits for something; or a crowded machine has forgotten it
)
PIECE = 20_000  # inputs of one process: what leaks does not add up


def main() -> int:
    asked = _asked()
    known = readers()
    chosen = [name for name in known if any(name.startswith(word) for word in asked.reader)]
    if not chosen:
        raise SystemExit(f"no reader of these names; there are {', '.join(known)}")
    try:
        for name in [] if asked.table else chosen:
            told = fuzzed(known[name], asked.seed, asked.inputs, asked.notes)
            print(row(told), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted; run again to go on", file=sys.stderr)
    every = [told for name in chosen if (told := told_of(name, asked.notes)) is not None]
    print(table(every))
    return int(any(told.defects for told in every))


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--inputs", type=int, default=100_000, help="for each reader, all runs together"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs="*", default=[""], help="beginnings of readers' names")
    parser.add_argument("--notes", type=Path, default=Path(tempfile.gettempdir()) / "prefetch-fuzz")
    parser.add_argument("--table", action="store_true", help="only print what was done so far")
    return parser.parse_args()


def place_of(name: str, notes: Path) -> Path:
    return notes / "".join(letter if letter.isalnum() else "-" for letter in name)


def told_of(name: str, notes: Path) -> Told | None:
    path = place_of(name, notes) / "told.json"
    return Told(**json.loads(path.read_text())) if path.exists() else None


def fuzzed(reader: Reader, seed: int, n: int, notes: Path) -> Told:
    """Processes one after the other, until so many inputs were read."""
    place = place_of(reader.name, notes)
    while (told := told_of(reader.name, notes) or Told(reader.name, seed)).inputs < n:
        with tempfile.TemporaryDirectory(dir=quick_folder(), prefix="fuzz-") as room:
            beat = mmap.mmap(-1, 8)
            child = os.fork()
            if not child:
                _child(
                    Loop(reader, seed, Path(room), place), min(PIECE, n - told.inputs), beat, place
                )
            ended = _watched(child, beat)
            if ended:
                _note_death(reader, seed, Path(room), place, beat, ended)
    return told


def _child(loop: Loop, n: int, beat: mmap.mmap, place: Path) -> None:
    """Never returns: what it printed and imported ends with it."""
    code = 1
    try:
        warnings.simplefilter("ignore")
        place.mkdir(parents=True, exist_ok=True)
        out = os.open(place / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        odd = [one for one in loop.warm() if one.kind == DEFECT and not one.what.startswith("hang")]
        for one in odd:
            print("SEED", one.what, one.message)
        loop.run(n, lambda number: beat.__setitem__(slice(0, 8), struct.pack("<q", number + 1)))
        code = 0
    except (
        BaseException
    ):  # a slip of a mutator: the input is counted as a death, and its file says why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watched(child: int, beat: mmap.mmap) -> str:
    """Empty where it ended well, else what ended it."""
    last, since, used = bytes(beat[:8]), time.monotonic(), 0.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            how = os.waitstatus_to_exitcode(status)
            return "" if how == 0 else signal.Signals(-how).name if how < 0 else f"exit code {how}"
        if bytes(beat[:8]) != last:
            last, since, used = bytes(beat[:8]), time.monotonic(), _computed_s(child)
        is_stuck = _computed_s(child) - used > STILL_S * (3 if last == bytes(8) else 1)
        if is_stuck or time.monotonic() - since > ASLEEP_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"nothing for {STILL_S:.0f} s of computing" if is_stuck else "asleep"
        time.sleep(0.05)


def _computed_s(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _note_death(
    reader: Reader, seed: int, room: Path, place: Path, beat: mmap.mmap, ended: str
) -> None:
    """The input that a process died of is a defect, and is not read again."""
    (number,) = struct.unpack("<q", beat[:8])
    if number == 0:
        raise SystemExit(f"{reader.name}: cannot begin ({ended}); {place / 'printed.txt'} says why")
    told = told_of(reader.name, place.parent) or Told(reader.name, seed)
    printed = (place / "printed.txt").read_text(errors="replace")[-3000:]
    what = f"the process died: {ended}"
    told.inputs = number - 1
    is_new = told.take(Outcome(DEFECT, 0.0, 0, what, printed), number)
    if is_new:
        shutil.copytree(room / "in", place / "defects" / f"died-{number}", dirs_exist_ok=True)
    (place / "told.json").write_text(json.dumps(told.__dict__, indent=1))


def row(told: Told) -> str:
    rate = 1e3 * told.seconds / max(1, told.inputs)
    return (
        f"| {told.reader} | {told.inputs:,} | {told.accepted:,} | {told.refused:,} | {told.seconds:.0f} | {rate:.1f} "
        f"| {1e3 * told.worst_s:.0f} | {told.worst_bytes / 1e6:.0f} | {told.lines:,} | {len(told.defects)} |"
    )


def table(every: list[Told]) -> str:
    lines = [
        describe(),
        "| reader | inputs | accepted | refused | seconds | ms each | worst ms | worst MB | lines | defects |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(row, every),
    ]
    for told in every:
        for what, one in told.defects.items():
            lines.append(f"{told.reader}: {one['count']} x {what} (input {one['first']})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
