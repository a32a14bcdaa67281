import numpy as np
import pytest

from orrery.seeds import MersenneTwister64, _mix, derive_seed, random_action


def test_mix_is_splitmix64():
    # First outputs of SplitMix64 with seeds 0 and 1234567 (Vigna's reference program).
    assert _mix(0) == 0xE220A8397B1DCDAF
    assert _mix(1234567) == 6457827717110365317


def test_derive_seed_is_the_programs_own():
    # libs/envs/envs_test.cc checks the same number for the text of a specification.
    text = "continuous 6;5:image uint8[64, 64, 3];6:joints float32[26]"
    assert derive_seed(0, text) == 15719396237172630804
    # FNV-1a of "a" is 0xAF63DC4C8601EC8C, by its authors' table.
    assert derive_seed(7, "a", 3) == _mix(_mix(_mix(7) ^ 0xAF63DC4C8601EC8C) ^ 3)


def test_twister_is_that_of_the_standard_library():
    # The C++ standard states the 10000th number of a default-constructed std::mt19937_64.
    random = MersenneTwister64()
    for _ in range(9999):
        random()
    assert random() == 9981545732273789042


def test_random_actions_cover_their_range():
    random = MersenneTwister64(3)
    actions = np.stack([random_action(4, False, random) for _ in range(500)])
    assert actions.dtype == np.float32
    assert actions.min() >= -1 and actions.max() < 1
    assert abs(float(actions.mean())) < 0.05 and actions.min() < -0.99 and actions.max() > 0.99
    choices = np.stack([random_action(3, True, random) for _ in range(300)])
    assert set(np.unique(choices)) == {0.0, 1.0}
    assert np.all(choices.sum(axis=1) == 1) and np.all(choices.sum(axis=0) > 60)


@pytest.mark.parametrize("size", [1, 2])
def test_random_action_uses_the_upper_24_bits(size):
    class Fixed:
        def __call__(self):
            return (0xC00000 << 40) | 0xFFFFFFFFFF

    assert random_action(size, False, Fixed()).tolist() == [0.5] * size
