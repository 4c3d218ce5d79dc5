"""Command `python -m dreambooth.convert`: converts a single-file model to a diffusers folder, or a folder to a file.

Torch is imported only when the work of the command starts, so that --help is fast.
"""

from dataclasses import dataclass
from types import MappingProxyType

import hydra
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, to_aliased_dataclass
from dreambooth.config.section import Section, require
from dreambooth.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass
class Convert(Section):
    """Options of the command; conf/convert.yaml explains each key.

    The field of the key `in` is called `source`, because `in` is a Python keyword.
    """

    source: str | None = None
    out: str | None = None
    config: str | None = None
    vae: str | None = None
    with_vae: bool = True
    dtype: str | None = None
    prediction_type: str | None = None
    resolution: int | None = None
    title: str | None = None

    aliases = MappingProxyType({"in": "source"})

    def __post_init__(self) -> None:
        require("", {
            "dtype": (self.dtype in (None, "fp16", "bf16", "fp32"),
                      f"fp16, bf16 or fp32, or null to keep it, not {self.dtype}"),
            "prediction_type": (self.prediction_type in (None, *PREDICTION_TYPES),
                                f"epsilon or v_prediction, or null to detect it, not {self.prediction_type}"),
            "resolution": (self.resolution is None or (8 <= self.resolution <= 2048 and self.resolution % 8 == 0),
                           f"a multiple of 8 from 8 to 2048 pixels, or null, not {self.resolution}"),
        })


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="convert")
def convert(cfg: DictConfig) -> None:
    """Convert a single-file model to a diffusers folder, or a diffusers folder to a single file."""
    cli.run_job(lambda: _job(parse_options(cfg)), sweep=False)


def parse_options(cfg: DictConfig) -> Convert:
    """Return the options of the command, read from the configuration `cfg` that Hydra composed.

    Raises:
        UserError: a value has the wrong type, or breaks a rule of its field.
    """
    return to_aliased_dataclass(cfg, Convert)


def _job(options: Convert) -> None:
    if not options.source or not options.out:
        raise UserError("type in=MODEL.safetensors out=DIR, or in=DIR out=MODEL.safetensors")
    from dreambooth.models.loading import import_libraries
    from dreambooth.serialization.convert import convert as convert_model

    import_libraries()
    convert_model(options.source, options.out, config=options.config, vae=options.vae, with_vae=options.with_vae,
                  dtype=options.dtype, prediction_type=options.prediction_type, resolution=options.resolution,
                  title=options.title)


def main() -> None:
    """Run the console script `dreambooth-convert`."""
    cli.run_hydra(convert, Convert)
    cli.exit_process()


if __name__ == "__main__":
    main()
