"""Formats the report at the end of an Argo workflow: which stages failed, why, and what the user can do."""

import json
import re
from collections.abc import Iterator
from typing import Any

from dreambooth.kubernetes.argo import LOST_POD

ADVICE = {  # exit code -> explanation and advice
    "1": "wrong input, or an internal error: see its log",
    "3": "the run does not fit into GPU memory, host memory or the disk: see its log for advice",
    "4": "out of memory: see its log for advice",
    "5": "interrupted several times: submit the same workflow again to resume the run",
    "6": "the loss is no longer a number: lower train.learning_rate",
    "137": "killed, most likely because host memory ran out: use a larger instance",
}
LOST_ADVICE = "the pod was lost with its node several times: submit the same workflow again to resume the run"


def format_report(status: str, failures: str) -> Iterator[str]:
    """Yield the lines of the report: the workflow's status, then one line per failed pod.

    Args:
        status: Argo's `workflow.status`.
        failures: Argo's `workflow.failures`, a JSON string. If no stage failed, it may be null or not JSON.
    """
    yield f"the workflow ended: {status or 'without a status'}"
    try:
        pods = json.loads(failures)
        pods = json.loads(pods) if isinstance(pods, str) else pods  # Argo encodes the list twice
    except ValueError:
        pods = []
    for pod in pods or ():
        yield _format_failure(pod)


def _format_failure(pod: dict[str, Any]) -> str:
    message = str(pod.get("message", ""))
    match = re.search(r"exit code (\d+)", message)
    advice = LOST_ADVICE if re.search(f"{LOST_POD}|^pod deleted", message) else ADVICE.get(match[1] if match else "")
    return f"{pod.get('displayName', 'a stage')}: {message or 'failed'}" + (f" ({advice})" if advice else "")
