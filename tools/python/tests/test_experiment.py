import pytest

from orrery import ConfigError, Experiment
from orrery.config.v1 import experiment_pb2

TEXT = """
name: "run"
environment { task: "t" }
model { modalities { name: "image" image { depth: 8 } } }
learning { batch_size: 7 }
"""


def test_reads_writes_and_keeps(tmp_path):
    experiment = Experiment.parse(TEXT)
    experiment.save(tmp_path / "e.textproto")
    assert Experiment.load(tmp_path / "e.textproto").proto == experiment.proto
    assert experiment.get("learning.batch_size") == 7
    assert experiment.get("learning.sequence_length") == 50, "the default"
    assert experiment.get("learning.schedule") == "ALTERNATE"
    assert experiment.get("model.modalities[0].image.depth") == 8


def test_sets_every_kind_of_field():
    experiment = Experiment.parse(TEXT)
    experiment.set("learning.batch_size", 16)
    experiment.set("learning.learning_rate", 0.25)
    experiment.assign("learning.schedule = CONCURRENT")
    experiment.set("name", "new name: not parsed")
    experiment.set("environment.task", '"quoted \\"one\\""')
    experiment.set("planner", "{ mppi { horizon: 5 warm_start: false } }")
    experiment.set("planner.mppi.mean_latents", True)
    experiment.set("model.modalities[1].name", "joints")
    experiment.set("model.modalities[1].vector", "{ size: 3 }")
    experiment.set("collection.early_end", "{}")
    proto = experiment.proto
    assert (proto.learning.batch_size, proto.learning.learning_rate) == (16, 0.25)
    assert proto.learning.schedule == experiment_pb2.Learning.CONCURRENT
    assert proto.name == "new name: not parsed"
    assert proto.environment.task == 'quoted "one"'
    assert proto.planner.mppi.horizon == 5 and proto.planner.mppi.mean_latents and not proto.planner.mppi.warm_start
    assert [modality.name for modality in proto.model.modalities] == ["image", "joints"]
    assert proto.model.modalities[1].vector.size == 3
    assert proto.collection.HasField("early_end")


@pytest.mark.parametrize("assignment, message", [
    ("learning.batch_size", "expected path=value"),
    ("learning.batch=3", "'batch' is no field of Learning, expected one of schedule, batch_size"),
    ("learning.batch_size=x", "learning.batch_size: 'x' is not valid"),
    ("learning.batch_size=3 sequence_length: 4", "not one value"),
    ("learning.schedule=SOMETIMES", "expected ALTERNATE, CONCURRENT"),
    ("learning=3", "its fields are schedule"),
    ("model.modalities.name=x", "is a list: name an entry"),
    ("model.modalities[5].name=x", "the list has 1 entries"),
    ("learning[0].batch_size=3", "is not a list"),
    ("learning.batch_size.x=3", "has no fields"),
    ("learning={ batch: 3 }", "batch"),
])
def test_refuses_and_leaves_everything_as_it_was(assignment, message):
    experiment = Experiment.parse(TEXT)
    with pytest.raises(ConfigError, match=message):
        experiment.assign(assignment)
    assert experiment.proto == Experiment.parse(TEXT).proto


def test_errors_name_file_and_line(tmp_path):
    (tmp_path / "bad.textproto").write_text('name: "x"\nnonsense: 3\n')
    with pytest.raises(ConfigError, match=r"bad\.textproto: 2:1.*nonsense"):
        Experiment.load(tmp_path / "bad.textproto")
