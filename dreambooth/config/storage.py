"""The config group `storage`, and two functions that tell whether a path is in S3 or is a single-file model.

Imports neither torch nor Hydra.
"""

from dataclasses import dataclass

from dreambooth.config.section import Section, require

S3_SCHEME = "s3://"
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def is_remote(path: str | None) -> bool:
    """Return whether a path is an S3 address."""
    return (path or "").startswith(S3_SCHEME)


def is_s3_folder(path: str) -> bool:
    """Return whether a path is the S3 address of a folder in a bucket, not of a bucket alone."""
    bucket, _, folder = path.removeprefix(S3_SCHEME).partition("/")
    return is_remote(path) and bool(bucket) and bool(folder.strip("/"))


def is_single_file(path: str | None) -> bool:
    """Return whether a path has the suffix of a model in a single file, such as .safetensors."""
    return (path or "").lower().endswith(SINGLE_FILE_SUFFIXES)


@dataclass
class Storage(Section):
    """Settings of S3: the address to which the result of a run is uploaded, and the local cache of inputs from S3."""

    upload: str | None = None
    checkpoints: bool = False
    cache: str = "runs/s3"
    parallel: int = 8

    def __post_init__(self) -> None:
        require("storage", {
            "upload": (self.upload is None or is_s3_folder(self.upload),
                       f"s3://BUCKET/FOLDER, or null for none, not {self.upload}"),
            "checkpoints": (not self.checkpoints or self.upload is not None, "false unless storage.upload is set"),
            "parallel": (1 <= self.parallel <= 64, f"from 1 to 64, not {self.parallel}"),
        })
