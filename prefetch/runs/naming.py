"""What a run is called and sorted by wherever runs are listed: name, group, tags. It knows no tracker and no stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefetch.runs.redaction import Redactor

LONGEST_NAME, LONGEST_TAG = 128, 64  # characters that W&B takes
UNSAID = (
    "stage",
    "store",
    "tracker",
    "trace",
    "experiment",
    "hydra",
)  # in a name: elsewhere, or no setting
PLURAL = {
    "policy": "policies",
    "predictor": "predictors",
}  # lists of a stage that take a choice's place


@dataclass(frozen=True)
class About:
    """One run, as a tracker is told of it; nothing in it is secret."""

    stage: str
    folder: Path
    words: Sequence[str]  # what was typed
    choices: Mapping[str, str]  # group -> its choice
    config: Mapping[str, Any]
    group: str | None = None  # what it shares with other runs

    @classmethod
    def safe(
        cls,
        *,
        stage: str,
        folder: Path,
        words: Sequence[str],
        choices: Mapping[str, Any],
        config: Mapping[str, Any],
        group: str | None,
        hidden: Redactor,
    ) -> About:
        """Without its secrets. An experiment's name goes before its sweep's, or stands for one."""
        chosen = {n: str(v) for n, v in choices.items() if v is not None and "hydra" not in n}
        parts = [part for part in (chosen.get("experiment"), group) if part]
        typed = hidden.words(words)
        return cls(stage, folder, typed, chosen, hidden.value(config), "-".join(parts) or None)

    @property
    def name(self) -> str:
        """The stage and what was typed for it; of a run with nothing typed, where its routing comes from."""
        said = [
            word
            for word in self.words
            if word.lstrip("+~").split("=")[0].split(".")[0] not in UNSAID
        ]
        return _short(" ".join([self.stage, *(said or [self._routing()])]), LONGEST_NAME)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "words": list(self.words),
            "choices": dict(self.choices),
        }

    def tags(self, groups: Mapping[str, Sequence[str]]) -> list[str]:
        """`group=choice` for the groups that the stage reads, the experiment, and the routing."""
        found = [f"experiment={self.choices['experiment']}"] if "experiment" in self.choices else []
        for group in groups.get(self.stage, ()):
            if group == "source":
                found.append(self._routing())
                continue
            names = dict(self.config.get(self.stage) or {}).get(PLURAL.get(group, ""))
            found += [f"{group}={name}" for name in names or [self.choices.get(group)] if name]
        return list(dict.fromkeys(_short(tag, LONGEST_TAG) for tag in found))

    def _routing(self) -> str:
        trace = self.config.get("trace")
        return f"trace={Path(trace).name}" if trace else f"source={self.choices.get('source')}"


def _short(text: str, most: int) -> str:
    """Without its middle: what tells the runs of a sweep apart is often typed last."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[: most - 3 - half]}...{text[-half:]}"
