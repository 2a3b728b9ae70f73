"""An engine compiled for one policy: a module of its own, written to a cache folder, so that the next process finds it.

numba keeps compiled code per file and line; what is compiled from memory is compiled anew by every process.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import numba

from prefetch.sim.code import own_code
from prefetch.sim.engines.shipped import kinds
from prefetch.sim.policy import KeyRules, Rules
from prefetch.written import left_parts, write_whole

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
ENGINE = "# the engine: from here on\n"
PARTS = {
    "replay": ("replay",),
    "timed": ("link", "timed"),
}  # files of an engine, each compiled per policy
INSIDE = (
    "__future__",
    "prefetch.sim.engines.keyed",
    "prefetch.sim.engines.link",
)  # imports that a whole engine needs not
SHARED = ("policy.py", "pool.py", "workload.py", "machine.py", "transfers.py", "storage.py")
# read when the engines' code is imported: what is edited later runs in the next process
SOURCES = {
    path.name: path.read_text()
    for folder in (HERE.parent, HERE)
    for path in sorted(folder.glob("*.py"))
}
NEEDED = (
    "from prefetch.sim.policy import BLOCK, FEW, STAYS, UNCOUNTED",
    "from prefetch.sim.engines.pool import FIRST, UNTOLD",
    "from prefetch.sim.engines.transfers import CALLED",
)
RULES = "# rules of the policy: from here on\n"
HOOKS = {  # of rules with a key, and with a state: what they are handed
    True: {"on_fill": "seen", "on_use": "key, seen"},
    False: {
        "filled": "state, n_slots, slot, seen",
        "used": "state, n_slots, slot, is_new, seen",
        "victim": "state, n_slots, busy, seen",
        "told": "state, n_slots, step, layer, row, is_first",
    },
}
Functions = dict[str, Callable[..., int | None]]


@cache
def engine(rules: Rules, name: str = "replay") -> ModuleType:
    """The module `prefetch.sim.<name>` with these rules in place of LRU's.

    The timed one takes long to compile: policies that come with the project share it.
    """
    is_keyed = isinstance(rules, KeyRules)
    shared = kinds(is_keyed) if name == "timed" else ()
    return _module(shared if rules in shared else (rules,), name, is_keyed)


@cache
def _module(kinds: tuple[Rules, ...], name: str, is_keyed: bool) -> ModuleType:
    functions = {
        f"{hook}_{kind}": getattr(rules, hook)
        for kind, rules in enumerate(kinds)
        for hook in HOOKS[is_keyed]
    }
    text = _text(len(kinds), name, is_keyed, functions)
    if any(_is_local(function) for function in functions.values()):
        return _in_memory(text, name, functions)
    return _from_file(text, name, functions)


def _is_local(function: Callable[..., int | None]) -> bool:
    """Of a notebook or of another function: no file to import it from."""
    return function.__module__ == "__main__" or "<" in function.__qualname__


def _text(n_kinds: int, name: str, is_keyed: bool, functions: Functions) -> str:
    parts = [SOURCES[f"{part}.py"].split(ENGINE) for part in PARTS[name]]
    imports = [line for head, _ in parts for line in _imports(head)]
    body = "\n".join(body for _, body in parts)
    lines = [_import(short, function) for short, function in functions.items()]
    lines += [f'_{short} = njit(inline="always")(_{short})' for short in functions]
    lines += [_choice(hook, given, n_kinds, is_keyed) for hook, given in HOOKS[is_keyed].items()]
    own = "\n".join([*imports, *NEEDED, *lines])
    return f"{own}\n{SOURCES['keyed.py' if is_keyed else 'stated.py'].split(RULES)[1]}\n{body}"


def _choice(hook: str, given: str, n_kinds: int, is_keyed: bool) -> str:
    """A function that calls the hook of the policy at hand; keys are so short that a call would take longer."""
    how = 'inline="always"' if is_keyed or n_kinds == 1 else "**CALLED"
    own = hook if is_keyed else f"own_{hook}"
    lines = [f"@njit({how})", f"def {own}(kind, {given}):"]
    for kind in range(n_kinds - 1):
        lines += [f"    if kind == {kind}:", f"        return _{hook}_{kind}({given})"]
    return "\n".join([*lines, f"    return _{hook}_{n_kinds - 1}({given})"])


def _imports(head: str) -> list[str]:
    nodes = [node for node in ast.parse(head).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return [ast.unparse(node) for node in nodes if getattr(node, "module", "") not in INSIDE]


def _import(short: str, function: Callable[..., int | None]) -> str:
    if _is_local(function):
        return f"_{short} = GIVEN[{short!r}]"
    return f"from {function.__module__} import {function.__name__} as _{short}"


def _in_memory(text: str, name: str, functions: Functions) -> ModuleType:
    module = ModuleType(f"prefetch_sim_{name}_of_{next(iter(functions.values())).__qualname__}")
    module.__dict__["GIVEN"] = functions
    exec(compile(text.replace("cache=True, ", ""), module.__name__, "exec"), module.__dict__)
    return module


def _from_file(text: str, name: str, functions: Functions) -> ModuleType:
    modules = sorted({name for function in functions.values() for name in _modules(function)})
    sources = [inspect.getsource(sys.modules[module]) for module in modules]
    sources += [code for module in modules if (code := own_code(module))]
    beside = [SOURCES[file] for file in SHARED]
    told = "\0".join([text, *sources, *beside, numba.__version__])
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    path = _folder() / f"{name}_{key}.py"
    if not path.exists() or path.read_text() != text:  # whatever lies there, this text is run
        if name == "timed":
            log.info("compiling the timed engine: about half a minute, once on this machine")
        for left in left_parts(path.parent):
            left.unlink(missing_ok=True)
        write_whole(path, text)  # two processes may write it at once: they write the same
    spec = importlib.util.spec_from_file_location(f"prefetch_sim_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _modules(function: Callable[..., int | None]) -> set[str]:
    """Where it stands, and where the compiled functions come from that are known there."""
    known = vars(sys.modules[function.__module__]).values()
    called = {value.py_func.__module__ for value in known if hasattr(value, "py_func")}
    return {function.__module__, *called}


def _folder() -> Path:
    """Of this user; where nothing can be written there, one that lasts as long as the process."""
    own = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    folder = Path(own or Path.home() / ".cache") / "expert-prefetch" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="expert-prefetch-"))
