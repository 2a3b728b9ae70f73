"""Typed schema of the root and the stages: what can be set, and what the types cannot say of it.

The trunk is typed; what stands in a group (source, hardware, tracker, ...) is a plain leaf: `leaves`.
"""

from __future__ import annotations

import math
import textwrap
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from prefetch.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass
class CollectConfig:
    max_dropped: float = 0.5  # share of a trace's rows that may be dropped before it is an error


@dataclass
class AnalyzeConfig:
    horizon: int = 4  # layers ahead: every pair of layers up to this far apart
    train_share: float = 0.7  # of the requests; the others are those that guesses are scored on
    significance: float = (
        0.01  # false discovery rate of what is called over- or underused, together, dead
    )
    window_tokens: int = 1024  # tokens of one batch, where balance is judged batch by batch
    figures: bool = True


@dataclass
class TrainConfig:
    horizons: list[int] = field(default_factory=lambda: [1, 4])  # layers ahead
    width: int | None = None  # guesses kept per layer; None = 2k
    folds: int = 5  # of five that are fitted and scored; 1 for speed
    baselines: str = "fast"  # all | fast | none: what stands beside the chosen predictor
    test_trace: str | None = None  # score on this trace instead: a folder, or a path for the source
    domains: list[str] | None = None  # to learn from; all are tested. None = all
    export: bool = False  # leave the first fold's predictor as one file that NumPy alone can ask
    figures: bool = True


@dataclass
class SimulatorConfig:
    cache: Any = 0.25  # a share of all experts (with a dot), experts per layer, or bytes (500MiB)
    scope: str = "per_layer"  # per_layer | global
    batch: int = 1  # requests at once
    chunk: int | None = None  # tokens of prompts per step; None = a whole prompt is a step
    phase: str = "auto"  # auto | decode (every token as if generated) | prefill
    context: int = 4096  # tokens of a request that memory is kept for
    horizon: int = 4  # layers ahead that a guess is made
    width: int | None = None  # guesses copied per layer; None = k
    threshold: float = 0.0  # chances below it are not copied; 0 = all, whatever scores mean
    admit: str = "at_start"  # at_start | on_hit: when a guess's copy takes a place in the cache
    landing: int | None = None  # with admit=on_hit: places beside the cache for guesses; None = k
    budget: str | None = None  # bytes that guesses may move per step (200MiB); None = no limit
    queue: str = "by_layer"  # by_layer (the nearest first) | by_score: whose copy of those guessed
    requests: str = "test"  # test | all: what is replayed
    semantics: str = "atomic"  # atomic | overshoot (evicts after the batch)
    misses: str = "wait"  # wait | host | both: what is done about an expert that is not there
    staging: int = 2  # experts that may be under way beside the cache
    uploads: int = 2  # with misses=both: copies that may wait at once
    is_pinned: bool = True  # the host memory that copies are made from
    host_cache: Any = None  # what host memory holds of the experts, written like cache; None = all
    split: Any = "equal"  # of the cache, per layer: equal | fitted | fitted_optimum | experts of each ([8, 12])
    pinned: int = 0  # experts of each layer, the most used by other requests, that never leave
    start: str = "cold"  # cold | warm (the most used by other requests are there)
    clock: str = "simulated"  # simulated | device: cells are run by the engine, with drawn weights
    device: str = "auto"  # auto | cpu | cuda: where the engine runs
    rounds: int = 3  # with clock=device: runs of every cell, of which the median counts
    model_card: str | None = None  # sizes of this model, where the trace does not know its own
    precision: str | None = (
        None  # of that model's experts (q4_k_m, mxfp4, ...); None = as published
    )
    matrix_precision: str | None = None  # ... of its attention, dense layers and shared experts


@dataclass
class EvaluateConfig:
    policies: list[str] | None = None  # None = the one chosen at the root
    predictors: list[str] | None = None
    capacities: list[Any] | None = None  # None = simulator.cache
    horizons: list[int] | None = None  # None = simulator.horizon
    required_recall: bool = True  # how good guesses must be before they pay, on the first requests
    protocols: bool = False  # also the hit rates of published protocols, on the same guesses
    figures: bool = True
    workers: int | None = None  # cells that run at once; None = all cores. No number depends on it


@dataclass
class AdviseConfig:
    policies: list[str] = field(  # of caches that fill on demand
        default_factory=lambda: ["lru", "lfu", "lfru", "hobbit", "sieve", "s3fifo"]
    )
    predictors: list[str] | None = None  # None = markov, and whose guesses are in the store
    horizons: list[int] | None = None  # layers ahead; None = train.horizons
    steps: int = 2000  # of the first requests that are replayed
    datasheet_error: list[float] = field(default_factory=lambda: [0.1, 1.5])
    # by how much a time may be shorter, and longer, on a machine that nobody calibrated (docs/published_ab.md)
    swing: float = (
        0.3  # the order is tried with link, host memory and GPU so much slower and faster
    )
    cases: Any = None  # a list of cases: predicts what each changes, instead of an advice
    figures: bool = True


@dataclass
class ProfileConfig:
    device: str = "auto"  # auto (a GPU where there is one) | cpu | cuda | cuda:1
    tokens: list[int] | None = None  # of one step; None, here and below = by the device
    experts: list[int] | None = None  # of the layer
    top_k: list[int] | None = None  # experts that a token takes
    hidden: list[int] | None = None  # elements of a token
    inner: list[int] | None = None  # elements between an expert's two matrices
    dtypes: list[str] | None = None  # fp32, bf16, fp16
    routings: list[str] = field(default_factory=lambda: ["uniform", "zipf"])
    skew: float = 1.0  # exponent of zipf: an expert's share falls with its rank to this power
    capacity_factor: float = 1.0  # seats of an expert in the dense baseline, over its even share
    backward: bool = True
    repeats: int | None = None  # calls of which the median is taken, after one that warms up
    threads: int | None = None  # of the CPU; None = as many as there are cores that are not busy
    seconds: float | None = None  # of the grid; rows that do not fit are left out, and marked
    figures: bool = True


@dataclass
class ValidateConfig:
    model_cards: list[str] | None = (
        None  # own = the trace's own sizes; None = own, and the smallest shipped with as many experts
    )
    capacities: list[Any] | None = None  # None = 0.25, 0.5 on a CPU, and 1.0 on a GPU
    policies: list[str] = field(default_factory=lambda: ["lru", "lfu", "sieve"])
    horizons: list[int] | None = None  # layers ahead, 0 = no guesses; None = 0, 4, and 1 on a GPU
    batches: list[int] | None = None  # requests at once; None = 1, 4 on a CPU, and 16 on a GPU
    recall: float = 0.8  # of the drawn guesses
    steps: int | None = (
        None  # of the first; None = 24 on a CPU, 220 on a GPU. The first tenth is not timed
    )
    repeats: int = 2  # runs of every cell
    figures: bool = True


@dataclass
class DiagnoseConfig:
    """None: the profile tells, then the model card."""

    names: str | None = None  # a YAML of names of one's own, asked before configs/moe_names
    model_card: str | None = None  # of the profiled model: a shipped one's name, or a YAML
    hardware: str = (
        "auto"  # auto (the profile's own device, if a file is shipped) | chosen (hardware=)
    )
    tokens: int | None = None  # of one call
    hidden: int | None = None  # elements of a token
    inner: int | None = None  # between an expert's matrices, on one rank
    experts: int | None = None  # of a layer, on all ranks
    top_k: int | None = None
    gated: bool | None = None  # three matrices per expert; false = two
    weight: str | None = None  # number type: fp32, bf16, fp16, fp8, int8, fp4, mxfp4, int4
    activation: str | None = None  # of what the experts' products read
    tensor_parallel: int | None = None  # ranks that each expert is cut over
    expert_parallel: int | None = None  # ranks that a layer's experts are spread over
    scales: bool = True  # count the scales of quantised weights; TraceLens does not
    phase: str = "auto"  # auto | decode | prefill: how recorded routing (trace=) is put into steps
    simulate: bool = (
        True  # with trace=: what pinning and prefetch would bring were experts offloaded
    )
    compatible: bool = True  # also the files of TraceLens's MoE analyzer, by its names
    figures: bool = True


@dataclass
class TracesConfig:
    do: str = "describe"  # describe | check | subset | merge | convert | migrate | export
    to: str | None = None  # the folder, or file, that is written; it must not be there yet
    inputs: list[str] | None = None  # of merge: folders of traces
    domains: list[str | None] | None = (
        None  # of subset: which stay; of merge: one for each input, null = its own
    )
    requests: Any = None  # of subset: numbers from 0 and ranges ([3, 7-9], 0-99)
    layers: Any = None  # of subset: the model's own numbers and ranges; encoder:3 of one stack
    phase: str | None = None  # of subset: prefill | decode
    first: int | None = None  # of subset: so many requests
    drawn: int | None = None  # of subset: so many requests, drawn by seed
    tokens: int | None = None  # of subset: at most so many, in whole requests
    format: str | None = None  # of export; None = by the suffix of traces.to
    leave_out: list[str] = field(default_factory=list)  # columns: weights, scores, gate_inputs, ...


@dataclass
class ReportConfig:
    runs: Any = "latest:20"  # of the store's index; or a folder of runs, a sweep, W&B offline runs, a list of these
    title: str | None = None  # None = "Runs compared"


@dataclass
class ArtifactsConfig:
    remove: str | None = None  # unused, damaged, or kind/key (a prefix will do); None = only list
    spare_minutes: float = (
        60.0  # "unused" leaves alone what was used so recently: a run may be at work
    )
    verify: bool = True  # compare every file with its sha256 before it is used
    rebuild: bool = False  # of any stage: make what is damaged again, instead of an error


@dataclass
class Config:
    """What a run is told; every block is always present, so that an override is valid whatever the stage."""

    stage: Any
    source: Any
    predictor: Any
    policy: Any
    hardware: Any
    tracker: Any
    cluster: Any
    makers: dict[str, str]  # artifact kind -> the function that says how to make it
    clocks: dict[str, str]  # simulator.clock -> what times a cell instead of the simulated clock
    collect: CollectConfig = field(default_factory=CollectConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    advise: AdviseConfig = field(default_factory=AdviseConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    diagnose: DiagnoseConfig = field(default_factory=DiagnoseConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    traces: TracesConfig = field(default_factory=TracesConfig)
    artifacts: ArtifactsConfig = field(default_factory=ArtifactsConfig)
    memory: str | None = (
        None  # all of the GPU's memory that may be used (12GiB), instead of simulator.cache
    )
    trace: str | None = None  # folder of a trace to use as it is; None = collect it from `source`
    profile_trace: str | None = (
        None  # what stage=diagnose reads: a profiler's trace, or a folder of TraceLens
    )
    store: str = "artifacts"  # folder of what runs share
    seed: int = 0


ConfigStore.instance().store(name="config_schema", node=Config)


def stage_names() -> dict[str, str]:
    """Every stage and its one line, read from the stage files."""
    return {path.stem: _first_comment(path) for path in sorted((CONFIGS / "stage").glob("*.yaml"))}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def overview() -> str:
    """What can be typed: every stage with its line, every choice of every group."""
    stages = stage_names()
    width = max(map(len, stages))
    lines = [
        "Speculative expert prefetch for Mixture-of-Experts models.",
        "",
        "python scripts/run.py stage=NAME [group=choice] [key=value]",
        "python scripts/run.py -m stage=NAME key=value1,value2      a sweep: one run per combination",
        "",
        *(f"  stage={name:{width}}  {line}" for name, line in stages.items()),
        "",
    ]
    groups = [
        path.name
        for path in sorted(CONFIGS.iterdir())
        if path.name not in ("stage", "moe_names") and choices(path.name)
    ]
    typed = {"model_card": "simulator.model_card=, source.model_card="}  # the one that is no group
    lines += [
        textwrap.fill(
            f"{typed.get(name, name)}: {', '.join(choices(name))}", 100, subsequent_indent="  "
        )
        for name in groups
    ]
    return "\n".join(lines)


def check_values(cfg: Config) -> None:
    """What the types of the trunk cannot say."""
    check_numbers(OmegaConf.to_container(typing.cast(DictConfig, cfg)))
    analyze, train = cfg.analyze, cfg.train
    claims = {
        f"analyze.horizon={analyze.horizon}: must be at least 1": analyze.horizon >= 1,
        f"analyze.train_share={analyze.train_share}: must lie between 0 and 1": 0
        < analyze.train_share
        < 1,
        f"analyze.significance={analyze.significance}: must lie between 0 and 1": 0
        < analyze.significance
        < 1,
        f"analyze.window_tokens={analyze.window_tokens}: must be at least 1": analyze.window_tokens
        >= 1,
        f"train.horizons={list(train.horizons)}: expected different numbers from 1 on": bool(
            train.horizons
        )
        and min(train.horizons) >= 1
        and len(set(train.horizons)) == len(train.horizons),
        f"train.width={train.width}: must be at least 1": train.width is None or train.width >= 1,
        f"train.folds={train.folds}: must be from 1 to 5": 1 <= train.folds <= 5,
        f"train.baselines={train.baselines}: expected all, fast or none": train.baselines
        in ("all", "fast", "none"),
        **{
            f"simulator.{name}={getattr(cfg.simulator, name)}: must be at least 1": getattr(
                cfg.simulator, name
            )
            is None
            or getattr(cfg.simulator, name) >= 1
            for name in ("batch", "chunk", "context", "horizon", "width", "landing")
        },
        f"advise.steps={cfg.advise.steps}: must be at least 1": cfg.advise.steps >= 1,
        f"advise.policies={list(cfg.advise.policies)}: must name at least one": bool(
            cfg.advise.policies
        ),
        f"advise.datasheet_error={list(cfg.advise.datasheet_error)}: expected two numbers, below 1 and from 0 on": len(
            cfg.advise.datasheet_error
        )
        == 2
        and 0 <= cfg.advise.datasheet_error[0] < 1
        and cfg.advise.datasheet_error[1] >= 0,
        f"advise.swing={cfg.advise.swing}: must lie between 0 and 1": 0 <= cfg.advise.swing < 1,
        f"seed={cfg.seed}: must not be negative": cfg.seed >= 0,
        "store=: must name a folder": bool(cfg.store.strip()),
        "trace=: must name a folder; leave it out to use the source": cfg.trace != "",
        f"collect.max_dropped={cfg.collect.max_dropped}: must be a share from 0 to 1": 0
        <= cfg.collect.max_dropped
        <= 1,
        f"artifacts.spare_minutes={cfg.artifacts.spare_minutes}: must not be negative": cfg.artifacts.spare_minutes
        >= 0,
    }
    for claim, holds in claims.items():
        if not holds:
            raise ConfigError(claim)


def check_numbers(value: Any, where: str = "") -> None:
    """Numbers that no option can mean: NaN, infinity, and whole ones that no array and no clock can hold."""
    if isinstance(value, dict):
        for name, inner in value.items():
            check_numbers(inner, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list):
        for inner in value:
            check_numbers(inner, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value}: expected a finite number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where}: a whole number beyond 64 bits is none that it can mean")


def _first_comment(path: Path) -> str:
    lines = (
        line.removeprefix("#").strip()
        for line in path.read_text().splitlines()
        if line.startswith("#")
    )
    return next(line for line in lines if not line.startswith("@package"))
