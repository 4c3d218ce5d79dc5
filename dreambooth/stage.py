"""Command `python -m dreambooth.stage`: runs one stage of a workflow of Argo, Kubeflow Pipelines or SageMaker.

The workflow engine passes all overrides as one string, and afterwards reads the outputs of the stage from files. A
stage runs another command (`train`, `evaluate`, ...) as a child process, forwards signals to it, and exits with the
exit code of the child process. The engine repeats a stage only if the exit code reports an interruption. Heavy
libraries such as torch are not imported in this process.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dreambooth import cli
from dreambooth.config.compose import load, name_trial, search_space
from dreambooth.config.enums import Device
from dreambooth.config.evaluate import require_one_objective
from dreambooth.config.recipe import resolve
from dreambooth.config.storage import S3_SCHEME
from dreambooth.container.cluster import count_gpus, limit_to_one_process, parse_resource_config
from dreambooth.container.supervisor import ExitStatus, Supervisor
from dreambooth.entrypoint import compose_run
from dreambooth.errors import ConfigError, UserError
from dreambooth.evaluate import compose_from_run
from dreambooth.kubernetes import exit_report, kfp_components, pod_spec
from dreambooth.kubernetes.workflow_spec import TRACKING_OVERRIDE, TRACKING_URI, TRIAL_RUN_DIR
from dreambooth.storage import run_inputs
from dreambooth.utils.atomic_files import check_writable, read_object
from dreambooth.utils.masking import mask_urls
from dreambooth.utils.plurals import counted
from dreambooth.utils.quoting import hydra_string, shell_line

STAGES = ("validate", "class-images", "train", "evaluate", "promote", "deploy", "choose", "ended")
# Keys that do not change how much memory a run needs: trials that differ only in these keys are planned
# once. The key `sweep` is not in the set, because a search space may set the training method.
MEMORY_NEUTRAL_KEYS = {"train.learning_rate", "train.max_train_steps", "prior.prior_loss_weight", "method.alpha"}
RUN_FILES = ("result.json", "contact_sheet.png", "evaluation.json")  # files that the engine stores as artifacts


def parser() -> cli.ArgumentParser:
    """Return the argument parser of `python -m dreambooth.stage`."""
    command_line = cli.ArgumentParser(
        prog="python -m dreambooth.stage", description=(__doc__ or "").split("\n")[0],
        epilog="arguments KEY=VALUE are overrides too, and take precedence over --words")
    command_line.add_argument("stage", choices=STAGES)
    command_line.add_argument("--words", default="", help="overrides as one string, quoted as for a shell")
    command_line.add_argument("--trial", default="", help="overrides of one trial of a sweep, as one string")
    command_line.add_argument("--space", default="", help="search space whose trials are checked and listed")
    command_line.add_argument("--out", type=Path, default=Path("stage"), help="folder for files that the engine reads")
    command_line.add_argument("--results", default="", help="folder or S3 folder with the results of jobs, for choose")
    command_line.add_argument("--deployment", default="", help="Deployment that serves the champion, for deploy")
    command_line.add_argument("--kfp", default="", help="executor input of Kubeflow Pipelines, as JSON")
    command_line.add_argument("--status", default="", help="final status of the workflow")
    command_line.add_argument("--failures", default="null", help="Argo's list of failed pods, as JSON")
    return command_line


def main() -> None:
    """Run one stage and exit with its exit code."""
    options = cli.parse_with_overrides(parser())
    status = ExitStatus()

    def job() -> None:
        nonlocal status
        check_writable(options.out, "type --out DIR, a folder that you can write to")
        options.out.mkdir(parents=True, exist_ok=True)
        if options.stage == "ended":
            print("\n".join(exit_report.format_report(options.status, options.failures)))
            return
        if options.stage == "choose":
            from dreambooth.sweeps import job_results

            print(job_results.choose(options.results, options.out))
            return
        if options.stage == "deploy":
            print(_deploy(options.deployment, options.overrides))
            return
        status = _run_stage(options, Supervisor())
        if options.kfp and not status.code:
            kfp_components.write_outputs(options.kfp, options.out)

    cli.run_job(job, sweep=False)
    if status.code:
        sys.exit(status.code)
    cli.exit_process()


def _run_stage(options: argparse.Namespace, supervisor: Supervisor) -> ExitStatus:
    overrides = [*_split_overrides(options.words), *options.overrides]
    if options.stage == "validate":
        return _validate(overrides, options.space, options.out, supervisor)
    if options.stage == "evaluate":
        status = supervisor.run(_module_command("evaluate", overrides), {})
        run_dir = Path(next((override[4:] for override in overrides if override.startswith("run=")), ""))
        return _copy_outputs(status, run_dir, options.out)
    if options.stage == "promote":
        return _promote(overrides, options.out, supervisor)
    overrides = _run_overrides(overrides, _split_overrides(options.trial))
    if options.stage == "class-images":
        return supervisor.run(_module_command("class_images", overrides), {})
    return _train(overrides, options.out, supervisor)


def _split_overrides(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"these overrides cannot be read ({error}): quote them as for a shell: {text}") from error


def _run_overrides(overrides: Sequence[str], trial: Sequence[str]) -> list[str]:
    """Return all overrides of a run: overrides that the workflow adds, then the user's, then the trial's.

    A trial is one run of a sweep. Overrides later in the result take precedence. The MLflow run of a trial is named
    after the overrides of the trial.
    """
    run_name = name_trial(trial)
    trial_overrides = (TRIAL_RUN_DIR, f"tracking.run_name={hydra_string(run_name)}") if run_name else ()
    return [TRACKING_OVERRIDE, *trial_overrides, *overrides, *trial]


def _validate(overrides: list[str], space: str, out: Path, supervisor: Supervisor) -> ExitStatus:
    """Check every run of a workflow before the workflow pays for a GPU, and write the list of trials to `out`.

    Each run is composed, resolved and planned. If a plan fails, return its exit status, and success otherwise.

    Args:
        space: the search space of a sweep, which has one run per trial; empty: the workflow has a single run.

    Raises:
        ConfigError: the settings of a run are not valid; the message has one line per problem.
    """
    trials = search_space(space).without_overridden(overrides).trials() if space else [()]
    problems: list[str] = []
    plans: dict[tuple[str, ...], tuple[str, ...]] = {}  # what determines a plan -> the first trial with it
    for trial in trials:
        try:
            config, run_dir = compose_run(_run_overrides(overrides, trial))
            resolve(config, run_dir)
            if space:
                require_one_objective(config.evaluate.objective)
        except UserError as error:
            problems += error.problems if isinstance(error, ConfigError) else [str(error)]
        plans.setdefault(tuple(override for override in trial
                               if override.partition("=")[0] not in MEMORY_NEUTRAL_KEYS), trial)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    for trial in plans.values():
        local = [override for override in (*overrides, *trial) if S3_SCHEME not in override]
        status = supervisor.run(_module_command("plan", [*local, "plan.larger_batch=false"]), {})
        if status.code:
            return status
    texts = [pod_spec.escape_variables(shlex.join(trial)) for trial in trials]  # the engine puts them into args
    (out / "trials").write_text(json.dumps(texts), encoding="utf-8")
    print(f"{counted(len(trials), 'run')}, checked and planned")
    return ExitStatus()


def _train(overrides: list[str], out: Path, supervisor: Supervisor) -> ExitStatus:
    config, run_dir = compose_run(overrides)
    cluster = parse_resource_config({}, count_gpus() or 1)
    if config.hardware.device is Device.cpu:
        cluster = limit_to_one_process(cluster)
    print(f"dreambooth: python -m dreambooth.train {mask_urls(shell_line(overrides))}", flush=True)
    status = supervisor.run(cluster.train_command(overrides), {}, launcher=cluster.world_size > 1)
    return _copy_outputs(status, run_dir, out)


def _promote(overrides: list[str], out: Path, supervisor: Supervisor) -> ExitStatus:
    """Write the comparison page of the sweep, for users without access to MLflow, then promote the best model.

    Return the exit status of the promotion.
    """
    run_root = Path(_value(overrides, "run_root") or "runs")
    shared = [override for override in overrides if override.startswith(("sweep=", "run_root="))]
    supervisor.run(_module_command("compare", [*shared, f"out={out / 'compare.html'}"]), {})
    status = supervisor.run(_module_command("promote", [f"default_uri={TRACKING_URI}", *overrides]), {})
    if not status.code:
        shutil.copyfile(run_root / "promoted.json", out / "promoted.json")
    return status


def _deploy(deployment: str, overrides: Sequence[str]) -> str:
    """Let a Deployment serve the champion of a sweep, and return a sentence that says so.

    Raises:
        UserError: the sweep has no champion, or the pictures of the new pods do not show its subject.
    """
    from dreambooth.deployment import smoke_test
    from dreambooth.deployment.kubernetes_rollout import Deployment, roll_out

    run_root, sweep = Path(_value(overrides, "run_root") or "runs"), _value(overrides, "sweep")
    champion = read_object(run_root / "promoted.json") or {}
    if not deployment or champion.get("sweep") != sweep:
        raise UserError(f"the sweep {sweep} has no champion in {run_root / 'promoted.json'}, or --deployment names no "
                        "Deployment: run the stage promote first")
    run = Path(champion["run_dir"])
    recipe = resolve(run_inputs.fetch_inputs(load(compose_from_run(run, {})), run), run)
    name, replaced = champion["name"], champion.get("replaced")
    return roll_out(Deployment.of_this_cluster(deployment), f"models:/{name}/{champion['version']}",
                    f"models:/{name}/{replaced}" if replaced else None, lambda url: smoke_test.check(url, recipe))


def _value(overrides: Sequence[str], key: str) -> str:
    """Return the last value of a key in overrides, or an empty string."""
    return next((text.partition("=")[2] for text in reversed(overrides) if text.startswith(f"{key}=")), "")


def _module_command(name: str, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", f"dreambooth.{name}", *overrides]


def _copy_outputs(status: ExitStatus, run_dir: Path, out: Path) -> ExitStatus:
    """Write the outputs of a run to `out`, where the workflow engine reads them, and return `status`.

    The outputs are the path of the run folder, the objective and RUN_FILES.
    """
    for name in RUN_FILES:
        if (run_dir / name).is_file():
            shutil.copyfile(run_dir / name, out / name)
    (out / "run").write_text(str(run_dir.absolute()), encoding="utf-8")
    if "objective" in (result := read_object(run_dir / "result.json") or {}):
        (out / "objective").write_text(str(result["objective"]), encoding="utf-8")
    return status


if __name__ == "__main__":
    main()
