"""The options of `python -m dreambooth.prepare`. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field
from types import MappingProxyType

from dreambooth.config.model_defaults import default_resolution, names
from dreambooth.config.section import Section, finite, require


@dataclass
class CaptionOptions(Section):
    """The model that writes captions."""

    model: str | None = None
    revision: str | None = None
    prompt: str | None = None
    max_tokens: int = 48
    overwrite: bool = False

    def __post_init__(self) -> None:
        require("captions", {"max_tokens": (1 <= self.max_tokens <= 1024, f"from 1 to 1024, not {self.max_tokens}")})


@dataclass
class MaskOptions(Section):
    """The model that segments the subject."""

    model: str | None = None
    revision: str | None = None
    text: str | None = None
    threshold: float = 0.5
    overwrite: bool = False

    def __post_init__(self) -> None:
        require("masks", {"threshold": (0 < self.threshold < 1, f"above 0 and below 1, not {self.threshold}")})


@dataclass
class FaceOptions(Section):
    """The model that finds faces."""

    model: str | None = None
    revision: str | None = None
    label: str = "face"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        require("faces", {"label": (bool(self.label.strip()), "a text such as face"),
                          "threshold": (finite(self.threshold, 0, 1), f"from 0 to 1, not {self.threshold}")})


@dataclass
class Prepare(Section):
    """Options of the command; conf/prepare.yaml explains each key.

    The field of the key `in` is called `source`, because `in` is a Python keyword.
    """

    source: str | None = None
    out: str | None = None
    trigger: str | None = None
    class_word: str | None = None
    base_model: str | None = None
    resolution: int | None = None
    similar: str = "keep"
    offline: bool = False
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    masks: MaskOptions = field(default_factory=MaskOptions)
    faces: FaceOptions = field(default_factory=FaceOptions)

    aliases = MappingProxyType({"in": "source"})

    def __post_init__(self) -> None:
        trigger, class_word = self.trigger, self.class_word
        require("", {
            "trigger": (trigger is None or (len(trigger.split()) == 1 and trigger.isprintable()
                                            and trigger == trigger.strip()),
                        f"one word without blanks, such as zwx, or null, not {trigger}"),
            "class_word": (class_word is None or (bool(class_word.strip()) and class_word.isprintable()),
                           f"what the subject is, such as dog, or null, not {class_word}"),
            "base_model": (self.base_model is None or self.base_model in names(),
                           f"one of {', '.join(names())}, or null, not {self.base_model}"),
            "resolution": (self.resolution is None or (8 <= self.resolution <= 2048 and self.resolution % 8 == 0),
                           f"a multiple of 8 from 8 to 2048 pixels, or null, not {self.resolution}"),
            "similar": (self.similar in ("keep", "drop"), f"keep or drop, not {self.similar}"),
        })

    @property
    def side(self) -> int:
        """Side in pixels of the square crop at which photos are judged: `resolution`, or that of `base_model`."""
        return self.resolution or default_resolution(self.base_model or "")

    @property
    def uses_models(self) -> bool:
        """Whether a network is needed for captions, masks or faces."""
        return bool(self.captions.model or self.masks.model or self.faces.model)

    @property
    def instance_prompt(self) -> str | None:
        """The prompt of a photo without a caption, such as "a photo of a zwx dog"; None without a trigger word."""
        if self.trigger is None:
            return None
        return f"a photo of a {self.trigger} {_one_line(self.class_word)}" if self.class_word else (
            f"a photo of {self.trigger}")

    @property
    def class_prompt(self) -> str | None:
        """The prompt of the class images, such as "a photo of a dog"; None without a class word."""
        return f"a photo of a {_one_line(self.class_word)}" if self.class_word else None


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
