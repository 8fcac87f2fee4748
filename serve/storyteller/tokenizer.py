"""Builds the tokenizer: the teacher's pieces at their ids, made safe for any Unicode text.

The teacher's tokenizer is a BPE over characters that knows ASCII letters only and drops everything else. Here
the same merges run over *bytes* (byte-level BPE, as in GPT-2: every byte is written as one printable
character), so that

- on text the teacher knows, both give the same ids, and its predictions can be learnt token by token;
- any other text falls apart into single bytes and comes back exactly, NUL and emoji included.

Ids: 0-2047 the teacher's, then the bytes it lacks, the three roles of a chat, and merges for the commonest
characters beyond ASCII, which fill the vocabulary up to `VOCABULARY_SIZE`. The last two kinds start
untrained; no id is without a meaning.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["BOS", "EOS", "PAD", "ROLES", "VOCABULARY_SIZE", "build_tokenizer", "save_tokenizer"]

VOCABULARY_SIZE = 2304  # 18 x 128
PAD, BOS, EOS = "<unk>", "<|start_story|>", "<|end_story|>"  # the teacher's names, ids 0, 1, 2
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")

_TYPOGRAPHY = "‘’“”–—…«»¡¿"
_LATIN_1 = "".join(chr(code) for code in range(0xC0, 0x100) if chr(code) != "×")
_SPACE = "▁"  # how the teacher writes a space

_CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()


def byte_characters() -> list[str]:
    """The printable stand-in of each byte, in the order of the bytes (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return [characters[byte] for byte in range(256)]


def build_tokenizer(teacher_folder: Path) -> Tokenizer:
    teacher = json.loads((teacher_folder / "tokenizer.json").read_text())["model"]
    stand_ins = byte_characters()
    special = {PAD, BOS, EOS}

    def rewrite(piece: str) -> str:
        text = piece.replace(_SPACE, " ")
        return piece if piece in special else "".join(stand_ins[byte] for byte in text.encode())

    vocabulary = {rewrite(piece): index for piece, index in teacher["vocab"].items()}
    merges = [(rewrite(left), rewrite(right)) for left, right in map(_pair, teacher["merges"])]
    for character in [*stand_ins, *ROLES]:
        vocabulary.setdefault(character, len(vocabulary))
    for left, right in _extra_merges(stand_ins):
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    assert len(vocabulary) == VOCABULARY_SIZE
    return _assemble(vocabulary, merges)


def save_tokenizer(teacher_folder: Path, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(teacher_folder).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": list(ROLES),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)


def _assemble(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # The teacher's pieces cross word boundaries ("ed to "), so the text is never split into words first.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (PAD, BOS, EOS, *ROLES)])
    return tokenizer


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _extra_merges(stand_ins: list[str]) -> list[tuple[str, str]]:
    """Merges that build the commonest characters beyond ASCII from their UTF-8 bytes."""
    merges: dict[tuple[str, str], None] = {}  # an ordered set
    for character in _TYPOGRAPHY + _LATIN_1:
        *leading, last = (stand_ins[byte] for byte in character.encode())
        if len(leading) == 2:
            merges[leading[0], leading[1]] = None
        merges["".join(leading), last] = None
    return list(merges)
