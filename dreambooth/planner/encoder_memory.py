"""Models the memory of the evaluation's encoders with a table, because a plan loads no encoder.

All encoders of a run are on the device at the same time, in fp32, and process 16 images at a time
(evaluation/encoders.py). ACTIVATIONS is the measured peak memory of EfficientNet-Lite0's activations for 16 images. The
other encoders need less, which a test verifies. This file does not import torch.
"""

from dreambooth.config.evaluate import Evaluate
from dreambooth.planner.caching_allocator import MIB

WEIGHTS = {"efficientnet_lite0": 14 * MIB, "dino": 84 * MIB, "clip": 578 * MIB, "lpips": 10 * MIB}
ACTIVATIONS = 96 * MIB
BATCH_SIZE = 16


def encoder_tensor_bytes(evaluate: Evaluate, resolution: int) -> list[int]:
    """Return the sizes, in bytes, of the tensors that exist at the same time while images are scored.

    Args:
        resolution: side of the images in pixels.
    """
    encoders = [*evaluate.encoders, *(["lpips"] if evaluate.lpips else [])]
    return [*(WEIGHTS[name] for name in encoders), BATCH_SIZE * 3 * resolution**2 * 4, ACTIVATIONS]
