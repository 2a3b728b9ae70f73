"""Readers of `stage=report`: folders of runs and offline files of W&B, put on a page, and the store's index of runs."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from report_runs import HOSTILE, Told, hostile, write_run

from analysis.report.contents import contents
from analysis.report.found import Found, find
from analysis.report.markdown import markdown
from analysis.report.page import page
from analysis.report.stage import frame
from fuzzing.readers import Files, Reader
from fuzzing.streams import field, logged
from fuzzing.trace_seeds import files_of
from prefetch.runs.standing import read as read_standing


def read_runs(folder: Path, out: Path) -> Found:
    """What cannot be read is named on the page: only a folder without any run is an error."""
    found = find([str(folder)], out)
    for run in found.runs:
        for name in run.tables:
            run.table(name)
    return found


def reported(folder: Path, out: Path) -> None:
    found = read_runs(folder, out)
    of = contents(found, None)
    (out / "report.html").write_text(page(of, found.asked), encoding="utf-8", errors="replace")
    (out / "report.md").write_text(markdown(of), encoding="utf-8", errors="replace")
    if of.runs:
        frame(of)


def run_seeds() -> list[Files]:
    stories = [
        Told(log="WARNING x\n", pages={"summary.md": "# a\n\n| a |\n|---|\n| 1 |\n"}), Told(stage="train", seed=1),
        Told(state="failed", error="FormatError: bad"), hostile(HOSTILE[0]),
    ]  # fmt: skip
    found: list[Files] = []
    for one in stories:
        with tempfile.TemporaryDirectory() as folder:
            write_run(Path(folder) / "20260102-030405", one)
            files = files_of(Path(folder))
        if one.has_tables and one.state == "finished":
            files["20260102-030405/results.parquet"] = pd.DataFrame(
                {"a": [1, 2], "hit_rate": [0.5, 0.6]}
            ).to_parquet()
            files["20260102-030405/results.csv"] = b"a,hit_rate\n1,0.5\n2,0.6\n"
        found.append(files)
    return found


def text_field(number: int, text: Any) -> bytes:
    raw = text.encode() if isinstance(text, str) else json.dumps(text).encode()
    return field(number, 2, raw)


def _item(key: str, value: Any) -> bytes:
    return text_field(1, key) + field(16, 2, json.dumps(value).encode())


def wandb_file() -> bytes:
    """The records that the client writes, by their numbers."""
    run = b"".join(
        text_field(n, t)
        for n, t in ((1, "abc"), (2, "me"), (3, "p"), (6, "g"), (7, "train"), (8, "n"), (10, "tag"))
    )
    config = b"".join(
        field(1, 2, _item(k, v))
        for k, v in {"seed": 3, "stage": {"name": "train"}, "lineage": ["a"]}.items()
    )
    table = {"_type": "table-file", "path": "media/table/rows.table.json", "ncols": 2, "nrows": 1}
    picture = {"_type": "image-file", "path": "media/images/a.png", "format": "png"}
    told = {
        "hit_rate": 0.5,
        "error": "x",
        "table/rows": table,
        "figure/a": picture,
        "best": {"max": 1.0},
    }
    summary = b"".join(field(1, 2, _item(k, v)) for k, v in told.items())
    history = field(2, 2, field(1, 0, b"\x02")) + b"".join(
        field(1, 2, field(2, 2, key) + value)
        for key, value in (
            (b"fit/loss", field(6, 1, struct.pack("<d", 0.5))),
            (b"n", field(5, 0, b"\x07")),
            (b"t", text_field(8, [1])),
        )
    )
    artifact = (
        text_field(4, "trace")
        + text_field(5, "t")
        + text_field(6, "d")
        + text_field(8, {"a": 1})
        + text_field(11, "latest")
    )
    artifact += field(12, 2, field(4, 2, text_field(1, "f") + text_field(3, "file:///x")))
    records = [
        field(21, 2, field(1, 2, text_field(1, "0.20.0+x"))),
        field(17, 2, run + field(17, 2, field(1, 0, b"\x80\x80\x01")) + field(4, 2, config)), field(5, 2, config),
        field(12, 2, text_field(1, "fit/*") + text_field(4, "fit/epoch")), field(2, 2, history), field(3, 2, summary),
        field(8, 2, artifact), field(100, 2, field(13, 2, field(1, 2, artifact))), field(18, 2, field(1, 0, b"\x00")),
    ]  # fmt: skip
    return logged(records)


def wandb_seeds() -> list[Files]:
    folder = "wandb/offline-run-20260102_030405-abc"
    rows = json.dumps({"columns": ["x", "y"], "data": [[1, "a"], [2, "b"]]}).encode()
    return [{f"{folder}/run-abc.wandb": wandb_file(), f"{folder}/files/media/table/rows.table.json": rows,
             f"{folder}/files/media/images/a.png": b"\x89PNG\r\n"}]  # fmt: skip


def indexed(folder: Path, out: Path) -> None:
    """Entries that are damaged, and those whose folders are gone, are told."""
    find(["latest:20"], folder)
    for path in sorted((folder / "runs").glob("*.json")):
        read_standing(path)


def index_seeds() -> list[Files]:
    entry = {"stage": "train", "folder": "/dev/shm/nowhere", "failed": False, "used": ["trace/abc"]}
    return [
        {
            f"runs/{i:016d}.json": json.dumps({**entry, "folder": f"/dev/shm/nowhere{i}"}).encode()
            for i in range(3)
        }
    ]


READERS = [
    Reader("report: runs", run_seeds, read_runs),
    Reader("report: W&B offline", wandb_seeds, read_runs),
    Reader("report: page", lambda: [*run_seeds(), *wandb_seeds()], reported),
    Reader("report: index", index_seeds, indexed),
]
