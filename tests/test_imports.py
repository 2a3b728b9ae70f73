"""The house: nothing below knows what stands above. The contracts stand in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_packages_themselves_load_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import prefetch, analysis;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert loaded >= {"prefetch", "analysis"}
    assert not loaded - {"prefetch", "analysis"} - sys.stdlib_module_names, loaded


def test_no_import_points_backward():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_backward_import_is_found(tmp_path):
    for name in ("prefetch", "analysis", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "prefetch").unlink()
    import shutil

    shutil.copytree(
        ROOT / "prefetch", tmp_path / "prefetch", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "prefetch" / "trace" / "backward.py").write_text(
        "import prefetch.sources.collect\n"
    )
    done = lint(tmp_path)
    assert done.returncode != 0 and "backward" in done.stdout
