"""What an environment shows and takes, and how the programs tell whether two agree."""

from __future__ import annotations

import dataclasses
import re

from orrery.config.v1 import experiment_pb2, model_pb2
from orrery.errors import ConfigError
from orrery.seeds import derive_seed

DTYPES = ("uint8", "int32", "int64", "float32", "float64")
ROW_FIELDS = ("action", "reward", "is_first", "is_terminal")  # beside the modalities
MAX_ACTION_SIZE = 256
MAX_CHOICES = 4096
MAX_VECTOR_SIZE = 65536
MIN_IMAGE_SIZE = 32
MAX_IMAGE_SIZE = 128


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One modality without a batch dimension: images [height, width, channels] uint8, vectors [size] float32."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ActionSpec:
    """Continuous: `size` numbers in [-1, 1]. Discrete: one-hot over `size` choices."""

    size: int
    discrete: bool = False


@dataclasses.dataclass(frozen=True)
class EnvironmentSpec:
    """Modalities ordered by name, and the action. ConfigError names what a model could not take."""

    observations: tuple[TensorSpec, ...]
    action: ActionSpec

    def __post_init__(self) -> None:
        object.__setattr__(self, "observations", tuple(sorted(self.observations, key=lambda tensor: tensor.name.encode())))
        names = [tensor.name for tensor in self.observations]
        if not names:
            raise ConfigError("no modalities: expected at least one")
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", name):
                raise ConfigError(f"modality name {name!r}: expected 1 to 64 letters, digits or '_'")
            if name in ROW_FIELDS:
                raise ConfigError(f"modality name {name!r} is the name of another field of a row")
            if names.count(name) > 1:
                raise ConfigError(f"modality {name!r} is named twice")
        least, most = (2, MAX_CHOICES) if self.action.discrete else (1, MAX_ACTION_SIZE)
        if not least <= self.action.size <= most:
            kind = "choices" if self.action.discrete else "dimensions"
            raise ConfigError(f"the action has {self.action.size} {kind}: expected {least} to {most}")

    def hash(self) -> int:
        """64-bit hash of names, dtypes, shapes and the action, as in libs/envs/environment.cc."""
        text = f"{'discrete' if self.action.discrete else 'continuous'} {self.action.size}"
        for tensor in self.observations:
            text += f";{len(tensor.name.encode())}:{tensor.name} {tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
        return derive_seed(0, text)

    def to_model(self) -> model_pb2.Model:
        """Action and modalities with every size written out: a learner that reads them makes no environment."""
        model = model_pb2.Model()
        if self.action.discrete:
            model.action.discrete.size = self.action.size
        else:
            model.action.continuous.size = self.action.size
        for tensor in self.observations:
            modality = model.modalities.add(name=tensor.name)
            if tensor.dtype == "uint8" and len(tensor.shape) == 3:
                modality.image.height, modality.image.width, modality.image.channels = tensor.shape
            elif tensor.dtype == "float32" and len(tensor.shape) == 1:
                modality.vector.size = tensor.shape[0]
            else:
                raise ConfigError(f"modality {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}: expected an image, uint8 "
                                  "[height, width, channels], or a vector, float32 [size]")
        return model

    def check_fits(self, model: model_pb2.Model) -> None:
        """ConfigError unless a model with everything written out takes exactly what this environment gives; what the model
        leaves open fits."""
        expected = self.to_model()
        kind = model.action.WhichOneof("kind")
        if kind is not None and kind != expected.action.WhichOneof("kind"):
            raise ConfigError(f"model.action is {kind}, the environment's is {expected.action.WhichOneof('kind')}")
        size = getattr(model.action, kind).size if kind is not None and getattr(model.action, kind).HasField("size") else None
        if size not in (None, self.action.size):
            raise ConfigError(f"model.action has size {size}, the environment's has {self.action.size}")
        if not model.modalities:
            return
        configured = {modality.name: modality for modality in model.modalities}
        given = {modality.name: modality for modality in expected.modalities}
        if configured.keys() != given.keys():
            raise ConfigError(f"model.modalities are {sorted(configured)}, the environment gives {sorted(given)}")
        for name, modality in configured.items():
            _check_modality(name, modality, given[name])


def _check_modality(name: str, configured: model_pb2.Modality, given: model_pb2.Modality) -> None:
    kind = configured.WhichOneof("kind")
    if kind != given.WhichOneof("kind"):
        raise ConfigError(f"modality {name!r} is configured as {kind}, the environment gives {given.WhichOneof('kind')}")
    sizes = ("height", "width", "channels") if kind == "image" else ("size",)
    for size in sizes:
        message = getattr(configured, str(kind))
        expected = getattr(getattr(given, str(kind)), size)
        if message.HasField(size) and getattr(message, size) != expected:
            raise ConfigError(f"modality {name!r} is configured with {size} {getattr(message, size)}, the environment gives "
                              f"{expected}")


def model_text(spec: EnvironmentSpec) -> str:
    """The part of an experiment that states an environment's specification, as text proto."""
    from google.protobuf import text_format

    return text_format.MessageToString(experiment_pb2.Experiment(model=spec.to_model()))
