"""Random numbers by key: the streams of Philox, whose numbers saved runs depend on."""

from hashlib import blake2b

import numpy as np
import pytest

from dreambooth.utils import rng


@pytest.mark.parametrize("key", [(0, 1, 2, "noise"), (2**63 - 1, "timestep"), ()])
def test_a_stream_is_that_of_philox_with_the_hashed_key(key: tuple[int | str, ...]) -> None:
    number = int.from_bytes(blake2b(repr(key).encode(), digest_size=16).digest(), "little")
    expected = np.random.Generator(np.random.Philox(key=number)).standard_normal(300)
    assert (rng.stream(*key).standard_normal(300) == expected).all()


def test_the_numbers_of_a_key_stay_the_same() -> None:
    assert rng.stream(0, "noise").integers(1000, size=4).tolist() == [949, 775, 386, 613]


def test_streams_are_independent_of_each_other() -> None:
    one, other = rng.stream(0, "noise"), rng.stream(0, "noise")
    first = one.standard_normal(5)
    assert (other.standard_normal(5) == first).all() and (one.standard_normal(5) != first).any()
