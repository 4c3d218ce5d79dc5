"""The config group `dataset`: the subjects, their photos and words. No torch, no Hydra."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dreambooth.config.section import Section, require

ALPHA = "alpha"  # the value of a mask that means the photo's own transparency
FOLDERS = ("instance_dir", "class_dir", "mask")  # keys that may name a folder


@dataclass
class Subject:
    """One of the things that a run teaches."""

    instance_dir: str | None = None
    instance_prompt: str | None = None
    class_dir: str | None = None
    class_prompt: str | None = None
    mask: str | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        require("dataset.concepts", {"repeats": (self.repeats >= 1, f"1 or more, not {self.repeats}")})


@dataclass
class Dataset(Section):
    """The photos of the subject and the words they are bound to; or several subjects, in `concepts`."""

    name: str = "demo"
    instance_dir: str | None = None
    instance_prompt: str | None = None
    class_dir: str | None = None
    class_prompt: str | None = None
    mask: str | None = None
    concepts: list[Subject] = field(default_factory=list)
    center_crop: bool = True
    random_flip: bool = False
    buckets: bool = False
    prompt_dropout: float = 0.0
    allow_drawings: bool = False

    def __post_init__(self) -> None:
        require("dataset", {
            "prompt_dropout": (0 <= self.prompt_dropout < 1, f"from 0 to below 1, not {self.prompt_dropout}")})

    @property
    def subjects(self) -> list[Subject]:
        """What is taught: the concepts, or the one that the keys beside them describe."""
        return self.concepts or [
            Subject(self.instance_dir, self.instance_prompt, self.class_dir, self.class_prompt, self.mask)]

    @property
    def places(self) -> Iterator[tuple[str, "Subject | Dataset"]]:
        """Where the keys of each subject are typed, such as dataset.concepts.0, and what holds them."""
        if self.concepts:
            yield from ((f"dataset.concepts.{number}", subject) for number, subject in enumerate(self.concepts))
        else:
            yield "dataset", self
