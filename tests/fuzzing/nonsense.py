"""Every option of the configuration with values that nobody means: the run says so in one line, or takes them.

A run is the entry itself in a forked process, on the smallest trace, so that thousands fit into an hour.
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from fuzzing import array_seeds, source_seeds
from fuzzing.profile_seeds import chrome_seeds
from fuzzing.watch import ROOT
from prefetch import config, leaves

VALUES = (
    "abc", "-1", "0", "nan", "inf", "1e400", "1" + "0" * 30, "[]", "{a: {b: 1}}", "null", "/no/such/path", "true",
    "1.5",
    "''", "[null]", "[a]", "[-1]", "[1.5]", "'\u00e9\u202e\x1b[31m\x07'", "'" + "x" * 3000 + "'", "-0.5", "2147483648",
)  # fmt: skip
TOO_LONG = 99  # the exit code of a run that was ended
LONGEST_S = 60.0  # of a run: a value may mean much work, which is no mistake
SPARE_BYTES = 6 << 30  # of address space
STAGES = {  # block of options -> the stage that reads it
    "collect": "collect", "source": "collect", "analyze": "analyze", "train": "train", "predictor": "train",
    "simulator": "evaluate", "policy": "evaluate", "hardware": "evaluate", "evaluate": "evaluate", "advise": "advise",
    "profile": "profile", "validate": "validate", "diagnose": "diagnose", "traces": "traces", "report": "report",
    "artifacts": "artifacts", "tracker": "collect", "cluster": "analyze", "memory": "evaluate", "trace": "analyze",
    "profile_trace": "diagnose", "store": "collect", "seed": "collect",
}  # fmt: skip
GROUPS = ("source", "predictor", "policy", "hardware", "tracker", "cluster")
FILES = {  # source -> its files, and what it cannot be read without
    "arrays": (array_seeds.npz_seeds, ()), "counts": (array_seeds.counts_seeds, ()),
    "flame": (array_seeds.flame_seeds, ()), "esft": (source_seeds.esft_seeds, ("source.top_k=2",)),
    "llama_server": (source_seeds.llama_server_seeds, ("source.n_experts=8",)),
    "llama_csv": (source_seeds.llama_csv_seeds, ("source.top_k=2", "source.n_experts=8")),
    "llama_eval_callback": (source_seeds.eval_callback_seeds, ()),
    "llama_imatrix": (source_seeds.imatrix_seeds, ("source.top_k=2",)),
    "route_csv": (source_seeds.route_csv_seeds, ()), "vllm": (source_seeds.vllm_seeds, ()),
    "sglang": (source_seeds.sglang_seeds, ("source.ids=logical",)), "specmoe": (source_seeds.pickle_seeds, ()),
}  # fmt: skip
MACHINES = ("rtx4090_pcie4", "measured")  # the others have the same options as the first
SMALL = (
    "source.n_requests=6", "source.prompt_tokens=4", "source.new_tokens=4", "source.n_layers=3", "source.n_experts=8",
)  # fmt: skip
QUICK = (
    "train.folds=1", "train.baselines=none", "train.horizons=[1]", "train.figures=false", "analyze.figures=false",
    "analyze.horizon=1", "simulator.horizon=1", "evaluate.figures=false", "evaluate.required_recall=false",
    "evaluate.workers=1", "simulator.model_card=files/card.yaml", "advise.figures=false", "advise.policies=[lru]",
    "advise.predictors=[none]", "advise.steps=20",
    "advise.horizons=[1]", "profile.figures=false", "profile.seconds=5", "profile.tokens=[1]", "profile.experts=[2]",
    "profile.top_k=[1]", "profile.hidden=[32]", "profile.inner=[32]", "profile.dtypes=[fp32]", "profile.repeats=1",
    "validate.figures=false", "validate.steps=12", "validate.policies=[lru]", "validate.horizons=[0]",
    "validate.batches=[1]",
    "validate.capacities=[0.5]", "validate.repeats=2", "validate.model_cards=[files/card.yaml]",
    "diagnose.figures=false", "profile_trace=files/profile",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    group: str  # empty for the trunk
    choice: str
    key: str  # dotted
    value: str

    @property
    def words(self) -> list[str]:
        block = self.key.partition(".")[0]
        chosen = {
            "source": "synthetic",
            "predictor": "popularity",
            "policy": "lru",
            "tracker": "none",
        }
        chosen |= {self.group: self.choice} if self.group else {}
        rest = [*QUICK, *(SMALL if chosen["source"] == "synthetic" else ())]
        if self.choice in FILES:
            rest += [f"source.path=files/{self.choice}", *FILES[self.choice][1]]
        words = {word.partition("=")[0]: word for word in rest}
        words[self.key] = f"{self.key}={self.value}"
        groups = (f"{group}={name}" for group, name in chosen.items())
        return [f"stage={STAGES[block]}", *groups, *words.values()]


@dataclass(frozen=True)
class Ran:
    """What a user would see."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong with how it ended, in a word; None = nothing."""
        said = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if "Traceback (most recent" in self.err or "Traceback (most recent" in self.out:
            last = [line for line in self.err.splitlines() if line.strip()]
            return f"traceback: {last[-1][:300] if last else '?'}"
        if self.code < 0:
            return f"died: {signal.Signals(-self.code).name}"
        if self.code in (0, TOO_LONG):
            return "an error, and exit code 0" if said else None
        if len(said) != 1:
            return f"{len(said)} error lines and exit code {self.code}: {self.err[-300:]!r}"
        if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in said[0]):
            return "control characters in its line"
        return f"a line of {len(said[0])} letters" if len(said[0]) > 5000 else None


def cases() -> Iterator[Case]:
    """Each option of the trunk, and of every choice of every group."""
    for key in _leaves(_composed(), without=GROUPS):
        yield from (Case("", "", key, value) for value in VALUES)
    for group in GROUPS:
        for choice in config.choices(group) if group != "hardware" else MACHINES:
            leaf = OmegaConf.load(config.CONFIGS / group / f"{choice}.yaml")
            for key in _leaves(leaf, prefix=f"{group}."):
                yield from (Case(group, choice, key, value) for value in VALUES)


def _composed() -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        return compose("config")


def _leaves(node: Any, prefix: str = "", without: tuple[str, ...] = ()) -> Iterator[str]:
    for name in node:
        if name in (*without, "stage", "makers", "clocks", "defaults"):
            continue
        inner = node._get_node(name)
        if (
            isinstance(inner, DictConfig)
            and not inner._is_none()
            and len(inner)
            and not inner._is_interpolation()
        ):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def warm(folder: Path) -> None:
    """What every run imports, imported once."""
    import matplotlib  # noqa: F401
    import torch  # noqa: F401

    for stage in config.stage_names():
        leaf: Any = OmegaConf.load(config.CONFIGS / "stage" / f"{stage}.yaml")
        leaves.locate(str(leaf["_target_"])) if "_target_" in leaf else None
    for group in GROUPS:
        for choice in config.choices(group):
            leaf = OmegaConf.load(config.CONFIGS / group / f"{choice}.yaml")
            leaves.locate(str(leaf["_target_"])) if "_target_" in leaf else None
    write_files(folder)


def write_files(folder: Path) -> None:
    """What options are about: one sound file for every source that reads files, and a profile."""
    seeds = {name: files()[0] for name, (files, _) in FILES.items()} | {
        "profile": chrome_seeds()[0]
    }
    small = {
        "hidden_size": 32,
        "vocab_size": 64,
        "layers": 3,
        "n_experts": 8,
        "top_k": 2,
        "expert_size": 16,
    }
    card: Any = OmegaConf.load(config.CONFIGS / "model_card" / "olmoe_1b_7b.yaml")
    (folder / "files").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.merge(card, small), folder / "files" / "card.yaml")
    for name, files in seeds.items():
        for inner, data in files.items():
            path = folder / "files" / name / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def run(words: list[str], folder: Path) -> Ran:
    """The entry with these words, in a process of its own; its store and folders stay for the next."""
    outs = [folder / "out.txt", folder / "err.txt"]
    began = time.perf_counter()
    child = os.fork()
    if not child:
        _entered(words, folder, outs)
    status = _waited(child)
    out, err = (path.read_text(errors="replace") for path in outs)
    return Ran(status, out, err, time.perf_counter() - began)


def _waited(child: int) -> int:
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TOO_LONG


def _entered(words: list[str], folder: Path, outs: list[Path]) -> None:
    """Never returns."""
    os.setsid()
    os.chdir(folder)
    for number, path in enumerate(outs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    GlobalHydra.instance().clear()
    code = 1
    try:
        places = [f"store={folder / 'store'}", f"hydra.run.dir={folder / 'run'}"]
        named = {word.partition("=")[0] for word in words}
        sys.argv = [
            "scripts/run.py",
            *words,
            *(word for word in places if word.partition("=")[0] not in named),
        ]
        runpy.run_path(str(ROOT / "scripts" / "run.py"), run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0x7F)
