"""A tokenizer as GGUF knows it: llama.cpp has two kinds of byte-pair encoding, and both are told apart here.

"gpt2" splits text into words by a rule with a name, then merges bytes by a list of pairs. "llama" splits nothing and
merges whatever two neighbours make the token with the best score; spaces are written as `▁`, and what no token covers
as bytes. (A token that is part of a character is lost on the way: the character becomes its bytes.) A tokenizer
whose rule llama.cpp does not know by name is refused: ids would come out wrong, in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from serve.errors import CheckpointError

__all__ = ["Vocabulary", "read_vocabulary"]

_SPACE = "▁"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_RULES = {_CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe", _CONTRACTIONS + r"\p{N}" + _REST: "qwen2"}
_UNMERGED = -1e6  # a score that never wins


@dataclass(frozen=True)
class Vocabulary:
    """`kind` "gpt2" has `merges`, "llama" has `scores`; `rule` names the splitting of text."""

    kind: str
    rule: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special_ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    prepends_space: bool
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prepends_space)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, number in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """As many tokens as the embedding has rows; raise `CheckpointError` for what llama.cpp cannot do alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {}
    model = description.get("model") or {}
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"tokenizer: GGUF is written for byte-pair encoding, not {model.get('type', 'this kind')}"
        )
    rule = _rule(description)
    pairs = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts) >= size:
        raise CheckpointError(f"tokenizer: has token {max(texts)}, but the model has only {size} embeddings")
    types = {number: _type(texts[number], description, number, model.get("unk_token")) for number in texts}
    names = [texts.get(number, f"[unused {number}]") for number in range(size)]
    kinds = [types.get(number, TokenType.UNUSED) for number in range(size)]
    tokens = [name.encode() for name in names]
    if rule is None and _splitters(description):  # bytes in disguise, which "llama" spells out
        tokens, kinds = zip(*map(_from_bytes, names, kinds), strict=True)  # type: ignore[assignment]
    rank = {"".join(pair): -float(place) for place, pair in reversed(list(enumerate(pairs)))}
    sample = list(tokenizer("a")["input_ids"])
    return Vocabulary(
        kind="llama" if rule is None else "gpt2",
        rule=rule or "default",
        tokens=list(tokens),
        types=[int(kind) for kind in kinds],
        scores=[rank.get(name, _UNMERGED) for name in names] if rule is None else None,
        merges=[" ".join(pair) for pair in pairs] if rule is not None else None,
        special_ids=_special_ids(tokenizer),
        adds_bos=sample[:1] == [tokenizer.bos_token_id],
        adds_eos=sample[-1:] == [tokenizer.eos_token_id],
        prepends_space=_prepends_space(description),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _rule(description: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the way text is split into words; None where it is not split."""
    normalizers = [part["type"] for part in _flat(description.get("normalizer"), "normalizers")]
    steps = _splitters(description)
    kinds = [step["type"] for step in steps]
    if not kinds or (kinds == ["ByteLevel"] and not steps[0].get("use_regex", True)):
        allowed = {"Prepend", "Replace"} if not kinds else set()
        if set(normalizers) <= allowed:
            return None
    elif set(normalizers) <= {"NFC"} and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
            pattern = steps[0]["pattern"].get("Regex", "")
            if pattern in _RULES:
                return _RULES[pattern]
    raise CheckpointError(
        f"tokenizer: llama.cpp has no rule that splits text like this one ({', '.join(normalizers + kinds)})"
    )


def _splitters(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What splits text, or spells it in bytes; a `Metaspace` that only rewrites spaces does neither."""
    steps = _flat(description.get("pre_tokenizer"), "pretokenizers")
    return [step for step in steps if step["type"] != "Metaspace" or step.get("split", True)]


def _flat(step: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for child in step[inner] for part in _flat(child, inner)] if inner in step else [dict(step)]


def _prepends_space(description: Mapping[str, Any]) -> bool:
    if any(part["type"] == "Prepend" for part in _flat(description.get("normalizer"), "normalizers")):
        return True
    steps = _flat(description.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)


def _type(text: str, description: Mapping[str, Any], number: int, unknown: str | None) -> TokenType:
    added = next((token for token in description.get("added_tokens", ()) if token["id"] == number), None)
    if text == unknown:
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    is_byte = description["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _from_bytes(text: str, kind: TokenType) -> tuple[bytes, TokenType]:
    """A token that spells bytes as characters (`Ġ` is a space), as "llama" wants it."""
    if kind != TokenType.NORMAL:
        return text.encode(), kind
    raw = bytes(_BYTES[character] for character in text)
    if len(raw) == 1 and raw[0] >= 128:
        return f"<0x{raw[0]:02X}>".encode(), TokenType.BYTE
    try:
        return raw.decode().replace(" ", _SPACE).encode(), kind
    except UnicodeDecodeError:  # a part of a character, which only bytes can spell there
        return f"[part {raw.hex()}]".encode(), TokenType.UNUSED


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names: Sequence[str] = ("bos", "eos", "unk", "pad")
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    return {name: number for name, number in found.items() if number is not None}


_CHARACTERS: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}
