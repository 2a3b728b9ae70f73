"""Every Python example of a page runs, on little: names and sizes of what nobody has here are exchanged, nothing else.

The example of an exported predictor runs in prefetch/predict/test_export.
"""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from entry import run
from offline_runs import settled
from routing_traces import random_trace
from whole_traces import everything, write

import analysis
from prefetch import simulate
from prefetch.predict.part import whole
from prefetch.predict.past import Past
from prefetch.trace.selection import Selection
from prefetch.trace.subset import subset

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ELSEWHERE = "from predictor_runtime import load"
TINY = (
    "stage=train", "predictor=mlp", "source=synthetic", "source.n_requests=12", "source.prompt_tokens=4",
    "source.new_tokens=8", "source.n_layers=6", "predictor.epochs=1", "train.folds=1", "train.figures=false",
    "train.baselines=none",
)  # fmt: skip


def fences(page: str, kind: str) -> list[str]:
    return [body for found, body in FENCE.findall((ROOT / page).read_text()) if found == kind]


def example(page: str, telling: str, **exchanged: str) -> str:
    """The one example of a page that holds these words; `exchanged`: names of what stands at its place here."""
    (code,) = [one for one in fences(page, "python") if telling in one]
    for name, value in exchanged.items():
        assert name in code, f"{page}: its example has no {name}"
        code = code.replace(name, value)
    return code


def execute(code: str, folder: Path, **given: Any) -> dict[str, Any]:
    told = dict(given)
    with contextlib.chdir(folder):
        exec(compile(code, "example", "exec"), told)
    return told


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody has trained a predictor."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(folder, *TINY)
    assert done.returncode == 0, done.stderr
    settled(folder / "outputs")
    return folder


def key(folder: Path, kind: str) -> str:
    """Of the one artifact of its kind."""
    (found,) = (folder / "artifacts" / kind).glob("[!.]*")
    return found.name


def test_a_trace_is_read_and_counted(tmp_path):
    write(tmp_path / "artifacts" / "trace" / "key", everything([6] * 6))
    told = execute(example("README.md", "TraceReader", **{"<key>": "key"}), tmp_path)
    assert told["block"].weights_TLK.shape == told["block"].ids_TLK.shape
    told = execute(example("README.md", "recall_from_counts", **{"<key>": "key"}), tmp_path)
    assert callable(told["cache_curve"]) and callable(told["recall_from_counts"])
    told = execute(example("docs/analysis.md", "working_sets", **{"<key>": "key"}), tmp_path)
    assert set(analysis.__all__) <= told.keys()


def test_hits_of_an_array(tmp_path):
    told = execute(
        example("README.md", "import simulate"),
        tmp_path,
        ids_TLK=random_trace(n_experts=64).ids_TLK,
    )
    assert 0 < told["told"].hit_rate < 1 and told["told"].loads > 0


def test_a_trace_is_replayed_in_parts(trained):
    told = execute(
        example("docs/simulator.md", "replay_parts", **{"<key>": key(trained, "trace")}), trained
    )
    assert told["hits"] > 0


def test_a_fitted_predictor_is_asked(trained):
    here = {
        f"{kind}/<key>": f"{kind}/{key(trained, kind)}" for kind in ("predictor", "predictions")
    }
    told = execute(example("docs/predict.md", "restore(", **here), trained, ids=np.array([3, 7]))
    assert told["chances"].shape == (32,) and told["block"].ids_THLP.shape[1:3] == (2, 6)


def test_a_predictor_of_ones_own(tmp_path, monkeypatch):
    code = example("docs/predict.md", "class LastLayerAgain")
    (tmp_path / "mymodule.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mymodule", raising=False)
    trace = random_trace(n_requests=4, tokens=6)
    part = whole(trace)
    guess = importlib.import_module("mymodule").LastLayerAgain().fit(part, part)
    scores_TLE = guess.scores(Past(trace, 1))
    assert scores_TLE.shape == (24, 4, 16)
    assert scores_TLE[0, 1, trace.ids_TLK[0, 0].astype(int)].all(), (
        "the layer before, guessed again"
    )


def test_a_policy_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mypolicy.py").write_text(example("docs/simulator.md", "class FifoWithCredit"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mypolicy", raising=False)
    policy = importlib.import_module("mypolicy").FifoWithCredit()
    ids_TLK = random_trace(n_experts=16).ids_TLK
    ours, fifo = (simulate(ids_TLK, 0.5, one, n_experts=16).loads for one in (policy, "fifo"))
    assert 0 < ours < fifo, "credit for uses helps where experts are used unevenly"


def test_traces_are_cut_and_put_together(tmp_path):
    write(tmp_path / "artifacts" / "trace" / "key", everything([6] * 6))
    with contextlib.chdir(tmp_path):
        subset("artifacts/trace/key", "code", Selection(domains=("code",), layers="1-8"))
    told = execute(example("docs/traces.md", "import subset", **{"<key>": "key"}), tmp_path)
    assert (tmp_path / "both.npz").stat().st_size and told["done"].said


def test_offline_runs_are_read(trained):
    told = execute(example("docs/tracking.md", "find_offline_runs"), trained)
    assert (told["run"].job_type, told["run"].state) == ("train", "finished")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model() -> Any:
    chosen = transformers.AutoConfig.for_model(
        "qwen3_moe", hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, head_dim=12, moe_intermediate_size=20, num_experts=8,
        num_experts_per_tok=2, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(chosen, dtype=torch.float32).eval()


TOKENS = {
    "input_ids": torch.ones(1, 3, dtype=torch.long),
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
}


@pytest.mark.usefixtures("one_thread")
def test_a_model_in_less_memory(tmp_path):
    told = execute(
        example("README.md", "OffloadedMoE"), tmp_path, model=tiny_model(), tokens=TOKENS
    )
    assert told["model"].counts()
    tiny_model().save_pretrained(tmp_path / "tiny")
    here = {"Qwen/Qwen3-30B-A3B": "tiny", "bfloat16": "float32", '"cuda"': '"cpu"'}
    told = execute(example("docs/engine.md", "OffloadedMoE", **here), tmp_path, tokens=TOKENS)
    assert told["model"].counts()


@pytest.mark.usefixtures("one_thread")
def test_a_layer_of_kernels(tmp_path):
    here = {
        "hidden=2048": "hidden=32",
        "inner=768": "inner=16",
        "bfloat16": "float32",
        '"cuda"': '"cpu"',
    }
    code = example("docs/kernels.md", "apply_experts", **here)
    given = {
        "logits_TE": torch.randn(3, 128),
        "x_TD": torch.randn(3, 32),
        "slot_E": torch.arange(128),
    }
    told = execute(code, tmp_path, torch=torch, **given)
    assert told["out_TD"].shape == (3, 32)


@pytest.mark.usefixtures("one_thread")
def test_a_profile_is_recorded(tmp_path):
    code = example("docs/diagnose.md", "export_chrome_trace", **{", ProfilerActivity.CUDA": ""})
    execute(code, tmp_path, model=torch.nn.Linear(2, 2), inputs={"input": torch.ones(1, 2)})
    assert (tmp_path / "trace.json.gz").stat().st_size


def test_none_is_left_out():
    """The tests above name an example by words of it, so that a new one needs a test."""
    named = re.findall(r'example\(\s*"([\w./]+)",\s+"([^"]+)"', Path(__file__).read_text())
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        page = str(path.relative_to(ROOT))
        for code in fences(page, "python"):
            is_run = any(page == of and words in code for of, words in named)
            assert is_run or ELSEWHERE in code, f"{page}:\n{code}"
