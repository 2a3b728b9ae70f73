"""What every test shares: real data when it lies beside the project, and one way to run a source without a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prefetch.sources.source import Source
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.writer import TraceWriter

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared"  # third-party recordings; never copied into the project

Collect = Callable[..., TraceReader]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever takes minutes begins first: at the end nobody waits for it."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def real_data() -> Path:
    if not (REAL / "traces").is_dir():
        pytest.skip("the real traces are not beside the project")
    return REAL


@pytest.fixture
def collect(tmp_path: Path) -> Collect:
    """Records a source into a fresh folder and opens the trace."""

    def record(
        source: Source, *, max_dropped: float = 0.5, upstream: dict[str, Path] | None = None
    ) -> TraceReader:
        folder = tmp_path / f"trace-{len(list(tmp_path.glob('trace-*')))}"
        folder.mkdir()
        provenance = Provenance("real" if source.real else "synthetic", type(source).__name__)
        writer = TraceWriter(folder, provenance, max_dropped=max_dropped)
        source.record(writer, upstream or {})
        writer.close()
        return TraceReader(folder)

    return record
