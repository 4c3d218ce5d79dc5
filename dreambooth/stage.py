"""The door `python -m dreambooth.stage`: one stage of a workflow, in the image. Nothing heavy is imported here.

A workflow engine hands over overrides as one text, and reads files afterwards. The stage types the words of a door
(`train`, `evaluate`, ...), runs it, passes signals on, and keeps its exit code: an engine may then repeat what was
interrupted and nothing else.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dreambooth import cli
from dreambooth.config.compose import search_space
from dreambooth.config.enums import Device
from dreambooth.config.recipe import resolve
from dreambooth.container import cluster as clusters
from dreambooth.container.supervisor import End, Supervisor
from dreambooth.entrypoint import composed
from dreambooth.errors import ConfigError, UserError
from dreambooth.kubernetes import exit_report, kfp_components
from dreambooth.kubernetes.workflow_spec import HERE, SERVER, TRIAL, Space
from dreambooth.storage.folders import SCHEME

STAGES = ("validate", "class-images", "train", "evaluate", "promote", "ended")
# Planned once, whatever these are. Not `sweep`: a search space may choose the method.
SAME_MEMORY = {"train.learning_rate", "train.max_train_steps", "prior.prior_loss_weight", "method.alpha"}
LEFT = ("result.json", "contact_sheet.png", "evaluation.json")  # what a run leaves for who looks at it


def parser() -> argparse.ArgumentParser:
    """What `python -m dreambooth.stage` understands."""
    found = argparse.ArgumentParser(prog="python -m dreambooth.stage", description=(__doc__ or "").split("\n")[0],
                                    epilog="KEY=VALUE, a word each, are overrides too; they beat the texts")
    found.add_argument("stage", choices=STAGES)
    found.add_argument("--words", default="", help="overrides as one text, as they are typed into a shell")
    found.add_argument("--trial", default="", help="overrides of this run of a sweep, as one text")
    found.add_argument("--space", default="", help="search space whose runs are checked and listed")
    found.add_argument("--out", type=Path, default=Path("stage"), help="folder for what an engine reads")
    found.add_argument("--kfp", default="", help="Kubeflow Pipelines' executor input, as JSON")
    found.add_argument("--status", default="", help="how the workflow ended")
    found.add_argument("--failures", default="null", help="Argo's list of what failed, as JSON")
    return found


def main() -> None:
    """One stage."""
    asked = cli.with_overrides(parser())
    asked.out.mkdir(parents=True, exist_ok=True)
    end = End()

    def job() -> None:
        nonlocal end
        if asked.stage == "ended":
            print("\n".join(exit_report.told(asked.status, asked.failures)))
            return
        end = _run(asked, Supervisor())
        if asked.kfp and not end.code:
            kfp_components.hand_over(asked.kfp, asked.out)

    cli.attempt(job, sweep=False)
    if end.code:
        sys.exit(end.code)
    cli.leave()


def _run(asked: argparse.Namespace, supervisor: Supervisor) -> End:
    words = [*_split(asked.words), *asked.overrides]
    if asked.stage == "validate":
        return _validate(words, asked.space, asked.out, supervisor)
    if asked.stage == "evaluate":
        run = Path(next((word[4:] for word in words if word.startswith("run=")), ""))
        return _kept(supervisor.run(_door("evaluate", words), {}), run, asked.out)
    if asked.stage == "promote":
        return _promote(words, asked.out, supervisor)
    words = _words(words, _split(asked.trial))
    if asked.stage == "class-images":
        return supervisor.run(_door("class_images", words), {})
    config, run_dir = composed(words)
    cluster = clusters.cluster({}, clusters.gpus() or 1)
    if config.hardware.device is Device.cpu:
        cluster = clusters.on_cpu(cluster)
    print(f"dreambooth: python -m dreambooth.train {shlex.join(words)}", flush=True)
    return _kept(supervisor.run(cluster.command(words), {}, launcher=cluster.world > 1), run_dir, asked.out)


def _validate(words: list[str], space: str, out: Path, supervisor: Supervisor) -> End:
    """Compose, resolve and plan every run before the first is paid for; list them.

    Raises:
        ConfigError: what is wrong with any of them.
    """
    trials = Space(space, search_space(space)).without(words).trials() if space else [()]
    problems: list[str] = []
    plans: dict[tuple[str, ...], None] = {}
    for trial in trials:
        try:
            config, run_dir = composed(_words(words, trial))
            resolve(config, run_dir)
        except UserError as error:
            problems += error.problems if isinstance(error, ConfigError) else [str(error)]
        plans[tuple(word for word in trial if word.partition("=")[0] not in SAME_MEMORY)] = None
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    for trial in plans:
        end = supervisor.run(_door("plan", [word for word in (*words, *trial) if SCHEME not in word]), {})
        if end.code:
            return end
    (out / "trials").write_text(json.dumps([shlex.join(trial) for trial in trials]), encoding="utf-8")
    print(f"{len(trials)} run{'s' * (len(trials) > 1)}, checked and planned")
    return End()


def _promote(words: list[str], out: Path, supervisor: Supervisor) -> End:
    """Draw the page of the sweep, for whoever cannot look into MLflow, then promote the best."""
    root = Path(next((word[9:] for word in reversed(words) if word.startswith("run_root=")), "runs"))
    both = [word for word in words if word.startswith(("sweep=", "run_root="))]
    supervisor.run(_door("compare", [*both, f"out={out / 'compare.html'}"]), {})
    end = supervisor.run(_door("promote", [f"default_uri={HERE}", *words]), {})
    if not end.code:
        shutil.copyfile(root / "promoted.json", out / "promoted.json")
    return end


def _words(words: Sequence[str], trial: Sequence[str]) -> list[str]:
    """The overrides of a run; those that are typed beat what a workflow adds. A trial is named by what differs."""
    pairs = [word.partition("=") for word in trial if not word.startswith("sweep=")]
    named = " ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs)
    return [SERVER, *([TRIAL, f'tracking.run_name="{named}"'] if named else ()), *words, *trial]


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"these overrides cannot be read ({error}): type them as into a shell, {text}") from error


def _door(name: str, words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", f"dreambooth.{name}", *words]


def _kept(end: End, run: Path, out: Path) -> End:
    """Copy what an engine reads: the run's folder and objective as texts, its results as files."""
    for name in LEFT:
        if (run / name).is_file():
            shutil.copyfile(run / name, out / name)
    (out / "run").write_text(str(run.absolute()), encoding="utf-8")
    with suppress(FileNotFoundError):
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        (out / "objective").write_text(str(result["objective"]), encoding="utf-8")
    return end


if __name__ == "__main__":
    main()
