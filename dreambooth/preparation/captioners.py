"""Models that describe a photo in words: BLIP, Florence-2 and Qwen-VL, loaded with transformers.

- BLIP: Li et al. 2022, arXiv:2201.12086. A prompt is the beginning of the caption.
- Florence-2: Xiao et al. 2024, arXiv:2311.06242. A prompt is one of its tasks, such as <CAPTION>.
- Qwen2-VL and its successors: Wang et al. 2024, arXiv:2409.12191. A prompt is an instruction.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from PIL import Image

from dreambooth.preparation.pretrained import Pretrained

EXAMPLES = "Salesforce/blip-image-captioning-base"
FLORENCE_TASK = "<DETAILED_CAPTION>"
QWEN_INSTRUCTION = "Describe this photo in one short sentence: the subject, what it does, and where it is."


class Captioner(Protocol):
    """The interface of a model that writes captions."""

    def describe(self, image: Image.Image) -> str:
        """Return a caption of an RGB image as one line; it may be empty."""


class _Generator:
    """Base class: generates text with a model of transformers, without random sampling."""

    def __init__(self, origin: Pretrained, prompt: str | None, max_tokens: int) -> None:
        """Args:
            origin: the model.
            prompt: see this file's docstring; None: the model's default.
            max_tokens: the highest number of tokens of a caption.
        """
        from transformers import AutoModelForImageTextToText

        self.origin, self.prompt, self.max_tokens = origin, prompt, max_tokens
        self.network: Any = origin.load_network(AutoModelForImageTextToText, half=True)
        self.network.generation_config.forced_eos_token_id = None  # it would hide that a caption is cut off

    def _generate(self, inputs: Any, tokenizer: Any, prompt_tokens: int = 0) -> str:
        """Return the text that the network generates.

        Args:
            inputs: the tensors of one image and its prompt, by name.
            prompt_tokens: tokens of the prompt at the start of the output, which are no part of the caption.
        """
        network = self.network
        placed = {name: value.to(network.device, network.dtype if value.is_floating_point() else value.dtype)
                  for name, value in inputs.items()}
        with torch.no_grad():
            tokens = network.generate(**placed, max_new_tokens=self.max_tokens, do_sample=False)[0][prompt_tokens:]
        text = " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
        return text if int(tokens[-1]) in tokenizer.all_special_ids else shorten(text)


class Blip(_Generator):
    """BLIP. BLIP-2 has the same interface."""

    def __init__(self, origin: Pretrained, prompt: str | None, max_tokens: int) -> None:
        from transformers import AutoProcessor

        super().__init__(origin, prompt, max_tokens)
        self.processor = origin.load(AutoProcessor)

    def describe(self, image: Image.Image) -> str:
        inputs = self.processor(images=image, text=self.prompt, return_tensors="pt") if self.prompt else (
            self.processor(images=image, return_tensors="pt"))
        return self._generate(inputs, self.processor.tokenizer)


class Florence2(_Generator):
    """Florence-2 in transformers' own format, such as florence-community/Florence-2-base."""

    def __init__(self, origin: Pretrained, prompt: str | None, max_tokens: int) -> None:
        from transformers import AutoProcessor

        super().__init__(origin, prompt or FLORENCE_TASK, max_tokens)
        self.processor = origin.load(AutoProcessor)

    def describe(self, image: Image.Image) -> str:
        inputs = self.processor(images=image, text=self.prompt, return_tensors="pt")
        return self._generate(inputs, self.processor.tokenizer)


class QwenVl(_Generator):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

    The parts of the processor are loaded one by one: the whole processor also reads videos, and needs torchvision for
    that.
    """

    def __init__(self, origin: Pretrained, prompt: str | None, max_tokens: int) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        super().__init__(origin, prompt or QWEN_INSTRUCTION, max_tokens)
        self.image_processor = origin.load(AutoImageProcessor, backend="pil")
        self.tokenizer = origin.load(AutoTokenizer)
        if not self.tokenizer.chat_template:
            raise origin.refuse("has no chat template in its tokenizer")

    def describe(self, image: Image.Image) -> str:
        pixels = self.image_processor(images=image, return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                  add_generation_prompt=True)
        image_token: int = self.network.config.image_token_id
        mark = self.tokenizer.convert_ids_to_tokens(image_token)
        count = int(pixels["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        inputs = dict(self.tokenizer(text.replace(mark, mark * count, 1), return_tensors="pt",
                                     add_special_tokens=False))
        inputs.pop("token_type_ids", None)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token).int()
        return self._generate(inputs | dict(pixels), self.tokenizer, inputs["input_ids"].shape[1])


KINDS: dict[str, type[Blip | Florence2 | QwenVl]] = {
    "blip": Blip, "blip-2": Blip, "florence2": Florence2, "qwen2_vl": QwenVl, "qwen2_5_vl": QwenVl, "qwen3_vl": QwenVl}


def open_captioner(origin: Pretrained, prompt: str | None, max_tokens: int) -> Captioner:
    """Load a model that writes captions. Arguments are as in `_Generator`.

    Raises:
        UserError: the model cannot be loaded, or is of another architecture.
    """
    kind = KINDS.get(model_type := origin.model_type())
    if kind is None:
        raise origin.refuse(f"is a model of the type {model_type}, and captions need one of {', '.join(KINDS)}")
    return kind(origin, prompt, max_tokens)


def shorten(text: str) -> str:
    """Return a text that was cut off in the middle, ended at its last sentence, clause or word.

    The end of a sentence or clause is used only if at least half of the text is before it.
    """
    for mark in (". ", ", "):
        if (end := text.rfind(mark)) >= len(text) / 2:
            return text[:end + (mark == ". ")]
    return text.rpartition(" ")[0] or text
