"""tools/tiny_base: pictures, captions, the tokenizers, the computed encoder, and resuming."""

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.tiny_base import autoencoder, emoji, pictures, pretrain, tokenizer

ROOT = Path(__file__).parents[2]


def sprite(seed: int = 0) -> emoji.Sprite:
    rng = np.random.default_rng(seed)
    return emoji.Sprite("dog", "cartoon", rng.integers(0, 256, (emoji.SIDE, emoji.SIDE, 4), dtype=np.uint8))


def some_pictures(count: int) -> tuple[np.ndarray, list[pictures.Meaning]]:
    rng = np.random.default_rng(1)
    composed = [pictures.compose(sprite(i), rng) for i in range(count)]
    return np.stack([picture for picture, _ in composed]), [meaning for _, meaning in composed]


def test_captions_never_contain_a_word_that_is_reserved_for_subjects() -> None:
    rng = random.Random(0)
    meanings = [pictures.Meaning(concept, "cartoon", ground) for concept in emoji.concepts()
                for ground in ("white", "red", "beach")]
    used = {word for meaning in meanings for _ in range(20) for word in pictures.caption(meaning, rng).split()}
    assert not used & set(pictures.RESERVED) and used & set(pictures.RARE)


@pytest.mark.parametrize("ground", ["white", *pictures.COLOURS, *pictures.SCENES])
def test_every_background_gives_a_picture_and_a_caption(ground: str) -> None:
    picture, meaning = pictures.compose(sprite(), np.random.default_rng(0), ground)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and meaning.ground == ground
    assert pictures.caption(meaning, random.Random(0)).startswith("a ")


def test_the_encoder_is_the_linear_code_of_its_pictures() -> None:
    drawn, _ = some_pictures(40)
    vae = autoencoder.analytic(drawn)
    latents = autoencoder.encode(vae, drawn)
    inputs = torch.from_numpy(autoencoder.patches(drawn)).double()
    codes = latents.permute(0, 2, 3, 1).reshape(-1, autoencoder.CODE).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    best = torch.linalg.lstsq(inputs, codes, driver="gelsd").solution
    # GroupNorm divides by the root of (4 LARGE^2 + 2 a^2 + 2 b^2) / 8 in place of 4 LARGE^2 / 8: a code a is too small
    # by a share of (a^2 + b^2) / (4 LARGE^2), to first order.
    bound = 2 * float(codes.abs().max()) ** 3 / (4 * autoencoder.LARGE**2)
    assert float((inputs @ best - codes).abs().max()) < bound
    assert float(codes.std()) > 0.5


def test_rare_words_and_classes_are_single_tokens(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer.build(tmp_path)
    built = CLIPTokenizer.from_pretrained(tmp_path)
    for word in (*pictures.RARE, "toy", "dog", "beach"):
        assert len(built(word).input_ids) == 3, word
    assert built.model_max_length == tokenizer.LENGTH


def test_every_word_of_a_caption_is_one_token_of_the_chat_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.build_chat(tmp_path)
    built = AutoTokenizer.from_pretrained(tmp_path)

    def chat(text: str) -> list[str]:
        message = [{"role": "user", "content": text}]
        filled = built.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return built.convert_ids_to_tokens(built(filled).input_ids)

    assert type(built).__name__ == "Qwen2Tokenizer" and built.model_max_length == tokenizer.CHAT_LENGTH
    before, after = ["<|im_start|>", "user", "Ċ"], ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]
    assert chat("") == before + after
    assert chat("A photo of a zwx toy") == [*before, "a", "Ġphoto", "Ġof", "Ġa", "Ġzwx", "Ġtoy", *after]
    for word in (*pictures.RARE, "toy", "dog", "beach"):
        assert len(chat(word)) == len(chat(f"a {word}")) - 1 == len(chat("")) + 1, word


def test_the_shipped_flow_base_is_small_and_of_the_family_that_its_card_names() -> None:
    from dreambooth.models import families

    base = ROOT / "dreambooth/assets/tiny-flow"
    assert families.of_folder(base) is families.of_architecture("z_image")
    assert sum(path.stat().st_size for path in base.rglob("*") if path.is_file()) < 15e6
    assert json.loads((base / "tokenizer/tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"
    assert str(ROOT) not in "".join(path.read_text() for path in base.rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("kind, denoiser", [("unet", "unet"), ("flow", "transformer")])
def test_pretraining_continues_after_an_interruption(tmp_path: Path, kind: str, denoiser: str) -> None:
    drawn, meanings = some_pictures(30)
    vae = autoencoder.analytic(drawn)
    tokenizer.build(tmp_path / "tokenizer")
    tokenizer.build_chat(tmp_path / "tokenizer-flow")
    np.save(tmp_path / "latents.npy", autoencoder.encode(vae, drawn).numpy())
    (tmp_path / "meanings.json").write_text(json.dumps([asdict(meaning) for meaning in meanings]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
               "-m", "tools.tiny_base.pretrain", str(tmp_path), f"--kind={kind}"]
    subprocess.run([*command, "--steps=8"], cwd=ROOT, check=True)
    ran = subprocess.run([*command, "--steps=16"], cwd=ROOT, check=True, capture_output=True, text=True)
    suffix = pretrain.SUFFIX[kind]
    assert pretrain.saved_step(tmp_path / f"state{suffix}-0.safetensors") == 16, ran.stdout
    assert (tmp_path / f"trained{suffix}/{denoiser}/diffusion_pytorch_model.safetensors").is_file()
