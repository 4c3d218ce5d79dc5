"""Draws pictures: opens a model once, and turns requests into pictures and PNG files with metadata.

`python -m dreambooth.generate`, the server and the MLflow model draw with the same class, so that they draw the same
pictures.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.errors import Interrupted, UserError
from dreambooth.inference import loras, picture_request, png_metadata
from dreambooth.inference.lora_embeddings import AttachedEmbeddings
from dreambooth.inference.loras import AttachedLoras, Lora
from dreambooth.inference.model_sources import Source
from dreambooth.inference.picture_request import InvalidRequest, PictureRequest
from dreambooth.models.inference_memory import PLAIN, InferenceMemory
from dreambooth.models.pipeline import Sampler, generate_images, open_pipeline, sampling_scheduler, without_bar
from dreambooth.serialization.export_layout import read_settings

DEFAULT_GUIDANCE_SCALE = 7.5  # of a model without a run


@dataclass(frozen=True)
class RendererInfo:
    """Facts about the model of a renderer. All values can be written as JSON."""

    model: str  # name of the model, as in the metadata of pictures
    family: str
    sampler: str
    resolution: int  # side in pixels of a picture without a size
    guidance_scale: float  # of a picture without one
    multiple: int  # both sides of a picture must be multiples of it, in pixels
    own_adapter: str | None  # name of the adapter of the model itself


@dataclass(frozen=True)
class _Look:
    """What an adapter of a request decides: the LoRAs to use, and the settings of their run."""

    loras: tuple[Lora, ...]
    settings: Mapping[str, Any]  # settings of the run, as strings; empty if there is no run
    zero_terminal_snr: bool


class Renderer:
    """A model in memory that draws pictures. One thread at a time may use it.

    Attributes:
        info: facts about the model.
    """

    def __init__(self, source: Source, device: str, adapters: Mapping[str, Path] | None = None, max_adapters: int = 4,
                 *, used_loras: Sequence[Lora] | None = None, memory: InferenceMemory = PLAIN) -> None:
        """Open the model and attach its own LoRAs.

        Args:
            source: the model. If it is an adapter, requests that name no adapter are drawn with it.
            device: cpu or cuda.
            adapters: the adapters that requests may name; a path is a run folder, another folder or a file, as the
                option lora of generate. They are opened at the first request that names them.
            max_adapters: number of adapters that are kept in memory; the least recently used one is released first.
            used_loras: the LoRAs of requests that name no adapter; None: the adapter of `source`.
            memory: options that save GPU memory; planner/serving_plan.py chooses them.

        Raises:
            UserError: the model cannot be opened, or a LoRA does not fit it.
        """
        if used_loras is None:
            used_loras = loras.find_loras([source.adapter], [1.0]) if source.adapter else []
        self._source, self._paths = source, dict(adapters or {})
        self._own = _Look(tuple(used_loras), source.settings, source.zero_terminal_snr)
        self._looks: dict[str, _Look] = {}
        self._pipeline, self._family = open_pipeline(source.model, device, source.revision, source.variant, source.vae,
                                                     source.zero_terminal_snr, memory)
        self._schedulers = {source.zero_terminal_snr: self._pipeline.scheduler}
        capacity = max(1, max_adapters, len(used_loras))
        self._attached = AttachedLoras(self._pipeline, capacity)
        self._embeddings = AttachedEmbeddings(self._pipeline, self._family, capacity)
        self._attached.use(self._own.loras)
        self._embeddings.use(self._pipeline, self._own.loras)
        self._start: Image.Image | None = None
        self._strength: float | None = None
        self._side = self._family.native_side(getattr(self._pipeline, self._family.denoiser.name),
                                              self._pipeline.vae, self._pipeline.vae_scale_factor)
        plain = self._resolved(PictureRequest("-"))
        self.info = RendererInfo(
            source.title, self._family.title, self._family.sampler_title, int(plain.width or 0),
            float(plain.guidance_scale or 0.0), self._family.side_multiple(self._pipeline),
            self._own.loras[0].name if source.adapter and self._own.loras else None)

    @property
    def loaded_adapters(self) -> int:
        """The number of LoRAs in memory."""
        return len(self._attached)

    def set_adapters(self, adapters: Mapping[str, Path]) -> None:
        """Replace the adapters that requests may name. An adapter with another path than before is opened anew."""
        self._looks = {name: look for name, look in self._looks.items() if adapters.get(name) == self._paths[name]}
        self._paths = dict(adapters)

    def start_from(self, picture: Image.Image, strength: float) -> None:
        """Draw all further pictures from a start picture of the model's resolution.

        Args:
            strength: the fraction of the denoising steps that are computed, in (0, 1].

        Raises:
            UserError: the model's family cannot do it.
        """
        self._pipeline = without_bar(self._family.image_to_image(self._pipeline))
        self._start, self._strength = picture, strength

    def check(self, request: PictureRequest) -> None:
        """Check a request against the model.

        Raises:
            InvalidRequest: the adapter is unknown, a side is no multiple of `info.multiple`, the prompt has more tokens
                than the model reads, or there is no adapter for the scale.
            UserError: the file of the adapter is damaged.
        """
        known = self._looks.get(request.adapter or "")
        if known and any(lora.has_changed for lora in known.loras):  # such as after a repeated run
            del self._looks[request.adapter or ""]
        look = self._look(request.adapter)
        if request.adapter_scale != 1.0 and not look.loras:
            raise InvalidRequest("adapter_scale is of an adapter: name one with adapter, or leave adapter_scale out")
        if request.width or request.height:
            size = self._size(self._resolved(request))
            multiple = self.info.multiple
            if any(side % multiple for side in size):
                choices = dict.fromkeys("x".join(str(max(multiple, (side + shift) // multiple * multiple))
                                                 for side in size) for shift in (0, multiple - 1))
                raise InvalidRequest(f"both sides must be multiples of {multiple} pixels for this model, and {size[0]}x"
                                     f"{size[1]} is not: the nearest sizes are {' and '.join(choices)}")
        tokenizers = self._embeddings.vocabulary(self._scaled_loras(request)).tokenizers
        for prompt in (request.prompt, request.negative_prompt or ""):
            try:
                self._family.check_prompt(tokenizers, prompt)  # the pipeline would cut a longer prompt
            except UserError as error:
                raise InvalidRequest(str(error)) from error

    def draw(self, requests: Sequence[PictureRequest], on_step: Callable[[int, int], bool] | None = None
             ) -> list[bytes]:
        """Draw one batch. Return one PNG file per request, with its settings as metadata.

        Arguments and errors are those of `pictures`.
        """
        return [self.png(request, picture) for request, picture in zip(
            requests, self.pictures(requests, on_step), strict=True)]

    def pictures(self, requests: Sequence[PictureRequest], on_step: Callable[[int, int], bool] | None = None
                 ) -> list[Image.Image]:
        """Draw one batch. Return one picture per request.

        Args:
            requests: requests with equal keys (`picture_request.batch_key`) that `check` accepts. A size that is
                absent and one that is the model's own are equal here.
            on_step: called after each denoising step with the number of completed steps and of all steps. It returns
                False to stop.

        Raises:
            Interrupted: `on_step` returned False.
            UserError: the adapter does not fit the model.
            Diverged: a picture is not finite.
        """
        request, *others = map(self._resolved, requests)
        if any(picture_request.batch_key(other) != picture_request.batch_key(request) for other in others):
            raise ValueError("the requests of one batch may differ in prompt and seed only")

        def step(done: int, total: int) -> None:
            if on_step is not None and not on_step(done, total):
                raise Interrupted(f"stopped after {done} of {total} steps")

        self._use(request)
        sampler = Sampler(request.num_inference_steps, float(request.guidance_scale or 0.0), self.info.resolution)
        try:
            return next(generate_images(
                self._pipeline, [one.prompt for one in requests], [one.seed for one in requests], sampler,
                len(requests), negative_prompt=request.negative_prompt, start=self._start,
                strength=self._strength or 1.0, size=self._size(request), on_step=step if on_step else None))
        except Exception:  # the pipeline itself does so only after the last step, and memory may have run out
            self._pipeline.maybe_free_model_hooks()
            raise

    def png(self, request: PictureRequest, picture: Image.Image, metadata: bool = True) -> bytes:
        """Return the PNG file of the picture of a request, with its settings as metadata."""
        settled = self._resolved(request)
        settings = {"num_inference_steps": settled.num_inference_steps, "sampler": self.info.sampler,
                    "guidance_scale": settled.guidance_scale, "negative_prompt": settled.negative_prompt,
                    "model": Path(self._source.model).name if settled.adapter else self.info.model,
                    "strength": self._strength}
        scales = [(lora.name, lora.scale) for lora in self._scaled_loras(settled)]
        file = io.BytesIO()
        picture.save(file, format="PNG", pnginfo=png_metadata.info(
            settled.prompt, settled.seed, picture.size, scales, settings) if metadata else None)
        return file.getvalue()

    def _look(self, adapter: str | None) -> _Look:
        """Return what a request's adapter decides; its files are checked at the first time.

        Raises:
            InvalidRequest: there is no adapter with this name.
            UserError: the adapter's file is missing or damaged, or needs another noise schedule than the model can use.
        """
        if adapter is None:
            return self._own
        if adapter not in self._paths:
            names = ", ".join(self._paths) or "none"
            raise InvalidRequest(f"there is no adapter {adapter!r}: the adapters of this model are {names}")
        if adapter not in self._looks:
            path = self._paths[adapter]
            settings = read_settings(path)
            zero_terminal_snr = settings.get("model.zero_terminal_snr") == "True"
            if zero_terminal_snr not in self._schedulers:
                if self._source.zero_terminal_snr:
                    raise UserError(f"the adapter {adapter} was trained without zero terminal SNR and the model itself "
                                    "with it: draw with their base model, base=DIR")
                self._schedulers[True] = sampling_scheduler(
                    self._schedulers[False].config, self._family, True, self._source.model)
            self._looks[adapter] = _Look(tuple(loras.find_loras([str(path)], [1.0])), settings, zero_terminal_snr)
        return self._looks[adapter]

    def _scaled_loras(self, request: PictureRequest) -> list[Lora]:
        return [replace(lora, scale=lora.scale * request.adapter_scale) for lora in self._look(request.adapter).loras]

    def _use(self, request: PictureRequest) -> None:
        """Attach the LoRAs of a request with their new tokens, and set the noise schedule they were trained with."""
        loras = self._scaled_loras(request)
        self._attached.use(loras)
        self._embeddings.use(self._pipeline, loras)
        self._pipeline.scheduler = self._schedulers[self._look(request.adapter).zero_terminal_snr]

    def _resolved(self, request: PictureRequest) -> PictureRequest:
        """Return the request with the model's defaults in place of None."""
        settings = self._look(request.adapter).settings
        side, guidance_scale = int(settings.get("model.resolution", self._side)), request.guidance_scale
        if guidance_scale is None:
            guidance_scale = float(settings.get("sample.guidance_scale", DEFAULT_GUIDANCE_SCALE))
        return replace(request, guidance_scale=guidance_scale, width=request.width or side,
                       height=request.height or side)

    @staticmethod
    def _size(request: PictureRequest) -> tuple[int, int]:
        return int(request.width or 0), int(request.height or 0)
