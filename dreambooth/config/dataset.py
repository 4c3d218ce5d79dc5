"""The config group `dataset`: the subjects with their photos and prompts. Imports neither torch nor Hydra."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dreambooth.config.section import Section, require

ALPHA = "alpha"  # value of `mask`: the alpha channel of each photo is its mask
FOLDERS = ("instance_dir", "class_dir", "mask", "validation_dir")  # keys whose value may be a folder


@dataclass
class Subject:
    """One subject in the list `Dataset.concepts`. All fields except `repeats` have the same meaning as in Dataset.

    Attributes:
        repeats: how often each photo is used per epoch.
    """

    instance_dir: str | None = None
    instance_prompt: str | None = None
    class_dir: str | None = None
    class_prompt: str | None = None
    mask: str | None = None
    validation_dir: str | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        require("dataset.concepts", {"repeats": (self.repeats >= 1, f"1 or more, not {self.repeats}")})


@dataclass
class Dataset(Section):
    """The photos and prompts of one subject, or of several subjects in `concepts`."""

    name: str = "demo"
    instance_dir: str | None = None
    instance_prompt: str | None = None
    class_dir: str | None = None
    class_prompt: str | None = None
    mask: str | None = None
    validation_dir: str | None = None
    validation_count: int = 0
    concepts: list[Subject] = field(default_factory=list)
    center_crop: bool = True
    random_flip: bool = False
    buckets: bool = False
    prompt_dropout: float = 0.0
    allow_drawings: bool = False

    def __post_init__(self) -> None:
        require("dataset", {
            "validation_count": (self.validation_count >= 0, f"0 or more photos, not {self.validation_count}"),
            "prompt_dropout": (0 <= self.prompt_dropout < 1, f"from 0 to below 1, not {self.prompt_dropout}")})

    @property
    def subjects(self) -> list[Subject]:
        """All subjects: the items of `concepts`. If `concepts` is empty: one subject, made from the other fields."""
        return self.concepts or [
            Subject(self.instance_dir, self.instance_prompt, self.class_dir, self.class_prompt, self.mask,
                    self.validation_dir)]

    @property
    def holds_out_photos(self) -> bool:
        """Whether the run has photos that it does not train on, so that the loss on them can be measured."""
        return self.validation_count > 0 or any(subject.validation_dir for subject in self.subjects)

    @property
    def keyed_subjects(self) -> Iterator[tuple[str, "Subject | Dataset"]]:
        """One pair (prefix, subject) per subject.

        The keys of the subject begin with the prefix, such as dataset.concepts.0.
        """
        if self.concepts:
            yield from ((f"dataset.concepts.{number}", subject) for number, subject in enumerate(self.concepts))
        else:
            yield "dataset", self


def concept_problems(data: Dataset) -> Iterator[str]:
    """Yield one sentence per broken rule of dataset.concepts, the list of subjects.

    Two subjects must not have the same instance prompt. If the list is not empty, the keys that describe a single
    subject, such as dataset.instance_prompt, must be null.
    """
    if not data.concepts:
        return
    if unused := [key for key in ("instance_dir", "instance_prompt", "class_dir", "class_prompt", "mask",
                                  "validation_dir")
                  if getattr(data, key) is not None]:
        yield (f"dataset.concepts lists the subjects, and dataset.{unused[0]} belongs to none of them: type "
               f"dataset.{unused[0]}=null, or dataset.concepts=[]")
    prompts = [subject.instance_prompt for subject in data.concepts if subject.instance_prompt]
    for prompt in sorted({prompt for prompt in prompts if prompts.count(prompt) > 1}):
        yield (f"two subjects have the prompt {prompt!r} and would become one: type another word in "
               "dataset.concepts.1.instance_prompt")
