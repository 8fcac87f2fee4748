"""What every request body is: strict JSON, unknown fields ignored, one clear line for the first field that is wrong.

Strict means that "3" and true are no numbers and 3.0 is no id. A field that we know and cannot honour is refused by
name (`REFUSED`), since ignoring it would answer another question than the one asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from serve.errors import InvalidRequest

__all__ = ["REFUSED", "Body", "parse", "wrong"]

_TEMPLATE: Final = "is not accepted: the model's own chat template is used"
_STRUCTURED: Final = "is not supported: this server has no structured output"
_TOOLS: Final = "is not supported: this server calls no tools"

REFUSED: Final[Mapping[str, str]] = {
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "suffix": "is not supported: no model here is trained to fill in the middle",
    "prompt_embeds": "is not supported: send text or token ids",
    "use_beam_search": "is not supported",
    "truncate_prompt_tokens": "is not supported: shorten the prompt",
    "allowed_token_ids": "is not supported: use logit_bias",
    "bad_words": "is not supported: use logit_bias",
    "logits_processors": "is not supported",
    "structured_outputs": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "structural_tag": _STRUCTURED,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "audio": "is not supported: text only",
}
"""Known fields that this server cannot honour, and why. Null, false and empty values ask for nothing and pass."""

_NEVER: Final = ("chat_template", "chat_template_kwargs")
"""Refused even when empty."""

_MESSAGES: Final[Mapping[str, str]] = {
    "missing": "is missing",
    "finite_number": "must be a finite number",
    "int_parsing_size": "is out of range",
    "model_type": "must be an object",
    "too_short": "must not be empty",
    "too_long": "holds too many entries",
}

_COMPLETE: Final = ("missing", "halftone", "too_short", "too_long")
"""Kinds of errors whose message needs no value beside it."""

B = TypeVar("B", bound="Body")


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def parse(kind: type[B], raw: Mapping[str, Any]) -> B:
    """Raises `InvalidRequest` that names the first field at fault."""
    for name, reason in REFUSED.items():
        value = raw.get(name)
        if value or (name in _NEVER and value is not None):
            raise InvalidRequest(f"{name} {reason}", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)[0]) from None


def wrong(message: str, path: str = "") -> PydanticCustomError:
    """For validators of ours. `path` leads from the field to the culprit, e.g. `[3].type`."""
    return PydanticCustomError("halftone", "{message}", {"message": message, "path": path})


def _invalid(error: ErrorDetails) -> InvalidRequest:
    context = error.get("ctx", {})
    param = _param(error["loc"]) + context.get("path", "")
    message = _MESSAGES.get(error["type"]) or error["msg"].replace("Input should be", "must be")
    shown = "" if error["type"] in _COMPLETE else _got(error["input"])
    return InvalidRequest(f"{param or 'the body'} {message}{shown}", param=param or None, code="invalid_value")


def _param(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content")` as the client would write it: `messages[0].content`."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{_one_line(part)}" for part in location)
    return path.removeprefix(".")


def _one_line(key: str) -> str:
    """A key as it is, or escaped: clients invent the keys of mappings."""
    return key[:64] if key.isprintable() else ascii(key[:64])


def _got(value: object) -> str:
    if isinstance(value, bool | None):
        return f", got {'null' if value is None else str(value).lower()}"
    if isinstance(value, int):
        return f", got {value}" if value.bit_length() <= 128 else ", got a far larger one"
    if isinstance(value, float):
        return f", got {value!r}"
    return f", got a {'string' if isinstance(value, str) else 'list' if isinstance(value, list) else 'object'}"
