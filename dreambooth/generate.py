"""The door `python -m dreambooth.generate`: draws with what a run has made. Nothing heavy is imported here."""

from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dreambooth import door
from dreambooth.config import conf_dir
from dreambooth.errors import UserError
from dreambooth.section import Section, finite, require


@dataclass
class Generate(Section):
    """What to draw; see conf/generate.yaml."""

    run: str | None = None
    prompt: str | None = None
    num_images: int = 4
    batch_size: int = 4
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        require("", {
            "num_images": (self.num_images >= 1, f"1 or more, not {self.num_images}"),
            "batch_size": (self.batch_size >= 1, f"1 or more, not {self.batch_size}"),
            "seed": (0 <= self.seed < 2**63, f"from 0 to 2**63 - 1, not {self.seed}"),
            "num_inference_steps": (1 <= self.num_inference_steps <= 1000,
                                    f"from 1 to 1000, not {self.num_inference_steps}"),
            "guidance_scale": (self.guidance_scale is None or finite(self.guidance_scale, 0),
                               f"0 or more, not {self.guidance_scale}"),
        })


ConfigStore.instance().store(name="generate_schema", node=Generate, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="generate")
def generate(cfg: DictConfig) -> None:
    """One call: writes pictures and a grid."""
    door.attempt(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    try:
        ask: Generate = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    except ValueError as error:
        raise UserError(str(error)) from error
    from dreambooth import remote
    from dreambooth.draw import draw
    from dreambooth.model import import_libraries

    import_libraries()
    draw(remote.local(ask.run), prompt=ask.prompt, num_images=ask.num_images, batch_size=ask.batch_size, seed=ask.seed,
         num_inference_steps=ask.num_inference_steps, guidance_scale=ask.guidance_scale, out=ask.out)


def main() -> None:
    """Console script `dreambooth-generate`."""
    generate()
    door.leave()


if __name__ == "__main__":
    main()
