"""Command `python -m dreambooth.compare`: writes an HTML page that compares the runs of a sweep."""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, to_dataclass
from dreambooth.config.section import Section, require
from dreambooth.errors import UserError


@dataclass
class Compare(Section):
    """Options of the command: the sweep, and the HTML file to write. conf/compare.yaml explains each key."""

    sweep: str | None = None
    run_root: str = "runs"
    out: str | None = None
    pixels: int = 384

    def __post_init__(self) -> None:
        require("", {"pixels": (32 <= self.pixels <= 4096, f"from 32 to 4096, not {self.pixels}")})


ConfigStore.instance().store(name="compare_schema", node=Compare, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="compare")
def compare(cfg: DictConfig) -> None:
    """Write the HTML page that compares the runs of a sweep."""
    cli.run_job(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    options = to_dataclass(cfg, Compare)
    sweep = cli.intercepted_override("sweep") or options.sweep
    if sweep is None:
        raise UserError("the sweep is missing: type sweep=ID, where ID is the tag `sweep` of its runs in MLflow")
    from dreambooth.sweeps.html_page import render_page
    from dreambooth.sweeps.trials import load_trials
    from dreambooth.utils import atomic_files

    trials = load_trials(Path(options.run_root), sweep)
    path = Path(options.out or f"{options.run_root}/compare-{sweep}.html")
    atomic_files.check_writable(path.parent, "type out=FILE.html, in a folder that you can write to")
    text = render_page(sweep, trials, options.pixels)
    with atomic_files.write_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{path}: {len(text) / 2**20:.1f} MiB in one file, opens in any browser")


def main() -> None:
    """Run the console script `dreambooth-compare`."""
    cli.intercept_override("sweep")  # its value is an ID, but Hydra would look for an option of the group sweep
    cli.run_hydra(compare, Compare)
    cli.exit_process()


if __name__ == "__main__":
    main()
