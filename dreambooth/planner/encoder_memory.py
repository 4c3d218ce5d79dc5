"""What looking at pictures takes of a device: a table, since a plan opens no encoder. No torch.

All encoders of a run are there together, fp32, and look at 16 pictures at a time (encoders.py). MOMENT is what
EfficientNet-Lite0 takes for such a batch, measured; the others take less (test).
"""

from dreambooth.config.evaluate import Evaluate
from dreambooth.planner.caching_allocator import MIB

WEIGHTS = {"efficientnet_lite0": 14 * MIB, "dino": 84 * MIB, "clip": 578 * MIB, "lpips": 10 * MIB}
MOMENT = 96 * MIB
BATCH = 16


def encoder_tensor_bytes(evaluate: Evaluate, resolution: int) -> list[int]:
    """Bytes of tensors that are there together while pictures of that many pixels a side are scored."""
    there = [*evaluate.encoders, *(["lpips"] if evaluate.lpips else [])]
    return [*(WEIGHTS[name] for name in there), BATCH * 3 * resolution**2 * 4, MOMENT]
