"""Seeds and random numbers that are the same here as in the C++ programs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive_seed(base: int, name: str, index: int = 0) -> int:
    """A well mixed 64-bit seed for stream `index` of purpose `name` (SplitMix64 over the FNV-1a hash of the name)."""
    digest = 0xCBF29CE484222325
    for byte in name.encode():
        digest = ((digest ^ byte) * 0x100000001B3) & _MASK
    return _mix(_mix(_mix(base) ^ digest) ^ index)


class MersenneTwister64:
    """The 64-bit Mersenne Twister of the C++ standard library (`std::mt19937_64`)."""

    _SIZE = 312
    _SHIFT = 156
    _UPPER = _MASK ^ ((1 << 31) - 1)
    _LOWER = (1 << 31) - 1

    def __init__(self, seed: int = 5489):
        state = [seed & _MASK]
        for i in range(1, self._SIZE):
            state.append((6364136223846793005 * (state[-1] ^ (state[-1] >> 62)) + i) & _MASK)
        self._state = state
        self._next = self._SIZE

    def __call__(self) -> int:
        """The next number, 0 to 2^64 - 1."""
        if self._next == self._SIZE:
            self._twist()
        x = self._state[self._next]
        self._next += 1
        x ^= (x >> 29) & 0x5555555555555555
        x ^= (x << 17) & 0x71D67FFFEDA60000
        x ^= (x << 37) & 0xFFF7EEE000000000
        return x ^ (x >> 43)

    def _twist(self) -> None:
        state = self._state
        for i in range(self._SIZE):
            x = (state[i] & self._UPPER) | (state[(i + 1) % self._SIZE] & self._LOWER)
            state[i] = state[(i + self._SHIFT) % self._SIZE] ^ (x >> 1) ^ (0xB5026F5AA96619E9 if x & 1 else 0)
        self._next = 0


def random_action(size: int, discrete: bool, random: MersenneTwister64) -> npt.NDArray[np.float32]:
    """Uniform in [-1, 1), or one-hot of a uniform choice; float32 [size]."""
    if discrete:
        action = np.zeros(size, np.float32)
        action[random() % size] = 1
        return action
    return np.array([(random() >> 40) * 2.0**-23 - 1 for _ in range(size)], np.float32)
