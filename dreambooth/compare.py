"""The door `python -m dreambooth.compare`: one HTML page of a sweep. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import asked, conf_dir
from dreambooth.config.section import Section, require
from dreambooth.errors import UserError


@dataclass
class Compare(Section):
    """Which sweep, and where its page goes; see conf/compare.yaml."""

    sweep: str | None = None
    run_root: str = "runs"
    out: str | None = None
    pixels: int = 384

    def __post_init__(self) -> None:
        require("", {"pixels": (32 <= self.pixels <= 4096, f"from 32 to 4096, not {self.pixels}")})


ConfigStore.instance().store(name="compare_schema", node=Compare, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="compare")
def compare(cfg: DictConfig) -> None:
    """One call: a page of a sweep."""
    cli.attempt(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    ask = asked(cfg, Compare)
    sweep = cli.given("sweep") or ask.sweep
    if sweep is None:
        raise UserError("the sweep is missing: type sweep=ID, the tag that its runs have in MLflow")
    from dreambooth.sweeps.html_page import page
    from dreambooth.sweeps.trials import of_sweep
    from dreambooth.utils import atomic_files

    text = page(sweep, of_sweep(Path(ask.run_root), sweep), ask.pixels)
    path = Path(ask.out or f"{ask.run_root}/compare-{sweep}.html")
    with atomic_files.whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
    print(f"{path}: {len(text) / 2**20:.1f} MiB, opens in any browser, nothing else is needed")


def main() -> None:
    """Console script `dreambooth-compare`."""
    cli.take("sweep")  # an ID; conf/sweep/ is a group, whose options Hydra would look for
    compare()
    cli.leave()


if __name__ == "__main__":
    main()
