"""Reads numbers back from the device without interrupting its work."""

import torch
from torch import Tensor


class AsyncReadback:
    """An asynchronous copy of a small tensor from the device to the host, started on construction.

    Kernels are queued: the host runs ahead of the device, and the device stays busy as long as its queue is not empty.
    Reading a loss with `.item()` at the end of every step stops both: the host waits until the queue is empty, and the
    device then idles while the host draws the next batch and launches its first kernels.

    Here the copy is queued behind the work launched so far, and an event is recorded behind the copy. `read` waits for
    that event only, not for work launched later. If `read` is called one step after construction, the copy has
    already finished, and the queue never runs empty. On a CPU there is no queue, and nothing is copied.
    """

    def __init__(self, values: Tensor) -> None:
        """Args:
            values: tensor of shape (n,), on any device.
        """
        self._values, self._copied = values, None
        if values.device.type != "cpu":
            self._values, self._copied = values.to("cpu", non_blocking=True), torch.Event(values.device.type)
            self._copied.record()

    def read(self) -> list[float]:
        """Wait until the copy has finished, and return the values."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._values.tolist()]
