"""1x1 convolutions, computed as matrix products, which is faster on a CPU.

At every call of a convolution, oneDNN reorders the weights, pixels and gradients. A 1x1 convolution has little other
work. In the tiny base model, the forward and backward passes of a 1x1 layer with matrix products take one half to two
thirds of the time that they take with convolutions. In Stable Diffusion 1.5 at 256 px, all 1x1 layers together take a
tenth to a fifth less time (docs/performance.md).
"""

import torch
from torch import Tensor, nn

# A layer with more output channels per pixel remains a convolution. Measured: with matrix products, the gradient of its
# weights, which is computed per picture, takes too long.
MAX_CHANNELS_PER_PIXEL = 8


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that computes y = W x + b for every pixel as a matrix product.

    The matrix product adds the same terms as the convolution, in another order. Let u be the unit roundoff (2**-24 in
    fp32) and gamma_k = k u / (1 - k u). In either order, the rounding error of a sum of n products and a bias is at
    most gamma_(n + 1) (|W| |x| + |b|) (Higham 2002, eq. 3.5). The results therefore differ by at most twice this bound.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count, channels, height, width = input.shape
        if len(weight) > MAX_CHANNELS_PER_PIXEL * height * width:
            convolved: Tensor = super()._conv_forward(input, weight, bias)
            return convolved
        pixels, matrices = input.flatten(2), weight.view(1, -1, channels).expand(count, -1, -1)
        outputs = torch.bmm(matrices, pixels) if bias is None else torch.baddbmm(bias.view(-1, 1), matrices, pixels)
        return outputs.view(count, -1, height, width)


def use_matrix_products(model: nn.Module) -> None:
    """Make `model` compute its 1x1 convolutions as matrix products. The names of its weights do not change."""
    for module in model.modules():
        if type(module) is nn.Conv2d and (module.kernel_size, module.stride, module.padding, module.groups) == (
                (1, 1), (1, 1), (0, 0), 1):
            module.__class__ = PointwiseConv2d
