"""The original key layout of Stable Diffusion 1.x, 2.x and SDXL: one file, as CompVis and Stability AI published it.

Each tensor of such a file is one tensor of a diffusers folder, or three that are stacked in it; `entries` pairs them by
name and say how they differ; single.py turns one side into the other and back, bit for bit. Sources: the modules and
attributes of CompVis/stable-diffusion, Stability-AI/generative-models and mlfoundations/open_clip. No torch.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Family(Enum):
    """Which layout."""

    sd1 = "sd1"
    sd2 = "sd2"
    sdxl = "sdxl"


PREFIX = {
    Family.sd1: {"text_encoder": "cond_stage_model."},
    Family.sd2: {"text_encoder": "cond_stage_model.model."},
    Family.sdxl: {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1.model."},
}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
V, ZERO = "v_pred", "ztsnr"  # empty tensors whose names alone say something: it predicts v; zero terminal SNR
EDM = "edm_"  # and names that begin so: noise as by Karras et al. 2022 (CosXL, Playground v2.5)
POSITIONS = "transformer.text_model.embeddings.position_ids"  # 0, 1, 2, ...: a constant that files of CLIP's hold
UNREAD = re.compile(  # in published files and not needed: averages beside, constants, what nothing is computed from
    r"(model_ema|first_stage_model\.(loss|model_ema))\..*|(\w+_)?alphas_cumprod(_prev)?|betas|posterior_\w+|logvar"
    r"|lvlb_weights|denoiser\.sigmas|.*\.(position_ids|logit_scale|attn_mask)|cond_stage_model\.model\.text_projection"
    r"|v_pred|ztsnr")


class Form(Enum):
    """How the two sides of an Entry differ."""

    plain = "plain"
    convolution = "convolution"  # a linear layer here, a convolution of 1 x 1 there
    stacked = "stacked"  # three here, one below the other there
    turned = "turned"  # transposed


@dataclass(frozen=True)
class Entry:
    """One tensor of the file and what it is in a folder."""

    original: str
    part: str  # unet, vae, text_encoder, text_encoder_2
    names: tuple[str, ...]  # in that part's state dict
    form: Form = Form.plain

    def shape(self, here: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape in the file, from the shapes of `names`."""
        match self.form:
            case Form.plain:
                return here[0]
            case Form.convolution:
                return (*here[0], 1, 1)
            case Form.stacked:
                return (sum(shape[0] for shape in here), *here[0][1:])
            case Form.turned:
                return here[0][::-1]


def entries(family: Family, part: str, names: Iterable[str], layers: int = 2) -> Iterator[Entry]:
    """The entries of one part.

    Args:
        names: of its state dict.
        layers: its `layers_per_block`; of UNet and VAE.
    """
    names = list(names)
    if part == "unet":
        attending = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions", name)}
        for name in names:
            yield Entry(UNET + _unet(name, layers, attending), part, (name,))
    elif part == "vae":
        blocks = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("decoder.up_blocks."))
        for name in names:
            linear = re.search(r"attentions\.0\.to_.*weight$", name)
            yield Entry(VAE + _vae(name, blocks), part, (name,), Form.convolution if linear else Form.plain)
    else:
        prefix, openclip = PREFIX[family][part], family is Family.sd2 or part == "text_encoder_2"
        for name in names:
            inner = name.removeprefix("text_model.")  # as older transformers called the inside
            if not openclip:
                yield Entry(f"{prefix}transformer.text_model.{inner}", part, (name,))
            elif inner == "text_projection.weight":
                yield Entry(f"{prefix}text_projection", part, (name,), Form.turned)
            elif ".k_proj." in inner or ".v_proj." in inner:
                continue  # with q_proj
            elif ".q_proj." in inner:
                three = tuple(name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv")
                yield Entry(prefix + _openclip(inner), part, three, Form.stacked)
            else:
                yield Entry(prefix + _openclip(inner), part, (name,))


RESIDUAL = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2"}


def _unet(name: str, layers: int, attending: set[str]) -> str:
    """A block's residual and attention layers take one place each, and its up- or downsampler the next."""
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if not found:
        return _begun(_residual(name) if ".resnets." in name else name, ENDS)
    side, block, kind, number, rest = found.groups()
    sampler = kind in ("downsamplers", "upsamplers")
    place = int(block) * (layers + 1) + (layers if sampler else int(number)) + (side == "down")
    slot = 1 if kind == "attentions" else 0
    if sampler and side == "up":
        slot = 1 + (block in attending)
    elif sampler:
        rest = rest.replace("conv.", "op.")
    return f"{'in' if side == 'down' else 'out'}put_blocks.{place}.{slot}." + (
        _residual(rest) if kind == "resnets" else rest)


def _residual(name: str) -> str:
    *before, layer, end = name.split(".")
    return ".".join([*before, RESIDUAL[layer], end])


ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae(name: str, blocks: int) -> str:
    """The decoder's blocks are counted from the picture there, from the latents here."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if found := re.fullmatch(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        side, block, kind, number, rest = found.groups()
        level = f"{side}.down.{block}" if side == "encoder" else f"{side}.up.{blocks - 1 - int(block)}"
        if kind == "resnets":
            return f"{level}.block.{number}.{rest}"
        return f"{level}.{kind.removesuffix('rs')}.{rest}"
    if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.*)", name):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
    if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.*)\.(\w+)", name):
        return f"{found[1]}.mid.attn_1.{ATTENTION[found[2]]}.{found[3]}"
    return name


LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
         "self_attn.out_proj": "attn.out_proj"}
OUTSIDE = {"embeddings.token_embedding.weight": "token_embedding.weight",
           "embeddings.position_embedding.weight": "positional_embedding",
           "final_layer_norm": "ln_final"}


def _openclip(name: str) -> str:
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
    if not found:
        return _begun(name, OUTSIDE)
    number, rest = found.groups()
    if rest.startswith("self_attn.q_proj."):
        return f"transformer.resblocks.{number}.attn.in_proj_{rest.rpartition('.')[2]}"
    return f"transformer.resblocks.{number}.{_begun(rest, LAYER)}"


def _begun(name: str, known: dict[str, str]) -> str:
    """The name with its beginning as the other side calls it."""
    for here, there in known.items():
        if name == here or name.startswith(here + "."):
            return there + name[len(here):]
    raise KeyError(name)


OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of a VAE's attention, once


def modern(key: str, known: Collection[str]) -> str:
    """A weight's name in a folder as libraries call it now."""
    before, _, end = key.rpartition(".")
    *outer, last = before.split(".")
    renamed = ".".join([*outer, OLD.get(last, last), end])
    for name in (key, key.removeprefix("text_model."), f"text_model.{key}", renamed):
        if name in known:
            return name
    return key
