"""The entry without its imports and its composing: a process that forks one run per line of JSON that it is told.

It knows no fault but how to arm one. `tests/faults.py` starts it with the library of `tests/fault_points.c` preloaded.
What a forked run does, from its signal handlers to its exit code, is what `scripts/run.py` does once it is composed.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numba
import yaml
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
SLOW = (
    "pandas", "pyarrow.parquet", "pyarrow.pandas_compat", "numba.typed", "safetensors.numpy", "matplotlib.pyplot",
    "prefetch.runs.stages", "prefetch.runs.outputs", "prefetch.trace.writer", "prefetch.sources.synthetic",
)  # fmt: skip


def warm(stages: list[str], modules: list[str]) -> None:
    """What the stages import as they begin, and these; what they import later is imported in each run."""
    sys.path.insert(0, str(ROOT))
    for name in stages:
        told = yaml.safe_load((ROOT / "configs" / "stage" / f"{name}.yaml").read_text())
        target = str(dict(told.get("stage") or told)["_target_"])
        importlib.import_module(target.rpartition(".")[0])
    for module in (*SLOW, *modules):
        importlib.import_module(module)
    numba.njit(lambda: 0)()  # readies its compiler


class Composer:
    """Hydra, asked once for the same words."""

    def __init__(self) -> None:
        setbase("1.3")
        entry = str(ROOT / "scripts" / "run.py")
        self.hydra = Hydra.create_main_hydra_file_or_module(entry, None, "../configs", "run")
        self._known: dict[tuple[str, ...], DictConfig] = {}

    def take(self, words: list[str]) -> None:
        compose, key = self.hydra.compose_config, tuple(words)
        if key not in self._known:
            self._known[key] = compose("config", words, RunMode.RUN)

    def run(self, words: list[str]) -> Any:
        composed = self._known[tuple(words)]
        self.hydra.compose_config = lambda **_: composed  # type: ignore[method-assign]
        stages = importlib.import_module("prefetch.runs.stages")
        return self.hydra.run("config", stages.run_stage, words)


def become(job: dict[str, Any], composer: Composer) -> int:
    """The run itself, as if the entry had been typed."""
    os.setsid()
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_DFL)
    os.chdir(job["folder"])
    for number, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    under = ":".join(job["under"]).encode()
    arm = ctypes.CDLL(None).fault_arm
    arm(under, job["harm"], ctypes.c_long(job["at"]), job["code"], job["log"].encode())
    sys.argv = ["run.py", *job["words"]]
    stages = importlib.import_module("prefetch.runs.stages")
    try:
        return int(stages.guarded(lambda: composer.run(job["words"])))
    except SystemExit as left:
        return int(left.code or 0)


def leave(code: int) -> None:
    """What the interpreter does at its end, but for taking the modules apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    told = sys.argv[1:]
    warm([name for name in told if "." not in name], [name for name in told if "." in name])
    composer = Composer()
    gc.freeze()  # so that what is shared stays shared
    print("ready", flush=True)
    while line := sys.stdin.buffer.raw.readline():  # type: ignore[attr-defined]
        job = json.loads(line)
        composer.take(job["words"])
        process = os.fork()
        if not process:
            try:
                code = become(job, composer)
            except Exception:
                traceback.print_exc()
                code = 1
            leave(code)
        print(process, flush=True)
        _, status, used = os.wait4(process, 0)
        cpu_s = used.ru_utime + used.ru_stime
        print(json.dumps([os.waitstatus_to_exitcode(status), cpu_s]), flush=True)
    leave(0)


if __name__ == "__main__":
    main()
