"""Runs tests against changed code: each change in a process of its own. Not a benchmark: `bench_mutants` asks for it.

A change inside a function is put into the loaded module, in a process forked after a first run of the tests: it costs
the tests up to the first that fails. Compiled functions run as plain Python (tests that take long so, or do not hold,
are left out); what stands outside functions is written to the file and imported anew. The current folder is a copy.
"""

from __future__ import annotations

import ast
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from mutations import Mutant, mutants_of

UNPUT = 4  # of a process
SLOW_S = 2.0  # of a test: left out where functions are not compiled
MOST_MEMORY = 6 << 30  # a loop that never ends may fill a list
OURS = ("prefetch", "analysis")
KILLED, SURVIVED, TIMED_OUT, UNFIT = "killed", "survived", "timed out", "unfit"


@dataclass(frozen=True)
class Group:
    """Files and the tests that stand for them.

    plain: others compile their functions; skip: words of tests that take too long uncompiled, as `pytest -k` has them.
    """

    files: list[str]
    tests: list[str]
    plain: bool = False
    skip: str = ""


def named(file: str, mutants: list[Mutant], lines: list[str]) -> dict[str, Mutant]:
    """By file, text of the line, and change: names that outlast a moved line."""
    seen, found = Counter[str](), dict[str, Mutant]()
    for mutant in mutants:
        text = lines[mutant.line - 1].strip()
        name = f"{file} | {text} | {mutant.before} -> {mutant.after}"
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} ({seen[name]})"] = mutant
    return found


class Run:
    """A session of pytest that runs its tests once, then until one fails for every mutant, each in a process."""

    def __init__(self, names: list[str], plain: bool, tell: Callable[..., None]) -> None:
        self.names, self.plain, self.tell = names, plain, tell
        self.seconds = dict[str, float]()
        self.kills = Counter[str]()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = [item for item in session.items if self._holds(item)]
        limit = 3 + 3 * sum(self.seconds[item.nodeid] for item in items)
        left_out = len(session.items) - len(items)
        print(
            f"{len(self.names)} mutants, {len(items)} tests, {left_out} left out",
            file=sys.__stderr__,
        )
        if _outcome(_forked(lambda: self._fails(items, os.dup(2)), limit)) != SURVIVED:
            print("tests fail in a forked process: no mutant is run", file=sys.__stderr__)
            return True
        for name in self.names:
            items.sort(key=lambda item: (-self.kills[item.nodeid], self.seconds[item.nodeid]))
            reading, writing = os.pipe()
            began = time.monotonic()
            status = _forked(lambda n=name, w=writing: self._mutated(n, items, w), limit)  # type: ignore[misc]
            os.close(writing)
            by = os.read(reading, 1000).decode()
            os.close(reading)
            self.kills[by] += 1
            self.tell(name, _outcome(status), by, time.monotonic() - began)
        return True

    def _holds(self, item: pytest.Item) -> bool:
        began = time.process_time()
        signal.signal(signal.SIGPROF, _too_slow)
        if self.plain:
            signal.setitimer(signal.ITIMER_PROF, SLOW_S)  # of its own: others may use the machine
        try:
            is_good = _passes(item)
        except Exception:  # pytest itself was met by the alarm
            is_good = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.seconds[item.nodeid] = time.process_time() - began
        return is_good and not (self.plain and self.seconds[item.nodeid] > SLOW_S)

    def _mutated(self, name: str, items: list[pytest.Item], writing: int) -> int:
        try:
            put_live(name)
        except (LookupError, ValueError) as error:
            print(f"{name}: {error}", file=sys.__stderr__)
            return UNPUT
        return self._fails(items, writing)

    def _fails(self, items: list[pytest.Item], writing: int) -> int:
        """The first that does is written."""
        forget()
        for item in items:
            if not _passes(item):
                os.write(writing, item.nodeid.encode()[:1000])
                return 1
        return 0


def _too_slow(*_: Any) -> None:
    raise TimeoutError


def _passes(item: pytest.Item) -> bool:
    from _pytest.runner import runtestprotocol

    reports = runtestprotocol(item, log=False, nextitem=None)
    return not any(report.failed for report in reports)


def _forked(work: Callable[[], int], limit_s: float) -> int:
    """How a process of this work ended."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if limit_s:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, used + MOST_MEMORY))
                signal.setitimer(signal.ITIMER_PROF, limit_s)
                signal.setitimer(signal.ITIMER_REAL, 10 * limit_s)
            code = work()
        except BaseException as error:  # whatever a mutant raises, it is not the parent's
            print(f"{type(error).__name__}: {error}"[:300], file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def _outcome(status: int) -> str:
    """Unfit: a mutant that could not be put in."""
    if os.WIFSIGNALED(status):
        is_late = os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        return TIMED_OUT if is_late else KILLED
    return {0: SURVIVED, UNPUT: UNFIT}.get(os.WEXITSTATUS(status), KILLED)


def tree_of(name: str) -> tuple[ast.Module, Mutant]:
    """Of the file that a mutant is in: its code with the mutant, and which one that is."""
    file = name.partition(" | ")[0]
    text = Path(file).read_text()
    tree = ast.parse(text)
    mutant = named(file, list(mutants_of(tree)), text.splitlines())[name]
    mutant.put()
    return tree, mutant


def put_live(name: str) -> None:
    """The function's code becomes the mutant's, wherever the function is known."""
    (tree, mutant), file = tree_of(name), name.partition(" | ")[0]
    function = live(sys.modules[file.removesuffix(".py").replace("/", ".")], mutant.scope)
    function.__code__ = _code_of(compile(tree, file, "exec"), mutant.scope)


def forget() -> None:
    """What other code has made, and pools of threads, which do not come along into a process."""
    for module in [one for key, one in sys.modules.items() if key.startswith(OURS)]:
        for value in [*vars(module).values()]:
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def live(module: ModuleType, scope: str) -> FunctionType:
    """The function of this name as it was written, below what decorates it."""
    found: Any = module
    for part in scope.split("."):
        found = vars(found).get(part)
        for inside in ("fget", "func", "__func__", "__wrapped__"):
            found = getattr(found, inside, found) if not isinstance(found, type) else found
    if not isinstance(found, FunctionType):
        raise LookupError(f"{module.__name__}.{scope}: is no function any more")
    return found


def _code_of(code: CodeType, scope: str) -> CodeType:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_qualname == scope:
                return inner
            if scope.startswith(f"{inner.co_qualname}."):
                return _code_of(inner, scope)
    raise LookupError(scope)


def in_session(group: Group, plugin: Any, plain: bool, log: Path) -> int:
    """Pytest on the group's tests, in a process that has imported nothing of the project yet."""
    with log.open("a") as to:
        os.dup2(to.fileno(), 1)
    if plain:
        import numba

        numba.config.DISABLE_JIT = 1
    words = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    skipped = ["-k", f"not ({group.skip})"] if plain and group.skip else []
    folder = f"--basetemp={tempfile.mkdtemp(dir=log.parent)}"
    return int(pytest.main([*words, *skipped, folder, *group.tests], plugins=[plugin]))


def run(group: Group, mutants: dict[str, Mutant], out: Path, log: Path) -> None:
    """All of these mutants of its files, and their outcomes to `out`."""

    def tell(name: str, outcome: str, by: str, seconds: float) -> None:
        mutant, file = mutants[name], name.partition(" | ")[0]
        row = {"name": name, "file": file, "line": mutant.line, "operator": mutant.operator}
        row |= {"outcome": outcome, "by": by, "seconds": round(seconds, 2)}
        with out.open("a") as to:
            to.write(json.dumps(row) + "\n")

    def is_plain(name: str) -> bool:
        return group.plain or mutants[name].is_compiled

    inside = [name for name in mutants if mutants[name].scope]
    for plain in (False, True):
        if names := [name for name in inside if is_plain(name) == plain]:
            session = Run(names, plain, tell)
            status = _forked(lambda s=session, p=plain: in_session(group, s, p, log), 0)  # type: ignore[misc]
            if os.waitstatus_to_exitcode(status) not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
                print(f"{group.tests}: pytest ended with {status}: see {log}", file=sys.__stderr__)
    if len(inside) < len(mutants):
        _outside(group, [name for name in mutants if name not in inside], log, tell)


def _outside(group: Group, names: list[str], log: Path, tell: Callable[..., None]) -> None:
    """Written to the file; uncompiled where compiled code would keep the numbers that it was compiled with."""
    plain = group.plain or any("njit" in Path(file).read_text() for file in group.files)
    holding = log.with_suffix(".json")
    _forked(lambda: in_session(group, Baseline(plain, holding), plain, log), 0)
    seconds = json.loads(holding.read_text())
    limit, plugin = 30 + 3 * sum(seconds.values()), Holding(set(seconds))
    for name in names:
        path, began = Path(name.partition(" | ")[0]), time.monotonic()
        text, (tree, _) = path.read_text(), tree_of(name)
        path.write_text(ast.unparse(tree))
        for stale in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            stale.unlink()
        status = _forked(lambda: in_session(group, plugin, plain, log), limit)
        path.write_text(text)
        tell(name, _outcome(status), "", time.monotonic() - began)


class Baseline(Run):
    """Writes which tests hold, and their seconds."""

    def __init__(self, plain: bool, holding: Path) -> None:
        super().__init__([], plain, print)
        self.holding = holding

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        names = [item.nodeid for item in session.items if self._holds(item)]
        self.holding.write_text(json.dumps({name: self.seconds[name] for name in names}))
        return True


class Holding:
    """Only tests that hold without a mutant, until one fails."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for item in session.items:
            if item.nodeid in self.names and not _passes(item):
                os._exit(1)
        os._exit(0)
