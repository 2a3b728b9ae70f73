"""Readers of machines, model cards and tables of names that somebody wrote by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from analysis.device.names import load_names
from fuzzing.readers import Files, Reader
from prefetch.config import CONFIGS
from prefetch.models.cards import load_card
from prefetch.sim.hardware import measured

CARDS = ("qwen3_30b_a3b", "mixtral_8x7b")


def machine() -> dict[str, Any]:
    leaf = yaml.safe_load((CONFIGS / "hardware" / "rtx4090_pcie4.yaml").read_text(encoding="utf-8"))
    return {
        "kind": "measured",
        **{name: value for name, value in leaf.items() if name != "_target_"},
    }


def read_machine(folder: Path, _: Path) -> None:
    path = next((path for path in sorted(folder.iterdir())), folder / "none.json")
    found = measured(str(path))
    for n_bytes in (0, 1, 10**9):
        found.link.copy_ns(n_bytes)
        found.storage.read_ns(n_bytes)


def card_seeds() -> list[Files]:
    there = [path for path in sorted((CONFIGS / "model_card").glob("*.yaml"))]
    return [{"card.yaml": path.read_bytes()} for path in there]


def names_seeds() -> list[Files]:
    own = {
        "operations": [{"match": "my_moe_(?P<weight>fp8|bf16)?", "role": "experts", "library": "mine", "inside": True,
                        "dims": [["tokens", "hidden"], None, ["experts", "up", "hidden"]], "concrete": {"top_k": 3}}],
        "kernels": [{"match": "my_kernel", "role": "combine", "note": "n"}], "hints": [{"match": "moe"}],
        "steps": ["^step"], "types": {"fp8": ["f8x"]}, "outside": ["Attention"],
    }  # fmt: skip
    return [{"names.yaml": yaml.safe_dump(own).encode()}]


READERS = [
    Reader("hardware.json", lambda: [{"a.json": json.dumps(machine()).encode()}], read_machine),
    Reader("hardware.yaml", lambda: [{"a.yaml": yaml.safe_dump(machine()).encode()}], read_machine),
    Reader(
        "model card",
        card_seeds,
        lambda folder, _: load_card(str(folder / "card.yaml"), expert_precision="q4_k_m"),
    ),
    Reader("names of operations", names_seeds, lambda folder, _: load_names(folder / "names.yaml")),
]
