"""The queue of pictures under cancellation."""

import asyncio

import pytest

from dreambooth.inference.picture_request import PictureRequest
from dreambooth.serving.queue import Job, PictureQueue


@pytest.mark.parametrize("turns", range(4))
def test_a_cancelled_wait_for_a_batch_loses_no_picture(turns: int) -> None:
    """The call is cancelled some turns of the event loop after the picture that makes the batch full."""
    async def run() -> None:
        loop = asyncio.get_running_loop()
        queue = PictureQueue(capacity=9, max_batch=2, max_wait=60.0)
        queue.put([Job(PictureRequest("a"), "key", loop.create_future())], 1)
        take = asyncio.ensure_future(queue.next_batch())
        for _ in range(3):  # until it waits for a second picture
            await asyncio.sleep(0)
        queue.put([Job(PictureRequest("b"), "key", loop.create_future())], 1)
        for _ in range(turns):
            await asyncio.sleep(0)
        done = take.done()
        take.cancel()
        await asyncio.wait({take}, timeout=5)
        assert take.cancelled() != done and len(queue) == (0 if done else 2)

    asyncio.run(run())
