"""Published speeds of GPUs, each with its source, and the GPU memory that a process needs outside PyTorch's allocator.

`cuda_overhead_gib` is the memory of a card that a process takes in addition to PyTorch's reserved memory: the CUDA
context, cuBLAS, cuDNN and the driver. The DreamBooth README of ShivamShrirao/diffusers (read 2026-11) publishes the
memory of nine configurations on a T4, in GB, here taken as 1e9 bytes. `cuda_overhead_gib` of the T4 is the published
memory minus the predicted reserved memory, averaged over the nine configurations. docs/planner.md shows a leave-one-out
check of this fit. For the other cards no such table is published, so they use the T4's value. This file does not import
torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Peak rates of a GPU: TFLOP/s in half precision (tensor cores, no sparsity) and in fp32, and memory GB/s.

    `source` names the publication of these figures. Public pages that quote the figures were read in 2026-11. The pages
    confirm the figures for the T4, the A100, the L4's fp32 rate and bandwidth, and the A10G's bandwidth. For the A10G
    the pages state 62.5 to 70 TFLOP/s in half precision and 31 to 35 in fp32. The L4's rate in half precision was not
    looked up.
    """

    name: str
    half_tflops: float
    fp32_tflops: float
    bandwidth_gb_s: float
    source: str
    cuda_overhead_gib: float = 0.74
    link_gb_s: float = 10.0  # between cards of one machine, in an all-reduce of gradients; PCIe, an assumption
    calibrated: bool = False  # True: time_and_cost.py was compared with published training speeds of this card
    overhead_seconds: float = 0.40  # per step, for kernel launches and small operators; fitted on the T4's speeds


CARDS = {
    "T4": Card("T4", 65.0, 8.1, 320.0, "NVIDIA T4 datasheet, 2019", calibrated=True),
    "A10G": Card("A10G", 70.0, 35.0, 600.0, "AWS EC2 G5 page and NVIDIA A10G datasheet, 2021"),
    "L4": Card("L4", 121.0, 30.3, 300.0, "NVIDIA L4 datasheet, 2023"),
    "L40S": Card("L40S", 362.0, 91.6, 864.0, "NVIDIA L40S datasheet, 2023", calibrated=True, overhead_seconds=0.0),
    "H100": Card("H100", 989.0, 67.0, 3350.0, "NVIDIA H100 datasheet (SXM), 2022", 0.74, 300.0, overhead_seconds=0.0),
    "H200": Card("H200", 989.0, 67.0, 4800.0, "NVIDIA H200 datasheet (SXM), 2024", 0.74, 300.0, overhead_seconds=0.0),
    "A100": Card("A100", 312.0, 19.5, 1555.0, "NVIDIA A100 datasheet (40 GB SXM), 2020", link_gb_s=200.0),
}


def find_card(gpu: str | None) -> Card | None:
    """Return the card with the name `gpu`; None if the card is unknown.

    Both the short name ("T4") and the name that a driver reports ("Tesla T4") are recognised.
    """
    words = (gpu or "").replace("-", " ").split()
    return next((card for name, card in CARDS.items() if name in words), None)


def cuda_overhead_gib(gpu: str | None) -> float:
    """Return the GiB of card memory that a process takes in addition to PyTorch's reserved memory.

    For an unknown card, return the value of the T4.
    """
    card = find_card(gpu)
    return card.cuda_overhead_gib if card else CARDS["T4"].cuda_overhead_gib
