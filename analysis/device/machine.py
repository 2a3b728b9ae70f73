"""Which hardware a profile is judged by: the file of the device that it names, or the one that was chosen.

It knows the devices that have a shipped file, and nothing of a profile beyond their names and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from prefetch.config import CONFIGS, Config
from prefetch.leaves import instantiate, with_choice
from prefetch.sim.hardware import Hardware

# Number of multiprocessors and major version: AMD's profiles have an empty name where the driver gives none.
UNNAMED = {(304, 9): "mi300x_pcie5"}
SHIPPED = {  # whole names: a PCIe, NVL, Ti, D or laptop version is another device
    r"\bB200$": "b200_pcie5",
    r"\bH200$": "h200_pcie5",
    r"\bH100( SXM5?)? 80GB HBM3$": "h100_pcie5",
    r"\bA100 80GB PCIe$": "a100_80gb_pcie4",
    r"\bMI300X( VF)?$": "mi300x_pcie5",
    r"\bRTX 4090$": "rtx4090_pcie4",
    r"\bRTX 5090$": "rtx5090_pcie5",
    r"\bRTX 3090$": "rtx3090_pcie4",
    r"\bRTX 3060$": "rtx3060_pcie4",
    r"\bRTX A6000$": "a6000_pcie4",
    r"\bRTX 4070 Laptop GPU$": "laptop_rtx4070",
}
NO_CPU = "No hardware was chosen for this CPU: pass hardware=NAME diagnose.hardware=chosen to get efficiencies."
SAME_MEMORY = (
    0.08  # devices of one name come with several memories; drivers tell a little less than the file
)


def default_name() -> str:
    """Of the group at the root: what nobody has chosen."""
    listed: Any = OmegaConf.load(CONFIGS / "config.yaml")
    return str(next(one["hardware"] for one in listed.defaults if "hardware" in one))


def device_file(meta: Mapping[str, Any]) -> str | None:
    """The shipped file of the first device that the profile names, by name or by what it tells of itself."""
    devices = meta.get("deviceProperties")
    rows = devices if isinstance(devices, list) else []
    first = next((row for row in rows if isinstance(row, dict)), {})
    name = str(first.get("name", "")).strip()
    found = next((file for pattern, file in SHIPPED.items() if re.search(pattern, name)), None)
    if not name:
        found = UNNAMED.get((first.get("numSms", 0), first.get("computeMajor", 0)))
    return found if found is not None and _has_memory_of(found, first) else None


def _has_memory_of(file: str, device: Mapping[str, Any]) -> bool:
    told = device.get("totalGlobalMem")
    if not isinstance(told, int):
        return True
    leaf: Any = OmegaConf.load(CONFIGS / "hardware" / f"{file}.yaml")
    expected = int(leaf.device.memory_bytes)
    return abs(told - expected) <= SAME_MEMORY * expected


def judging_hardware(
    cfg: Config, meta: Mapping[str, Any], *, is_cpu: bool
) -> tuple[Hardware | None, str]:
    """The hardware, and a sentence about why it. A wrong machine would make every efficiency wrong: then none."""
    chosen = str(cfg.hardware.get("name", "measured"))
    if cfg.diagnose.hardware == "chosen" or chosen != default_name():
        return instantiate(cfg.hardware, "hardware"), f"Peaks: hardware={chosen}, as chosen."
    if is_cpu:
        return None, NO_CPU
    name = device_file(meta)
    if name is not None and (CONFIGS / "hardware" / f"{name}.yaml").is_file():
        leaf = with_choice(cfg, "hardware", name).hardware
        return instantiate(leaf, "hardware"), f"Peaks: hardware={name}, the profile's own device."
    return None, _no_file(meta)


def _no_file(meta: Mapping[str, Any]) -> str:
    devices = meta.get("deviceProperties")
    rows = devices if isinstance(devices, list) else []
    told = next((str(row.get("name")) for row in rows if isinstance(row, dict)), None)
    device = (
        "the profile names no device"
        if told is None
        else f"the profile's device {told!r} has no shipped file"
    )
    return (
        f"No hardware: {device}; pass hardware=NAME diagnose.hardware=chosen to get efficiencies."
    )
