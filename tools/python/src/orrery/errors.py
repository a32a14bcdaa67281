"""What this package raises."""

from __future__ import annotations

import grpc


class OrreryError(Exception):
    """Base of every error of this package."""


class DataError(OrreryError, ValueError):
    """Bytes or arrays that are not what their format says."""


class ConfigError(OrreryError, ValueError):
    """A configuration, or an environment that does not fit it."""


class EnvironmentFault(OrreryError):
    """An environment raised, hung, died, or gave something that cannot be used. The message names it."""


class ServiceError(OrreryError):
    """An answer of a service, or none. `code` is the gRPC status code, `message` the service's text."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later."""
        return not self.final

    @property
    def final(self) -> bool:
        """Whether trying the same again cannot help: the request, the run or the data is wrong, not the connection."""
        return self.code in _FINAL


_FINAL = frozenset({
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
})
