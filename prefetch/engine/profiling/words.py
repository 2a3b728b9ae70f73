"""Numbers as a page says them: three digits and a unit. It knows no table."""

from __future__ import annotations

TIMES = ((1e9, "s"), (1e6, "ms"), (1e3, "us"))
SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def time(ns: float) -> str:
    for unit, name in TIMES:
        if ns >= unit * 0.9995:
            return f"{digits(ns / unit)} {name}"
    return f"{digits(ns)} ns"


def size(n_bytes: float) -> str:
    for unit, name in SIZES:
        if n_bytes >= unit:
            return f"{digits(n_bytes / unit)} {name}"
    return f"{n_bytes:.0f} B"


def percent(share: float) -> str:
    """Small shares keep two digits, so that they are not 0."""
    value = 100 * share
    return f"{value:.3g} %" if 0 < abs(value) < 10 else f"{value:.0f} %"


def times(ratio: float) -> str:
    return f"{digits(ratio)}x"


def digits(value: float) -> str:
    """Three, without a power of ten."""
    if value == 0 or not abs(value) >= 0.001:
        return f"{value:.2g}"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def tokens(n: int) -> str:
    return f"{n:,} token{'' if n == 1 else 's'}"


def count(n: int, name: str) -> str:
    return f"{n:,} {name}{'' if n == 1 else 's'}"


def one_of(names: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
