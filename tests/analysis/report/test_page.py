"""The file: one, under its size, fetching nothing, with data that cannot become markup."""

import base64
import gzip
import hashlib
import json
import random
import re
import string
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import HOSTILE, Told, hostile, sweep, write_run

from analysis.report.contents import contents
from analysis.report.found import find
from analysis.report.markdown import markdown
from analysis.report.packed import packed_json, plain, script_json
from analysis.report.page import MOST_BYTES, page

texts = st.text(st.characters(exclude_categories=["Cs"]))
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
)


class Scripts(HTMLParser):
    """Elements of the page as a browser parses them."""

    def __init__(self, text):
        super().__init__()
        self.found, self.tags, self._open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self._open = [dict(attributes), ""]
            self.found.append(self._open)

    def handle_data(self, data):
        if self._open is not None:
            self._open[1] += data

    def handle_endtag(self, tag):
        if tag == "script":
            self._open = None


def made(folder, **settings):
    return page(contents(find(str(folder), folder)), "Made by a test.", **settings)


def data_of(text):
    return json.loads(
        next(body for attributes, body in Scripts(text).found if attributes.get("id") == "data")
    )


def details_of(text, at):
    name = f"packed-run-{at}"
    body = next(body for attributes, body in Scripts(text).found if attributes.get("id") == name)
    return json.loads(gzip.decompress(base64.b64decode(body)))


@given(anything)
def test_data_survives_and_cannot_end_its_element(content):
    text = script_json(content)
    assert json.loads(text) == content and not set("<>&") & set(text) and text.isascii()
    assert json.loads(gzip.decompress(base64.b64decode(packed_json(content)))) == content


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), None),
        (float("inf"), None),
        (1.23456789, 1.23457),
        (2**60, str(2**60)),
        ((1, {2: b"x"}), [1, {"2": "b'x'"}]),
    ],
)
def test_what_json_has_not_is_said_another_way(value, said):
    assert plain(value) == said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    sweep(folder / "20260102-030405-1", 24)
    for i, name in enumerate(HOSTILE):
        write_run(folder / f"hostile{i}", hostile(name))
    write_run(folder / "failed", Told(state="failed", error="</script><b>no</b>"))
    return made(folder)


def test_one_file_that_fetches_nothing(whole):
    for tag, attributes in Scripts(whole).tags:
        assert tag not in ("iframe", "object", "embed", "base", "img")
        assert not attributes.get("src") and attributes.get("href", "#")[0] in "#d"
        assert not [name for name in attributes if name.startswith("on")], "no handlers in markup"
    own = re.sub(r"<script.*?</script>|<pre>.*?</pre>", "", whole, flags=re.DOTALL)
    assert "//" not in re.sub(r"http://www.w3.org/2000/svg", "", own).replace("/* ", "").replace(
        " */", ""
    )


def test_only_scripts_whose_sum_is_told_may_run(whole):
    policy = next(a["content"] for tag, a in Scripts(whole).tags if a.get("http-equiv"))
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    (rule,) = [part for part in policy.split(";") if "script-src" in part]
    assert "unsafe" not in rule and "default-src 'none'" in policy and "connect-src" not in policy
    bodies = Scripts(whole).found
    run = [body for attributes, body in bodies if "type" not in attributes]
    library = next(body for attributes, body in bodies if attributes.get("id") == "packed-library")
    run.append(gzip.decompress(base64.b64decode(library)).decode())
    assert {
        base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in run
    } == allowed
    assert (
        "Licensed under the MIT license" in run[-1][:500]
        and "Permission is hereby granted" in whole
    )


def test_names_of_users_are_data_and_no_markup(whole):
    tags = [tag for tag, _ in Scripts(whole).tags]
    assert "img" not in tags and tags.count("script") == whole.count("<script")
    told = data_of(whole)
    said = {cell for run in told["runs"] for cell in run["cells"] if isinstance(cell, str)}
    assert set(HOSTILE) <= said, "every one arrives as it was typed"
    (one,) = [run for run in told["runs"] if run["state"] == "failed"]
    assert one["message"] == "</script><b>no</b>"


def test_of_every_run_there_is_its_command_and_what_it_said(whole):
    told = data_of(whole)
    for at, run in enumerate(told["runs"]):
        details = details_of(whole, at)
        assert details["command"].startswith(f"python scripts/run.py stage={run['stage']}")
        if run["state"] == "finished":
            assert (
                details["tables"]
                or run["stage"] == "collect"
                or run["id"].startswith("train-hostile")
            )
            assert details["lineage"] == [["trace/0123456789abcdef", "model/fedc"]]
    names = [run["id"] for run in told["runs"]]
    assert len(set(names)) == len(names) and all(
        re.fullmatch(r"[a-z0-9-]+", name) for name in names
    )


def test_a_full_page_leaves_out_from_the_end_and_says_so(tmp_path):
    sweep(tmp_path / "20260102-030405-1", 12)
    everything = made(tmp_path)
    limit = len(everything) - 1500
    tight = made(tmp_path, most_bytes=limit)
    assert len(tight.encode()) <= limit
    newest, oldest = (details_of(tight, at) for at in (11, 0))
    assert newest["tables"] and not newest["left_out"]
    assert (
        not oldest["tables"]
        and "lies in the run's folder" in oldest["left_out"]
        and oldest["command"]
    )


def noise(n, seed=0):
    """Text that cannot be packed."""
    rng = random.Random(seed)
    return "".join(rng.choices(string.ascii_letters + string.digits, k=n))


@pytest.mark.parametrize(
    "told",
    [
        Told(pages={f"{i}.md": noise(90_000, i) for i in range(6)}),
        Told(log="\n".join(f"WARNING {noise(2000, i)}" for i in range(300))),
        Told(settings={"source.path": noise(600_000)}, words=(f"source.path={noise(600_000)}",)),
        Told(state="failed", error=noise(600_000)),
    ],
    ids=["pages", "log", "setting", "error"],
)
def test_whatever_a_run_says_the_page_stays_small(tmp_path, told):
    write_run(tmp_path / "long", replace(told, seed=5))
    write_run(tmp_path / "short", Told())
    limit = len(made(tmp_path / "short")) + 100_000
    text = made(tmp_path, most_bytes=limit)
    assert len(text.encode()) <= limit and len(data_of(text)["runs"]) == 2
    left_out = [details_of(text, at)["left_out"] for at in (0, 1)]
    assert any("lies in the run's folder" in said for said in left_out)


def test_when_rows_do_not_fit_the_newest_stay_and_it_is_said(tmp_path):
    found = find(str(sweep(tmp_path / "20260102-030405-1", 8)), tmp_path)
    few = len(page(contents(found), ""))
    found.runs = [found.runs[i % 8] for i in range(800)]
    text = page(contents(found), "", most_bytes=few + 100_000)
    told = data_of(text)
    n = len(told["runs"])
    assert 8 < n < 800 and len(text.encode()) <= few + 100_000
    assert f"{800 - n} older runs found no room" in text
    assert any(f"{800 - n} runs (the oldest)" in one["why"] for one in told["problems"])


def test_a_table_that_cannot_be_read_is_named_where_it_would_stand(tmp_path):
    (write_run(tmp_path / "a", Told()) / "by_fold.csv").write_text('a\n"')
    (one,) = (t for t in details_of(made(tmp_path), 0)["tables"] if t["name"] == "by_fold")
    assert "Error" in one["why"]


def test_numbers_keep_their_digits_and_long_texts_their_place(tmp_path):
    write_run(tmp_path / "a", Told(metrics={"hit_rate": 0.1234567890123, "tokens": 123456789.0}))
    write_run(tmp_path / "b", Told(settings={"source.path": "x" * 5000}, seed=1))
    text = made(tmp_path)
    (cells,) = (run["cells"] for run in data_of(text)["runs"] if run["name"].endswith("a"))
    assert 0.1234567890123 in cells and 123456789 in cells
    assert "x" * 400 not in text and any(
        details_of(text, at)["settings"].get("source.path") == "x" * 5000 for at in (0, 1)
    )


def test_equal_seeds_have_no_interval_of_rounding(tmp_path):
    for seed in range(3):
        write_run(tmp_path / str(seed), Told(seed=seed, metrics={"tpot_ms": 0.24138325}))
    (group,) = data_of(made(tmp_path))["groups"]
    at = group["cells"].index(0.24138325)
    assert group["low"][at] == group["high"][at] == 0.24138325


def test_a_thousand_runs_fit(tmp_path):
    folder = tmp_path / "20260102-030405-1"
    one = sweep(tmp_path / "few", 8)
    folder.mkdir()
    for i in range(1000):  # each its own folder, the files of eight
        (folder / str(i)).symlink_to(one / str(i % 8))
    found = find([str(folder / str(i)) for i in range(8)], tmp_path)
    found.runs = [found.runs[i % 8] for i in range(1000)]
    text = page(contents(found), "")
    assert len(text.encode()) < MOST_BYTES < 6_000_000 and len(data_of(text)["runs"]) == 1000


def test_what_an_older_version_kept_of_a_secret_stays_hidden(tmp_path):
    """Everything that the page packs, unpacked: no key, wherever it was said."""
    secret = "hf_" + "a1B2" * 8
    told = Told(
        settings={"source.hub_token": "s3cretword", "tracker.url": f"http://u:{secret}@host/"},
        words=("source.hub_token=s3cretword",), state="failed", error=f"OSError: {secret} s3cretword",
        log=f"WARNING {secret}", pages={"summary.md": f"s3cretword and {secret}"},
    )  # fmt: skip
    write_run(tmp_path / "a", told)
    text = made(tmp_path)
    everything = (
        text + json.dumps(details_of(text, 0)) + markdown(contents(find(str(tmp_path), tmp_path)))
    )
    assert secret not in everything and "s3cretword" not in everything and "REDACTED" in everything


def test_the_same_runs_give_the_same_bytes(tmp_path):
    folder = sweep(tmp_path / "20260102-030405-1", 4)
    assert made(folder) == made(folder)


def test_no_runs_is_a_page_too(tmp_path):
    assert data_of(page(contents(find("latest:3", tmp_path)), ""))["runs"] == []
