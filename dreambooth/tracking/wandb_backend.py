"""Weights & Biases: one W&B run per journal, online or, with WANDB_MODE=offline, in the folder `wandb` of the run."""

import os
import uuid
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.tracking.journal import is_line_start
from dreambooth.tracking.tensorboard_backend import read_image
from dreambooth.utils import atomic_files

STEP = "step"  # the key that all charts have as their x axis
OFFLINE = ("offline", "dryrun", "disabled")  # values of WANDB_MODE that need no account
SERVER = "https://api.wandb.ai"


class WandbBackend:
    """Sends the journal of a run to Weights & Biases.

    The file `wandb.json` holds the id of the W&B run, and the byte of the journal up to which entries were sent when
    the run was closed. A resumed run goes on in the same W&B run. If the process is killed, the entries since the last
    closing are sent again, because W&B does not tell which of them it has: a chart then has some points twice, but
    never a gap. Weights are not uploaded.

    Args:
        project: W&B's project, which is tracking.experiment.
        group: name of the sweep to which the run belongs; None: none.
    """

    name = "Weights & Biases"

    def __init__(self, run_dir: Path, project: str, run_name: str, group: str | None = None) -> None:
        self._run_dir, self._project, self._run_name, self._group = run_dir, project, run_name, group
        self._state_file = run_dir / "wandb.json"
        self._exit_code = 0

    def open(self) -> int:
        import wandb

        saved = atomic_files.read_object(self._state_file) or {}
        run_id, offset = saved.get("run_id"), saved.get("offset")
        if not isinstance(run_id, str) or not isinstance(offset, int):
            run_id, offset = uuid.uuid4().hex[:8], 0
        if not is_line_start(self._run_dir / "metrics.jsonl", offset):
            offset = 0
        self._run_id = run_id
        self._run: Any = wandb.init(
            project=self._project, id=run_id, name=self._run_name, group=self._group, dir=str(self._run_dir),
            resume="allow", settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True))
        self._run.define_metric("*", step_metric=STEP)
        self.flush(offset)
        self._save_state()
        return offset

    def write(self, entry: dict[str, Any]) -> None:
        import wandb

        moment = {"_timestamp": entry["time"] / 1000}
        if "metrics" in entry:
            self._run.log({**entry["metrics"], STEP: entry["step"], **moment})
        elif "image" in entry:
            image = wandb.Image(read_image(self._run_dir / entry["image"]))
            self._run.log({entry["key"]: image, STEP: entry["step"], **moment})
        elif "params" in entry:
            self._run.config.update(entry["params"], allow_val_change=True)
        elif "input" in entry:
            self._run.config.update({"dataset": entry["input"]}, allow_val_change=True)
        elif "tags" in entry:
            tags = dict(entry["tags"])
            self._run.notes = tags.pop("mlflow.note.content", self._run.notes)
            self._run.config.update({f"tags.{key}": value for key, value in tags.items()}, allow_val_change=True)
        elif "status" in entry:
            self._exit_code = int(entry["status"] not in ("RUNNING", "FINISHED"))

    def flush(self, offset: int) -> None:
        self._offset = offset

    def close(self) -> None:
        self._run.finish(exit_code=self._exit_code)
        self._save_state()

    def _save_state(self) -> None:
        atomic_files.write_json(self._state_file, {"run_id": self._run_id, "offset": self._offset})


def check_login() -> None:
    """Check that W&B will not ask for an API key.

    Raises:
        UserError: W&B has no key for its server, and is not offline.
    """
    from requests.utils import get_netrc_auth

    server = os.environ.get("WANDB_BASE_URL", SERVER)
    if os.environ.get("WANDB_MODE", "online") in OFFLINE or os.environ.get("WANDB_API_KEY") or get_netrc_auth(server):
        return
    raise UserError("Weights & Biases has no API key: type wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline "
                    "to write files for `wandb sync`")
