"""Which hardware a profile is judged by: the file of the device that it names, or the one that was chosen.

It knows the devices that have a shipped file, and nothing of a profile beyond their names and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from prefetch.config import CONFIGS, Config, instantiate, with_choice
from prefetch.sim.hardware import Hardware

# Number of multiprocessors and major version: AMD's profiles have an empty name where the driver gives none.
UNNAMED = {(304, 9): "mi300x_pcie5"}
SHIPPED = {
    r"B200\b": "b200_pcie5",
    r"H200\b": "h200_pcie5",
    r"H100\b": "h100_pcie5",
    r"A100.*80GB": "a100_80gb_pcie4",
    r"MI300X": "mi300x_pcie5",
    r"RTX 4090\b": "rtx4090_pcie4",
    r"RTX 5090\b": "rtx5090_pcie5",
    r"RTX 3090\b": "rtx3090_pcie4",
    r"RTX 3060\b": "rtx3060_pcie4",
    r"RTX A6000": "a6000_pcie4",
    r"RTX 4070 Laptop": "laptop_rtx4070",
}


def default_name() -> str:
    """Of the group at the root: what nobody has chosen."""
    listed: Any = OmegaConf.load(CONFIGS / "config.yaml")
    return str(next(one["hardware"] for one in listed.defaults if "hardware" in one))


def device_file(meta: Mapping[str, Any]) -> str | None:
    """The shipped file of the first device that the profile names, by name or by what it tells of itself."""
    devices = meta.get("deviceProperties")
    rows = devices if isinstance(devices, list) else []
    for row in (row for row in rows if isinstance(row, dict)):
        for pattern, file in SHIPPED.items():
            if re.search(pattern, str(row.get("name", ""))):
                return file
        found = UNNAMED.get((row.get("numSms", 0), row.get("computeMajor", 0)))
        if found is not None:
            return found
    return None


def judging_hardware(
    cfg: Config, meta: Mapping[str, Any], *, is_cpu: bool
) -> tuple[Hardware | None, str]:
    """The hardware, and a sentence about why it. A wrong machine would make every efficiency wrong: then none."""
    chosen_name = str(cfg.hardware.get("name", "measured"))
    is_chosen = cfg.diagnose.hardware == "chosen" or chosen_name != default_name()
    if is_chosen:
        return instantiate(cfg.hardware, "hardware"), f"hardware={chosen_name}, as chosen."
    if is_cpu:
        return (
            None,
            "No hardware was chosen for this CPU: pass hardware=NAME to be told efficiencies.",
        )
    name = device_file(meta)
    if name is not None and (CONFIGS / "hardware" / f"{name}.yaml").is_file():
        leaf = with_choice(cfg, "hardware", name).hardware
        return instantiate(leaf, "hardware"), f"hardware={name}: the profile names that device."
    told = [
        str(row.get("name")) for row in meta.get("deviceProperties") or () if isinstance(row, dict)
    ][:1]
    device = (
        f"the profile's device {told[0]!r} has no shipped file"
        if told
        else "the profile names no device"
    )
    return (
        None,
        f"No hardware: {device}; pass hardware=NAME diagnose.hardware=chosen to be told efficiencies.",
    )
