"""A predictor that was taken along gives the same answers where there is NumPy and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from recorded_traces import SMALL, full_trace, on_disk

from prefetch import config, leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.predict import export
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import Predictor
from prefetch.predict.runtime import KINDS, load
from prefetch.predict.train import run
from prefetch.runs.outputs import Outputs
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import RoutingTrace
from prefetch.tracking import NoTracker

Exported = dict[str, tuple[Predictor, Path]]
HORIZONS = (1, 3)
TINY: dict[str, dict[str, Any]] = {  # name, settings; a window and a memory that overflow
    "popularity": {},
    "previous_token": {},
    "markov": {},
    "markov2": {},
    "linear": {"depth": 2},
    "activation_matrix": {"capacity": 3},
    "activation_matrix code": {"variant": "code"},
    "gate_lookahead": {},
    "gate_lookahead rescaled": {"rescale": True},
    "hidden_mlp": {},
    "route_memory": {"window": 4, "nearest": 5, "memory_tokens": 40, "carry": 0.5},
    "route_memory alone": {"memory_tokens": 0},
    "mlp": {"decays": [0.0, 0.9]},
    "memory_mlp": {},
    "recurrent": {"units": 6},
    "transformer": {"window": 4},
    "transformer whole": {"heads": 2},
    "ensemble": {
        "members": ["markov2", "previous_token", {"route_memory": {"nearest": 3}}, {"mlp": SMALL["mlp"]}]
    },
}  # fmt: skip
ASK = """
import json, sys
import numpy as np

def blocked(name):
    try:
        __import__(name)
    except ImportError:
        return
    raise SystemExit(name + " is here: this is no test")

for name in ("torch", "numba", "safetensors", "prefetch", "pandas"):
    blocked(name)
asked = np.load("asked.npz")
for name in json.loads(sys.argv[1]):
    sys.path.insert(0, name)
    from predictor_runtime import load
    for horizon in (1, 3):
        predictor = load(name + "/predictor.safetensors", horizon)
        out = np.full((*asked["ids"].shape[:2], predictor.n_experts), np.nan, np.float32)
        for t, request in enumerate(asked["request"]):
            if t == 0 or request != asked["request"][t - 1]:
                predictor.start()
            for layer in range(predictor.n_layers):
                for target in predictor.ahead():
                    out[t, target] = predictor.guess(target)
                ids = asked["ids"][t, layer]
                predictor.observe(layer, ids[ids < predictor.n_experts], asked["inputs"][t, layer])
        np.save(f"{name}/scores_{horizon}.npy", out)
print(*sorted(name for name in sys.modules if "." not in name))
"""


def with_holes(trace: RoutingTrace) -> RoutingTrace:
    trace.ids_TLK[::5, 1, 2] = 255
    trace.ids_TLK[::7, 2] = 255
    return trace


def built(name: str) -> Predictor:
    kind, settings = name.split()[0], TINY[name]
    leaf = OmegaConf.load(config.CONFIGS / "predictor" / f"{kind}.yaml")
    small = {} if kind == "ensemble" else SMALL.get(kind, {})
    leaf = OmegaConf.merge(leaf, small, settings)
    root = OmegaConf.create({"seed": 0, "train": {"horizons": list(HORIZONS)}, "predictor": leaf})
    return cast(Predictor, leaves.instantiate(root.predictor, "predictor"))


def stirred(predictor: Predictor) -> Predictor:
    """A network that learnt for a moment has weights near zero, which hide what is done with them."""
    generator = torch.Generator().manual_seed(0)
    for horizon in HORIZONS if hasattr(predictor, "fitted") else ():
        with torch.no_grad():
            for weight in cast(Any, predictor).fitted(horizon).parameters():
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return predictor


def about(name: str, reader: TraceReader) -> dict[str, Any]:
    card = reader.card.to_json()
    return {"predictor": name, "settings": TINY[name], "fold": 0, "split": "requests", "card": card}


def numpy_alone(folder: Path) -> str:
    """A place for modules that holds NumPy and nothing else."""
    folder.mkdir()
    home = Path(np.__file__).parents[1]
    for path in (home / "numpy", home / "numpy.libs"):
        if path.exists():
            (folder / path.name).symlink_to(path)
    return str(folder)


def isolated(code: str, *words: str, folder: Path, modules: str) -> str:
    """Runs it with no site-packages, no environment variables, no current folder on the path."""
    code = f"import sys; sys.path[:0] = [{modules!r}]\n{code}"
    line = [sys.executable, "-I", "-S", "-c", code, *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def asked() -> RoutingTrace:
    return with_holes(full_trace(7))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, asked: RoutingTrace) -> Exported:  # fmt: skip
    """Every kind, fitted, written, and asked in a process that has NumPy alone."""
    home = tmp_path_factory.mktemp("exported")
    reader = on_disk(with_holes(full_trace(0)), home / "trace")
    train, validation = Part(reader, np.arange(6)), Part(reader, np.arange(6, 8))
    found = {}
    for name in TINY:
        predictor = stirred(built(name).fit(train, validation))
        found[name] = predictor, home / name.replace(" ", "_")
        export.write(predictor, about(name, reader), "key", found[name][1])
    arrays = {"ids": asked.ids_TLK, "request": asked.request_T, "inputs": asked.gate_inputs_TLD}
    np.savez(home / "asked.npz", **cast(Any, arrays))
    names = json.dumps([path.name for _, path in found.values()])
    loaded = isolated(ASK, names, folder=home, modules=numpy_alone(home / "modules"))
    assert not {"torch", "numba", "prefetch", "safetensors", "scipy"} & set(loaded.split())
    return found


@pytest.mark.parametrize("name", TINY)
def test_the_same_answers_with_numpy_alone(
    name: str, exported: Exported, asked: RoutingTrace
) -> None:
    predictor, folder = exported[name]
    for horizon in HORIZONS:
        expected_TLE = np.array(predictor.scores(Past(asked, horizon)))
        scores_TLE = np.load(folder / f"scores_{horizon}.npy")
        far_TLE = np.abs(scores_TLE - expected_TLE) / (1 + np.abs(expected_TLE))
        # memory_mlp rounds what it is told to half precision: a last digit can fall to the other side
        error = 2e-3 if name == "memory_mlp" else 1e-5
        assert far_TLE.max() < error
        assert (far_TLE < 1e-5).mean() > 0.99
        assert len(np.unique(expected_TLE[:, -1], axis=0)) > (1 if name != "popularity" else 0)
        for width in (3, 6):
            check_best(scores_TLE, expected_TLE, width, 2 * error)


def check_best(scores_TLE: np.ndarray, expected_TLE: np.ndarray, width: int, error: float) -> None:
    """The same experts among the best, but for those whose scores differ by no more than rounding."""
    ours, theirs = (
        np.argsort(-scores, axis=2, kind="stable")[..., :width] for scores in (scores_TLE, expected_TLE)
    )  # fmt: skip
    last_TL = np.take_along_axis(expected_TLE, theirs[..., -1:], axis=2)
    mine_TLP = np.take_along_axis(expected_TLE, ours, axis=2)
    assert (mine_TLP >= last_TL - error * (1 + np.abs(last_TL))).all()


def test_where_there_is_an_incremental_face_it_says_the_same(
    exported: Exported, asked: RoutingTrace
) -> None:
    """The faces of the package and of the file, side by side, event by event."""
    for name in ("mlp", "route_memory", "recurrent"):
        predictor, folder = exported[name]
        face, runtime = cast(Any, predictor).online(3), load(folder / export.FILE)
        assert (runtime.horizon, runtime.horizons) == (3, HORIZONS)
        for t in range(20):
            if t % 10 == 0:
                face.start(), runtime.start()
            for layer in range(4):
                for target in runtime.ahead():
                    np.testing.assert_allclose(runtime.guess(target), face.guess(target), atol=1e-5)
                ids_K = asked.ids_TLK[t, layer]
                face.observe(layer, ids_K)
                runtime.observe(layer, ids_K[ids_K < 16].tolist())


def test_among_equally_alike_tokens_the_same_ones_are_asked() -> None:
    """The compiled walk gives places up in an order of its own."""
    from prefetch.predict.alike import nearest

    rng, walked = np.random.default_rng(0), 0
    memory = object.__new__(cast(Any, KINDS["route_memory"]))
    for _ in range(200):
        memory._alike_M = rng.integers(0, 6, rng.integers(0, 60)).astype(np.float32)
        memory._plan = {"nearest": int(rng.integers(1, 12))}
        _, expected = nearest(memory._alike_M, memory._plan["nearest"], 0, 0)
        near = memory._most_alike()
        assert sorted(near.tolist()) == sorted(expected.tolist())
        walked += not np.all(np.diff(near) > 0)
    assert walked > 10


def test_the_file_says_what_it_is(exported: Exported) -> None:
    told = load(exported["mlp"][1] / export.FILE, 1).told
    assert (told["predictor"], told["settings"]) == ("mlp", TINY["mlp"])
    assert (told["n_layers"], told["n_experts"], told["top_k"]) == (4, 16, 3)
    assert (told["horizons"], told["score"], told["trace"]) == ([1, 3], "probability", "key")
    assert "chance" in told["score_means"] and told["fold"] == 0


def test_the_example_runs_as_it_is_written(exported: Exported, tmp_path: Path) -> None:
    for name in ("mlp", "ensemble"):
        folder = exported[name][1]
        text = (folder / export.CONTRACT).read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(code.splitlines()) <= 20 and text.startswith(f"# Predictor `{name}`")
        modules = numpy_alone(tmp_path / name)
        code = f"sys.path.insert(0, {str(folder)!r})\n{code}"
        assert re.findall(r"request \d: \d+ of 96 choices", isolated(code, folder=folder, modules=modules))  # fmt: skip


def test_the_docs_show_the_same_example() -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (export.RUNTIME / export.CONTRACT).read_text(), re.DOTALL
    )
    assert code in (config.CONFIGS.parent / "docs" / "predict.md").read_text()


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported["mlp"][1] / export.FILE, tmp_path))


def test_a_damaged_file_is_refused(copy: Path) -> None:
    whole, size = copy.read_bytes(), int.from_bytes(copy.read_bytes()[:8], "little")
    header = whole[8 : 8 + size]
    fewer = header.replace(b'"n_experts":"16"', b'"n_experts":"15"')
    other = header.replace(b"prefetch.exported/1", b"prefetch.exported/9")
    odd = bytearray(whole)
    odd[-3] ^= 64
    for raw, message in (
        (b"", "header ends at byte"),
        (whole[:100], "header ends at byte"),
        (whole[:-4], "cut short or damaged"),
        (bytes(odd), "cut short or damaged"),
        (whole[:8] + b"x" * size + whole[8 + size :], "expected a predictor that was exported"),
        (whole[:8] + other + whole[8 + size :], r"expected schema prefetch\.exported/1, found"),
        (whole[:8] + fewer + whole[8 + size :], r"expected shape \(.*\), found \(.*\)"),
    ):
        copy.write_bytes(raw)
        with pytest.raises(ValueError, match=message) as error:
            load(copy)
        assert str(error.value).startswith(str(copy))


def rewritten(copy: Path, change: Any) -> None:
    """What the file says of itself is another, its numbers are the same."""
    raw = copy.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    copy.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def said(**texts: str) -> Any:
    return lambda header: header["__metadata__"].update(texts)


@pytest.mark.parametrize(
    "change",
    [
        said(horizons="5"),
        said(horizons="[]"),
        said(n_layers="1099511627776"),
        said(n_experts='"16"'),
        said(top_k="99"),
        said(plan="[]"),
        said(plan='{"kind": "mlp", "axes": {}}'),
        said(plan="[" * 5000),
        lambda header: header["__metadata__"].pop("horizons"),
        lambda header: [header.pop(name) for name in list(header) if "told_LEX" in name],
        lambda header: [header.pop(name) for name in list(header) if "gain_N" in name],
    ],
)
def test_what_a_file_lacks_shows_when_it_is_loaded_and_not_when_it_is_asked(
    copy: Path, change: Any
) -> None:
    rewritten(copy, change)
    with pytest.raises(ValueError, match=r"predictor\.safetensors"):
        load(copy)


def test_a_header_of_brackets_is_refused(copy: Path) -> None:
    text = b"[" * 100_000
    copy.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="expected a predictor that was exported"):
        load(copy)


def test_a_wrong_call_is_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match=r"horizon 2: was not learnt; there are \[1, 3\]"):
        load(copy, 2)
    predictor = load(copy, 1)
    for call, message in (
        (lambda: predictor.observe(1, [0, 1, 2]), "expected layer 0, got 1"),
        (lambda: predictor.observe(0, [0, 1, 16]), "expected expert ids from 0 to 15"),
        (lambda: predictor.observe(0, [0, 1, -1]), "expected expert ids from 0 to 15"),
        (lambda: predictor.observe(0, [0, 1, 2, 3]), "at most 3 different expert ids"),
        (lambda: predictor.observe(0, [1, 1]), "at most 3 different expert ids"),
        (lambda: predictor.observe(0, [0.5]), "at most 3 different expert ids"),
        (lambda: predictor.guess(1), r"layer 1 cannot be asked .* after 0 layers .* these can: 0$"),
        (lambda: predictor.best(0, 17), "width must be from 1 to 16, got 17"),
    ):
        with pytest.raises(ValueError, match=message):
            cast(Any, call)()
    np.testing.assert_array_equal(predictor.guess(0), load(copy, 1).guess(0))  # nothing was seen
    for layer in range(4):
        assert list(predictor.ahead()) == [layer]
        predictor.observe(layer, [])
    assert list(predictor.ahead()) == [0]


def test_a_gate_input_is_asked_for(exported: Exported) -> None:
    predictor = load(exported["gate_lookahead"][1] / export.FILE)
    with pytest.raises(ValueError, match="pass gate_input"):
        predictor.observe(0, [1])
    with pytest.raises(ValueError, match="expected 6 numbers of gate_input"):
        predictor.observe(0, [1], np.zeros(5))
    predictor.observe(0, [1], np.zeros(6))


def configured(tmp_path: Path, *words: str) -> Config:
    if not (tmp_path / "trace").exists():
        on_disk(full_trace(0), tmp_path / "trace")
    fixed = [
        "stage=train", f"store={tmp_path / 'store'}", f"trace={tmp_path / 'trace'}", "train.horizons=[1,3]",
        "train.export=true", "train.baselines=none", "train.folds=1", "train.figures=false",
    ]  # fmt: skip
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        return cast(Config, compose("config", overrides=[*fixed, *words]))


def test_the_stage_leaves_it_in_its_folder(tmp_path: Path) -> None:
    cfg = configured(tmp_path, "predictor=markov")
    run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(tmp_path / "run", NoTracker()))
    folder = tmp_path / "run" / "exported"
    told = load(folder / export.FILE).told
    kept = (tmp_path / "store" / "predictor").glob("*/predictor.json")
    assert told["settings"] == json.loads(next(kept).read_text())["settings"]
    assert told["trace"] and told["predictor"] == "markov"
    written = {path.name for path in (folder / export.FOLDER).iterdir()}
    assert written == {path.name for path in export.RUNTIME.glob("*.py")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predictor=oracle",), r"oracle sees the answer.* these can: activation_matrix, ensemble"),
        (("predictor=none",), "none has no runtime"),
        (("predictor=transformer", "predictor.memory=true"), "with memory=true has no runtime"),
        (("predictor=pre_attention",), r"reads pre_attention, which observe\(\) is not told"),
        (("predictor=ensemble", "predictor.members=[markov,trajectory]"), "trajectory has no run"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_fitted(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    cfg = configured(tmp_path, *words)
    with pytest.raises(ConfigError, match=message):
        run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(tmp_path / "run", NoTracker()))
    assert not (tmp_path / "store").exists() or not any((tmp_path / "store").iterdir())
