"""`python -m dreambooth.storage`: upload a folder to S3, or download one."""

import argparse
from pathlib import Path

from dreambooth import cli
from dreambooth.errors import UserError
from dreambooth.storage import folders
from dreambooth.utils.console import Console


def parser() -> argparse.ArgumentParser:
    """What `python -m dreambooth.storage` understands."""
    description = (folders.__doc__ or "").split("\n")[0]
    found = argparse.ArgumentParser(prog="python -m dreambooth.storage", description=description)
    commands = found.add_subparsers(dest="command", required=True)
    up = commands.add_parser("upload", help="make a folder complete in S3")
    up.add_argument("folder", type=Path)
    up.add_argument("uri", metavar="s3://BUCKET/PREFIX")
    down = commands.add_parser("download", help="fetch a folder from S3 and say where it is")
    down.add_argument("uri", metavar="s3://BUCKET/PREFIX")
    down.add_argument("folder", type=Path, help="a folder is made in it, named by its content")
    for one in (up, down):
        one.add_argument("--parallel", type=int, default=folders.PARALLEL, help="transfers at a time")
    return found


def main() -> None:
    """`python -m dreambooth.storage`."""
    asked = parser().parse_args()

    def job() -> None:
        if not 1 <= asked.parallel <= 64:
            raise UserError(f"--parallel must be from 1 to 64, not {asked.parallel}")
        if asked.command == "upload":
            if not asked.folder.is_dir():
                raise UserError(f"{asked.folder} is no folder: type a folder, then the place in S3")
            folders.upload(asked.folder, asked.uri, Console(), asked.parallel)
            print(f"{asked.uri} is complete")
        else:
            print(folders.download(asked.uri, asked.folder, Console(), asked.parallel))

    cli.attempt(job, sweep=False)
    cli.leave()


if __name__ == "__main__":
    main()
