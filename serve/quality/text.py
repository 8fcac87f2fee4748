"""The texts that models are scored on: JSONL records or plain text, cut at the context as a reader would meet them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from serve.errors import CalibrationError

__all__ = ["read_texts", "tokenize"]


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` texts: records of a `.jsonl` file (`{"text": ...}`), else paragraphs parted by blank lines."""
    if not path.is_file():
        raise CalibrationError(f"{path}: no such text file")
    try:
        with path.open(encoding="utf-8") as file:
            texts = _records(path, file) if path.suffix == ".jsonl" else _paragraphs(file)
            found = list(islice((text for text in texts if text.strip()), limit))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text ({error.reason})") from error
    if not found:
        raise CalibrationError(f"{path}: holds no text")
    return found


def tokenize(tokenizer: Any, texts: Iterable[str], context_length: int) -> list[list[int]]:
    """Token ids of each text, special tokens as the tokenizer adds them, cut at `context_length`."""
    return [list(tokenizer(text, truncation=True, max_length=context_length).input_ids) for text in texts]


def _records(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f'{path}:{number}: not a record like {{"text": "..."}}') from error
        if not isinstance(text, str):
            raise CalibrationError(f"{path}:{number}: text is a {type(text).__name__}, not a string")
        yield text


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    yield "".join(paragraph)
