"""Random numbers of the data pipeline: each draw has a seed of its own, made of what it is for. Nothing to save."""

import hashlib
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a random number is for; keeps draws for different purposes independent."""

    SHUFFLE = 1
    """Order of one data set's samples in an epoch; key: data set (`name_key`), epoch."""
    PHASE = 2
    """Where a stream begins in the turns of data sets and groups; key: stream."""
    IMAGE = 3
    """Augmentation and position step of one image; key: data set (`name_key`), record, pass over it, image index."""
    WINDOW = 4
    """Order in which the rows of a window go out, by cost; key: number of the window."""


def generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """The generator for one purpose and key: the same numbers wherever and whenever it is made."""
    return np.random.Generator(_bits(seed, purpose, *key))


def words(count: int, seed: int, purpose: Purpose, *key: int) -> list[int]:
    """Numbers below 2^64 for one purpose and key, which numpy promises never to change."""
    return _bits(seed, purpose, *key).random_raw(count).tolist()


def name_key(name: str) -> int:
    """A number below 2^64 for a name: what belongs to a data set stays with it when others come or go."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _bits(seed: int, purpose: Purpose, *key: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence((seed, int(purpose), *key)))
