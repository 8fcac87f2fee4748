"""The one exception tree. Standard library only; every layer raises from here, and the rim maps it to HTTP once.

HalftoneError
├── RequestError                the caller's mistake: a 4xx in OpenAI's shape, naming the parameter
│   ├── InvalidRequest          400
│   ├── ContextLengthExceeded   400
│   ├── Unauthorized            401
│   ├── Forbidden               403
│   ├── UnknownModel            404
│   ├── NotFound                404
│   ├── RequestTimeout          408
│   ├── Conflict                409
│   ├── RequestTooLarge         413
│   └── HeadersTooLarge         431
├── ServiceError                ours or the moment's: retrying may help
│   ├── Overloaded              429, with Retry-After
│   ├── VariantUnavailable      503, with Retry-After
│   └── GenerationFailed        500
│       ├── OutputNotFinite     the model's output was not a number
│       └── OutOfMemory         the step did not fit into memory
├── Unmeasurable                what this machine does not tell, with the reason: shown as "unavailable"
└── SetupError                  the operator's: one clear line at the terminal, no traceback
    ├── ConfigError             a key of the configuration, by its path
    ├── RecipeError             a recipe that means nothing, or two stages that exclude each other
    ├── CheckpointError         missing, truncated, of a refused format or not what it says
    ├── UnsupportedArchitecture a model that the engine would serve wrong
    ├── UnsupportedHardware     a recipe that this machine cannot run, or not at a sane speed
    ├── CalibrationError        text that is missing or too little to calibrate on
    ├── CompressionError        a layer whose numbers cannot be compressed, by name
    └── ArtifactError           a saved artifact that is corrupt, truncated or foreign
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CheckpointError",
    "CompressionError",
    "ConfigError",
    "Conflict",
    "ContextLengthExceeded",
    "Forbidden",
    "GenerationFailed",
    "HalftoneError",
    "HeadersTooLarge",
    "InvalidRequest",
    "NotFound",
    "OutOfMemory",
    "OutputNotFinite",
    "Overloaded",
    "RecipeError",
    "RequestError",
    "RequestTimeout",
    "RequestTooLarge",
    "ServiceError",
    "SetupError",
    "Unauthorized",
    "UnknownModel",
    "Unmeasurable",
    "UnsupportedArchitecture",
    "UnsupportedHardware",
    "VariantUnavailable",
]


class HalftoneError(Exception):
    """Anything that Halftone raises on purpose. `message` is one line for a person: what, where, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders: rebuild from the message, then restore whatever the subclass set.
        return _rebuild, (type(self), self.message, self.__dict__)


def _rebuild(kind: type[HalftoneError], message: str, state: dict[str, Any]) -> HalftoneError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class RequestError(HalftoneError):
    """The caller's mistake. `param` names the request field as the client spelt it."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidRequest(RequestError):
    """A field that is missing, of the wrong type, out of range or contradicts another."""


class ContextLengthExceeded(RequestError):
    """Prompt and `max_tokens` together do not fit the model's context."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class Unauthorized(RequestError):
    """No API key, or one that is not known."""

    status = 401
    type = "authentication_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class Forbidden(RequestError):
    """A route that this caller may not use, whatever key it sends."""

    status = 403
    type = "permission_error"


class UnknownModel(RequestError):
    """A model or variant name that is not served; the message lists those that are."""

    status = 404
    type = "not_found_error"

    def __init__(self, message: str, *, param: str | None = "model") -> None:
        super().__init__(message, param=param, code="model_not_found")


class NotFound(RequestError):
    """An experiment or a rollout that this server does not know."""

    status = 404
    type = "not_found_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="not_found")


class Conflict(RequestError):
    """It contradicts what is under way, such as an experiment while a rollout runs; the message says what to end."""

    status = 409

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="conflict")


class RequestTimeout(RequestError):
    """A body that did not arrive in time."""

    status = 408


class RequestTooLarge(RequestError):
    """A body over the configured limit."""

    status = 413


class HeadersTooLarge(RequestError):
    """More headers, or larger ones, than the configured limit."""

    status = 431


class ServiceError(HalftoneError):
    """Not the caller's fault. `retry_after_s` is set where waiting may help."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(ServiceError):
    """A bounded queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class VariantUnavailable(ServiceError):
    """The variant failed to load, is still loading or has died; the message says which and why."""

    status = 503
    code = "variant_unavailable"


class GenerationFailed(ServiceError):
    """The engine failed while it served this request."""

    code = "generation_failed"


class OutputNotFinite(GenerationFailed):
    """The model gave something that is not a number: the recipe may not suit the model."""

    code = "output_not_finite"


class OutOfMemory(GenerationFailed):
    """A step did not fit into what the machine or the GPU had left."""

    code = "out_of_memory"


class Unmeasurable(HalftoneError):
    """A counter that this machine does not have or does not let us read; the message says which, and the remedy."""


class SetupError(HalftoneError):
    """The operator's: a configuration, a model or a machine that cannot work as asked."""


class ConfigError(SetupError):
    """A key that is unknown, missing or out of range. `path` is the key's path, e.g. `variants[1].recipe`."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class RecipeError(SetupError):
    """A recipe that cannot be parsed, or whose stages exclude each other."""


class CheckpointError(SetupError):
    """A checkpoint that is missing, truncated, not safetensors, or does not match its own configuration."""


class UnsupportedArchitecture(SetupError):
    """A model class that the engine would serve wrong, named with the reason."""


class UnsupportedHardware(SetupError):
    """A recipe that this machine cannot run, with the recipe that can."""


class CalibrationError(SetupError):
    """Calibration text that is missing, unreadable or too little."""


class CompressionError(SetupError):
    """A layer whose weights or statistics cannot be compressed. The message names the layer."""


class ArtifactError(SetupError):
    """A saved artifact that is corrupt, truncated or foreign. Never served."""
