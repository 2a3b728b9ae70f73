"""Every stage as a command that takes a second or two, with what must stand in the store before it."""

from __future__ import annotations

from pathlib import Path

from faults import Case
from profiler_traces import launched, operation, written
from small_card import CARD

TRACE = ("source=synthetic", "source.n_requests=3")
FIT = ("train.folds=1", "train.baselines=none", "train.figures=false")
COUNTED, LEARNT = (
    ("predictor=popularity",),
    ("predictor=mlp", "predictor.epochs=2", "predictor.hidden=4"),
)
SIZES = "simulator.model_card=gpt_oss_20b"
COLLECTED = ("stage=collect", *TRACE)
FITTED = ("stage=train", *TRACE, *COUNTED, *FIT)
PROFILE = (
    "profile.tokens=[1]", "profile.experts=[4]", "profile.top_k=[2]", "profile.hidden=[16]", "profile.inner=[16]",
    "profile.repeats=2", "profile.threads=1", "profile.device=cpu", "memory=400KB", "profile.figures=false",
)  # fmt: skip
SMALL = (
    "source=synthetic", "source.n_requests=12", "source.prompt_tokens=6", "source.new_tokens=10",
    "source.n_layers=4", "source.n_experts=8", "source.top_k=2", "validate.model_cards=[small.yaml]",
    "validate.capacities=[0.5]", "validate.policies=[lru]", "validate.horizons=[0]", "validate.batches=[1]",
    "validate.steps=10", "validate.figures=false", "predictor=popularity", "train.horizons=[1]",
    "simulator.horizon=1", "simulator.device=cpu",
)  # fmt: skip


def profiled(folder: Path) -> None:
    shapes = [[8, 64], [16, 64, 64], [16, 64, 32], [8, 3]]
    events = [operation("vllm::rocm_aiter_fused_moe", 0, 50, shapes)]
    events += [*launched(1, "aiter_fused_moe", 5, 60, 500), *launched(2, "other", 55, 700, 100)]
    written(folder, events, "profile.json")


def carded(folder: Path) -> None:
    (folder / "small.yaml").write_text(CARD)


EVALUATED = ("stage=evaluate", *TRACE, *COUNTED, *FIT, SIZES, "evaluate.figures=false")
ADVISED = ("stage=advise", *TRACE, *COUNTED, *FIT, SIZES)
REMADE = (
    "cells",
    "runs",
)  # all is there but the rows: what was timed for a predictor stays as it is
CASES = {
    case.name: case
    for case in (
        Case("collect", COLLECTED),
        Case("analyze", ("stage=analyze", "analyze.figures=false", *TRACE), (COLLECTED,)),
        Case("train", ("stage=train", *TRACE, *LEARNT, *FIT), (COLLECTED,)),
        Case("evaluate", EVALUATED, (EVALUATED,), dropped=REMADE),
        Case("advise", ADVISED, (ADVISED,), dropped=REMADE),
        Case(
            "diagnose",
            ("stage=diagnose", "profile_trace=profile.json", "diagnose.figures=false"),
            files=profiled,
        ),
        Case("report", ("stage=report", "report.runs=before"), (COLLECTED,), is_kept=True),
        Case("traces", ("stage=traces", *TRACE), (COLLECTED,)),
        Case(
            "subset",
            ("stage=traces", "traces.do=subset", "traces.first=2", "traces.to=out/few", *TRACE),
            (COLLECTED,),
        ),
        Case(
            "artifacts",
            ("stage=artifacts", "artifacts.remove=unused", "artifacts.spare_minutes=0"),
            (FITTED,),
            dropped=("runs",),
        ),
        Case("profile", ("stage=profile", *PROFILE, *TRACE), (COLLECTED,), timed="profile|hardware"),
        Case("validate", ("stage=validate", *SMALL), files=carded, timed="_ms|error|spread"),
        Case(
            "all",
            ("stage=all", *TRACE, *COUNTED, *FIT, SIZES, "analyze.figures=false", "evaluate.figures=false"),
            timed="evaluate|advise|report",
        ),
    )
}  # fmt: skip
STAGES = tuple(dict.fromkeys(case.words[0].removeprefix("stage=") for case in CASES.values()))
