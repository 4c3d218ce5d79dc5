"""What a workflow says at its end: which stages failed, in words, with what to do."""

import json
import re
from collections.abc import Iterator
from typing import Any

MEANING = {
    "1": "wrong input, or a fault: its log says which",
    "3": "the run does not fit the card, the host or the disk: its log says what to type",
    "4": "memory ran out: its log says what to type",
    "5": "interrupted again and again: submit the same workflow once more, and it goes on",
    "6": "the loss is no longer a number: a lower train.learning_rate",
    "137": "killed, most likely for want of host memory: a larger instance",
}


def told(status: str, failures: str) -> Iterator[str]:
    """The workflow's status, then a line a failed pod, from Argo's `workflow.failures`."""
    yield f"the workflow ended: {status or 'without a word'}"
    try:
        found = json.loads(failures)
        found = json.loads(found) if isinstance(found, str) else found  # Argo quotes it once more
    except ValueError:
        found = []
    for failure in found or ():
        yield _line(failure)


def _line(failure: dict[str, Any]) -> str:
    said = str(failure.get("message", ""))
    found = re.search(r"exit code (\d+)", said)
    code = found[1] if found else ""
    return f"{failure.get('displayName', 'a stage')}: {said or 'failed'}" + (
        f" ({MEANING[code]})" if code in MEANING else "")
