"""Random numbers of the data pipeline: each draw has a seed of its own, made of what it is for. Nothing to save."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a random number is for; keeps draws for different purposes independent."""

    SHUFFLE = 1
    """Order of one data set's records; key: data set index."""
    CHOOSE = 2
    """Data set of a stream's next sample; key: stream, serial number of the sample."""
    IMAGE = 3
    """Augmentation and position step of one image; key: stream, serial number of the sample, image index."""
    WINDOW = 4
    """Order in which the rows of a window go out, by cost; key: number of the window."""


def generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """The generator for one purpose and key: the same numbers wherever and whenever it is made."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(purpose), *key))))
