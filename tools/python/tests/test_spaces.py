import numpy as np
import pytest

from orrery import ActionSpec, ConfigError, DataError, TensorSpec
from orrery.actions import dm_env_action, gymnasium_action
from orrery.observations import ObservationMap, dm_env_parts, gymnasium_parts
from orrery.pictures import as_picture, resize

spaces = pytest.importorskip("gymnasium").spaces

PICTURE = spaces.Box(0, 255, (48, 64, 3), np.uint8)
MIXED = spaces.Dict({"camera": PICTURE, "joints": spaces.Box(-np.inf, np.inf, (2, 3), np.float64), "gear": spaces.Discrete(4)})


def mixed():
    return {"camera": np.full((48, 64, 3), 9, np.uint8), "joints": np.arange(6.0).reshape(2, 3), "gear": 2}


def no_picture():
    raise AssertionError("nothing is drawn")


def test_resize_averages_areas():
    picture = np.array([[0, 10], [20, 40]], np.uint8)[:, :, None]
    assert resize(picture, 1, 1)[0, 0, 0] == 18, "17.5, rounded"
    # Three columns to two: the middle one is shared.
    row = np.array([[0, 90, 60]], np.uint8)[:, :, None]
    assert resize(row, 1, 2)[0, :, 0].tolist() == [30, 70]
    # Larger: every pixel is repeated.
    assert resize(picture, 4, 4)[:, :, 0].tolist() == [[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 40, 40]]


def test_resize_keeps_the_mean_of_any_size():
    picture = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    small = resize(picture, 64, 64)
    assert small.shape == (64, 64, 3) and small.dtype == np.uint8
    np.testing.assert_allclose(small.mean(axis=(0, 1)), picture.mean(axis=(0, 1)), atol=0.5)
    # One pixel of it, from its 6.25 by 9.375 inputs.
    rows = np.array([1, 1, 1, 1, 1, 1, 0.25]) / 6.25
    columns = np.array([1] * 9 + [0.375]) / 9.375
    expected = np.einsum("i,j,ijc->c", rows, columns, picture[:7, :10].astype(float))
    np.testing.assert_allclose(small[0, 0], expected, atol=0.51)


def test_pictures_of_other_layouts():
    assert as_picture(np.zeros((40, 50), np.uint8), "x").shape == (40, 50, 1)
    assert as_picture(np.zeros((3, 40, 50), np.uint8), "x").shape == (40, 50, 3)
    with pytest.raises(DataError, match=r"x is float64\[40, 50, 3\]"):
        as_picture(np.zeros((40, 50, 3)), "x")


def test_default_modalities_are_the_parts():
    observations = ObservationMap(gymnasium_parts(MIXED), (), 32)
    assert set(observations.specs) == {
        TensorSpec("camera", "uint8", (32, 32, 3)), TensorSpec("joints", "float32", (6,)), TensorSpec("gear", "float32", (4,))}
    assert not observations.needs_render
    values = observations.convert(mixed(), no_picture)
    assert np.all(values["camera"] == 9) and values["camera"].shape == (32, 32, 3)
    assert values["joints"].tolist() == [0, 1, 2, 3, 4, 5] and values["joints"].dtype == np.float32
    assert values["gear"].tolist() == [0, 0, 1, 0]


def test_chosen_modalities():
    observations = ObservationMap(gymnasium_parts(MIXED), ("state=gear+joints", "image", "all=*", "view=@render"), 32)
    shapes = {spec.name: spec.shape for spec in observations.specs}
    assert shapes == {"state": (10,), "image": (32, 32, 3), "all": (48 * 64 * 3 + 6 + 4,), "view": (32, 32, 3)}
    assert observations.needs_render
    values = observations.convert(mixed(), lambda: np.full((100, 100, 3), 5, np.uint8))
    assert values["state"].tolist() == [0, 0, 1, 0, 0, 1, 2, 3, 4, 5]
    assert np.all(values["image"] == 5) and np.all(values["view"] == 5)


def test_observations_that_are_no_dictionary():
    box = gymnasium_parts(spaces.Box(-1, 1, (4,), np.float32))
    assert ObservationMap(box, (), 64).specs == (TensorSpec("observation", "float32", (4,)),)
    both = ObservationMap(box, ("image", "joints"), 64)
    assert both.needs_render and {spec.name for spec in both.specs} == {"image", "joints"}
    picture = ObservationMap(gymnasium_parts(PICTURE), ("image",), 64)
    assert picture.specs == (TensorSpec("image", "uint8", (64, 64, 3)),) and not picture.needs_render
    grey = ObservationMap(gymnasium_parts(spaces.Box(0, 255, (84, 84), np.uint8)), (), 64)
    assert grey.specs == (TensorSpec("image", "uint8", (64, 64, 1)),)
    memory = ObservationMap(gymnasium_parts(spaces.Box(0, 255, (128,), np.uint8)), (), 64)
    assert memory.specs == (TensorSpec("observation", "float32", (128,)),)


@pytest.mark.parametrize("choices, message", [
    (("speed",), "'speed'.*camera, gear, joints"),
    (("speed=wheels",), "no part 'wheels'"),
])
def test_unknown_parts_are_refused(choices, message):
    with pytest.raises(ConfigError, match=message):
        ObservationMap(gymnasium_parts(MIXED), choices, 64)


@pytest.mark.parametrize("change, message", [
    ({"joints": np.array([[0, 1, 2], [3, np.nan, 5]])}, "'joints' holds nan at index 4"),
    ({"joints": np.zeros((2, 4))}, r"'joints' has changed its shape to \[2, 4\]: expected \[2, 3\]"),
    ({"camera": np.zeros((48, 48, 3), np.uint8)}, r"'camera' has changed its shape to \[48, 48, 3\]"),
    ({"camera": np.zeros((48, 64, 3))}, "float64"),
])
def test_bad_observations_are_named(change, message):
    observations = ObservationMap(gymnasium_parts(MIXED), (), 64)
    with pytest.raises(DataError, match=message):
        observations.convert({**mixed(), **change}, no_picture)


def test_a_missing_part_is_named():
    observations = ObservationMap(gymnasium_parts(MIXED), ("joints",), 64)
    with pytest.raises(DataError, match="no part 'joints'"):
        observations.convert({"camera": 1}, no_picture)


def test_box_actions_are_scaled_and_clipped():
    action = gymnasium_action(spaces.Box(np.array([[-2.0, 0.0]], np.float32), np.array([[2.0, 10.0]], np.float32)))
    assert action.spec == ActionSpec(2)
    native = action.to_native(np.array([0.5, -1], np.float32))
    assert native.shape == (1, 2) and native.dtype == np.float32
    assert native.tolist() == [[1.0, 0.0]]
    assert action.to_native(np.array([7, -7], np.float32)).tolist() == [[2.0, 0.0]]


def test_discrete_actions_count_from_their_start():
    action = gymnasium_action(spaces.Discrete(3, start=5))
    assert action.spec == ActionSpec(3, discrete=True)
    assert action.to_native(np.array([0, 0, 1], np.float32)) == 7


def test_padded_actions_ignore_what_the_environment_does_not_take():
    action = gymnasium_action(spaces.Box(-2, 2, (2,), np.float32))
    assert action.padded(0) is action
    assert action.padded(4).spec == ActionSpec(4)
    assert action.padded(4).to_native(np.array([0.5, 1, -1, -1], np.float32)).tolist() == [1, 2]
    with pytest.raises(ConfigError, match="1 numbers is asked for: the environment's is continuous 2"):
        action.padded(1)


@pytest.mark.parametrize("space, message", [
    (spaces.Box(-np.inf, np.inf, (2,)), "unbounded"),
    (spaces.Box(0, np.array([1, np.inf], np.float32)), "unbounded, from 0.0 to inf"),
    (spaces.Box(0, 3, (2,), np.int64), "dtype int64"),
    (spaces.MultiDiscrete([2, 3]), "expected Box or Discrete"),
])
def test_actions_that_no_model_gives_are_refused(space, message):
    with pytest.raises(ConfigError, match=message):
        gymnasium_action(space)


def test_dm_env_specifications():
    specs = pytest.importorskip("dm_env").specs
    parts = dm_env_parts({"height": specs.Array((), np.float64), "camera": specs.Array((40, 40, 3), np.uint8)})
    observations = ObservationMap(parts, (), 32)
    assert set(observations.specs) == {TensorSpec("height", "float32", (1,)), TensorSpec("camera", "uint8", (32, 32, 3))}
    bounded = dm_env_action(specs.BoundedArray((2,), np.float64, minimum=0.0, maximum=[1.0, 4.0]))
    assert bounded.to_native(np.array([0, 0.5], np.float32)).tolist() == [0.5, 3.0]
    assert dm_env_action(specs.DiscreteArray(4)).spec == ActionSpec(4, discrete=True)
    with pytest.raises(ConfigError, match="expected one BoundedArray"):
        dm_env_action(specs.Array((2,), np.float64))
