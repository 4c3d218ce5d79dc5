"""LPIPS (Zhang et al. 2018, arXiv:1801.03924), version 0.1 on AlexNet: the perceptual distance between two images.

This project does not contain the weights. docs/evaluate.md shows how to write them to a safetensors file with the
authors' package. The file has the keys of `lpips.LPIPS(net="alex").state_dict()`.
"""

from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, relu

from dreambooth.errors import UserError
from dreambooth.evaluation import metrics

CHANNELS = (64, 192, 384, 256, 256)
# Per convolution: index in AlexNet's `features`, input channels, kernel, stride, padding, whether max-pooling precedes.
_LAYERS = ((0, 3, 11, 4, 2, False), (3, 64, 5, 1, 2, True), (6, 192, 3, 1, 1, True), (8, 384, 3, 1, 1, False),
           (10, 256, 3, 1, 1, False))
# Mean and standard deviation of ImageNet for pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Computes LPIPS distances between images (N, 3, H, W) in [0, 1]."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for number, (index, *_) in enumerate(_LAYERS):
            layer = f"net.slice{number + 1}.{index}"
            self.register_buffer(f"kernel{number}", weights[f"{layer}.weight"])
            self.register_buffer(f"bias{number}", weights[f"{layer}.bias"])
            self.register_buffer(f"linear{number}", weights[f"lin{number}.model.1.weight"].flatten())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load the weights from a safetensors file.

        Raises:
            UserError: the file cannot be read, or does not contain the weights of LPIPS on AlexNet.
        """
        try:
            weights = load_file(path)
            wrong = [key for key, shape in weight_shapes().items() if key not in weights or weights[key].shape != shape]
        except (OSError, SafetensorError) as error:
            raise UserError(f"LPIPS weights could not be read from {path} ({error}): "
                            "type evaluate.lpips=FILE.safetensors, or evaluate.lpips=null") from error
        if wrong:
            raise UserError(f"{path} does not hold LPIPS on AlexNet (no {wrong[0]} of the right shape): "
                            "create the file as in docs/evaluate.md, or type evaluate.lpips=null")
        return cls(weights)

    @torch.no_grad()
    def distances(self, pixels: Tensor) -> Tensor:
        """Return the matrix (N, N) of the distances between every two of N images, fp64, on the CPU."""
        features = self.features(pixels.to(next(self.buffers()).device))
        matrix = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
        weights = [getattr(self, f"linear{number}") for number in range(len(_LAYERS))]
        for row in range(len(pixels) - 1):
            image = [layer[row:row + 1].expand(len(pixels) - row - 1, -1, -1, -1) for layer in features]
            matrix[row, row + 1:] = metrics.lpips(image, [layer[row + 1:] for layer in features], weights).cpu()
        return matrix + matrix.T

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Return five tensors (N, C, h, w): the output of each AlexNet convolution after its ReLU."""
        shift, scale = (torch.tensor(values).to(pixels).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        x = (2 * pixels - 1 - shift) / scale
        features = []
        for number, (_, _, _, stride, padding, pooled) in enumerate(_LAYERS):
            x = max_pool2d(x, 3, 2) if pooled else x
            x = relu(conv2d(x, getattr(self, f"kernel{number}"), getattr(self, f"bias{number}"), stride, padding))
            features.append(x)
        return features


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a file of LPIPS weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (index, inputs, kernel, *_) in enumerate(_LAYERS):
        layer, channels = f"net.slice{number + 1}.{index}", CHANNELS[number]
        shapes |= {f"{layer}.weight": (channels, inputs, kernel, kernel), f"{layer}.bias": (channels,),
                   f"lin{number}.model.1.weight": (1, channels, 1, 1)}
    return shapes
