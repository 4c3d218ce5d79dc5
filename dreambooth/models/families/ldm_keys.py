"""The original single-file format of latent diffusion models, as CompVis and Stability AI published it.

Each tensor of such a file corresponds to one tensor of a diffusers folder, or to three tensors that are stacked in the
file. `LdmFormat` maps the tensor names of folders to those of files. serialization/single_file.py converts the tensors
in both directions, bit for bit. The names in files come from the modules and attributes of CompVis/stable-diffusion,
Stability-AI/generative-models and mlfoundations/open_clip. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.errors import UserError
from dreambooth.models.families import clip_text
from dreambooth.models.families.file_format import Entry, Form, ModelFile, SingleFileFormat

if TYPE_CHECKING:
    from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# Names of empty tensors that carry information: the model predicts v; its noise schedule has zero terminal SNR.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
# Prefix of names in files of models that were trained with the noise of Karras et al. 2022 (CosXL, Playground v2.5).
EDM = "edm_"
POSITIONS = "transformer.text_model.embeddings.position_ids"  # 0, 1, 2, ...: a constant in files with CLIP
# Keys of published files that are not needed: averaged weights, constants, and tensors that the model does not use.
IGNORED = re.compile(
    r"(model_ema|first_stage_model\.(loss|model_ema))\..*|(\w+_)?alphas_cumprod(_prev)?|betas|posterior_\w+|logvar"
    r"|lvlb_weights|denoiser\.sigmas|.*\.(position_ids|logit_scale|attn_mask)|cond_stage_model\.model\.text_projection"
    r"|v_pred|ztsnr")


class LdmFormat(SingleFileFormat):
    """The original single-file format. A subclass defines the key prefixes of the text encoders of one family.

    It also defines what the files do not contain, such as the resolution of the published model.
    """

    denoiser_key = f"{UNET}input_blocks.0.0.weight"
    vae_prefix = VAE
    marks = frozenset({V_PREDICTION, ZERO_SNR})
    text_key: str  # prefix of text encoder keys that only files of this family have
    text_prefixes: Mapping[str, str]  # name of a text encoder -> prefix of its keys
    openclip: frozenset[str] = frozenset()  # names of the text encoders that are stored with OpenCLIP's keys
    side: int  # side, in pixels, of the published model's pictures
    architecture: str  # in ModelSpec metadata
    implementation: str  # in ModelSpec metadata

    def matches(self, names: frozenset[str]) -> bool:
        return self.denoiser_key in names and any(name.startswith(self.text_key) for name in names)

    def check(self, file: ModelFile) -> None:
        if any(name.startswith(EDM) for name in file.names):
            raise UserError(f"{file.path} was trained with noise of another kind (EDM, as CosXL and Playground v2.5), "
                            "which is not supported: type another file")

    def prediction_type(self, file: ModelFile) -> tuple[str, str]:
        kind = file.metadata.get("modelspec.prediction_type", "")
        return prediction_name(V_PREDICTION in file.names or kind == "v"), "its keys"

    def resolution(self, file: ModelFile, prediction_type: str, typed: bool) -> tuple[int, str]:
        return self.side, "its keys"

    def is_zero_terminal_snr(self, file: ModelFile) -> bool:
        return ZERO_SNR in file.names

    def entries(self, part: str, names: Iterable[str], config: Any) -> Iterator[Entry]:
        names = list(names)
        if part == "unet":
            yield from _unet_entries(part, names, config.layers_per_block)
        elif part == "vae":
            yield from _vae_entries(part, names)
        elif part in self.openclip:
            yield from _openclip_entries(part, names, self.text_prefixes[part])
        else:
            for name in names:
                key = f"{self.text_prefixes[part]}transformer.text_model.{clip_text.without_level(name)}"
                yield Entry(key, part, (name,))

    def is_ignored(self, key: str, encoders: Sequence[Any]) -> bool:
        return bool(IGNORED.fullmatch(key))

    def constants(self, encoders: Sequence[Any]) -> dict[str, Tensor]:
        """Return the position ids of the first text encoder, by their key. This encoder is a CLIP encoder."""
        import torch

        count = encoders[0].config.max_position_embeddings
        return {self.text_prefixes["text_encoder"] + POSITIONS: torch.arange(count)[None]}

    def marks_of(self, scheduler_config: Mapping[str, Any]) -> set[str]:
        kind = scheduler_config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"this model predicts {kind}, which a file of this layout cannot say: type in=DIR, a model "
                            "that predicts noise (epsilon) or v (v_prediction)")
        zero = bool(scheduler_config.get("rescale_betas_zero_snr"))
        return {mark for mark, holds in ((V_PREDICTION, kind == "v_prediction"), (ZERO_SNR, zero)) if holds}

    def modelspec(self, prediction_type: str) -> dict[str, str]:
        return {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": self.architecture,
                "modelspec.implementation": self.implementation,
                "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon"}


def prediction_name(v: bool) -> str:
    """Return the prediction_type of diffusers for a model that predicts v (if `v`) or noise (if not)."""
    return "v_prediction" if v else "epsilon"


# -- UNet -----------------------------------------------------------------------------------------------------------

RESIDUAL = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET_ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
             "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
             "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}


def _unet_entries(part: str, names: Sequence[str], layers_per_block: int) -> Iterator[Entry]:
    attending = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions", name)}
    for name in names:
        yield Entry(UNET + _unet_key(name, layers_per_block, attending), part, (name,))


def _unet_key(name: str, layers_per_block: int, attending: set[str]) -> str:
    """Return the single-file key of a UNet's weight.

    In a single file, the layers of all blocks are numbered in one sequence. A residual layer and the attention layer
    after it share one number; the upsampler or downsampler of the block has the next number.

    Args:
        name: the weight's name in a diffusers folder.
        attending: numbers of the up blocks that have attention.
    """
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if not match:
        return _replace_start(_residual_key(name) if ".resnets." in name else name, UNET_ENDS)
    side, block, kind, number, rest = match.groups()
    sampler = kind in ("downsamplers", "upsamplers")
    position = int(block) * (layers_per_block + 1) + (layers_per_block if sampler else int(number)) + (side == "down")
    slot = 1 if kind == "attentions" else 0
    if sampler and side == "up":
        slot = 1 + (block in attending)
    elif sampler:
        rest = rest.replace("conv.", "op.")
    return f"{'in' if side == 'down' else 'out'}put_blocks.{position}.{slot}." + (
        _residual_key(rest) if kind == "resnets" else rest)


def _residual_key(name: str) -> str:
    *before, layer, end = name.split(".")
    return ".".join([*before, RESIDUAL[layer], end])


# -- VAE ------------------------------------------------------------------------------------------------------------

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae_entries(part: str, names: Sequence[str]) -> Iterator[Entry]:
    blocks = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("decoder.up_blocks."))
    for name in names:
        linear = re.search(r"attentions\.0\.to_.*weight$", name)
        yield Entry(VAE + _vae_key(name, blocks), part, (name,), Form.convolution if linear else Form.plain)


def _vae_key(name: str, blocks: int) -> str:
    """Return the single-file key of a VAE's weight.

    In a single file, the numbers of the decoder's blocks start at the output picture. In a diffusers folder, they start
    at the latents.

    Args:
        name: the weight's name in a diffusers folder.
        blocks: number of the decoder's blocks.
    """
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if match := re.fullmatch(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        side, block, kind, number, rest = match.groups()
        level = f"{side}.down.{block}" if side == "encoder" else f"{side}.up.{blocks - 1 - int(block)}"
        if kind == "resnets":
            return f"{level}.block.{number}.{rest}"
        return f"{level}.{kind.removesuffix('rs')}.{rest}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.*)", name):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.*)\.(\w+)", name):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    return name


# -- OpenCLIP -------------------------------------------------------------------------------------------------------

OPENCLIP_LAYERS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                   "self_attn.out_proj": "attn.out_proj"}
OPENCLIP_ENDS = {"embeddings.token_embedding.weight": "token_embedding.weight",
                 "embeddings.position_embedding.weight": "positional_embedding",
                 "final_layer_norm": "ln_final"}


def _openclip_entries(part: str, names: Sequence[str], prefix: str) -> Iterator[Entry]:
    """Yield the entries of an OpenCLIP text encoder. OpenCLIP stacks the projections of queries, keys and values."""
    for name in names:
        inner = clip_text.without_level(name)
        if inner == "text_projection.weight":
            yield Entry(f"{prefix}text_projection", part, (name,), Form.transposed)
        elif ".k_proj." in inner or ".v_proj." in inner:
            continue  # part of the entry of q_proj
        elif ".q_proj." in inner:
            three = tuple(name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv")
            yield Entry(prefix + _openclip_key(inner), part, three, Form.stacked)
        else:
            yield Entry(prefix + _openclip_key(inner), part, (name,))


def _openclip_key(name: str) -> str:
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
    if not match:
        return _replace_start(name, OPENCLIP_ENDS)
    number, rest = match.groups()
    if rest.startswith("self_attn.q_proj."):
        return f"transformer.resblocks.{number}.attn.in_proj_{rest.rpartition('.')[2]}"
    return f"transformer.resblocks.{number}.{_replace_start(rest, OPENCLIP_LAYERS)}"


def _replace_start(name: str, replacements: Mapping[str, str]) -> str:
    """Return the name with its start replaced.

    Find the first key in `replacements` with which the name starts, and replace this start by the key's value.

    Raises:
        KeyError: the name starts with none of the keys.
    """
    for start, replacement in replacements.items():
        if name == start or name.startswith(start + "."):
            return replacement + name[len(start):]
    raise KeyError(name)
