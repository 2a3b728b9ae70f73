"""YAML that anybody may have written, as plain values: nothing is made of a tag, and no few lines become a mountain.

The parsers of yaml call themselves for every level: a line of a hundred thousand brackets ends the process. So the
levels are counted first, and what aliases would unfold to. It knows no file and no key.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_LEVELS = 64
MOST_NODES = 200_000  # with aliases unfolded: whoever prints or walks a value meets them all
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built


def load(text: str) -> Any:
    """The value; whatever is wrong is a `yaml.YAMLError`."""
    try:
        _check(text)
        return yaml.load(text, Loader=Loader)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # of a date, or a number
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def _check(text: str) -> None:
    sizes: dict[str, int] = {}  # of what has an anchor, unfolded
    # of every level: its anchor, and the nodes so far
    waiting: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            waiting.append((event.anchor, 1))
            if len(waiting) > MOST_LEVELS:
                raise yaml.YAMLError(f"more than {MOST_LEVELS} levels")
            continue
        if isinstance(event, yaml.AliasEvent):
            # without a size: of itself, or of nothing
            anchor, n_nodes = None, sizes.get(event.anchor, MOST_NODES + 1)
        elif isinstance(event, yaml.ScalarEvent):
            anchor, n_nodes = event.anchor, 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, n_nodes = waiting.pop()
        else:
            continue
        if anchor is not None:
            sizes[anchor] = n_nodes
        above, before = waiting.pop()
        if before + n_nodes > MOST_NODES:
            raise yaml.YAMLError(f"an alias of itself, or more than {MOST_NODES:,} values")
        waiting.append((above, before + n_nodes))
