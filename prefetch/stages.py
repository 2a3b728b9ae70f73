"""Running a stage: its folder, its tracker, its lineage, and errors that a user can read. It knows no stage by name."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefetch import config, sweeps
from prefetch.artifacts import Store, write_index
from prefetch.config import Config
from prefetch.errors import ConfigError, PrefetchError
from prefetch.naming import About
from prefetch.redaction import Redactor
from prefetch.standing import Standing

log = logging.getLogger(__name__)
SAY_AGAIN_S = 10  # longer than tidying up takes


def run_stage(cfg: DictConfig) -> dict[str, float]:
    """What Hydra calls, once a job: the stage that `stage=` chose."""
    typed = cast(
        Config, cfg
    )  # the schema stands in the defaults list: Hydra checked names and types
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if cfg.stage.recorded:
            return record(typed, folder)
        config.check_values(typed)
        config.locate(cfg.stage._target_)(typed, open_store(typed))
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
    return Store(cfg.store, makers=cfg.makers, verify=cfg.artifacts.verify)


def record(cfg: Config, folder: Path) -> dict[str, float]:
    """One stage with its folder, standing, tracker and lineage; the folder is the last line it prints."""
    plain = cast(dict[str, Any], OmegaConf.to_container(cast(DictConfig, cfg), resolve=True))
    standing = Standing(folder, cfg.stage.name, sweeps.words(cfg.stage.name), plain)
    if sweeps.is_sweep() and (found := standing.done()) is not None:
        log.info("found finished")
        print(folder)
        return found
    folder.mkdir(parents=True, exist_ok=True)
    Redactor(plain).command_line(folder)
    store, has_failed = open_store(cfg), True
    try:
        with standing.kept():
            config.check_values(cfg)
            metrics = _recorded(cfg, store, folder, plain)
        has_failed = False
    finally:
        if store.used or not has_failed or sweeps.is_sweep():  # a typo leaves no trace of itself
            write_index(store, stage=cfg.stage.name, folder=folder, failed=has_failed)
    print(folder)
    return metrics


def _recorded(cfg: Config, store: Store, folder: Path, plain: dict[str, Any]) -> dict[str, float]:
    from prefetch.outputs import Outputs
    from prefetch.tracking import NoTracker

    began_s, hidden = time.time(), Redactor(plain)
    tracker = config.instantiate(cfg.tracker, "tracker") if _is_first_rank() else NoTracker()
    outputs = Outputs(folder, tracker, store=store, hidden=hidden)
    outputs.start(_about(cfg, folder, plain, hidden))
    error, exit_code = cast(str | None, "interrupted"), 130
    try:
        with hidden.logs():
            metrics = config.locate(cfg.stage._target_)(cfg, store, outputs)
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
    """Of the processes that torchrun began together, one tells the tracker."""
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
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on instead of printing them
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        if signal.getsignal(stop) != signal.SIG_IGN:  # nohup's children ignore Ctrl-C
            signal.signal(stop, _interrupt)
    try:
        _refuse_words(sys.argv[1:])
        try:
            main()
        finally:
            sweeps.close(sys.argv[1:])
    except BrokenPipeError:
        return _mute()
    except (OSError, HydraException, OmegaConfBaseException, PrefetchError) as error:
        if wants_traceback:
            raise
        return _report(error)
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("interrupted; what was finished is kept, run again to go on", file=sys.stderr)
        return 130
    return 0


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
    print(f"error: {Redactor(settings).text(explain(error))}", file=sys.stderr)
    return 2 if isinstance(error, (ConfigError, HydraException, OmegaConfBaseException)) else 1


def _refuse_words(words: list[str]) -> None:
    """What Hydra would take and nobody means: keys that no stage reads, and lists of choices merged into one."""
    for word in words:
        if word.startswith("+") and not word.lstrip("+").startswith("hydra"):
            raise ConfigError(
                f"{word}: nothing reads an added key; leave out the + to set one that exists"
            )
        group, _, value = word.partition("=")
        if value.startswith("[") and group in _groups():
            names = value.strip("[]").replace(" ", "")
            raise ConfigError(
                f"{word}: a group takes one name; to run each, use -m {group}={names}"
            )


def explain(error: BaseException) -> str:
    """One line that says what was wrong and lists what exists."""
    if isinstance(error, PrefetchError):
        return str(error)
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}; {error.__cause__}"
    line = text.split("Config search path")[0]
    for noise in (
        r"To append to your config use \S+",
        r"(object|reference)_type=\S+",
        r"See https\S+ for \w+",
    ):
        line = re.sub(noise, "", line)
    if isinstance(error, OverrideParseException):
        line = f"{error.override}: {line}"
    return " ".join(f"{line}{_siblings(text)}".split())


def _siblings(text: str) -> str:
    """What stands beside the key that was not found, from the configuration without it."""
    found = re.search(r"full_key: (\S+)", text)
    if not found or "Key '" not in text:
        return ""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    chosen = [word for word in sys.argv[1:] if re.fullmatch(r"\w+=\w+", word)]
    groups = [word for word in chosen if word.split("=")[0] in _groups() - {"experiment"}]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        node: Any = compose("config", overrides=groups)
    parent = found.group(1).rpartition(".")[0]
    for part in parent.split(".") if parent else []:
        node = node.get(part) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig):
        return ""
    names = sorted(str(name) for name in node if name != "_target_")
    return f"; {parent or 'the root'} has: {', '.join(names)}"


def _groups() -> set[str]:
    return {path.name for path in config.CONFIGS.iterdir() if path.is_dir()}
