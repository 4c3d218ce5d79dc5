"""Numbers on their way from the device to the host, without either waiting for the other."""

import torch
from torch import Tensor


class Sent:
    """A copy of a small tensor that was begun when this was made: behind the work given to the device until then, not
    behind what is given to it later. On a CPU there is nothing to wait for."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrived = numbers, None
        if numbers.device.type != "cpu":
            self._numbers, self._arrived = numbers.to("cpu", non_blocking=True), torch.Event(numbers.device.type)
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers; waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(number) for number in self._numbers.tolist()]
