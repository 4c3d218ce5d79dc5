"""Convolutions of one pixel against matrix products: python benchmarks/pointwise.py [--repeats 15] [--write]

Forward and backward of every such layer of the tiny base at 64 px and of Stable Diffusion 1.5 at 256 px, with the
inputs that the UNet gives it (seen in a pass on fake tensors). Both ways alternate in one process; medians of wall
time. `dreambooth/models/pointwise_conv.py` leaves a layer with more than 8 output channels a pixel to the convolution:
marked *.
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
from speed_table import machine, put
from torch import nn

from dreambooth.config.compose import conf_dir, load
from dreambooth.config.recipe import resolve
from dreambooth.models import pointwise_conv as products
from dreambooth.models.loading import import_libraries
from dreambooth.planner.fake_cuda import fake_tensors
from dreambooth.planner.skeleton_models import blank

Layer = tuple[int, int, int]  # channels in, channels out, pixels of a side
MODELS = {"tiny": 64, "sd15": 256}  # name -> pixels of a side


def layers(model: str, pixels: int) -> Counter[Layer]:
    """How often the UNet has each layer."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = load(compose("config", [
            "hardware=cpu", f"model={model}", f"model.resolution={pixels}", "dataset.allow_drawings=true"]))
    found: Counter[Layer] = Counter()

    def see(module: nn.Conv2d, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        found[module.in_channels, module.out_channels, inputs[0].shape[-1]] += 1

    with fake_tensors():
        parts = blank(resolve(config, Path("runs/benchmark")))
        products.as_products(parts.unet)
        for module in parts.unet.modules():
            if isinstance(module, products.Pointwise):
                module.register_forward_hook(see)
        side = pixels // parts.vae_scale
        text = parts.conditions.blank_text(parts.encoders, 1)
        parts.conditions.predict(parts.unet, torch.empty(1, parts.latent_channels, side, side),
                                 torch.zeros(1, dtype=torch.long), text)
    return found


def measure(layer: Layer, count: int, repeats: int) -> tuple[float, float]:
    """Milliseconds of forward and backward for `count` pictures: as a convolution, as a product in any case."""
    before, after, side = layer
    plain, product = nn.Conv2d(before, after, 1), nn.Conv2d(before, after, 1)
    products.as_products(product)
    pixels, goal = torch.randn(count, before, side, side), torch.randn(count, after, side, side)
    seen: dict[nn.Module, list[float]] = {plain: [], product: []}
    limit, products.CHANNELS_A_PIXEL = products.CHANNELS_A_PIXEL, after
    for _ in range(repeats + 2):
        for module, times in seen.items():
            began = time.perf_counter()
            module(pixels.detach().requires_grad_()).backward(goal)
            times.append(1000 * (time.perf_counter() - began))
            module.zero_grad()
    products.CHANNELS_A_PIXEL = limit
    return median(seen[plain][2:]), median(seen[product][2:])


def rows(count: int, repeats: int) -> Iterator[str]:
    """A table: a line for each kind of layer, and what all of them take in a step."""
    yield "| UNet | channels | pixels | layers | convolution, ms | product, ms | quotient |"
    yield "|---|---|---|---|---|---|---|"
    for model, pixels in MODELS.items():
        total = [0.0, 0.0]
        for layer, number in sorted(layers(model, pixels).items()):
            plain, product = measure(layer, count, repeats)
            left = layer[1] > products.CHANNELS_A_PIXEL * layer[2] ** 2
            total = [total[0] + number * plain, total[1] + number * (plain if left else product)]
            yield (f"| {model} | {layer[0]} to {layer[1]} | {layer[2]} x {layer[2]}{' *' * left} | {number} | "
                   f"{plain:.2f} | {product:.2f} | {plain / product:.2f}x |")
        yield (f"| {model} | all, * as convolutions | | | {total[0]:.1f} | {total[1]:.1f} | "
               f"{total[0] / total[1]:.2f}x |")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--repeats", type=int, default=15)
    ask.add_argument("--rows", type=int, default=8, help="pictures at a time")
    ask.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    ask.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    import_libraries()
    found = [machine(given.threads), "", *rows(given.rows, given.repeats)]
    print("\n".join(found))
    if given.write:
        put("pointwise", found)


if __name__ == "__main__":
    main()
