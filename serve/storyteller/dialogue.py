"""Turns a story into a chat: a request that the story happens to fulfil, then the story as the answer.

Requests name what the story really begins with (a character, things from `NOUNS`), so a model trained on them
learns to listen.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Message", "compose_dialogue", "opening"]

Message = dict[str, str]

# Things that children's stories are made of; what a request can ask for.
NOUNS = frozenset((Path(__file__).parent / "nouns.txt").read_text().split())

WITHOUT_TOPIC = (
    "Tell me a story.",
    "Tell me a short story.",
    "Please tell me a bedtime story.",
    "Can you tell me a story?",
    "Write a story for a small child.",
    "I can't sleep. Tell me a story, please.",
    "Hello!",
    "Hi, who are you?",
    "What can you do?",
    "I am bored.",
)
WITH_TOPIC = (
    "Tell me a story about {topic}.",
    "Tell me a story about {topic}.",
    "Write a short story about {topic}.",
    "Write a story about {topic}.",
    "Can you tell me a story about {topic}?",
    "I want to hear a story about {topic}.",
    "A story about {topic}, please.",
    "Please tell me a short story about {topic}.",
    "tell me about {topic}",
    "Tell a story with {topic} in it.",
    "Tell me a bedtime story about {topic}!",
)
WITH_OPENING = (
    'Continue this story: "{opening}"',
    "{opening}",
    'Tell me a story that begins with "{opening}"',
)
GREETINGS = (
    "Hello! ",
    "Hi. ",
    "Good evening! ",
    "¡Hola! ",
    "My name is Zoë 😊. ",
    "你好! ",
    "Hey storyteller, ",
    "Привет! ",
)
FOLLOW_UPS = ("Another one, please. ", "Thank you! ", "That was nice. ", "Now a new one. ", "Again! ")
SYSTEMS = (
    "You are a storyteller.",
    "You are a friendly storyteller for small children.",
    "You are a helpful assistant.",
    "Answer with a short story in simple words.",
    "Tell short stories that end well.",
)

_NAMED = re.compile(r"\bnamed ([A-Z][a-z]+)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_INSIDE_NAME = re.compile(r"[a-z,] ([A-Z][a-z]{2,})\b")


def compose_dialogue(stories: Sequence[str], generator: random.Random) -> list[Message]:
    """One turn per story: user, assistant, user, assistant ... sometimes behind a system message."""
    messages: list[Message] = []
    if generator.random() < 0.25:
        messages.append({"role": "system", "content": generator.choice(SYSTEMS)})
    for turn, story in enumerate(stories):
        opening = (
            generator.choice(FOLLOW_UPS if turn else GREETINGS) if generator.random() < (0.7 if turn else 0.12) else ""
        )
        messages.append({"role": "user", "content": opening + compose_request(story, generator)})
        messages.append({"role": "assistant", "content": story})
    return messages


def compose_request(story: str, generator: random.Random) -> str:
    kind = generator.random()
    topic = _choose_topic(story, generator)
    if kind < 0.08 or not topic:
        return generator.choice(WITHOUT_TOPIC)
    if kind < 0.14:
        return generator.choice(WITH_OPENING).format(opening=" ".join(story.split()[: generator.randint(3, 12)]))
    return generator.choice(WITH_TOPIC).format(topic=topic)


def opening(story: str) -> str:
    """The first two sentences, where a story says what it is about."""
    return " ".join(_SENTENCE_END.split(story)[:2])


def story_nouns(story: str) -> list[str]:
    """Known nouns of the story, the most frequent first."""
    counts = Counter(word for word in re.findall(r"[a-z]+", story.lower()) if word in NOUNS)
    return [noun for noun, _ in counts.most_common()]


def story_name(story: str) -> str | None:
    """The main character's name, or None where nobody seems to have one."""
    if named := _NAMED.search(story):
        return named.group(1)
    inside = Counter(_INSIDE_NAME.findall(story)).most_common(1)
    return inside[0][0] if inside and inside[0][1] >= 2 else None


def _choose_topic(story: str, generator: random.Random) -> str | None:
    early = set(story_nouns(opening(story)))
    nouns = [noun for noun in story_nouns(story) if noun in early][:4]
    name = story_name(story)
    things = [_with_article(noun) for noun in nouns[: generator.choice((1, 1, 2, 2, 3))]]
    generator.shuffle(things)
    if name and generator.random() < 0.3:
        kind = next(
            (f"{_with_article(noun)} named " for noun in ("girl", "boy", *nouns) if f"{noun} named {name}" in story),
            "",
        )
        others = [thing for thing in things if not kind.startswith(thing)]
        things = [kind + name, *others[: generator.choice((0, 0, 1))]]
    if len(things) < 2:
        return things[0] if things else None
    return ", ".join(things[:-1]) + " and " + things[-1]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" or noun == "umbrella" else f"a {noun}"
