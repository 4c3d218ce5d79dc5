"""Short names of configuration keys, for titles of trials and axes of charts."""

from collections.abc import Iterable


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the short name of each key, by key: the last part of the key, such as learning_rate.

    If several keys have the same last part, their names are the whole keys.
    """
    last = {key: key.rpartition(".")[2] for key in keys}
    ends = list(last.values())
    return {key: name if ends.count(name) == 1 else key for key, name in last.items()}
