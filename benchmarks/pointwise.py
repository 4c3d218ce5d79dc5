"""Compares 1x1 convolutions with matrix products on a CPU: python benchmarks/pointwise.py [--repeats 15] [--write]

It measures the forward and backward pass of every 1x1 convolution of the tiny base at 64 px and of Stable Diffusion 1.5
at 256 px. A pass on fake tensors determines the sizes of their inputs. Both implementations alternate in one process,
and the table contains medians of wall time. `dreambooth/models/layers/pointwise_conv.py` uses matrix products, except
for layers with more than 8 output channels per pixel, which stay convolutions; the table marks these layers with *.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from speed_table import describe_machine, write_section
from torch import nn

from dreambooth.config.compose import conf_dir, load
from dreambooth.config.recipe import resolve
from dreambooth.models.layers import pointwise_conv
from dreambooth.models.loading import import_libraries
from dreambooth.planner.fake_cuda import fake_tensors
from dreambooth.planner.skeleton_models import build_skeleton

Layer = tuple[int, int, int]  # input channels, output channels, side in pixels
MODELS = {"tiny": 64, "sd15": 256}  # name -> side of an image in pixels


def count_layers(model: str, pixels: int) -> Counter[Layer]:
    """Count the 1x1 convolutions of each kind in the UNet."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = load(compose("config", [
            "hardware=cpu", f"model={model}", f"model.resolution={pixels}", "dataset.allow_drawings=true"]))
    layers: Counter[Layer] = Counter()

    def count(module: nn.Conv2d, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        layers[module.in_channels, module.out_channels, inputs[0].shape[-1]] += 1

    with fake_tensors():
        parts = build_skeleton(resolve(config, Path("runs/benchmark")))
        pointwise_conv.use_matrix_products(parts.denoiser)
        for module in parts.denoiser.modules():
            if isinstance(module, pointwise_conv.PointwiseConv2d):
                module.register_forward_hook(count)
        side = pixels // parts.vae_scale
        text = parts.blank_text(1)
        parts.predict(torch.empty(1, parts.latent_channels, side, side), torch.zeros(1, dtype=torch.long), text)
    return layers


def measure(layer: Layer, count: int, repeats: int) -> tuple[float, float]:
    """Measure a forward and backward pass for `count` images.

    Return the milliseconds as a convolution and as a matrix product.
    """
    channels_in, channels_out, side = layer
    plain, product = nn.Conv2d(channels_in, channels_out, 1), nn.Conv2d(channels_in, channels_out, 1)
    pointwise_conv.use_matrix_products(product)
    inputs, gradient = torch.randn(count, channels_in, side, side), torch.randn(count, channels_out, side, side)
    durations: dict[nn.Module, list[float]] = {plain: [], product: []}
    limit, pointwise_conv.MAX_CHANNELS_PER_PIXEL = pointwise_conv.MAX_CHANNELS_PER_PIXEL, channels_out
    for _ in range(repeats + 2):
        for module, times in durations.items():
            start = time.perf_counter()
            module(inputs.detach().requires_grad_()).backward(gradient)
            times.append(1000 * (time.perf_counter() - start))
            module.zero_grad()
    pointwise_conv.MAX_CHANNELS_PER_PIXEL = limit
    return median(durations[plain][2:]), median(durations[product][2:])


def table_rows(count: int, repeats: int) -> Iterator[str]:
    """Yield the rows of a Markdown table: one per kind of layer, and one with the time of all layers in a step."""
    yield "| UNet | channels | pixels | layers | convolution, ms | product, ms | quotient |"
    yield "|---|---|---|---|---|---|---|"
    for model, pixels in MODELS.items():
        total = [0.0, 0.0]
        for layer, number in sorted(count_layers(model, pixels).items()):
            plain, product = measure(layer, count, repeats)
            as_convolution = layer[1] > pointwise_conv.MAX_CHANNELS_PER_PIXEL * layer[2] ** 2
            total = [total[0] + number * plain, total[1] + number * (plain if as_convolution else product)]
            yield (f"| {model} | {layer[0]} to {layer[1]} | {layer[2]} x {layer[2]}{' *' * as_convolution} | "
                   f"{number} | {plain:.2f} | {product:.2f} | {plain / product:.2f}x |")
        yield (f"| {model} | all, * as convolutions | | | {total[0]:.1f} | {total[1]:.1f} | "
               f"{total[0] / total[1]:.2f}x |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8, help="images per batch")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import_libraries()
    rows = [describe_machine(options.threads), "", *table_rows(options.rows, options.repeats)]
    print("\n".join(rows))
    if options.write:
        write_section("pointwise", rows, "performance.md")


if __name__ == "__main__":
    main()
