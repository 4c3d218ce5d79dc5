"""The config group `method`: which weights are trained. Imports neither torch nor Hydra."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from math import sqrt
from typing import Any

from dreambooth.config.dataset import Dataset, Subject
from dreambooth.config.enums import BaseWeights, MethodKind, Targets
from dreambooth.config.section import Section, finite, require

WORD = re.compile(r"[^\W_]+(-[^\W_]+)*")  # the underscore separates the number of a further token, such as zwx_1
MAX_RANK, MAX_LOHA_RANK = 1024, 32  # a LoHa of rank r is a matrix of rank r * r
LYCORIS = (MethodKind.lokr, MethodKind.loha)  # the methods of Yeh et al. 2024, arXiv:2309.14859


@dataclass
class Method(Section):
    """Which weights are trained: all of them (full), or an adapter (lora, dora, lokr, loha).

    The fields after `kind` apply to adapters only.
    """

    name: str = "full"
    kind: MethodKind = MethodKind.full
    rank: int = 16
    alpha: float | None = None
    use_rslora: bool = False
    decompose_factor: int = -1
    decompose_both: bool = False
    targets: Targets = Targets.transformer
    target_modules: list[str] | None = None
    exclude_modules: list[str] = field(default_factory=list)
    rank_pattern: Any = None  # a dictionary from pattern to rank
    alpha_pattern: Any = None  # a dictionary from pattern to alpha
    dropout: float = 0.0
    base_weights: BaseWeights = BaseWeights.half
    merge: bool = False
    new_tokens: int = 0
    trigger_word: str | None = None
    token_initializer: str | None = None
    token_learning_rate: float | None = None
    token_train_share: float = 1.0

    def __post_init__(self) -> None:
        most = MAX_LOHA_RANK if self.kind is MethodKind.loha else MAX_RANK
        ranks = _is_table(self.rank_pattern, lambda rank: isinstance(rank, int) and 1 <= rank <= most)
        alphas = _is_table(self.alpha_pattern, lambda alpha: finite(alpha, 0) and alpha > 0)
        require("method", {
            "rank": (1 <= self.rank <= most, f"from 1 to {most}, not {self.rank}"),
            "alpha": (self.alpha is None or (finite(self.alpha, 0) and self.alpha > 0),
                      f"above 0, or null for the rank, not {self.alpha}"),
            "decompose_factor": (self.decompose_factor == -1 or 1 <= self.decompose_factor <= 1024,
                                 f"from 1 to 1024, or -1 for factors of about the same size, "
                                 f"not {self.decompose_factor}"),
            "target_modules": (self.target_modules is None or _are_patterns(self.target_modules),
                               "a list of patterns of layer names, such as [attn2.*], or null for all layers of "
                               "method.targets"),
            "exclude_modules": (not self.exclude_modules or _are_patterns(self.exclude_modules),
                                "a list of patterns of layer names, such as [unet.down_blocks.0.*]"),
            "rank_pattern": (ranks, f"like {{attn2.*:4}}, with ranks from 1 to {most}, or null, "
                             f"not {self.rank_pattern}"),
            "alpha_pattern": (alphas, f"like {{attn2.*:4}}, with numbers above 0, or null, not {self.alpha_pattern}"),
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

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor s of an adapter's output: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

        With alpha / sqrt(rank), the size of the output and of the gradients does not depend on the rank (Kalajdzievski
        2023, arXiv:2312.03732, theorem 3.2).
        """
        return alpha / (sqrt(rank) if self.use_rslora else rank)

    @property
    def chooses_layers(self) -> bool:
        """Whether patterns of names choose layers, ranks or scales."""
        return bool(self.target_modules or self.exclude_modules or self.rank_pattern or self.alpha_pattern)

    @property
    def changed_keys(self) -> list[str]:
        """The keys after `kind` whose values differ from the defaults."""
        default = Method(self.name, self.kind)
        return [f"method.{item.name}" for item in fields(self)
                if getattr(self, item.name) != getattr(default, item.name)]


def _is_table(table: Any, holds: Callable[[Any], bool]) -> bool:
    """Return whether `table` is None, or a dictionary from patterns to numbers for which `holds` is true."""
    if table is None:
        return True
    return isinstance(table, dict) and _are_patterns([*table]) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and holds(number) for number in table.values())


def _are_patterns(patterns: list[str]) -> bool:
    return bool(patterns) and all(isinstance(pattern, str) and pattern.strip() for pattern in patterns)


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
