"""Finds the model to draw with: a run's, any diffusers folder, or the base of a run's adapter."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.config.generate import Generate
from dreambooth.errors import UserError
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.utils.assets import resolve_asset


@dataclass(frozen=True)
class Source:
    """A diffusers model, and a run's own adapter if it has one."""

    folder: Path  # of the run
    model: str  # a folder, or a hub id
    adapter: str | None  # the run's adapter, not merged
    settings: dict[str, Any]  # of the run, as texts; empty if there is no run
    base_typed: bool = False  # the user has typed another base than the run's, of which the settings say nothing

    @property
    def revision(self) -> str | None:
        return self._of_base("model.revision")

    @property
    def variant(self) -> str | None:
        return self._of_base("model.variant")

    @property
    def vae(self) -> str | None:
        """The VAE that replaces the base's: a folder or a hub id."""
        replacement = self._of_base("model.vae")
        return resolve_asset(replacement) if replacement else None

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the adapter was trained with a rescaled noise schedule; it then needs one beside any base."""
        return self.adapter is not None and self.settings.get("model.zero_terminal_snr") == "True"

    def setting(self, key: str) -> str | None:
        """Return a setting of the run; run.json stores None as the text null."""
        text = self.settings.get(key)
        return None if text in (None, "null") else str(text)

    def _of_base(self, key: str) -> str | None:
        return None if self.adapter is None or self.base_typed else self.setting(key)


def find_source(config: Generate) -> Source:
    """Find the model to draw with, and the settings of its run.

    Raises:
        UserError: there is none.
    """
    if not config.run and not config.base:
        raise UserError("the run is missing: type run=runs/NAME, a folder that python -m dreambooth.train made")
    if not config.run:
        return Source(Path(), resolve_asset(config.base or ""), None, {})
    folder = Path(config.run)
    settings = _read_settings(folder)
    for model in (folder / "model", folder):
        adapter = str(model / ADAPTER) if (model / ADAPTER).is_file() else None
        if (model / "model_index.json").is_file() and not config.base:
            return Source(folder, str(model), None, settings)
        base = config.base or settings.get("model.source")
        if adapter and base:
            return Source(folder, resolve_asset(base), adapter, settings, base_typed=bool(config.base))
        if adapter:
            raise UserError(f"{config.run} holds an adapter and does not say of which model: type base=DIR, the model "
                            "that it was trained on")
        if config.base and (model / "model_index.json").is_file():
            raise UserError(f"{config.run} is a model of its own: type run=null to draw with base={config.base}, or "
                            "leave base out")
    if (folder / "run.json").is_file():
        raise UserError(f"the run in {config.run} is not finished: repeat its command first, "
                        "python -m dreambooth.train ...")
    raise UserError(f"there is no model in {config.run}: type run=runs/NAME, a folder that "
                    "python -m dreambooth.train made")


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        return {}
    return settings
