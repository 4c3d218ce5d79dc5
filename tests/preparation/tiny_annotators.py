"""Tiny models that describe photos, of the architectures of published ones, with random weights and own tokenizers.

Each function fills a folder as `save_pretrained` does; the same every time. None needs torchvision.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dreambooth.utils.assets import resolve_asset

WORDS = ["What", "does", "the", "image", "describe?", "Describe", "in", "detail", "what", "is", "shown", "image.", "a",
         "toy", "dog", "on", "red", "table", "photo", "of"]
CLASSES = {0: "toy", 1: "dog", 2: "teddy bear", 3: "wall-other-merged"}


def word_tokenizer(*marks: str) -> Any:
    """A tokenizer that splits at blanks, with special tokens for the images."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", *WORDS, *(f"w{number}" for number in range(20))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": marks[0]})
    built.add_tokens(list(marks), special_tokens=True)
    return built


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(resolve_asset("package:tiny-sd"), subfolder="tokenizer")


CLIP_TEXT = {"vocab_size": 1803, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 1801, "eos_token_id": 1802,
             "pad_token_id": 1802}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SQUARE = {"height": 32, "width": 32}


def blip(folder: Path) -> None:
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS, *(f"w{number}" for number in range(20))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    text = SMALL | {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64,
                    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2, "projection_dim": 8}
    network = BlipForConditionalGeneration(BlipConfig(
        text_config=text, vision_config=SMALL | {"image_size": 32, "patch_size": 16}, projection_dim=8))
    _save(folder, network, BlipProcessor(BlipImageProcessorPil(size=SQUARE), BertTokenizer(str(folder / "vocab.txt"))))


def florence2(folder: Path) -> None:
    from transformers import (
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    tokenizer = word_tokenizer("<image>")
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
            "max_position_embeddings": 128, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": tokenizer.convert_tokens_to_ids("toy")}  # which the tied weights repeat
    vision = {"embed_dim": [8, 8, 8, 16], "depths": [1] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4,
              "window_size": 2, "projection_dim": 16, "max_temporal_embeddings": 4, "max_position_embeddings": 10}
    network = Florence2ForConditionalGeneration(Florence2Config(
        text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id))
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5  # 2 x 2 patches, and their mean
    _save(folder, network, Florence2Processor(images, tokenizer))


def qwen2_vl(folder: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
    tokenizer = word_tokenizer(*marks)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }} {% for part in message.content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant ")
    numbers = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                       tokenizer.convert_tokens_to_ids(list(marks[:4])), strict=True))
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "rope_parameters": rope,
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    network = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **numbers))
    _save(folder, network, tokenizer, Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4 * 28 * 28))


def clipseg(folder: Path) -> None:
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessorPil

    network = CLIPSegForImageSegmentation(CLIPSegConfig(
        text_config=CLIP_TEXT, vision_config=SMALL | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16, extract_layers=[0, 1], reduce_dim=8, decoder_num_attention_heads=2,
        decoder_intermediate_size=16))
    _save(folder, network, CLIPSegProcessor(ViTImageProcessorPil(size=SQUARE), clip_tokenizer()))


def mask2former(folder: Path) -> None:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    backbone = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    network = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=8, id2label=CLASSES,
        label2id={name: number for number, name in CLASSES.items()}))
    torch.nn.init.constant_(network.class_predictor.bias, 0)
    network.class_predictor.bias.data[0] = 9  # each query finds a toy
    _save(folder, network, Mask2FormerImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}))


def owlvit(folder: Path) -> None:
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil, OwlViTProcessor

    network = OwlViTForObjectDetection(OwlViTConfig(
        text_config=CLIP_TEXT, vision_config=SMALL | {"image_size": 32, "patch_size": 8}, projection_dim=16))
    _save(folder, network, OwlViTProcessor(OwlViTImageProcessorPil(size=SQUARE), clip_tokenizer()), factor=1)


def yolos(folder: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    network = YolosForObjectDetection(YolosConfig(
        **SMALL, image_size=[32, 32], patch_size=8, num_detection_tokens=4, id2label={0: "face", 1: "hat"},
        label2id={"face": 0, "hat": 1}))
    _save(folder, network, YolosImageProcessorPil(size=SQUARE), factor=1)


MAKERS = {maker.__name__: maker for maker in (blip, florence2, qwen2_vl, clipseg, mask2former, owlvit, yolos)}


def make(name: str, folder: Path) -> Path:
    """Fill `folder` with the model of this name, and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        MAKERS[name](folder)
    return folder


def remove_weight(folder: Path) -> None:
    """Remove one weight from a model, as in a file of another format."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path, metadata={"format": "pt"})


def retype(folder: Path, model_type: str) -> None:
    """Change the architecture that a model's configuration names."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))


def _save(folder: Path, network: Any, *processors: Any, factor: float = 8) -> None:
    with torch.no_grad():  # larger than transformers' initial weights, so that the output depends on the picture
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.mul_(factor)
    network.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
