"""Libraries that only some runs need: imported when they do, or one line that says what to install.

Also of any other library, what it means that its import failed. It knows no stage.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from prefetch.errors import ConfigError

EXTRAS = {
    "transformers": "hf",
    "huggingface_hub": "hf",
    "gguf": "llama",
    "distributed": "cluster",
    "dask_jobqueue": "cluster",
}
PLACES = ("purelib", "platlib")
NAMES = {"dask_jobqueue": "dask-jobqueue", "huggingface_hub": "huggingface-hub"}


def require(package: str, *names: str, asked_by: str) -> Any:
    """The module, with these names in it. What was installed by halves is told from what was not."""
    what = f"{asked_by} needs the package {NAMES.get(package, package)}"
    try:
        module = importlib.import_module(package)
        if getattr(module, "__file__", "") is None:  # a folder without its files
            raise ImportError("its files are missing")
        for name in names:
            getattr(module, name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ConfigError(f"{what}: pip install {_whence(package)}") from error
        raise _broken(package, what, error) from error
    except Exception as error:  # half a package fails in its own way
        raise _broken(package, what, error) from error
    return module


def broken_install(error: Exception) -> ConfigError | None:
    """Said in one line, if the error arose while a library's own module was imported, as after an interrupted pip."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    begun = [frame for frame in frames if frame.f_code.co_name == "<module>"]
    found = [(str(frame.f_globals["__name__"]), frame.f_code.co_filename) for frame in begun]
    if isinstance(error, SyntaxError) and error.filename:
        path = Path(error.filename)
        found.append((path.parent.name if path.stem == "__init__" else path.stem, error.filename))
    if not found or not (distribution := _distribution(*found[-1])):
        return None
    return _broken(distribution, f"the package {distribution} cannot be imported", error)


def _distribution(module: str, file: str) -> str | None:
    """What pip calls the package of a module, if pip put it there; its own note of that is the last it writes."""
    package, _, plugin = module.partition(".")
    known = importlib.metadata.packages_distributions().get(package, [])
    is_installed = any(Path(file).is_relative_to(sysconfig.get_path(at)) for at in PLACES)
    if package == "hydra_plugins" and plugin:
        return plugin.partition(".")[0].replace("_", "-")
    return known[0] if known else package if is_installed else None


def _broken(package: str, what: str, error: Exception) -> ConfigError:
    said = " ".join(str(error).split())[:200]
    again = f"pip install --force-reinstall {NAMES.get(package, package)}"
    reason = f"{type(error).__name__}: {said}"
    return ConfigError(f"{what}, its installation is broken ({reason}): {again}")


def _whence(package: str) -> str:
    return f"'expert-prefetch[{EXTRAS[package]}]'" if package in EXTRAS else package
