"""The door `python -m dreambooth.workflows`: workflow files for Kubernetes from conf/. Nothing heavy is imported here.

`render` writes them, `check` says whether they are what conf/ says, `submit` sends one to a cluster.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dreambooth import __version__, cli
from dreambooth.config.compose import search_space
from dreambooth.config.recipe import resolve
from dreambooth.entrypoint import composed
from dreambooth.errors import UserError
from dreambooth.kubernetes import submit
from dreambooth.kubernetes.render import rendered
from dreambooth.kubernetes.workflow_spec import Asked, Space

FOLDER = Path("workflows")
SPACE = "subject"
IMAGE = f"dreambooth:{__version__}"
PHOTOS = ("dataset=s3", "dataset.instance_dir=s3://BUCKET/photos", "dataset.instance_prompt=a photo of a zwx dog",
          "dataset.class_prompt=a photo of a dog")
DEFAULT = ("hardware=g4dn", *PHOTOS)
DEMO = ("hardware=cpu",)  # the shipped demo: shows that a cluster works before photos and cards are there
OVERLAYS = {"g4dn": (DEFAULT, "subject", ""), "g5": (("hardware=g5", *PHOTOS), "subject", ""),
            "cpu": (DEMO, "tiny", "-cpu")}  # overlay -> overrides, search space, ending of the image's tag


def asked(overrides: Sequence[str] = DEFAULT, space: str = SPACE, image: str = IMAGE) -> Asked:
    """What files are rendered from.

    Raises:
        UserError: the overrides do not compose, or break a rule.
    """
    config, run_dir = composed(list(overrides))
    resolve(config, run_dir)
    return Asked(tuple(overrides), Space(space, search_space(space)).without(overrides), config.hardware, image)


def shipped() -> Asked:
    """The committed files, overlays included."""
    machines = {name: asked(overrides, space, IMAGE + ending) for name, (overrides, space, ending) in OVERLAYS.items()}
    return replace(asked(), machines=machines)


def parser() -> argparse.ArgumentParser:
    """What `python -m dreambooth.workflows` understands."""
    found = argparse.ArgumentParser(prog="python -m dreambooth.workflows", description=(__doc__ or "").split("\n")[0])
    commands = found.add_subparsers(dest="command", required=True)
    words = "KEY=VALUE, a word each, are overrides of every run; none: those of the committed files"
    render = commands.add_parser("render", help="write the files", epilog=words)
    check = commands.add_parser("check", help="say which files are not what conf/ says", epilog=words)
    send = commands.add_parser("submit", help="send a workflow, TrainJob or Experiment to a cluster", epilog=words)
    for one in (render, check, send):
        one.add_argument("--space", default=SPACE, help="search space, a file of conf/sweep")
        one.add_argument("--image", default=IMAGE, help="where nodes find the image, such as REGISTRY/dreambooth:0.1.0")
    for one in (render, check):
        one.add_argument("--to", type=Path, default=FOLDER, help="folder of the files")
    send.add_argument("--what", choices=submit.KINDS, default="sweep")
    send.add_argument("--namespace", default="dreambooth")
    send.add_argument("--name", help="of the TrainJob or Experiment; Argo makes one up")
    return found


def main() -> None:
    """`python -m dreambooth.workflows`."""
    options = cli.with_overrides(parser())

    def job() -> None:
        if not options.overrides and (options.space != SPACE or options.image != IMAGE):
            raise UserError(f"--space and --image go with overrides: type them after {options.command}, such as "
                            "hardware=cpu")
        given = asked(options.overrides, options.space, options.image) if options.overrides else shipped()
        if options.command == "submit":
            if unfilled := [word for word in given.overrides if "s3://BUCKET" in word]:
                raise UserError(f"{unfilled[0]} is a placeholder: type the overrides of your run after submit")
            print(submit.submit(given, options.what, options.namespace, options.name))
        elif options.command == "check":
            if stale := differing(rendered(given), options.to):
                raise UserError(f"not what conf/ says: {', '.join(stale)}: type python -m dreambooth.workflows render")
        else:
            for name, text in rendered(given).items():
                (options.to / name).parent.mkdir(parents=True, exist_ok=True)
                (options.to / name).write_text(text, encoding="utf-8")
            print(f"{len(rendered(given))} files in {options.to}")

    cli.attempt(job, sweep=False)
    cli.leave()


def differing(texts: dict[str, str], folder: Path) -> list[str]:
    """The files that are missing, differ, or do not belong there."""
    there = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.yaml")}
    return sorted(name for name in texts.keys() | there.keys() if texts.get(name) != there.get(name))


if __name__ == "__main__":
    main()
