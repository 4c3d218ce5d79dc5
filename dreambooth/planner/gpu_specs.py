"""What is known of a card beside its memory, each figure with its source. No torch.

`fixed_gib` is what a process takes of a card beyond PyTorch's reserved memory: CUDA context, cuBLAS and cuDNN, driver.
It is fitted once, on the nine rows that ShivamShrirao/diffusers' DreamBooth README publishes for a T4 (GB taken as 1e9
bytes): the mean of published minus predicted reserved memory; docs/planner.md shows it with one row left out at a time.
No such table is published for the other cards; they are given the T4's constant.
"""

from dataclasses import dataclass

FIXED_SOURCE = "fitted on 9 published T4 rows (ShivamShrirao/diffusers README, read 2026-11)"


@dataclass(frozen=True)
class Card:
    """Peak rates are dense, without sparsity: TFLOP/s in half precision with tensor cores and in fp32; GB/s.

    `source` names where such figures are published. Public pages that quote them were read in 2026-11 and agree for the
    T4, the A100, the L4's fp32 rate and bandwidth and the A10G's bandwidth; of the A10G's rates they have 62.5 to 70
    and 31 to 35. The L4's rate in half precision was not looked up.
    """

    name: str
    half_tflops: float
    fp32_tflops: float
    bandwidth_gb_s: float
    source: str
    fixed_gib: float = 0.74
    link_gb_s: float = 10.0  # between cards of one machine that a sum of gradients reaches: PCIe, an assumption
    calibrated: bool = False  # True: published training speeds of this very card went into estimate.py


CARDS = {
    "T4": Card("T4", 65.0, 8.1, 320.0, "NVIDIA T4 datasheet, 2019", calibrated=True),
    "A10G": Card("A10G", 70.0, 35.0, 600.0, "AWS EC2 G5 page and NVIDIA A10G datasheet, 2021"),
    "L4": Card("L4", 121.0, 30.3, 300.0, "NVIDIA L4 datasheet, 2023"),
    "A100": Card("A100", 312.0, 19.5, 1555.0, "NVIDIA A100 datasheet (40 GB SXM), 2020", link_gb_s=200.0),
}


def card_of(gpu: str | None) -> Card | None:
    """The card of that name; names as a driver gives them ("Tesla T4", "NVIDIA A10G") are understood. None: unknown."""
    words = (gpu or "").replace("-", " ").split()
    return next((card for name, card in CARDS.items() if name in words), None)


def fixed_gib(gpu: str | None) -> float:
    """GiB of the card that are gone before PyTorch takes any."""
    card = card_of(gpu)
    return card.fixed_gib if card else CARDS["T4"].fixed_gib
