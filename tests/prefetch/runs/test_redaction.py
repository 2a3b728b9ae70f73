"""Secrets are hidden wherever they turn up, and nothing else is: a token here is also a piece of text."""

import logging
import os

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prefetch.config import CONFIGS
from prefetch.runs.redaction import HIDDEN, Redactor

KEY = "hf_" + "aB3" * 10
SAFE = Redactor(environment={})


@pytest.mark.parametrize(
    ("said", "safe"),
    [
        (f"401 for {KEY}.", f"401 for {HIDDEN}."),
        ("https://user:p%40ss@host/a.npz", f"https://{HIDDEN}@host/a.npz"),
        ("see git+https://oauth2@host/x and s3://a:b@c", f"see git+https://{HIDDEN}@host/x and s3://{HIDDEN}@c"),
        ("https://host/a?token=abc&b=1", f"https://host/a?token={HIDDEN}&b=1"),
        ("https://host/a?X-Amz-Signature=ab12", f"https://host/a?X-Amz-Signature={HIDDEN}"),
        ("Authorization: Bearer abcdefghijklmnop", f"Authorization: Bearer {HIDDEN}"),
        ("key ghp_" + "a1" * 18, f"key {HIDDEN}"),
        ("AKIA" + "A1" * 8 + " was refused", f"{HIDDEN} was refused"),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_hidden(said, safe):
    assert SAFE.text(said) == safe


@pytest.mark.parametrize(
    "said",
    [
        "5.65 ms per token: 2 loads", "https://host:8080/a@b/c", "user@host", "sha256 " + "0a" * 32,
        "most_tokens=100000", "trace/1b3eccc81d081278", "bearer of news", "a?key", "s-k, sk-1", "predictor=token_table",
        "https://host/a?b=1#x@y",
    ],
)  # fmt: skip
def test_what_does_not_stays(said):
    assert SAFE.text(said) == said


@given(st.text(alphabet="abc:/@?&= .\n", max_size=60))
def test_what_is_safe_stays_as_it_is(said):
    once = SAFE.text(said)
    assert SAFE.text(once) == once


def test_every_shipped_choice_is_told_as_it_is():
    for path in CONFIGS.rglob("*.yaml"):
        told = yaml.safe_load(path.read_text())
        assert SAFE.value(told) == told, path


NAMES = (
    "token",
    "hub_token",
    "HF_TOKEN",
    "password",
    "apiKey",
    "api-key",
    "aws_secret",
    "authToken",
)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_under_a_telling_name_is_hidden_there_and_elsewhere(name):
    hidden = Redactor({"source": {name: "open sesame"}}, environment={})
    assert hidden.value({"source": {name: "open sesame", "n": 1}}) == {
        "source": {name: HIDDEN, "n": 1}
    }
    assert hidden.text("said open sesame twice") == f"said {HIDDEN} twice"


@pytest.mark.parametrize(
    "name", ["tokens", "new_tokens", "token_table", "monkey", "sasha", "secretary"]
)
def test_other_names_are_no_reason(name):
    assert Redactor({name: "value"}, environment={}).value({name: "value"}) == {name: "value"}


def test_secrets_of_the_environment_are_hidden_by_their_value():
    hidden = Redactor(
        environment={"WANDB_API_KEY": "0123456789", "DB_PASSWORD": "a", "HOME": "/root"}
    )
    assert hidden.text("key 0123456789 at /root, a") == f"key {HIDDEN} at /root, a"


def test_the_folder_that_one_stands_in_is_no_password():
    hidden = Redactor(environment={"PWD": "/home/me/study", "MYSQL_PWD": "open sesame"})
    said = "/home/me/study/trace: open sesame"
    assert hidden.text(said) == f"/home/me/study/trace: {HIDDEN}"
    assert hidden.value({"pwd": "open sesame"}) == {"pwd": HIDDEN}


def test_a_password_of_an_address_is_hidden_where_it_stands_alone_encoded_or_not():
    hidden = Redactor({"path": "https://me:p%40ssword@host"}, environment={})
    assert hidden.text("p%40ssword, p@ssword") == f"{HIDDEN}, {HIDDEN}"


def test_overrides_as_they_were_typed():
    hidden = Redactor({"source": {"hub_token": "xyzzy"}}, environment={})
    words = [
        "stage=collect",
        "source.hub_token=xyzzy",
        "+api_key=x",
        "source.path=s3://a:b@c",
        "source.note=xyzzy",
    ]
    assert hidden.words(words) == [
        "stage=collect", f"source.hub_token={HIDDEN}", f"+api_key={HIDDEN}", f"source.path=s3://{HIDDEN}@c",
        f"source.note={HIDDEN}",
    ]  # fmt: skip


def test_texts_of_a_table_and_nothing_else():
    frame = pd.DataFrame(
        {"why": [f"no {KEY}", None, "fine"], "n": [1, 2, 3], "mixed": [KEY, 2, None]}
    )
    safe = SAFE.frame(frame)
    assert safe["why"].tolist()[0] == f"no {HIDDEN}" and safe["why"].tolist()[2] == "fine"
    assert safe["mixed"].tolist()[:2] == [HIDDEN, 2] and safe["n"].equals(frame["n"])
    assert frame["why"].tolist()[0] == f"no {KEY}"  # the stage's own table is not touched
    assert SAFE.frame(plain := pd.DataFrame({"a": ["x"]})) is plain


def test_yaml_that_hydra_keeps_stays_yaml(tmp_path):
    (path := tmp_path / "0" / ".hydra" / "config.yaml").parent.mkdir(parents=True)
    path.write_text(
        "source:\n  token: ab\n  note: null\n  password: null\n  n_tokens: 4\nover:\n- source.token=ab\n"
    )
    (tmp_path / "multirun.yaml").write_text("hydra:\n  task:\n  - source.token=ab\n")
    Redactor(environment={}).command_line(tmp_path / "0")
    told = yaml.safe_load(path.read_text())
    assert told["source"] == {"token": HIDDEN, "note": None, "password": None, "n_tokens": 4}
    assert told["over"] == [f"source.token={HIDDEN}"]
    assert yaml.safe_load((tmp_path / "multirun.yaml").read_text())["hydra"]["task"] == [
        f"source.token={HIDDEN}"
    ]
    Redactor(environment={}).command_line(tmp_path / "absent")


def test_files_that_somebody_else_wrote_are_the_last_resort(tmp_path):
    hidden = Redactor({"token": "xyzzy"}, environment={})
    (folder := tmp_path / "run").mkdir()
    (folder / "summary.md").write_text("from xyzzy, and much more text after it\n")
    (folder / "picture.png").write_bytes(b"\x89 xyzzy")
    (folder / "mine.yaml").write_text("token: xyzzy\n")  # of the user, from before the run
    (folder / "again.md").write_text("xyzzy\n")
    before = {
        folder / name: (folder / name).stat().st_mtime_ns for name in ("mine.yaml", "again.md")
    }
    assert hidden.seen(folder).items() >= before.items()
    os.utime(folder / "again.md", (100, 100))  # written since, by a clock that was set back
    (tmp_path / "elsewhere.json").write_text('"xyzzy"')
    (folder / "link.json").symlink_to(tmp_path / "elsewhere.json")
    hidden.folder(folder, before)
    assert (folder / "again.md").read_text() == f"{HIDDEN}\n"
    assert (folder / "summary.md").read_text() == f"from {HIDDEN}, and much more text after it\n"
    assert (folder / "picture.png").read_bytes() == b"\x89 xyzzy"
    assert (folder / "mine.yaml").read_text() == "token: xyzzy\n"
    assert (tmp_path / "elsewhere.json").read_text() == '"xyzzy"'


def test_a_log_is_safe_before_it_is_written(caplog):
    logger, hidden = logging.getLogger("some.stage"), Redactor({"token": "xyzzy"}, environment={})
    with hidden.logs():
        logger.warning("reading %s of %d", "xyzzy", 3)
    logger.warning("after: %s", "xyzzy")
    assert [record.getMessage() for record in caplog.records] == [
        f"reading {HIDDEN} of 3",
        "after: xyzzy",
    ]


def test_a_password_of_digits_changes_no_number(tmp_path):
    hidden = Redactor({"proxy": "http://me:1234@host", "password": "5678"}, {})
    before = hidden.seen(tmp_path)
    kept = {"metrics.json": '{"tokens": 512345, "misses": 1234}', "a.csv": "n\n1234\n0.5678\n"}
    for name, text in {**kept, "a.log": "5678 was refused; 56789 tokens, 0.5678"}.items():
        (tmp_path / name).write_text(text)
    hidden.folder(tmp_path, before)
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    assert (tmp_path / "a.log").read_text() == "REDACTED was refused; 56789 tokens, 0.5678"
    assert hidden.text("http://me:1234@host") == "http://REDACTED@host"
