"""Changes of what a JSON or YAML file says: a key gone, a value of another type, a number that nothing can hold."""

from __future__ import annotations

import copy
import json
import re
from random import Random
from typing import Any

import yaml

from fuzzing import odd
from fuzzing.plain import LARGEST, bytewise
from fuzzing.plain import text as textwise
from prefetch import plain_yaml

AT_RAW = re.compile(rf'"{odd.RAW}((?:[^"\\]|\\.)*)"')
YAML_TRICKS = (
    "!!python/object/apply:os.system ['touch canary']\n",
    "!!python/name:os.system\n",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nname: *g\n",
    "&a [*a]\n", "? [a, b]\n: 1\n", "a: 2001-01-01\n", "a: !!binary aGk=\n", "--- a\n--- b\n", "<<: [1]\n",
    "a: 1\na: 2\n",
    "a: 190:20:30\n", "%YAML 9.9\n---\na: 1\n", "a: [1, 2\n", "\t- a\n", "[" * 3000, "0o17: 0x1F\n", ".inf: .nan\n", "",
)  # fmt: skip


def json_file(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.12:
        return rng.choice((bytewise, textwise))(data, rng)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return bytewise(data, rng)
    return written(changed(tree, rng), rng)


def json_lines(data: bytes, rng: Random) -> bytes:
    lines = data.split(b"\n")
    if rng.random() < 0.2:
        return textwise(data, rng)
    i = rng.randrange(len(lines))
    lines[i] = json_file(lines[i], rng).replace(b"\n", b" ") if lines[i].strip() else lines[i]
    return b"\n".join(lines)[:LARGEST]


def yaml_file(data: bytes, rng: Random) -> bytes:
    """JSON is YAML: what is changed is written as such. The rest are YAML's own tricks."""
    kind = rng.random()
    if kind < 0.1:
        return textwise(data, rng)
    if kind < 0.2:
        trick = rng.choice(YAML_TRICKS).encode()
        return trick if rng.random() < 0.4 else rng.choice((data + b"\n" + trick, trick + data))
    try:
        tree = plain_yaml.load(data.decode())  # a mountain of an earlier trick is not unfolded here
    except (yaml.YAMLError, ValueError, RecursionError):
        return bytewise(data, rng)
    return written(changed(tree, rng), rng) if tree is not None else bytewise(data, rng)


def changed(tree: Any, rng: Random) -> Any:
    """The tree itself, which nobody else holds."""
    box = [tree]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(_places(box))
        _change(holder, key, box, rng)
    return box[0]


def _places(box: list[Any]) -> list[tuple[Any, Any]]:
    """Every value as (what holds it, under which key); those near the top as often as all below together."""
    found, near = [], []
    waiting: list[tuple[Any, int]] = [(box, 0)]
    while waiting and len(found) < 4000:
        holder, depth = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            (near if depth < 3 else found).append((holder, key))
            if isinstance(holder[key], (dict, list)) and depth < 12:
                waiting.append((holder[key], depth + 1))
    share = max(1, len(found) // max(1, len(near)))
    return near * share + found


def _change(holder: Any, key: Any, box: list[Any], rng: Random) -> None:
    how, old = rng.random(), holder[key]
    if how < 0.45:
        holder[key] = odd.value(rng)
    elif how < 0.6 and holder is not box:
        del holder[key]
    elif how < 0.7 and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = rng.choice((old + 1, old - 1, -old, old * 2, float(old), str(old), old + 0.5))
    elif how < 0.78 and isinstance(old, list):
        holder[key] = rng.choice(
            (old * 2, old[:-1], old[1:], old[::-1], [*old, odd.value(rng)], {"0": old})
        )
    elif how < 0.86 and isinstance(holder, dict):
        name = (
            rng.choice(odd.TEXTS)
            if rng.random() < 0.6
            else str(key) + rng.choice(("x", " ", "\x00"))
        )
        holder[name] = holder.pop(key) if rng.random() < 0.6 else odd.value(rng)
    elif how < 0.93:
        holder[key] = rng.choice(([old], {"a": old}, str(old)[:2000], None))
    else:
        there, its_key = rng.choice(_places(box))
        holder[key] = copy.deepcopy(there[its_key]) if there is not box else [old, old]


def written(tree: Any, rng: Random) -> bytes:
    """With what Python would not write: numbers without end, halves of characters, a key twice."""
    try:
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.8, indent=rng.choice((None, None, 1)))
    except (RecursionError, ValueError):
        return b"[" * 100_000
    text = AT_RAW.sub(lambda found: found[1].replace('\\"', '"'), text)
    if rng.random() < 0.04 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + ", " + text[1:]
    return text.encode("utf-8", "surrogatepass")[:LARGEST]
