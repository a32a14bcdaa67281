"""Observations of an environment as modalities: pictures [height, width, channels] uint8 and vectors [size] float32.

A modality is chosen by NAME, or NAME=SOURCE where SOURCE is keys of a Dict observation joined by '+', '*' for the whole
observation as one vector, or '@render' for a picture drawn by the environment. NAME alone is the key of that name where
there is one; else `image` is the observation itself if that is a picture, or drawn; any other name is the whole observation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.errors import ConfigError, DataError
from orrery.pictures import as_picture, channels_of, is_picture, resize
from orrery.specification import MAX_IMAGE_SIZE, MAX_VECTOR_SIZE, MIN_IMAGE_SIZE, TensorSpec

RENDER = "@render"


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of an observation, whatever the library it comes from. `shape` None: not an array; `flatten` checks it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...] | None
    size: int  # numbers in its vector
    flatten: Callable[[Any], npt.NDArray[Any]]

    @property
    def picture(self) -> bool:
        return self.shape is not None and is_picture(self.dtype, self.shape)


Parts = Mapping[str, Part]  # one part named "" where the observation is no dictionary


def gymnasium_parts(space: Any) -> Parts:
    """Of a gymnasium.Space."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return {str(key): _gymnasium_part(part) for key, part in space.spaces.items()}
    return {"": _gymnasium_part(space)}


def _gymnasium_part(space: Any) -> Part:
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        return Part(np.dtype(space.dtype), tuple(space.shape), int(np.prod(space.shape)), np.ravel)
    try:
        size = int(spaces.flatdim(space))
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"observation space {space} cannot be made a vector: {error}") from error
    return Part(np.dtype(np.float32), None, size, lambda value: np.asarray(spaces.flatten(space, value)))


def dm_env_parts(spec: Any) -> Parts:
    """Of what dm_env.Environment.observation_spec returns: an array specification or a dictionary of them."""
    if isinstance(spec, Mapping):
        return {str(key): _dm_env_part(str(key), part) for key, part in spec.items()}
    return {"": _dm_env_part("", spec)}


def _dm_env_part(key: str, spec: Any) -> Part:
    if not hasattr(spec, "shape") or not hasattr(spec, "dtype"):
        raise ConfigError(f"observation {key!r} is specified as {spec}: expected an array specification")
    shape = tuple(spec.shape)
    return Part(np.dtype(spec.dtype), shape, int(np.prod(shape)), np.ravel)


@dataclasses.dataclass(frozen=True)
class _Modality:
    name: str
    keys: tuple[str, ...]  # empty: drawn
    picture: bool


class ObservationMap:
    """Makes modalities of observations. Constant; `specs` says what comes out, `needs_render` whether pictures are drawn.
    ConfigError names what cannot be had."""

    def __init__(self, parts: Parts, choices: Sequence[str], image_size: int):
        if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
            raise ConfigError(f"image size is {image_size}: expected {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}")
        self._parts = parts
        self._size = image_size
        self._modalities = [self._choose(choice) for choice in choices or self._defaults()]
        self.needs_render = any(not modality.keys for modality in self._modalities)
        self.specs = tuple(self._spec(modality) for modality in self._modalities)

    def _defaults(self) -> list[str]:
        if "" in self._parts:
            return ["image" if self._parts[""].picture else "observation"]
        return list(self._parts)

    def _choose(self, choice: str) -> _Modality:
        name, given, source = choice.partition("=")
        if source == RENDER:
            return _Modality(name, (), True)
        if given and source != "*":
            keys = tuple(source.split("+"))
        elif not given and name in self._parts:
            keys = (name,)
        elif not given and name == "image" and not ("" in self._parts and self._parts[""].picture):
            return _Modality(name, (), True)
        elif not given and "" not in self._parts:
            raise ConfigError(f"modality {name!r}: the observation has the parts {', '.join(self._parts)}; name one, or "
                              f"{name}=KEY+KEY, {name}=* or {name}={RENDER}")
        else:
            keys = tuple(self._parts)
        for key in keys:
            if key not in self._parts:
                raise ConfigError(f"modality {name!r}: the observation has no part {key!r}, expected one of "
                                  f"{', '.join(map(repr, self._parts))}")
        return _Modality(name, keys, len(keys) == 1 and source != "*" and self._parts[keys[0]].picture)

    def _spec(self, modality: _Modality) -> TensorSpec:
        if modality.picture:
            shape = self._parts[modality.keys[0]].shape if modality.keys else (self._size, self._size, 3)
            channels = channels_of(shape or ())
            if channels > 16:
                raise ConfigError(f"modality {modality.name!r} has {channels} channels: expected 1 to 16")
            return TensorSpec(modality.name, "uint8", (self._size, self._size, channels))
        size = sum(self._parts[key].size for key in modality.keys)
        if not 1 <= size <= MAX_VECTOR_SIZE:
            raise ConfigError(f"modality {modality.name!r} has {size} numbers: expected 1 to {MAX_VECTOR_SIZE}")
        return TensorSpec(modality.name, "float32", (size,))

    def convert(self, observation: Any, render: Callable[[], Any]) -> dict[str, npt.NDArray[Any]]:
        """DataError names the part that has another shape than it said, or holds a number that is not finite."""
        return {modality.name: self._picture(modality, observation, render) if modality.picture
                else self._vector(modality, observation) for modality in self._modalities}

    def _value(self, observation: Any, key: str) -> Any:
        if key == "":
            return observation
        if not isinstance(observation, Mapping) or key not in observation:
            raise DataError(f"the observation has no part {key!r}")
        return observation[key]

    def _picture(self, modality: _Modality, observation: Any, render: Callable[[], Any]) -> npt.NDArray[np.uint8]:
        if not modality.keys:
            picture = as_picture(render(), "the rendered picture")
            if picture.shape[2] != 3:
                raise DataError(f"the rendered picture has {picture.shape[2]} channels: expected 3")
        else:
            value = self._value(observation, modality.keys[0])
            self._check_shape(modality.keys[0], value)
            picture = as_picture(value, _name(modality.keys[0]))
        return np.ascontiguousarray(resize(picture, self._size, self._size))

    def _vector(self, modality: _Modality, observation: Any) -> npt.NDArray[np.float32]:
        vectors = []
        for key in modality.keys:
            value = self._value(observation, key)
            self._check_shape(key, value)
            vector = np.ravel(self._parts[key].flatten(value))
            if vector.size != self._parts[key].size:
                raise DataError(f"{_name(key)} has {vector.size} numbers: expected {self._parts[key].size}")
            vectors.append(vector.astype(np.float32))
        whole = np.concatenate(vectors)
        bad = np.flatnonzero(~np.isfinite(whole))
        if bad.size > 0:
            raise DataError(f"modality {modality.name!r} holds {whole[bad[0]]} at index {bad[0]}: expected finite numbers")
        return whole

    def _check_shape(self, key: str, value: Any) -> None:
        expected = self._parts[key].shape
        if expected is not None and np.shape(value) != expected:
            raise DataError(f"{_name(key)} has changed its shape to {list(np.shape(value))}: expected {list(expected)}")


def _name(key: str) -> str:
    return f"observation {key!r}" if key else "the observation"
