"""Suggestions for misspelt names, such as keys, options and files."""

import difflib
from collections.abc import Iterable


def closest(name: str, choices: Iterable[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return the choices that a user most likely meant by `name`; an empty list if none is similar.

    Dotted keys are compared by their last parts: "seed" finds "train.seed" and "sample.seed", "train.max_step" finds
    "train.max_train_steps", and "prompt" finds "dataset.instance_prompt". A similar group decides:
    "caption.model" finds only "captions.model".

    Args:
        count: the highest number of choices to return.
        cutoff: the lowest similarity of a choice, from 0 to 1.
    """
    choices = list(dict.fromkeys(choices))
    group, _, last = name.rpartition(".")
    parts = {choice: choice.rpartition(".")[2] for choice in choices}
    longer = [choice for choice, part in parts.items() if part.endswith(f"_{last}")]
    if same := [choice for choice, part in parts.items() if part == last]:
        groups = [choice.rpartition(".")[0] for choice in same]
        near = difflib.get_close_matches(group, groups, n=1, cutoff=0.75) if group else []
        at_the_top = [] if group else [choice for choice in longer if "." not in choice]
        return [f"{near[0]}.{last}"] if near else [*at_the_top, *same][:count]
    if longer:
        return longer[:count]
    for candidates in ([choice for choice in choices if group and choice.startswith(f"{group}.")], choices):
        if similar := difflib.get_close_matches(last, [parts[choice] for choice in candidates], n=1, cutoff=cutoff):
            return [choice for choice in candidates if parts[choice] == similar[0]][:count]
    return []


def one_of(choices: Iterable[str]) -> str:
    """Return the choices as "a, b or c"."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last
