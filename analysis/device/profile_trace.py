"""A profile in columns: what the device did, who launched it, and what ran on the host meanwhile.

It keeps about sixty bytes an event instead of the hundreds of its text, and knows no MoE beyond which inputs to keep.
N device activities, S host spans, Q launches. Times are whole nanoseconds.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.device.chrome_trace import ChromeTrace
from analysis.device.matrix_products import MATMULS, NO_PRODUCT, Product, product_of
from analysis.device.names import Names
from prefetch.errors import FormatError, reading

Ints = NDArray[np.int64]
KERNEL, COPY, SET = range(3)  # of an activity
OPERATION, MODULE, FRAME, ANNOTATION = range(4)  # of a span
ACTIVITIES = {"kernel": KERNEL, "gpu_memcpy": COPY, "gpu_memset": SET}
LAUNCHES = {
    "cuda_runtime",
    "cuda_driver",
    "hip_runtime",
    "hip_driver",
    "xpu_runtime",
    "runtime",
    "driver",
}
MODULE_PREFIX = "nn.Module: "
# columns
ACTIVITY = ("name", "start", "took", "device", "stream", "correlation", "external", "kind")
LAUNCH = ("correlation", "external", "start", "thread", "process", "name")
SPAN = (
    "name", "start", "took", "thread", "kind", "external", "inputs", "flops", "bytes", "arithmetic", "sequence",
    "backward",
)  # fmt: skip
NOBODY = -1
LATEST_NS, LONGEST_NS = 2**62, 2**52  # of a moment; of a duration, 52 days: sums of both stay whole


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of one length, by name."""

    of: dict[str, Ints]

    def __getattr__(self, name: str) -> Ints:
        try:
            return self.of[name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(next(iter(self.of.values())))


@dataclass(frozen=True, eq=False)
class ProfileTrace:
    """`names[i]` is what the columns `name` point to; `inputs[i]` what an operation was called with."""

    path: Path
    names: tuple[str, ...]
    meta: Mapping[str, Any]
    activities: Columns  # ACTIVITY
    spans: Columns  # SPAN
    launches: Columns  # LAUNCH
    inputs: tuple[dict[str, Any], ...]
    n_events: int

    @property
    def is_cpu(self) -> bool:
        return len(self.activities) == 0

    @property
    def kernels(self) -> NDArray[np.bool_]:
        return self.activities.kind == KERNEL

    @property
    def has_modules(self) -> bool:
        return bool(np.isin(self.spans.kind, (MODULE, FRAME)).any())

    @property
    def ranks(self) -> int | None:
        """How many processes the run had, where it says."""
        told = self.meta.get("distributedInfo")
        size = told.get("world_size") if isinstance(told, dict) else None
        return size if isinstance(size, int) else None


class _Table:
    """Rows of whole numbers that grow without Python objects."""

    def __init__(self, *columns: str) -> None:
        self.columns = {name: array("q") for name in columns}

    def add(self, *row: int) -> None:
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)

    def done(self) -> Columns:
        return Columns(
            {
                k: np.frombuffer(v, np.int64) if v else np.zeros(0, np.int64)
                for k, v in self.columns.items()
            }
        )


class _Reader:
    """Sorts each event into its table."""

    def __init__(self, path: Path, names: Names) -> None:
        self.path, self.moe = path, names
        self.name_of: dict[str, int] = {}
        self.threads: dict[tuple[Any, Any], int] = {}
        self.inputs: list[dict[str, Any]] = []
        self.input_of: dict[str, int] = {}
        self.activities, self.spans = _Table(*ACTIVITY), _Table(*SPAN)
        self.launches = _Table(*LAUNCH)
        self.processes: dict[Any, int] = {}
        self.n_events = 0

    def add(self, event: dict[str, Any]) -> None:
        self.n_events += 1
        category = str(event.get("cat", "")).lower()
        if event.get("ph") != "X":
            return
        if category in ACTIVITIES:
            self._activity(event, ACTIVITIES[category])
        elif category in LAUNCHES:
            self._launch(event)
        elif category in ("cpu_op", "operator"):
            self._operation(event)
        elif category == "python_function":
            self._python(event)
        elif category == "user_annotation":
            self._span(event, ANNOTATION)

    def _activity(self, event: dict[str, Any], kind: int) -> None:
        start, took = self._times(event)
        args = self._args(event)
        self.activities.add(
            self._name(event), start, took, _whole(args.get("device", event.get("pid")), 0),
            _whole(args.get("stream", event.get("tid")), 0), _whole(args.get("correlation")),
            _whole(args.get("External id", args.get("external id"))), kind,
        )  # fmt: skip

    def _launch(self, event: dict[str, Any]) -> None:
        args = self._args(event)
        external = _whole(args.get("External id", args.get("external id")))
        correlation = _whole(args.get("correlation"))
        if correlation == external == NOBODY:
            return
        start, _ = self._times(event)
        process = self.processes.setdefault(str(event.get("pid")), len(self.processes))
        row = correlation, external, start, self._thread(event), process, self._name(event)
        self.launches.add(*row)

    def _operation(self, event: dict[str, Any]) -> None:
        name, args = str(event.get("name", "")), self._args(event)
        product = product_of(args) if name in MATMULS else NO_PRODUCT
        found = self.moe.find("operations", name)
        kept = self._keep(args) if found is not None else NOBODY
        self._span(event, OPERATION, kept, product)

    def _python(self, event: dict[str, Any]) -> None:
        """Modules, and functions that a rule names. Of the others there are too many."""
        name = str(event.get("name", ""))
        if name.startswith(MODULE_PREFIX):
            self._span(event, MODULE)
        elif not name.startswith("<") and self.moe.find("frames", name) is not None:
            self._span(event, FRAME)

    def _span(
        self, event: dict[str, Any], kind: int, kept: int = NOBODY, product: Product = NO_PRODUCT
    ) -> None:
        start, took = self._times(event)
        args = self._args(event)
        external = _whole(args.get("External id", args.get("external id")))
        backward = _whole(args.get("Fwd thread id"), 0)
        self.spans.add(
            self._name(event), start, took, self._thread(event), kind, external, kept, *product,
            _whole(args.get("Sequence number")), backward,
        )  # fmt: skip

    def _keep(self, args: Mapping[str, Any]) -> int:
        """Inputs that occur again and again are kept once."""
        wanted = {
            name: args[name]
            for name in ("Input Dims", "Input type", "Concrete Inputs")
            if name in args
        }
        text = json.dumps(wanted)
        if text not in self.input_of:
            self.input_of[text] = len(self.inputs)
            self.inputs.append(wanted)
        return self.input_of[text]

    def _args(self, event: dict[str, Any]) -> dict[str, Any]:
        args = event.get("args") or {}
        if not isinstance(args, dict):
            raise self._wrong(event, f"expected args {{...}}, found {str(args)[:60]!r}")
        return args

    def _times(self, event: dict[str, Any]) -> tuple[int, int]:
        try:
            start, took = _nanoseconds(event["ts"]), _nanoseconds(event["dur"])
            if not 0 <= took <= LONGEST_NS or abs(start) > LATEST_NS:
                raise ValueError
            return start, took
        except (KeyError, TypeError, ValueError, OverflowError):
            found = f"ts={str(event.get('ts'))[:30]}, dur={str(event.get('dur'))[:30]}"
            raise self._wrong(
                event, f"expected numbers ts and dur >= 0 (µs), found {found}"
            ) from None

    def _wrong(self, event: dict[str, Any], what: str) -> FormatError:
        name = str(event.get("name"))[:60]
        return FormatError(f"{self.path}: event {self.n_events:,} ({name!r}): {what}")

    def _name(self, event: dict[str, Any]) -> int:
        text = (
            str(event.get("name", "")).encode("utf-8", "replace").decode()
        )  # half a character is none
        return self.name_of.setdefault(text, len(self.name_of))

    def _thread(self, event: dict[str, Any]) -> int:
        who = str(event.get("pid")), str(event.get("tid"))
        return self.threads.setdefault(who, len(self.threads))


def read_profile(path: str | Path, names: Names) -> ProfileTrace:
    """The whole profile in columns; what cannot be one is an error that says so."""
    file = Path(path)
    trace, reader = ChromeTrace(file), _Reader(file, names)
    with reading(file, "events as torch.profiler writes them"):
        for event in trace.events():
            reader.add(event)
    found = ProfileTrace(
        file, tuple(reader.name_of), trace.meta, reader.activities.done(), reader.spans.done(),
        reader.launches.done(), tuple(reader.inputs), reader.n_events,
    )  # fmt: skip
    _need_work(found)
    _need_one_process(found)
    return found


def _need_work(trace: ProfileTrace) -> None:
    n_kernels = int(trace.kernels.sum())
    if n_kernels:
        return
    ask = "record it with activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]"
    if len(trace.launches) or trace.meta.get("deviceProperties"):
        raise FormatError(
            f"{trace.path}: expected GPU kernels, found none in {trace.n_events:,} events, though a GPU was there "
            f"({len(trace.launches):,} calls of its runtime); {ask}"
        )
    if not (trace.spans.kind == OPERATION).any():
        raise FormatError(
            f"{trace.path}: expected GPU kernels or CPU operations, found neither in {trace.n_events:,} events; {ask}"
        )


def _need_one_process(trace: ProfileTrace) -> None:
    """Each process numbers its launches from the same number: of several one cannot tell whose a kernel is."""
    launches = trace.launches
    place_Q = np.flatnonzero(launches.correlation != NOBODY)
    order_Q = place_Q[np.argsort(launches.correlation[place_Q], kind="stable")]
    number_Q, process_Q = launches.correlation[order_Q], launches.process[order_Q]
    clash_Q = np.flatnonzero((np.diff(number_Q) == 0) & (np.diff(process_Q) != 0))
    if len(clash_Q):
        raise FormatError(
            f"{trace.path}: expected one process, found {len(np.unique(launches.process))}, and {len(clash_Q):,} "
            f"numbers of launches that two of them use (first {number_Q[clash_Q[0]]}): pass each rank's own profile"
        )


def _nanoseconds(us: Any) -> int:
    """Of microseconds; what is behind the point apart, for moments since 1970 have no digits to spare."""
    number = us if isinstance(us, int) else float(us)
    whole = math.floor(number)
    return whole * 1000 + round((number - whole) * 1000)


def _whole(value: Any, otherwise: int = NOBODY) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return otherwise
    return number if abs(number) < 2**63 else otherwise
