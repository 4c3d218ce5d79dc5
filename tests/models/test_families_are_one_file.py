"""Nothing outside models/families/ names a model family: adding one is then one file there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.models import families
from dreambooth.models.families.family import Family

ROOT = Path(__file__).parents[2]
HOME = ROOT / "dreambooth/models/families"
NAMES = re.compile("|".join([
    r"\bsd_?(1|2|15|21|xl|3)\b", r"\bsdxl", r"stable.?diffusion", r"\bflux\b",  # families, present and to come
    r"text_encoder_\d", r"tokenizer_\d", r"\.(unet|text_encoder)\b",  # parts, by their names
    r"\b(runwayml|compvis|stabilityai|sd2-community|madebyollin)\b",  # publishers
    r"UNet2DConditionModel|AutoencoderKL|CLIPTextModel|StableDiffusion\w*Pipeline",  # classes of parts
]), re.IGNORECASE)
# The one exception: a paragraph of prose may say which model a published figure was measured with.
MEASURED = re.compile(r"Stable Diffusion \d\.\d")
FIGURES = "docs/performance.md"


def sources() -> list[Path]:
    files = (path for folder in ("dreambooth", "hydra_plugins") for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in files if HOME not in path.parents)


def named_families(text: str) -> list[str]:
    """The lines that name a family, in code, strings, comments or docstrings."""
    hits = []
    for paragraph in re.split(r"\n\s*\n", text):
        if FIGURES in paragraph:
            paragraph = MEASURED.sub("", paragraph)
        hits += [line.strip() for line in paragraph.splitlines() if NAMES.search(line)]
    return hits


def test_nothing_outside_its_file_names_a_family() -> None:
    files = sources()
    assert len(files) > 100
    hits = {path.relative_to(ROOT).as_posix(): named_families(path.read_text("utf-8")) for path in files}
    assert {path: lines for path, lines in hits.items() if lines} == {}


@pytest.mark.parametrize("line", [
    'if name == "sdxl":', "parts.text_encoder_2 is not None", "pipeline.tokenizer_2", 'HUB = "runwayml/x"',
    "from diffusers import AutoencoderKL", "side = pipeline.unet.config.sample_size", "# SDXL has two encoders",
    "from dreambooth.models.families import sd1"])
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert named_families(f"first = 1\n{line}\n")


def test_a_figure_may_name_the_model_it_was_measured_with() -> None:
    figure = "A step of Stable Diffusion 1.5 takes 19 s (docs/performance.md)."
    assert not named_families(figure)
    assert named_families(f"{figure} SDXL takes longer.")
    assert named_families("A step of Stable Diffusion 1.5 takes 19 s.")


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.architecture)
def test_a_family_answers_everything(family: Family) -> None:
    """Each attribute of the interface has a value, and its model is registered everywhere."""
    for attribute in Family.__annotations__:
        assert getattr(family, attribute) is not None, attribute
    folder = ROOT / "dreambooth/assets/architectures" / family.architecture
    assert families.of_folder(folder) is family
    assert [families.architecture_of(name) for name in family.hub_ids] == [family.architecture] * len(family.hub_ids)
    assert (ROOT / f"conf/model/{family.architecture}.yaml").is_file()
    assert [each for each in families.FAMILIES if each.title == family.title] == [family]


def test_families_are_imported_without_torch() -> None:
    """The container asks them about hub ids in the small process before a run."""
    code = "import sys, dreambooth.models.families; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
