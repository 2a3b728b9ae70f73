"""What a machine can do: its link, GPU, host and disk, with a source for every number.

It simulates nothing. A file is `datasheet` or, where its numbers were measured on the machine itself, `measured`, until
an engine has found how far simulated times are from real ones there; from then on it is `calibrated` and carries that
error.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from prefetch import plain_yaml
from prefetch.errors import ConfigError

NS_PER_S, MEASURED = 1_000_000_000, "measured"
KIND, HARDWARE_FILE = "hardware", "hardware.json"  # of the artifact that a measurement is sealed as
Part = TypeVar("Part")


@dataclass(frozen=True)
class Lane:
    """Copies out of one kind of host memory: pairs of a size and the rate of the bytes beyond it.

    ((0, 10e9), (1048576, 24e9)) moves the first 1 MiB at 10 GB/s and the rest at 24, so that time
    is continuous in size. Rates may not fall with size, or a copy in two parts would beat the whole.
    """

    host_ns_per_copy: int  # what the calling thread loses per copy
    bytes_per_s: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.bytes_per_s]
        rates = [rate for _, rate in self.bytes_per_s]
        if sizes[:1] != [0] or sizes != sorted(set(sizes)):
            raise ConfigError(f"bytes_per_s must have rising sizes, the first 0; found {sizes}")
        if rates != sorted(rates) or rates[0] <= 0:
            raise ConfigError(f"bytes_per_s must be positive and not fall with size; found {rates}")

    def moving_ns(self, n_bytes: int) -> int:
        """Time on the link without its latency, rounded up once."""
        ends = [size for size, _ in self.bytes_per_s[1:]] + [n_bytes]
        moving_s = Fraction(0)
        for (start, rate), end in zip(self.bytes_per_s, ends, strict=True):
            moving_s += Fraction(max(0, min(end, n_bytes) - start), rate)
        return math.ceil(moving_s * NS_PER_S)


@dataclass(frozen=True)
class Link:
    """Host to device: one queue; a copy starts late by the latency, and goes in chunks."""

    latency_ns: int
    chunk_bytes: int  # a demand copy waits for at most one chunk of a prefetch
    pinned: Lane
    pageable: Lane

    def copy_ns(self, n_bytes: int, *, is_pinned: bool = True) -> int:
        """One copy on an idle link. The host's own cost is `host_ns_per_copy`, on the host's clock."""
        if n_bytes < 0:
            raise ValueError(f"a copy of {n_bytes} bytes")
        lane = self.pinned if is_pinned else self.pageable
        return self.latency_ns + lane.moving_ns(n_bytes)


@dataclass(frozen=True)
class Operations:
    """Peak operations per second by number type, dense; None = the device has no such units."""

    fp32: int
    bf16: int
    fp8: int | None
    int8: int | None
    fp4: int | None


@dataclass(frozen=True)
class Device:
    """The GPU, at its published peaks until a calibration replaces them."""

    memory_bytes: int
    bytes_per_s: int
    operations_per_s: Operations
    fixed_ns_per_layer: int  # launches and synchronisation, whatever the batch


@dataclass(frozen=True)
class Host:
    """The memory that copies read from, and the cores that can compute an expert instead."""

    memory_bytes: int
    bytes_per_s: int  # shared by copies and by experts computed on the host
    operations_per_s: int  # fp32


@dataclass(frozen=True)
class Storage:
    """The disk behind the host's memory."""

    latency_ns: int
    bytes_per_s: int
    chunk_bytes: int  # a demand read waits for at most one chunk of a guess

    def read_ns(self, n_bytes: int) -> int:
        """One read on an idle disk, rounded up once."""
        return self.latency_ns - (-n_bytes * NS_PER_S // self.bytes_per_s)


@dataclass(frozen=True)
class Hardware:
    """One machine with one GPU. `sources` says for every number where it is from."""

    name: str
    link: Link
    device: Device
    host: Host
    storage: Storage
    reserve_bytes: int  # device memory that is never ours: context, allocator, display
    sources: dict[str, str] = field(hash=False)
    measured_error: float | None = None  # median |simulated / measured - 1| of a step; None = never
    is_measured: bool = False  # its numbers are this machine's own, not a datasheet's

    def __post_init__(self) -> None:
        numbers = dict(numeric_fields(self))
        for path, number in numbers.items():
            if not 0 <= number < math.inf or (number == 0 and path not in MAY_BE_ZERO):
                raise ConfigError(f"{path} must be positive; found {number}")
        if self.reserve_bytes >= self.device.memory_bytes:
            raise ConfigError("reserve_bytes must be less than device.memory_bytes")
        if missing := [path for path in numbers if not self.sources.get(path)]:
            raise ConfigError(f"sources must say where {missing[0]} is from")
        if extra := sorted(set(self.sources) - set(numbers)):
            raise ConfigError(f"sources names {extra[0]}, which is no number here")

    @property
    def kind(self) -> str:
        if self.measured_error is not None:
            return "calibrated"
        return "measured" if self.is_measured else "datasheet"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `hardware` takes back, and what a calibrated YAML holds."""
        return dataclasses.asdict(self)


MAY_BE_ZERO = {
    "measured_error",
    "reserve_bytes",
    "link.latency_ns",
    "link.pinned.host_ns_per_copy",
    "link.pageable.host_ns_per_copy",
    "device.fixed_ns_per_layer",
    "storage.latency_ns",
}


def hardware(**fields: Any) -> Hardware:
    """What `_target_` names: the dataclass from plain nested mappings; what is wrong is named."""
    return build(Hardware, fields, "hardware")


def measured(path: str | None = None) -> Hardware:
    """What `hardware=measured` names: a file that says of itself that it was measured."""
    if path is None:
        raise ConfigError(
            "path is missing: pass hardware.path=FILE, the JSON or YAML of a machine, or run stage=profile"
        )
    file = Path(path)
    try:
        text = file.read_text()
        fields = json.loads(text) if file.suffix == ".json" else plain_yaml.load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as JSON or YAML ({told})") from error
    if not isinstance(fields, Mapping) or fields.get("kind") != MEASURED:
        found = fields.get("kind") if isinstance(fields, Mapping) else fields
        raise ConfigError(
            f"{path}: expected `kind: {MEASURED}` beside the keys of a hardware file, found {found!r}; a datasheet's "
            "numbers are a file of their own in configs/hardware"
        )
    given = {str(k): value for k, value in fields.items() if k not in ("kind", "_target_")}
    try:
        return hardware(**{**given, "is_measured": True})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def numeric_fields(part: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, number) of each number; a curve over sizes is one number, its best rate."""
    for entry in dataclasses.fields(part):
        value, path = getattr(part, entry.name), prefix + entry.name
        if dataclasses.is_dataclass(value):
            yield from numeric_fields(value, f"{path}.")
        elif isinstance(value, tuple):
            yield path, value[-1][1]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, value


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def build(cls: type[Part], fields: object, where: str) -> Part:
    """A dataclass from a mapping, parts and all. A wrong field is an error that gives its path."""
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where} must be a mapping; found {fields!r}")
    hints = get_type_hints(cls)
    known = dataclasses.fields(cls)  # type: ignore[arg-type]
    needed = [entry.name for entry in known if entry.default is dataclasses.MISSING]
    if unknown := [str(name) for name in fields if name not in hints]:
        raise ConfigError(f"{where}.{unknown[0]}: no such field; there are {', '.join(hints)}")
    if missing := [name for name in needed if name not in fields]:
        raise ConfigError(f"{where}.{missing[0]} is missing")
    ready = {str(k): convert(hints[k], value, f"{where}.{k}") for k, value in fields.items()}
    try:
        return cls(**ready)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None


def convert(hint: Any, value: Any, where: str) -> Any:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    if dataclasses.is_dataclass(hint):
        return value if type(value) is hint else build(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        return curve(value, where)
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return {str(k): text if isinstance(text, str) else "" for k, text in value.items()}
    if (value is None and NoneType in get_args(hint)) or (kinds == [float] and is_count(value)):
        return value
    if get_origin(hint) is dict or type(value) not in kinds:
        expected = "a mapping" if get_origin(hint) is dict else kinds[0].__name__
        raise ConfigError(f"{where} must be {expected}; found {value!r}")
    return value


def curve(value: Any, where: str) -> tuple[tuple[int, int], ...]:
    """Pairs of plain whole numbers from whatever sequence a YAML, JSON or Hydra gave."""
    try:
        pairs = tuple((size, rate) for size, rate in value)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or not all(is_count(number) for pair in pairs for number in pair):
        raise ConfigError(f"{where} must be a list of [size, bytes per second]; found {value!r}")
    return pairs
