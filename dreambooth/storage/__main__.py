"""The command `python -m dreambooth.storage`: uploads a folder to S3, or downloads a folder from S3."""

from argparse import Namespace
from pathlib import Path

from dreambooth import cli
from dreambooth.errors import UserError
from dreambooth.storage import folders
from dreambooth.storage.manifest import hash_folder
from dreambooth.utils.console import Console


def parser() -> cli.ArgumentParser:
    """Build the argument parser of `python -m dreambooth.storage`."""
    description = (folders.__doc__ or "").split("\n")[0]
    parser = cli.ArgumentParser(prog="python -m dreambooth.storage", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    upload = commands.add_parser("upload", help="upload a folder to S3, or continue an upload")
    upload.add_argument("folder", type=Path)
    upload.add_argument("uri", metavar="s3://BUCKET/PREFIX")
    upload.add_argument("--result", action="store_true", help="FOLDER is the result of a run: if the address has "
                        "another result, use ADDRESS.2, ADDRESS.3 and so on; do not send an equal model/ again")
    download = commands.add_parser("download", help="download a folder from S3 and print its path")
    download.add_argument("uri", metavar="s3://BUCKET/PREFIX")
    download.add_argument("folder", type=Path, help="parent of the new folder, whose name has a hash of its content")
    for command in (upload, download):
        command.add_argument("--parallel", type=int, default=folders.PARALLEL, help="number of parallel transfers")
    return parser


def main() -> None:
    """Run `python -m dreambooth.storage`."""
    cli.use_utf8()
    options = parser().parse_args()

    def job() -> None:
        if not 1 <= options.parallel <= 64:
            raise UserError(f"--parallel must be from 1 to 64, not {options.parallel}")
        if options.command == "upload":
            if not options.folder.is_dir():
                raise UserError(f"{options.folder} is not a folder: type a folder, then its S3 address")
            print(f"{upload(options)} is complete")
        else:
            print(folders.download(options.uri, options.folder, Console(), options.parallel))

    cli.run_job(job, sweep=False)
    cli.exit_process()


def upload(options: Namespace) -> str:
    """Upload a folder as `options` say, and return the S3 address to which it was uploaded.

    With --result, this is another address than `options.uri` if there is another result at `options.uri`.
    """
    if options.result:
        return folders.upload_with_fallback(options.folder, options.uri, hash_folder(options.folder), Console(),
                                            options.parallel, core="model/")
    folders.upload(options.folder, options.uri, Console(), options.parallel)
    return str(options.uri)


if __name__ == "__main__":
    main()
