"""What can be drawn with: a run, any diffusers folder, or a base beside which LoRAs are used."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.config.generate import Generate
from dreambooth.errors import UserError
from dreambooth.serialization.lora_files import DIFFUSERS
from dreambooth.utils.assets import asset


@dataclass(frozen=True)
class Source:
    """A diffusers model, and a run's own adapter if it has one."""

    folder: Path  # that was asked for
    model: str  # a folder, or a hub id
    own: str | None  # the run's adapter, not merged
    settings: dict[str, Any]  # of the run, as text; empty: it is no run
    base_typed: bool = False  # in place of the run's, of which the run then says nothing

    @property
    def revision(self) -> str | None:
        return self._of_base("model.revision")

    @property
    def variant(self) -> str | None:
        return self._of_base("model.variant")

    @property
    def vae(self) -> str | None:
        """In place of the base's: a folder, or a hub id."""
        other = self._of_base("model.vae")
        return asset(other) if other else None

    @property
    def zero_terminal_snr(self) -> bool:
        """The adapter was trained so, whichever base it is used beside."""
        return self.own is not None and self.settings.get("model.zero_terminal_snr") == "True"

    def setting(self, key: str) -> str | None:
        """A setting of the run as it was before run.json made it a text."""
        text = self.settings.get(key)
        return None if text in (None, "null") else str(text)

    def _of_base(self, key: str) -> str | None:
        return None if self.own is None or self.base_typed else self.setting(key)


def find(ask: Generate) -> Source:
    """The model that is asked for, and the settings of its run.

    Raises:
        UserError: there is none.
    """
    if not ask.run and not ask.base:
        raise UserError("the run is missing: type run=runs/NAME, a folder that python -m dreambooth.train made")
    if not ask.run:
        return Source(Path(), asset(ask.base or ""), None, {})
    folder = Path(ask.run)
    settings = _settings(folder)
    for model in (folder / "model", folder):
        own = str(model / DIFFUSERS) if (model / DIFFUSERS).is_file() else None
        if (model / "model_index.json").is_file() and not ask.base:
            return Source(folder, str(model), None, settings)
        base = ask.base or settings.get("model.source")
        if own and base:
            return Source(folder, asset(base), own, settings, base_typed=bool(ask.base))
        if own:
            raise UserError(f"{ask.run} holds an adapter and does not say of which model: type base=DIR, the model "
                            "that it was trained on")
        if ask.base and (model / "model_index.json").is_file():
            raise UserError(f"{ask.run} is a model of its own: type run=null to draw with base={ask.base}, or leave "
                            "base out")
    if (folder / "run.json").is_file():
        raise UserError(f"the run in {ask.run} is not finished: repeat its command first, "
                        "python -m dreambooth.train ...")
    raise UserError(f"there is no model in {ask.run}: type run=runs/NAME, a folder that "
                    "python -m dreambooth.train made")


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        return {}
    return settings
