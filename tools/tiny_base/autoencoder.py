"""Builds the VAE: the encoder is computed from the pictures, and the decoder is trained.

The encoder is the best linear code for patches of 4 x 4 pixels: it projects the 48 numbers of a patch onto 4 principal
components. The code is written into the weights of an ordinary AutoencoderKL as follows:

- The residual blocks return their input, and strided convolutions move pixels into channels.
- Each value is represented by a pair (+a, -a), because SiLU(x) - SiLU(-x) = x.
- Constant channels are so large that the normalisation before the last convolution is approximately linear.

The latents are therefore known before any training, and the UNet can be trained without waiting for the VAE.
"""

import math

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

PATCH, CODE = 4, 4  # side of a patch in pixels; numbers in the code of a patch
LARGE = 20.0  # value of the constant channels; the error of the linear approximation falls with its square
LOG_VARIANCE = -7.0  # log-variance of the latents: almost no noise


def patches(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Cut pictures (N, H, W, 3) of bytes into patches (N * H/4 * W/4, 48) in [-1, 1], ordered row, column, colour."""
    count, height, width, _ = pictures.shape
    cut = pictures.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return (cut.reshape(-1, PATCH * PATCH * 3) / 127.5 - 1).astype(np.float32)


def analytic(pictures: NDArray[np.uint8]) -> AutoencoderKL:
    """Build an AutoencoderKL whose encoder is the linear code of these pictures, and whose decoder is random."""
    sample = patches(pictures[::20]).astype(np.float64)
    mean = sample.mean(0)
    strengths, axes = np.linalg.eigh(np.cov((sample - mean).T))
    strengths, axes = strengths[::-1][:CODE], axes[:, ::-1][:, :CODE]
    matrix = torch.tensor((axes / np.sqrt(strengths) * np.array([1, 1, 1, 0.7])).T, dtype=torch.float32)  # (4, 48)
    offset = -matrix @ torch.tensor(mean, dtype=torch.float32)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=CODE, norm_num_groups=8,
        sample_size=64, mid_block_add_attention=False, scaling_factor=1.0)
    with torch.no_grad():
        _write_encoder(vae, matrix.view(CODE, PATCH, PATCH, 3), offset)
    return vae


def _write_encoder(vae: AutoencoderKL, matrix: Tensor, offset: Tensor) -> None:
    """Write the code `matrix @ patch + offset` into the encoder's weights."""
    encoder = vae.encoder
    _set_weights(encoder.conv_in, {(c, c, 1, 1): 1.0 for c in range(3)})
    for block in [*encoder.down_blocks, encoder.mid_block]:
        for residual in block.resnets:
            _pass_through(residual)
    first, second = (encoder.down_blocks[i].downsamplers[0].conv for i in (0, 1))
    _set_weights(first, {((2 * y + x) * 3 + c, c, y, x): 1.0 for y in range(2) for x in range(2) for c in range(3)})
    _write_code(second, matrix, offset)
    groups = 8  # channels per normalisation group of conv_norm_out
    nn.init.ones_(encoder.conv_norm_out.weight)
    nn.init.zeros_(encoder.conv_norm_out.bias)
    scale = math.sqrt(4 * LARGE**2 / groups)
    _set_weights(encoder.conv_out, {(k, _channel(k) + half, 1, 1): sign * scale
                             for k in range(CODE) for half, sign in enumerate((1, -1))})
    encoder.conv_out.bias[CODE:] = LOG_VARIANCE
    for convolution, size in ((vae.quant_conv, 2 * CODE), (vae.post_quant_conv, CODE)):
        _set_weights(convolution, {(i, i, 0, 0): 1.0 for i in range(size)})


def _write_code(convolution: nn.Conv2d, matrix: Tensor, offset: Tensor) -> None:
    """Write the linear code into a strided convolution, whose input channels are the pixels of a 2 x 2 block."""
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    for k in range(CODE):
        for half, sign in enumerate((1, -1)):
            for y in range(PATCH):
                for x in range(PATCH):
                    inner = ((y % 2) * 2 + x % 2) * 3
                    convolution.weight[_channel(k) + half, inner:inner + 3, y // 2, x // 2] = sign * matrix[k, y, x]
            convolution.bias[_channel(k) + half] = sign * offset[k]
    for group in range(2):
        for i, sign in enumerate((1, -1, 1, -1)):
            convolution.bias[8 * group + 4 + i] = sign * LARGE


def _channel(k: int) -> int:
    """Return the first channel of the pair (+a, -a) of the k-th number of the code.

    A normalisation group of eight channels contains two pairs and four constant channels.
    """
    return 8 * (k // 2) + 2 * (k % 2)


def _set_weights(convolution: nn.Conv2d, weights: dict[tuple[int, int, int, int], float]) -> None:
    """Set the given weights of a convolution, and all others and the bias to zero."""
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    for index, value in weights.items():
        convolution.weight[index] = value


def _pass_through(residual: nn.Module) -> None:
    """Make a residual block return its input."""
    nn.init.zeros_(residual.conv2.weight)
    nn.init.zeros_(residual.conv2.bias)
    if residual.conv_shortcut is not None:
        _set_weights(residual.conv_shortcut, {(i, i, 0, 0): 1.0 for i in range(residual.conv_shortcut.in_channels)})


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: NDArray[np.uint8], size: int = 64) -> Tensor:
    """Return the means of the latents (N, 4, 16, 16), without the scaling factor."""
    return torch.cat([vae.encode(pixels(pictures[i:i + size])).latent_dist.mean
                      for i in range(0, len(pictures), size)])


def pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """Convert pictures (N, H, W, 3) of bytes to (N, 3, H, W) in [-1, 1]."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(decoded: Tensor, real: Tensor) -> Tensor:
    """Return a weighted sum of absolute error, squared error, and absolute error of differences between neighbours.

    The last term preserves edges.
    """
    error = decoded - real
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio, in dB, of pictures that are encoded and decoded."""
    real = pixels(pictures)
    decoded = vae.decode(vae.encode(real).latent_dist.mean).sample.clamp(-1, 1)
    return 10 * math.log10(4 / (decoded - real).square().mean().item())


def tune_decoder(vae: AutoencoderKL, pictures: NDArray[np.uint8], latents: Tensor, steps: int, rate: float = 2e-3,
                 batch: int = 8) -> None:
    """Train the decoder, and set its weights to their EMA.

    The decoder is trained on slightly noisy latents, because the latents from a UNet are never exact.
    """
    vae.requires_grad_(False)
    trained = [p for name, p in vae.named_parameters() if name.startswith(("decoder", "post_quant"))]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    average = [p.detach().clone() for p in trained]
    rng, noise = np.random.default_rng(5), torch.Generator().manual_seed(5)
    spread = 0.03 * float(latents.std())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        chosen = rng.integers(0, len(pictures), batch)
        code = latents[chosen] + spread * torch.randn(latents[chosen].shape, generator=noise)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(code).sample
        loss = reconstruction_loss(decoded.float(), pixels(pictures[chosen]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in trained], 1 - min(0.995, (1 + step) / (10 + step)))
        if (step + 1) % 500 == 0:
            print(f"decoder {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        for parameter, mean in zip(trained, average, strict=True):
            parameter.copy_(mean)
