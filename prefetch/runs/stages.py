"""Running a stage: its folder, its tracker, its lineage, and errors that a user can read. It knows no stage by name."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefetch import config, leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ArtifactError, ConfigError, PrefetchError
from prefetch.optional import broken_install
from prefetch.runs import sweeps, typed
from prefetch.runs.index import write_index
from prefetch.runs.naming import About
from prefetch.runs.redaction import Redactor
from prefetch.runs.standing import Standing

log = logging.getLogger(__name__)
TOO_MUCH = re.compile(
    "can't allocate memory|out of memory", re.IGNORECASE
)  # torch, of a host or a GPU
SAY_AGAIN_S = 10  # longer than tidying up takes


def run_stage(cfg: DictConfig) -> dict[str, float]:
    """What Hydra calls, once a job: the stage that `stage=` chose."""
    chosen = cast(
        Config, cfg
    )  # the schema stands in the defaults list: Hydra checked names and types
    folder = Path(HydraConfig.get().runtime.output_dir)
    if (
        not _is_first_rank()
    ):  # of the processes that torchrun began together, which may share a folder
        folder = folder / f"rank-{os.environ['RANK']}"
    try:
        if cfg.stage.recorded:
            return record(chosen, folder)
        config.check_values(chosen)
        leaves.locate(cfg.stage._target_)(chosen, open_store(chosen))
        return {}
    except PrefetchError as error:
        if sweeps.is_sweep():
            said = Redactor(OmegaConf.to_container(cfg)).text(str(error))
            print(f"error in {folder}: {said}", file=sys.stderr)
            raise  # the other jobs of the sweep go on; Hydra ends with the first that failed
        raise SystemExit(_report(error, OmegaConf.to_container(cfg))) from error
    except BrokenPipeError:
        raise SystemExit(_mute()) from None


def open_store(cfg: Config) -> Store:
    asked = cfg.artifacts
    return Store(cfg.store, makers=cfg.makers, verify=asked.verify, rebuild=asked.rebuild)


def record(cfg: Config, folder: Path) -> dict[str, float]:
    """One stage with its folder, standing, tracker and lineage; the folder is the last line it prints."""
    plain = cast(dict[str, Any], OmegaConf.to_container(cast(DictConfig, cfg), resolve=True))
    standing = Standing(folder, cfg.stage.name, sweeps.words(cfg.stage.name), plain)
    if sweeps.is_sweep() and (found := standing.done()) is not None:
        log.info("found finished")
        print(folder)
        return found
    standing.need_place(in_sweep=sweeps.is_sweep())
    folder.mkdir(parents=True, exist_ok=True)
    Redactor(plain).command_line(folder)
    store = open_store(cfg)
    with standing.kept(), _entered(cfg, store, folder):  # whom a folder is refused has no entry
        config.check_values(cfg)
        typed.refuse_dead_words(cfg, standing.words)
        metrics = _recorded(cfg, store, folder, plain)
    print(folder)
    return metrics


@contextmanager
def _entered(cfg: Config, store: Store, folder: Path) -> Iterator[None]:
    """In the index from the first artifact on: nobody removes what the run stands on. A killed one stays as failed."""
    enter, has_failed = partial(write_index, store, stage=cfg.stage.name, folder=folder), True
    store.on_use = partial(enter, failed=True, is_over=False)
    try:
        yield
        has_failed = False
    finally:
        if store.used or not has_failed or sweeps.is_sweep():  # a typo leaves no trace of itself
            enter(failed=has_failed)


def _recorded(cfg: Config, store: Store, folder: Path, plain: dict[str, Any]) -> dict[str, float]:
    from prefetch.runs.outputs import Outputs
    from prefetch.tracking import NoTracker

    began_s, hidden = time.time(), Redactor(plain)
    tracker = leaves.instantiate(cfg.tracker, "tracker") if _is_first_rank() else NoTracker()
    outputs = Outputs(folder, tracker, store=store, hidden=hidden)
    outputs.start(_about(cfg, folder, plain, hidden))
    error, exit_code = cast(str | None, "interrupted"), 130
    try:
        with hidden.logs():
            metrics = leaves.locate(cfg.stage._target_)(cfg, store, outputs)
        error = None
    except Exception as raised:
        error, exit_code = f"{type(raised).__name__}: {raised}", 1
        raise
    except SystemExit as left:
        error = f"SystemExit: {left.code}"
        exit_code = left.code if isinstance(left.code, int) and left.code else 1
        raise
    finally:
        outputs.finish(error, exit_code, began_s)
    return cast(dict[str, float], metrics)


def _is_first_rank() -> bool:
    """One of several tells the tracker, and is what is listed."""
    return os.environ.get("RANK", "0") == "0"


def _about(cfg: Config, folder: Path, plain: dict[str, Any], hidden: Redactor) -> About:
    """What the run is called, where runs are compared; those of one command share their group."""
    hydra: Any = HydraConfig.get()
    is_several = "stages" in cfg.stage or hydra.runtime.choices.stage != cfg.stage.name
    together = f"{hydra.runtime.choices.stage}-{Path(hydra.runtime.output_dir).name}"
    return About.safe(
        stage=cfg.stage.name,
        folder=folder,
        words=sweeps.words(cfg.stage.name),
        choices={str(name): choice for name, choice in hydra.runtime.choices.items()},
        config=plain,
        group=sweeps.name() or (together if is_several else None),
        hidden=hidden,
    )


def list_stages(_cfg: Config, _store: Store) -> None:
    """Stage `list`: what there is, a line each."""
    print(config.overview())


def run_all(cfg: Config, store: Store, outputs: Any) -> dict[str, float]:
    """Stage `all`: every stage in the order of the data, each in a folder of its own."""
    metrics: dict[str, float] = {}
    for name in cfg.stage.stages:
        chosen = OmegaConf.load(config.CONFIGS / "stage" / f"{name}.yaml")
        log.info("stage=%s", name)
        done = record(
            cast(Config, OmegaConf.merge(cast(DictConfig, cfg), {"stage": chosen})),
            outputs.folder / name,
        )
        store.used.update(json.loads((outputs.folder / name / "lineage.json").read_text()))
        metrics.update({f"{name}/{key}": value for key, value in done.items()})
    outputs.metrics(metrics)
    return metrics


def guarded(main: Callable[[], Any]) -> int:
    """Runs the entry; a user's mistake is one clear line and exit code 1 or 2, anything else is a traceback."""
    if not sys.argv[1:] or {"--help", "-h"} & set(sys.argv[1:]):
        print(config.overview())  # without composing anything: the answer is the same, and at once
        return 0
    logging.raiseExceptions = False  # a log that cannot be written stops nothing, and says nothing
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on instead of printing them
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        if signal.getsignal(stop) != signal.SIG_IGN:  # nohup's children ignore Ctrl-C
            signal.signal(stop, _interrupt)
    try:
        sys.argv[1:] = typed.at_home(typed.in_order(sys.argv[1:]))
        typed.refuse(sys.argv[1:])
        try:
            main()
        finally:
            sweeps.close(sys.argv[1:])
    except BrokenPipeError:
        return _mute()
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("interrupted; what was finished is kept, run again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        known = _known(error)
        if known is None or wants_traceback:
            raise
        return _report(known)
    return 0


def _known(error: Exception) -> Exception | None:
    """What whoever typed can do something about; None = a slip of ours."""
    if isinstance(error, (OSError, HydraException, OmegaConfBaseException, PrefetchError)):
        return error
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and TOO_MUCH.search(str(error))
    ):
        return ArtifactError(
            f"out of memory ({str(error)[:300] or 'no amount told'}): what was asked for is more than this machine "
            "holds; ask for less, or free memory"
        )
    if isinstance(error, ValueError) and str(error).startswith("Only one of --run"):
        return ConfigError(str(error))  # Hydra's own options against each other
    if isinstance(error, ValueError) and isinstance(error.__cause__, OSError):
        return error.__cause__  # Hydra could not open its log
    if isinstance(error, RuntimeError) and "srun" in str(error):
        no_slurm = "hydra/launcher: Slurm is not on this machine (no srun); try submitit_local"
        return ConfigError(no_slurm)
    return broken_install(error)


def _interrupt(*_: Any) -> None:
    """What Slurm, `timeout` and `docker stop` send ends like Ctrl-C, so that nothing half-made stays.

    Raised inside a callback of a library it is lost: so it is raised again until the run has ended. Objects that it
    left half-made may fail as they are thrown away, which says nothing to whoever interrupted.
    """
    sys.unraisablehook = lambda _: None
    signal.setitimer(signal.ITIMER_REAL, SAY_AGAIN_S)
    raise KeyboardInterrupt


def _mute() -> int:
    """Whoever read our output has gone: the interpreter must not try to flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _report(error: BaseException, settings: Any = None) -> int:
    print(f"error: {Redactor(settings).text(typed.explain(error))}", file=sys.stderr)
    return 2 if isinstance(error, (ConfigError, HydraException, OmegaConfBaseException)) else 1
