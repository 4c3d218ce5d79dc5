"""Finds the model for generating pictures: a run's model, any diffusers model, or the base model of a run's adapter."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreambooth.config.generate import Generate
from dreambooth.config.storage import is_remote
from dreambooth.errors import UserError
from dreambooth.models import hub
from dreambooth.serialization import export_layout
from dreambooth.serialization.export_layout import check_intact, find_adapter, read_run_name, read_settings
from dreambooth.storage import run_inputs
from dreambooth.utils import quoting
from dreambooth.utils.assets import resolve_asset


@dataclass(frozen=True)
class Source:
    """The model for generating pictures: a diffusers model and, if a run exported an adapter, the adapter."""

    folder: Path  # folder of the run; the current folder if there is no run
    model: str  # a diffusers folder or a hub id
    adapter: str | None  # path of the run's adapter file; None if the model needs none
    settings: dict[str, Any]  # settings of the run, as strings; empty if there is no run
    base_typed: bool = False  # whether `model` is a base model that the user typed; `settings` then do not describe it
    run: str = ""  # name of the run, if it is not the name of the folder: that of a registered model
    included_vae: str | None = None  # folder of the VAE that travels with a registered adapter

    @property
    def title(self) -> str:
        """The name of the model in the metadata of pictures: of the base model of an adapter, or of a run's folder."""
        return Path(self.model).name if self.adapter or self.base_typed else self.run or self.folder.name

    @property
    def revision(self) -> str | None:
        return self._of_base("model.revision")

    @property
    def variant(self) -> str | None:
        return self._of_base("model.variant")

    @property
    def vae(self) -> str | None:
        """A folder or hub id of the VAE that replaces the base model's own VAE; None to keep it."""
        replacement = self._of_base("model.vae")
        return (self.included_vae or resolve_asset(replacement)) if replacement else None

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the run trained an adapter with a noise schedule that was rescaled to zero terminal SNR.

        If so, pictures must be generated with the rescaled schedule, also with another base model.
        """
        return self.adapter is not None and self.settings.get("model.zero_terminal_snr") == "True"

    def setting(self, key: str) -> str | None:
        """Return the run's setting `key`, see `export_layout.setting`."""
        return export_layout.setting(self.settings, key)

    def _of_base(self, key: str) -> str | None:
        return None if self.adapter is None or self.base_typed else self.setting(key)


def find_source(config: Generate) -> Source:
    """Find the model that the options `run` and `base` describe, and the settings of the run.

    Raises:
        UserError: neither option names a model, the run has not exported a model, the model is damaged, or the options
            contradict each other.
    """
    source = _find_source(config)
    for folder in [Path(source.model)] + ([Path(source.adapter).parent] if source.adapter else []):
        check_intact(folder)
    return source


def fetch_base(source: Source, remedy: str = "type base=DIR", cache: str = "runs/s3") -> Source:
    """Download the base model of an adapter, or a typed base model, from S3 or the hub unless it is on this machine.

    Args:
        remedy: what the user can do if this fails; the end of the messages.
        cache: folder for downloads from S3.

    Returns:
        The source, in which a local folder replaces an S3 address.

    Raises:
        UserError: the base model is a folder that is not on this machine, or could not be downloaded.
    """
    base = source.model
    if source.adapter is None and not source.base_typed:
        return source
    if is_remote(base):
        return replace(source, model=str(run_inputs.download_if_remote(base, cache)))
    if hub.is_local(base):
        if not Path(base).is_dir():
            raise UserError(f"the base model {base} is not on this machine: {remedy}")
        return source
    try:
        hub.download_pipeline(base, source.revision, source.variant, hub.local_files_only(base, offline=False))
    except (OSError, ValueError) as error:
        raise UserError(f"the base model {base} could not be downloaded ({hub.failure_reason(error, base, False)}): "
                        f"{remedy}") from error
    return source


def _find_source(config: Generate) -> Source:
    if not config.run and not config.base:
        raise UserError("the run is missing: type run=runs/NAME, a folder that python -m dreambooth.train made")
    if not config.run:
        return Source(Path(), resolve_asset(config.base or ""), None, {}, base_typed=True)
    folder = Path(config.run)
    settings, run = read_settings(folder), read_run_name(folder)
    for model in (folder / "model", folder):
        adapter_file = find_adapter(model)
        adapter = str(adapter_file) if adapter_file else None
        if (model / "model_index.json").is_file() and not config.base:
            return Source(folder, str(model), None, settings, run=run)
        included = _included(model / "base")
        base = config.base or included or settings.get("model.source")
        if adapter and base:
            return Source(folder, resolve_asset(base), adapter, settings, bool(config.base), run,
                          _included(model / "base_vae"))
        if adapter:
            raise UserError(f"{config.run} holds an adapter and does not say of which model: type base=DIR, the model "
                            "that it was trained on")
        if config.base and (model / "model_index.json").is_file():
            raise UserError(f"{config.run} is a model of its own: type run=null to draw with "
                            f"{quoting.override('base', config.base)}, or "
                            "leave base out")
    if (folder / "run.json").is_file():
        raise UserError(f"the run in {config.run} is not finished: repeat its command first, "
                        "python -m dreambooth.train ...")
    raise UserError(f"there is no model in {config.run}: type run=runs/NAME, a folder that "
                    "python -m dreambooth.train made")


def _included(place: Path) -> str | None:
    """Return the only folder in `place`, or None: a model that travels with a registered adapter."""
    return next((str(path) for path in sorted(place.glob("*")) if path.is_dir()), None)
