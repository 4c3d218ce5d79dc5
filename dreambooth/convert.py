"""The door `python -m dreambooth.convert`: a model in one file to a diffusers folder, and back. Nothing heavy is
imported here."""

from dataclasses import dataclass

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth import cli
from dreambooth.config.compose import asked, conf_dir
from dreambooth.config.section import Section, require
from dreambooth.errors import UserError

TYPES = ("epsilon", "v_prediction")


@dataclass
class Convert(Section):
    """What to convert; see conf/convert.yaml. `in` is a word of Python's: here it is `source`."""

    source: str | None = None
    out: str | None = None
    config: str | None = None
    vae: str | None = None
    with_vae: bool = True
    dtype: str | None = None
    prediction_type: str | None = None
    resolution: int | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        require("", {
            "dtype": (self.dtype in (None, "fp16", "fp32"), f"fp16 or fp32, or null for as it is, not {self.dtype}"),
            "prediction_type": (self.prediction_type in (None, *TYPES),
                                f"epsilon or v_prediction, or null for what the file says, not {self.prediction_type}"),
            "resolution": (self.resolution is None or (8 <= self.resolution <= 2048 and self.resolution % 8 == 0),
                           f"a multiple of 8 from 8 to 2048 pixels, or null, not {self.resolution}"),
        })


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="convert")
def convert(cfg: DictConfig) -> None:
    """One call: a file becomes a folder, or a folder a file."""
    cli.attempt(lambda: _job(read(cfg)), sweep=False)


def read(cfg: DictConfig) -> Convert:
    """What was asked for, checked.

    Raises:
        UserError: a value is of the wrong kind.
    """
    words = {("source" if key == "in" else str(key)): value for key, value in cfg.items()}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Convert), words)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    return asked(merged, Convert)


def _job(ask: Convert) -> None:
    if not ask.source or not ask.out:
        raise UserError("type in=MODEL.safetensors out=DIR, or in=DIR out=MODEL.safetensors")
    from dreambooth.models.loading import import_libraries
    from dreambooth.serialization.convert import convert as work

    import_libraries()
    work(ask.source, ask.out, config=ask.config, vae=ask.vae, with_vae=ask.with_vae, dtype=ask.dtype,
         prediction_type=ask.prediction_type, resolution=ask.resolution, title=ask.title)


def main() -> None:
    """Console script `dreambooth-convert`."""
    convert()
    cli.leave()


if __name__ == "__main__":
    main()
