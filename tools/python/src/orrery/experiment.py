"""Reads and writes experiments: the text protos of orrery.config.v1 under configs/."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from orrery.config.v1 import experiment_pb2
from orrery.errors import ConfigError

_PART = re.compile(r"([^\[\]]+)(?:\[(\d+)\])?")


class Experiment:
    """One experiment. `proto` is the message itself; unset fields read as their defaults. Ranges are checked by the
    programs that read the file. Not thread-safe.

        experiment = Experiment.load("configs/quickstart.textproto")
        experiment.set("learning.batch_size", 16)
        experiment.save("mine.textproto")
    """

    def __init__(self, proto: experiment_pb2.Experiment | None = None):
        self.proto = experiment_pb2.Experiment() if proto is None else proto

    @classmethod
    def parse(cls, text: str) -> Experiment:
        """ConfigError with line and column for a syntax error or an unknown field or value."""
        try:
            return cls(text_format.Parse(text, experiment_pb2.Experiment()))
        except text_format.ParseError as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], *assignments: str) -> Experiment:
        """Reads a file, then applies assignments such as "learning.batch_size=16". Errors name the file."""
        try:
            experiment = cls.parse(pathlib.Path(path).read_text(encoding="utf-8"))
            for assignment in assignments:
                experiment.assign(assignment)
            return experiment
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from error

    def text(self) -> str:
        """Text proto, one field per line; parses back to the same."""
        return text_format.MessageToString(self.proto)

    def save(self, path: str | os.PathLike[str]) -> None:
        pathlib.Path(path).write_text(self.text(), encoding="utf-8")

    def assign(self, assignment: str) -> None:
        """Sets one field as the programs' --set does: "path=value"."""
        path, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r}: expected path=value, for example learning.batch_size=16")
        self.set(path.strip(), value.strip())

    def set(self, path: str, value: bool | int | float | str) -> None:
        """The path names fields by '.', entries of a list as "model.modalities[0].name" (one past the end adds an entry). A
        message takes "{…}". ConfigError names the path and leaves everything as it was."""
        text = ("true" if value else "false") if isinstance(value, bool) else str(value)
        changed = experiment_pb2.Experiment()
        changed.CopyFrom(self.proto)
        try:
            _set(changed, path.split("."), text)
        except (ConfigError, text_format.ParseError) as error:
            raise ConfigError(f"{path}: {error}") from error
        self.proto.CopyFrom(changed)

    def get(self, path: str) -> Any:
        """The value at a path: a number, a text, a bool, the name of an enum's value, or a message. Unset: its default."""
        value: Any = self.proto
        for part in path.split("."):
            if not isinstance(value, Message):
                raise ConfigError(f"{path}: {part!r} is asked of something that has no fields")
            field, index = _field(value, part)
            value = getattr(value, field.name)
            if index is not None:
                if index >= len(value):
                    raise ConfigError(f"{path}: {part!r}: the list has {len(value)} entries")
                value = value[index]
            elif field.enum_type is not None:
                value = field.enum_type.values_by_number[value].name
        return value


def _is_repeated(field: Any) -> bool:
    # protobuf 7 has no `label`, protobuf 5 no `is_repeated`.
    repeated = getattr(field, "is_repeated", None)
    return bool(field.label == FieldDescriptor.LABEL_REPEATED if repeated is None else repeated)


def _field(message: Message, part: str) -> tuple[Any, int | None]:
    """The field's descriptor and the index asked for."""
    match = _PART.fullmatch(part)
    if match is None:
        raise ConfigError(f"{part!r}: expected a name, or an entry of a list as in name[0]")
    name, index = match.group(1), match.group(2)
    fields = message.DESCRIPTOR.fields_by_name
    if name not in fields:
        raise ConfigError(f"{name!r} is no field of {message.DESCRIPTOR.name}, expected one of {', '.join(fields)}")
    field = fields[name]
    if _is_repeated(field) != (index is not None):
        raise ConfigError(f"{part!r} is a list: name an entry, as in {name}[0]" if index is None else f"{part!r} is not a list")
    return field, None if index is None else int(index)


def _descend(message: Message, part: str) -> Message:
    field, index = _field(message, part)
    if field.message_type is None:
        raise ConfigError(f"{field.name!r} has no fields")
    value = getattr(message, field.name)
    if index is None:
        value.SetInParent()
        return value  # type: ignore[no-any-return]
    if index > len(value):
        raise ConfigError(f"{part!r}: the list has {len(value)} entries")
    return value.add() if index == len(value) else value[index]  # type: ignore[no-any-return]


def _set(message: Message, parts: list[str], text: str) -> None:
    for part in parts[:-1]:
        message = _descend(message, part)
    field, _ = _field(message, parts[-1])
    if field.message_type is not None:
        message = _descend(message, parts[-1])
        if not (text.startswith("{") and text.endswith("}")):
            names = ", ".join(message.DESCRIPTOR.fields_by_name)
            raise ConfigError(f"expected a field of it or {{…}}; its fields are {names}")
        message.Clear()
        text_format.Parse(text[1:-1], message)
        message.SetInParent()
        return
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING and text[:1] not in ("'", '"'):
        setattr(message, field.name, text)
        return
    # A fresh message, so that a value cannot smuggle in a second field.
    parsed = type(message)()
    try:
        text_format.Parse(f"{field.name}: {text}", parsed)
    except text_format.ParseError as error:
        values = list(field.enum_type.values_by_name)[1:] if field.enum_type is not None else []
        raise ConfigError(f"{text!r} is not valid{', expected ' + ', '.join(values) if values else ''}: {error}") from error
    if [given.name for given, _ in parsed.ListFields()] != [field.name]:
        raise ConfigError(f"{text!r} is not one value")
    setattr(message, field.name, getattr(parsed, field.name))
