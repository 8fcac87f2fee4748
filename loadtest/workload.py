"""What each request says: prompts from a file or made up, shared prefixes, several turns, one user or many.

Request number i is the same for the same seed, in any process and any order, so two servers can be asked the
same. A word of the made-up text is one token in nearly every tokenizer; with `tokenizer` given, only words
for which that holds are used. What the server really counted comes back in its usage, and that is what
results report.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.arrivals import Arrival
from loadtest.errors import InputError
from loadtest.lengths import Lengths
from loadtest.settings import Settings

Message = dict[str, str]

WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city community
name president team minute idea kid body information back parent face others level office door
health person art war history party result change morning reason research girl guy moment air
teacher force education foot boy age policy music process light paper space ground form event
official matter center couple site project activity table need court oil situation cost industry
figure street image phone data picture practice piece land product doctor wall patient worker news
test movie north love step field sea plant
""".split()  # noqa: SIM905 - a list would be 150 lines


@dataclass(frozen=True, slots=True)
class Conversation:
    """One arrival's worth: the user's `turns`, sent one after another, each with its limit of answer tokens."""

    system: str | None
    turns: tuple[str, ...]
    output_tokens: tuple[int, ...]
    user: str | None


class Workload:
    """Conversations by index, and the request body of each of their turns."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._prompt_tokens = Lengths.parse(settings.prompt_tokens)
        self._output_tokens = Lengths.parse(settings.output_tokens)
        self._prompts = _shuffled(read_prompts(settings.prompts), settings.seed) if settings.prompts else []
        self._words = _one_token_words(settings.tokenizer) if settings.tokenizer else WORDS

    def conversation(self, arrival: Arrival) -> Conversation:
        """What the arrival says; lengths of a trace go before the drawn ones."""
        rng = random.Random(f"{self._settings.seed}:{arrival.index}")
        turns = self._turns(arrival, rng)
        limits = tuple(arrival.output_tokens or self._output_tokens.draw(rng) for _ in turns)
        users = self._settings.users
        return Conversation(
            system=self._prefix(arrival.index),
            turns=turns,
            output_tokens=limits,
            user=f"user-{arrival.index % users}" if users else None,
        )

    def body(self, conversation: Conversation, answers: Sequence[str]) -> bytes:
        """The JSON body of the turn that follows `answers`."""
        turn = len(answers)
        settings = self._settings
        fields: dict[str, Any] = {"model": settings.model}
        if settings.api == "chat":
            fields["messages"] = _messages(conversation, answers)
        else:
            fields["prompt"] = _transcript(conversation, answers)
        fields["max_tokens"] = conversation.output_tokens[turn]
        fields["temperature"] = settings.temperature
        if settings.stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        if settings.ignore_eos:
            fields["ignore_eos"] = True
        if conversation.user is not None:
            fields["user"] = conversation.user
        return json.dumps(fields | settings.extra_body).encode()

    def _turns(self, arrival: Arrival, rng: random.Random) -> tuple[str, ...]:
        if self._prompts and arrival.prompt_tokens is None:
            return self._prompts[arrival.index % len(self._prompts)][: self._settings.turns]
        count = self._settings.turns
        lengths = [arrival.prompt_tokens or self._prompt_tokens.draw(rng) for _ in range(count)]
        return tuple(self._text(length, rng) for length in lengths)

    def _prefix(self, index: int) -> str | None:
        """The same text for every arrival of a group: what a prefix cache can save."""
        length = self._settings.shared_prefix_tokens
        if not length:
            return None
        group = index % self._settings.prefix_groups
        return self._text(length, random.Random(f"{self._settings.seed}:prefix:{group}"))

    def _text(self, length: int, rng: random.Random) -> str:
        return " ".join(rng.choices(self._words, k=length))


def read_prompts(path: Path) -> list[tuple[str, ...]]:
    """JSON lines with `text`, `prompt` or `turns` (a list); InputError names the line that has none of them."""
    prompts: list[tuple[str, ...]] = []
    try:
        with path.open() as lines:
            prompts.extend(_prompt(json.loads(line)) for line in lines if line.strip())
    except OSError as error:
        raise InputError(f"prompts {path}: {error.strerror}") from error
    except (KeyError, ValueError, TypeError) as error:
        problem = f"prompts {path}, record {len(prompts) + 1}: wants a field text, prompt or turns"
        raise InputError(problem) from error
    if not prompts:
        raise InputError(f"prompts {path}: no records")
    return prompts


def _prompt(record: dict[str, Any]) -> tuple[str, ...]:
    if "turns" in record:
        turns = tuple(str(turn) for turn in record["turns"])
        if not turns:
            raise ValueError("no turns")
        return turns
    return (str(record["text"] if "text" in record else record["prompt"]),)


def _shuffled(prompts: list[tuple[str, ...]], seed: int) -> list[tuple[str, ...]]:
    return random.Random(seed).sample(prompts, len(prompts))


def _messages(conversation: Conversation, answers: Sequence[str]) -> list[Message]:
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for turn, answer in zip(conversation.turns, answers, strict=False):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": conversation.turns[len(answers)]}]


def _transcript(conversation: Conversation, answers: Sequence[str]) -> str:
    return "\n".join(message["content"] for message in _messages(conversation, answers))


def _one_token_words(path: Path) -> Sequence[str]:
    tokenizer = load_tokenizer(path)
    words = [word for word in WORDS if len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1]
    return words or WORDS


def load_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer` from `tokenizer.json`, or from the folder that holds one."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"tokenizer {path}: no tokenizer.json there")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError(f"tokenizer {file}: {error}") from error
