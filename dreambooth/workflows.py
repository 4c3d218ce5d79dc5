"""Command `python -m dreambooth.workflows`: writes workflow files from conf/, checks or submits them.

`render` writes the files for Kubernetes, Slurm, SkyPilot and SageMaker, `check` reports files that differ from conf/,
`submit` submits a workflow to a cluster or to SageMaker. Heavy libraries such as torch are not imported.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dreambooth import __version__, cli
from dreambooth.cloud import sagemaker_pipeline, sagemaker_submit, sagemaker_tuner
from dreambooth.cloud.pipeline_requests import SageMakerSpec
from dreambooth.config.compose import search_space
from dreambooth.config.evaluate import require_one_objective
from dreambooth.config.recipe import resolve
from dreambooth.entrypoint import compose_run
from dreambooth.errors import UserError
from dreambooth.kubernetes import submit, trainjob
from dreambooth.kubernetes.render import HEADER, dump_yaml, render_files
from dreambooth.kubernetes.workflow_spec import WorkflowSpec
from dreambooth.schedulers import skypilot, slurm
from dreambooth.utils.atomic_files import check_writable
from dreambooth.utils.plurals import counted

FOLDER = Path("workflows")
PIPELINE_FILE, TUNER_FILE = "sagemaker/pipeline.json", "sagemaker/tuning-job.json"
DEFAULT_SPACE = "subject"
DEFAULT_IMAGE = f"dreambooth:{__version__}"
PHOTO_OVERRIDES = ("dataset=s3", "dataset.instance_dir=s3://BUCKET/photos",
                   "dataset.instance_prompt=a photo of a zwx dog", "dataset.class_prompt=a photo of a dog")
DEFAULT_OVERRIDES = ("hardware=g4dn", *PHOTO_OVERRIDES)
DEMO_OVERRIDES = ("hardware=cpu",)  # the demo in the package; it tests a cluster without photos and GPUs
OVERLAYS = {  # overrides, search space and suffix of the image tag, by name of the overlay
    "g4dn": (DEFAULT_OVERRIDES, "subject", ""), "g5": (("hardware=g5", *PHOTO_OVERRIDES), "subject", ""),
    "cpu": (DEMO_OVERRIDES, "tiny", "-cpu")}
KUEUE_OVERLAY, KUEUE_PRIORITY = "kueue", "dreambooth"  # the default machine, with pods that wait in a queue of Kueue


def build_spec(
    overrides: Sequence[str] = DEFAULT_OVERRIDES, space: str = DEFAULT_SPACE, image: str = DEFAULT_IMAGE
) -> WorkflowSpec:
    """Return the values from which workflow files are rendered, without kustomize overlays.

    Raises:
        UserError: Hydra cannot compose the overrides, or the overrides break a rule.
    """
    config, run_dir = compose_run(list(overrides))
    resolve(config, run_dir)
    require_one_objective(config.evaluate.objective)
    search = search_space(space).without_overridden(overrides)
    return WorkflowSpec(tuple(overrides), search, config.hardware, image, config.name)


def build_shipped_spec() -> WorkflowSpec:
    """Return the values from which the committed workflow files are rendered, including all kustomize overlays."""
    overlays = {name: build_spec(overrides, space, DEFAULT_IMAGE + suffix)
                for name, (overrides, space, suffix) in OVERLAYS.items()}
    overlays[KUEUE_OVERLAY] = replace(build_spec(), queue=trainjob.DEFAULT_QUEUE, priority=KUEUE_PRIORITY)
    return replace(build_spec(), overlays=overlays)


def render_all(spec: WorkflowSpec) -> dict[str, str]:
    """Return the content of all files, by path relative to workflows/.

    For hardware that SageMaker does not have, such as hardware=cpu, there is no tuning job.

    Raises:
        sagemaker_pipeline.MissingPackage: the SageMaker SDK is not installed.
    """
    own = to_sagemaker(spec)
    files = {PIPELINE_FILE: sagemaker_pipeline.render_pipeline(own)}
    if spec.hardware.instance_type:
        files[TUNER_FILE] = sagemaker_tuner.render_tuning_request(own)
    return render_portable(spec) | files


def render_portable(spec: WorkflowSpec) -> dict[str, str]:
    """Return the content of all files except those of SageMaker: for Kubernetes, Slurm and SkyPilot."""
    task = HEADER + dump_yaml([skypilot.build_task(spec)])
    return render_files(spec) | slurm.render_scripts(spec) | {skypilot.FILE: task}


def to_sagemaker(spec: WorkflowSpec) -> SageMakerSpec:
    """Return the inputs of SageMaker's workflow files."""
    return SageMakerSpec(spec.overrides, spec.space, spec.hardware, spec.image)


def parser() -> cli.ArgumentParser:
    """Return the argument parser of `python -m dreambooth.workflows`."""
    command_line = cli.ArgumentParser(
        prog="python -m dreambooth.workflows", description=(__doc__ or "").split("\n")[0])
    commands = command_line.add_subparsers(dest="command", required=True)
    epilog = "arguments KEY=VALUE are overrides of every run; without any, those of the committed files are used"
    render = commands.add_parser("render", help="write the files", epilog=epilog)
    check = commands.add_parser("check", help="list the files that differ from conf/", epilog=epilog)
    send = commands.add_parser("submit", help="submit a workflow to a cluster or to SageMaker", epilog=epilog)
    for command in (render, check, send):
        command.add_argument("--space", default=DEFAULT_SPACE, help="search space, a file of conf/sweep")
        command.add_argument("--image", default=DEFAULT_IMAGE,
                             help="name under which nodes pull the image, such as REGISTRY/dreambooth:0.1.0")
        command.add_argument("--queue", help="LocalQueue of Kueue, in which pods with a GPU wait until all can start")
        command.add_argument("--priority", help="WorkloadPriorityClass of Kueue; needs --queue")
    for command in (render, check):
        command.add_argument("--to", type=Path, default=FOLDER, help="folder of the files")
    send.add_argument("--what", choices=(*submit.KINDS, *slurm.KINDS, *sagemaker_submit.KINDS),
                      default="sweep")
    send.add_argument("--namespace", default="dreambooth")
    send.add_argument("--name", help="name of the TrainJob, Experiment, Slurm job, pipeline or tuning job; Argo "
                      "generates its own")
    return command_line


def main() -> None:
    """Run the command and exit with its exit code."""
    options = cli.parse_with_overrides(parser())

    def job() -> None:
        if not options.overrides and (options.space != DEFAULT_SPACE or options.image != DEFAULT_IMAGE):
            raise UserError(f"--space and --image need overrides: type them after {options.command}, such as "
                            "hardware=cpu")
        if problem := _option_problem(options):
            raise UserError(problem)
        spec = (build_spec(options.overrides, options.space, options.image) if options.overrides
                else build_shipped_spec())
        spec = replace(spec, queue=options.queue, priority=options.priority)
        if options.command == "submit":
            if placeholders := [override for override in spec.overrides if "s3://BUCKET" in override]:
                raise UserError(f"{placeholders[0]} is a placeholder: type the overrides of your run after submit")
            if options.what in sagemaker_submit.KINDS:
                print(sagemaker_submit.submit(to_sagemaker(spec), options.what, options.name))
            elif options.what in slurm.KINDS:
                print(slurm.submit(spec, options.what, options.name))
            else:
                print(submit.submit(spec, options.what, options.namespace, options.name))
        elif options.command == "check":
            if not any(_list_files(options.to)):
                raise UserError(f"there are no workflow files in {options.to}: type --to DIR, the folder workflows of "
                                "a checkout, or python -m dreambooth.workflows render to write the files")
            if different := find_differences(render_all(spec), options.to):
                raise UserError(f"files that differ from conf/: {', '.join(different)}: "
                                "type python -m dreambooth.workflows render")
        else:
            try:
                files = render_all(spec)
            except sagemaker_pipeline.MissingPackage as error:
                files = render_portable(spec)
                print(f"dreambooth: the files in {options.to / 'sagemaker'} are left as they are: {error}",
                      file=sys.stderr)
            check_writable(options.to, "type --to DIR, a folder that you can write to")
            for name, text in files.items():
                (options.to / name).parent.mkdir(parents=True, exist_ok=True)
                (options.to / name).write_text(text, encoding="utf-8")
            print(f"{counted(len(files), 'file')} in {options.to}")

    cli.run_job(job, sweep=False)
    cli.exit_process()


def _option_problem(options: argparse.Namespace) -> str | None:
    """Return one sentence if an option would have no effect, otherwise None."""
    if options.priority and not options.queue:
        return "--priority is a priority in a queue of Kueue: type --queue NAME too"
    if options.queue and not options.overrides:
        return f"--queue needs overrides: type them after {options.command}, such as hardware=cpu"
    if options.queue and options.command == "submit" and options.what not in submit.QUEUED:
        return (f"--queue has no effect on --what {options.what}: type --what with one of "
                f"{', '.join(submit.QUEUED)}, or render with --queue and apply the WorkflowTemplates again")
    if options.command == "submit" and options.what in slurm.KINDS and options.image != DEFAULT_IMAGE:
        return f"--image has no effect on --what {options.what}: type export IMAGE=REGISTRY#NAME:TAG before the command"
    return None


def find_differences(files: dict[str, str], folder: Path) -> list[str]:
    """Compare the files of `folder` with `files`. Return the names of missing, different and unexpected files.

    Args:
        files: the expected content of each file, by name.
    """
    committed = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
                 for path in _list_files(folder)}
    return sorted(name for name in files.keys() | committed.keys() if files.get(name) != committed.get(name))


def _list_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in (".yaml", ".json", ".sbatch"))


if __name__ == "__main__":
    main()
