"""Prompts and texts inside a body: their shapes, checked by hand, since a union's error would name every branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, PlainValidator, WithJsonSchema

from serve.api.limits import MAX_PROMPTS, MAX_STOP_CHARS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, MAX_TOKEN_ID
from serve.api.schema.body import wrong

__all__ = ["Content", "Prompts", "StopStrings", "StopTokenIds", "Text", "TokenIds"]

_IDS_SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
}
_STRINGS_SCHEMA: Final[dict[str, Any]] = {"type": "array", "items": {"type": "string"}}
_PART_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


def check_text(value: object, path: str = "") -> str:
    if not isinstance(value, str):
        raise wrong("must be a string", path)
    if "\x00" in value:
        raise wrong("must not contain NUL characters", path)
    return value


def check_token_ids(value: object, path: str = "") -> tuple[int, ...]:
    """Integers of the model's vocabulary; only the replica knows how large that is."""
    if not isinstance(value, list):
        raise wrong("must be a list of token ids", path)
    for position, token_id in enumerate(value):
        if type(token_id) is not int:
            raise wrong("must be an integer token id", f"{path}[{position}]")
        if not 0 <= token_id <= MAX_TOKEN_ID:
            raise wrong("must be a token id of the model's vocabulary", f"{path}[{position}]")
    return tuple(value)


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, a list of token ids or a list of lists of token ids; never empty."""
    prompts: Sequence[str | tuple[int, ...]]
    if isinstance(value, str):
        prompts = [_not_empty(check_text(value), "")]
    elif not isinstance(value, list):
        raise wrong("must be a string, a list of strings, a list of token ids or a list of those")
    elif value and type(value[0]) in (int, float, bool):
        prompts = [check_token_ids(value)]
    else:
        prompts = _several(value)
    return tuple(prompts)


def _several(value: list[Any]) -> list[str | tuple[int, ...]]:
    if not value:
        raise wrong("must not be empty")
    if len(value) > MAX_PROMPTS:
        raise wrong(f"must hold at most {MAX_PROMPTS} prompts, got {len(value)}")
    check: Any = check_token_ids if isinstance(value[0], list) else check_text
    return [_not_empty(check(prompt, f"[{index}]"), f"[{index}]") for index, prompt in enumerate(value)]


def _not_empty(prompt: str | tuple[int, ...], path: str) -> str | tuple[int, ...]:
    if not prompt:
        raise wrong("must not be empty", path)
    return prompt


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise wrong("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise wrong(f"must hold at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
    for index, string in enumerate(strings):
        if not 0 < len(string) <= MAX_STOP_CHARS:
            raise wrong(f"must be 1 to {MAX_STOP_CHARS} characters long", f"[{index}]")
    return tuple(strings)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and len(value) > MAX_STOP_TOKEN_IDS:
        raise wrong(f"must hold at most {MAX_STOP_TOKEN_IDS} token ids, got {len(value)}")
    return check_token_ids(value)


def _content(value: object) -> str:
    """Text, or parts of text joined by newlines. Media is refused unread: no URL is ever fetched."""
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list):
        raise wrong("must be a string or a list of text parts")
    return "\n".join(_part(part, f"[{index}]") for index, part in enumerate(value))


def _part(part: object, path: str) -> str:
    if not isinstance(part, Mapping):
        raise wrong("must be an object", path)
    if part.get("type") != "text":
        raise wrong("must be 'text': images, audio, video and files are not supported", f"{path}.type")
    return check_text(part.get("text"), f"{path}.text")


Text = Annotated[str, BeforeValidator(check_text)]
Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}),
]
TokenIds = Annotated[tuple[int, ...], PlainValidator(check_token_ids), WithJsonSchema(_IDS_SCHEMA)]
Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "description": "A text, a list of texts, a list of token ids, or a list of lists of token ids.",
            "anyOf": [
                {"type": "string", "minLength": 1},
                {**_STRINGS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
                {**_IDS_SCHEMA, "minItems": 1},
                {"type": "array", "items": {**_IDS_SCHEMA, "minItems": 1}, "minItems": 1, "maxItems": MAX_PROMPTS},
            ],
        }
    ),
]
StopStrings = Annotated[
    tuple[str, ...],
    PlainValidator(_stop),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {**_STRINGS_SCHEMA, "maxItems": MAX_STOP_STRINGS}, {"type": "null"}]}
    ),
]
StopTokenIds = Annotated[
    tuple[int, ...],
    PlainValidator(_stop_token_ids),
    WithJsonSchema({"anyOf": [{**_IDS_SCHEMA, "maxItems": MAX_STOP_TOKEN_IDS}, {"type": "null"}]}),
]
