"""The config group `method`: which weights are trained. Imports neither torch nor Hydra."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dreambooth.config.dataset import Dataset, Subject
from dreambooth.config.enums import BaseWeights, MethodKind, Targets
from dreambooth.config.section import Section, finite, require

WORD = re.compile(r"[^\W_]+(-[^\W_]+)*")  # the underscore separates the number of a further token, such as zwx_1


@dataclass
class Method(Section):
    """Which weights are trained: all of them (full), or a low-rank adapter (lora, dora).

    The fields after `kind` apply to adapters only.
    """

    name: str = "full"
    kind: MethodKind = MethodKind.full
    rank: int = 16
    alpha: float | None = None
    targets: Targets = Targets.transformer
    dropout: float = 0.0
    base_weights: BaseWeights = BaseWeights.half
    merge: bool = False
    new_tokens: int = 0
    trigger_word: str | None = None
    token_initializer: str | None = None
    token_learning_rate: float | None = None
    token_train_share: float = 1.0

    def __post_init__(self) -> None:
        require("method", {
            "rank": (1 <= self.rank <= 1024, f"from 1 to 1024, not {self.rank}"),
            "alpha": (self.alpha is None or (finite(self.alpha, 0) and self.alpha > 0),
                      f"above 0, or null for the rank, not {self.alpha}"),
            "dropout": (0 <= self.dropout < 1, f"in [0, 1), not {self.dropout}"),
            "new_tokens": (0 <= self.new_tokens <= 16, f"from 1 to 16, or 0 for none, not {self.new_tokens}"),
            "trigger_word": (self.trigger_word is None or bool(WORD.fullmatch(self.trigger_word)),
                             f"one word of letters, digits and hyphens, or null, not {self.trigger_word!r}"),
            "token_initializer": (self.token_initializer is None or bool(self.token_initializer.strip()),
                                  "a word of the base model such as dog, or null for random numbers"),
            "token_learning_rate": (
                self.token_learning_rate is None or (finite(self.token_learning_rate, 0)
                                                     and self.token_learning_rate > 0),
                f"above 0, or null for train.learning_rate, not {self.token_learning_rate}"),
            "token_train_share": (0 < self.token_train_share <= 1, f"in (0, 1], not {self.token_train_share}"),
        })

    @property
    def low_rank(self) -> bool:
        """Whether an adapter is trained and the base model is frozen."""
        return self.kind is not MethodKind.full

    @property
    def scale_alpha(self) -> float:
        """The value of `alpha`, or the rank if `alpha` is None."""
        return float(self.rank if self.alpha is None else self.alpha)


def rare_words(instance_prompt: str, class_prompt: str) -> list[str]:
    """Return the words of the instance prompt that the class prompt lacks, in lower case, such as ["zwx"]."""
    known = set(_words(class_prompt))
    return list(dict.fromkeys(word for word in _words(instance_prompt) if word not in known))


def trigger_word(method: Method, subject: Subject | Dataset) -> str | None:
    """Return the word of a subject's prompts that new tokens replace, in lower case; None: no or several candidates."""
    if method.trigger_word:
        return method.trigger_word.lower()
    words = rare_words(subject.instance_prompt or "", subject.class_prompt or "")
    return words[0] if len(words) == 1 else None


def prompt_problems(method: Method, subjects: Iterable[tuple[str, Subject | Dataset]]) -> Iterator[str]:
    """Yield a sentence for each subject whose prompts do not fit method.new_tokens.

    Args:
        subjects: the subjects with the prefixes of their keys.
    """
    for prefix, subject in subjects:
        instance, known = subject.instance_prompt or "", subject.class_prompt or ""
        if not instance.strip():
            continue  # reported with the data
        word = trigger_word(method, subject)
        if word is None:
            yield (f"method.new_tokens={method.new_tokens} replaces one rare word, and {instance!r} has none or "
                   f"several words that the class prompt {known!r} lacks: type method.trigger_word=zwx, the rare word")
        elif not has_word(instance, word):
            yield (f"the instance prompt {instance!r} does not have the word {word} that method.new_tokens replaces: "
                   f"type method.trigger_word=null, or {prefix}.instance_prompt with this word")
        elif has_word(known, word):
            yield (f"the class prompt {known!r} has the word {word} that method.new_tokens replaces, and class images "
                   "would train it away: type method.trigger_word=zwx with a word that the class prompt lacks")


def has_word(prompt: str, word: str) -> bool:
    """Return whether a prompt has a word. Upper and lower case are the same, as for CLIP's tokenizer."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) is not None


def _words(prompt: str) -> Iterable[str]:
    return (found[0] for found in WORD.finditer(prompt.lower()))
