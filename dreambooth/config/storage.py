"""The section `storage` of the schema. No torch, no Hydra."""

from dataclasses import dataclass

from dreambooth.config.section import Section, require

SCHEME = "s3://"
SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def is_remote(path: str | None) -> bool:
    """Whether a path is a place in S3."""
    return (path or "").startswith(SCHEME)



def is_single(path: str | None) -> bool:
    """Whether a path names a model that is one file."""
    return (path or "").lower().endswith(SINGLE)


@dataclass
class Storage(Section):
    """S3: where a run's result goes, where what it reads from s3:// is kept."""

    upload: str | None = None
    checkpoints: bool = False
    cache: str = "runs/s3"
    parallel: int = 8

    def __post_init__(self) -> None:
        place = (self.upload or f"{SCHEME}b/p").removeprefix(SCHEME)
        require("storage", {
            "upload": (self.upload is None or (is_remote(self.upload) and all(place.partition("/")[::2])),
                       f"s3://BUCKET/FOLDER, or null for none, not {self.upload}"),
            "checkpoints": (not self.checkpoints or self.upload is not None, "false unless storage.upload says where"),
            "parallel": (1 <= self.parallel <= 64, f"from 1 to 64, not {self.parallel}"),
        })
