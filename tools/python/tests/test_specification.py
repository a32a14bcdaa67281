import pytest

from orrery import ActionSpec, ConfigError, EnvironmentSpec, Experiment, TensorSpec, model_text

IMAGE = TensorSpec("image", "uint8", (64, 64, 3))
JOINTS = TensorSpec("joints", "float32", (26,))


def test_hash_is_that_of_the_programs():
    # The number that libs/envs/envs_test.cc checks.
    assert EnvironmentSpec((IMAGE, JOINTS), ActionSpec(6)).hash() == 15719396237172630804


def test_hash_sees_every_field_and_no_order():
    base = EnvironmentSpec((IMAGE, JOINTS), ActionSpec(6))
    assert EnvironmentSpec((JOINTS, IMAGE), ActionSpec(6)).hash() == base.hash()
    others = [
        EnvironmentSpec((IMAGE, JOINTS), ActionSpec(7)),
        EnvironmentSpec((IMAGE, JOINTS), ActionSpec(6, discrete=True)),
        EnvironmentSpec((TensorSpec("camera", "uint8", (64, 64, 3)), JOINTS), ActionSpec(6)),
        EnvironmentSpec((TensorSpec("image", "uint8", (64, 3, 64)), JOINTS), ActionSpec(6)),
        EnvironmentSpec((IMAGE, TensorSpec("joints", "float32", (2, 6))), ActionSpec(6)),
        EnvironmentSpec((IMAGE,), ActionSpec(6)),
    ]
    assert len({base.hash(), *(other.hash() for other in others)}) == 7


@pytest.mark.parametrize("observations, action, message", [
    ((), ActionSpec(1), "no modalities"),
    ((TensorSpec("a b", "float32", (1,)),), ActionSpec(1), "'a b'"),
    ((TensorSpec("reward", "float32", (1,)),), ActionSpec(1), "another field"),
    ((JOINTS, JOINTS), ActionSpec(1), "twice"),
    ((JOINTS,), ActionSpec(257), "257 dimensions: expected 1 to 256"),
    ((JOINTS,), ActionSpec(1, discrete=True), "1 choices: expected 2 to 4096"),
])
def test_refuses_what_no_model_takes(observations, action, message):
    with pytest.raises(ConfigError, match=message):
        EnvironmentSpec(observations, action)


def test_model_text_states_every_size():
    text = model_text(EnvironmentSpec((JOINTS, IMAGE), ActionSpec(4, discrete=True)))
    model = Experiment.parse(text).proto.model
    assert model.action.discrete.size == 4
    assert [modality.name for modality in model.modalities] == ["image", "joints"]
    image = model.modalities[0].image
    assert (image.height, image.width, image.channels) == (64, 64, 3)
    assert image.HasField("channels"), "a default that is not written out makes the learner look for the environment"
    assert model.modalities[1].vector.size == 26


def test_check_fits_names_what_differs():
    spec = EnvironmentSpec((JOINTS,), ActionSpec(6))
    spec.check_fits(Experiment.parse("").proto.model)
    spec.check_fits(Experiment.parse(model_text(spec)).proto.model)
    for text, message in [
        ("model { action { discrete { size: 6 } } }", "discrete.*continuous"),
        ("model { action { continuous { size: 5 } } }", "size 5.*has 6"),
        ('model { modalities { name: "image" image {} } }', "image.*joints"),
        ('model { modalities { name: "joints" image {} } }', "image.*vector"),
        ('model { modalities { name: "joints" vector { size: 25 } } }', "size 25.*26"),
    ]:
        with pytest.raises(ConfigError, match=message):
            spec.check_fits(Experiment.parse(text).proto.model)
