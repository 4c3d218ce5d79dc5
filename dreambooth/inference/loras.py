"""Finds and checks the LoRA files for generating pictures, and attaches them to a pipeline."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dreambooth.errors import UserError
from dreambooth.inference.attached_lokr import AttachedLoKr
from dreambooth.models import families
from dreambooth.models.adapters.factors import LoKr
from dreambooth.serialization import embedding_files, lora_files
from dreambooth.serialization.export_layout import ADAPTER, OLD_ADAPTER, check_intact, locate_adapter


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its name in the pictures' metadata, and its scale (1: as strong as in training; 0: no effect)."""

    path: Path
    name: str
    scale: float
    version: tuple[int, int] = (0, 0)  # time of the last change in nanoseconds, and size in bytes
    embeddings: tuple[tuple[str, Path, tuple[int, int]], ...] = ()  # word, file and its version, of new tokens
    is_lokr: bool = False  # whether it is a LoKr, see adapters/factors.py

    @property
    def has_changed(self) -> bool:
        """Whether a file is another one than when it was checked. A file that has gone has not changed."""
        files = (self.path, self.version), *((path, version) for _, path, version in self.embeddings)
        try:
            return any(_version(path) != version for path, version in files)
        except OSError:
            return False


def find_loras(sources: Sequence[str], scales: Sequence[float]) -> list[Lora]:
    """Find and check the LoRA file of each source.

    Args:
        sources: paths of run folders, other folders or files.
        scales: one scale per source.

    Raises:
        UserError: a source contains no LoRA; a LoRA file is damaged, cannot be read, or belongs to no supported model
            family; or diffusers would apply only a part of a LoRA.
    """
    return [_find_lora(Path(source), scale) for source, scale in zip(sources, scales, strict=True)]


class AttachedLoras:
    """The LoRAs that are attached to a pipeline. The weights of the base model do not change.

    At most `capacity` LoRAs stay attached, or as many as are used at a time if they are more. The least recently used
    LoRAs are detached first, which frees their memory.
    """

    def __init__(self, pipeline: Any, capacity: int) -> None:
        self._pipeline, self._capacity = pipeline, capacity
        # (path, version, occurrence in one call of `use`) -> name; last used last
        self._names: dict[tuple[Path, tuple[int, int], int], str] = {}
        self._lokrs: dict[str, AttachedLoKr] = {}  # by name; all other LoRAs are attached by diffusers
        self._used: tuple[tuple[str, float], ...] = ()  # (name, scale) of the LoRAs that the pipeline uses now
        self._count = 0  # LoRAs attached until now

    def __len__(self) -> int:
        return len(self._names)

    def use(self, loras: Sequence[Lora]) -> None:
        """Make the pipeline use exactly these LoRAs: attach those that are missing, and set the scales.

        Raises:
            UserError: a LoRA does not fit this base model.
        """
        keys = [(lora.path, lora.version, sum(other.path == lora.path for other in loras[:number]))
                for number, lora in enumerate(loras)]
        for key in keys:
            if key in self._names:
                self._names[key] = self._names.pop(key)
        missing = [(key, lora) for key, lora in zip(keys, loras, strict=True) if key not in self._names]
        self._detach([key for key in self._names if key not in keys][:max(
            0, len(self._names) + len(missing) - self._capacity)])
        for key, lora in missing:
            self._names[key] = self._attach(lora)
        used = tuple((self._names[key], lora.scale) for key, lora in zip(keys, loras, strict=True))
        scales = dict(used)
        for name, lokr in self._lokrs.items():
            lokr.scale = scales.pop(name, 0.0)
        if used != self._used and not scales:
            self._enable(False)
        elif used != self._used:
            self._enable(True)
            self._pipeline.set_adapters(list(scales), list(scales.values()))
        self._used = used

    def _attach(self, lora: Lora) -> str:
        name = f"lora{self._count}"  # not the file name: peft allows no dots
        self._count, self._used = self._count + 1, (("", 0.0),)  # diffusers now uses the new LoRA
        try:
            if lora.is_lokr:
                self._lokrs[name] = AttachedLoKr(self._pipeline, families.of_pipeline(self._pipeline), {
                    layer: adapter for layer, adapter in lora_files.read(lora.path).items()
                    if isinstance(adapter, LoKr)})
                return name
            self._enable(True)
            self._pipeline.load_lora_weights(lora.path.parent, weight_name=lora.path.name, adapter_name=name,
                                             local_files_only=True)
            if not any(name in attached for attached in self._pipeline.get_list_adapters().values()):
                raise ValueError("it has nothing for a layer of it")  # diffusers only warns
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
            with suppress(Exception):  # a part of the LoRA may be attached by diffusers
                self._pipeline.delete_adapters(name)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
            raise UserError(f"the LoRA {lora.path} does not fit this base ({reason}): type base=DIR, the model that "
                            "it was trained on") from error
        return name

    def _detach(self, keys: Sequence[tuple[Path, tuple[int, int], int]]) -> None:
        for key in keys:
            name = self._names.pop(key)
            if lokr := self._lokrs.pop(name, None):
                lokr.detach()
            else:
                self._pipeline.delete_adapters(name)

    def _enable(self, enabled: bool) -> None:
        """Enable or disable all attached LoRAs. A pipeline with disabled LoRAs draws as the base model does."""
        from diffusers.utils.peft_utils import set_adapter_layers

        for name in self._pipeline.get_list_adapters():
            set_adapter_layers(getattr(self._pipeline, name), enabled=enabled)


def _find_lora(source: Path, scale: float) -> Lora:
    path = locate_adapter(source)
    if path is None:
        raise UserError(f"there is no LoRA in {source}: type lora=FILE, a .safetensors file, or lora=runs/NAME of a "
                        "run with method=lora, dora, lokr or loha")
    if source.is_dir():
        check_intact(path.parent)
    try:
        version = _version(path)
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
        embeddings = tuple((word, file, _version(file)) for word, file in embedding_files.find(path).items())
    except (SafetensorError, OSError) as error:
        raise UserError(f"the LoRA {path} cannot be read ({error}): type lora=FILE, a .safetensors file") from error
    if any(key.endswith(".dora_scale") for key in keys):
        raise UserError(f"{path} is a DoRA in kohya's layout, of which diffusers would leave a part out: type "
                        f"lora=DIR, the folder with its {ADAPTER}")
    is_lokr = any(".lokr_" in key for key in keys)
    if any(".hada_w" in key for key in keys) or (is_lokr and any(key.endswith(".alpha") for key in keys)):
        raise UserError(f"{path} is a {'LoKr' if is_lokr else 'LoHa'} in kohya's layout, which is read by other "
                        f"programs only: type lora=DIR, the folder with its {ADAPTER}")
    if any(family.diffusers_lacks.match(key) for family in families.FAMILIES for key in keys):
        raise UserError(f"{path} is a LoRA in ComfyUI's layout, of which diffusers would leave a part out: type "
                        f"lora=DIR, the folder with its {ADAPTER}")
    return Lora(path, _name(path), scale, version, embeddings, is_lokr)


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _name(path: Path) -> str:
    """Return the name that a web UI would show for a LoRA: a file name without the suffix.

    A run exports its LoRA twice: as `path`, and as a file for web UIs in the folder `webui/` beside `path`. If the
    second file exists, its name is returned, otherwise the name of `path`.
    """
    webui_files = sorted((path.parent / "webui").glob("*.safetensors")) if path.name in (ADAPTER, OLD_ADAPTER) else []
    return (webui_files[0] if webui_files else path).stem
