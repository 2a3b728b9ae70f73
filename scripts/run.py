"""One entry for every stage: python scripts/run.py stage=NAME [group=choice] [key=value].

The stage is named in YAML by `_target_`; this file imports none.
"""

import sys

import hydra
from omegaconf import DictConfig

from prefetch.runs import stages


@hydra.main(version_base="1.3", config_path="../configs", config_name="config")
def main(cfg: DictConfig) -> dict[str, float]:
    return stages.run_stage(cfg)


if __name__ == "__main__":
    sys.exit(stages.guarded(main))
