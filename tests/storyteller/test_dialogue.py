import random

from hypothesis import given
from hypothesis import strategies as st

from serve.storyteller import CALIBRATION
from serve.storyteller.dialogue import WITHOUT_TOPIC, compose_dialogue, compose_request, story_name, story_nouns
from serve.storyteller.evaluate import read_stories

STORY = "One day, a girl named Mia saw a dog. The dog had a ball. Mia and the dog played with the ball. The dog barked."


def test_nouns_come_by_frequency() -> None:
    assert story_nouns(STORY) == ["dog", "ball", "girl"]


def test_the_main_character_is_found() -> None:
    assert story_name(STORY) == "Mia"
    assert story_name("Then Tom ran, and Tom fell. But Tom was well, so Tom ran.") == "Tom"
    assert story_name("The sun was warm.") is None


@given(seed=st.integers(0, 10_000))
def test_requests_ask_only_for_what_the_story_holds(seed: int) -> None:
    request = compose_request(STORY, random.Random(seed))
    assert request in WITHOUT_TOPIC or any(word in request for word in ("dog", "ball", "girl", "Mia", "One day, a"))
    assert not set(story_nouns(request)) - {"dog", "ball", "girl"} or request in WITHOUT_TOPIC


@given(seed=st.integers(0, 10_000), turns=st.integers(1, 3))
def test_dialogues_alternate_and_answer_with_the_stories(seed: int, turns: int) -> None:
    stories = read_stories(CALIBRATION)[:turns]
    messages = compose_dialogue(stories, random.Random(seed))
    spoken = [message for message in messages if message["role"] != "system"]
    assert [message["role"] for message in spoken] == ["user", "assistant"] * turns
    assert [message["content"] for message in spoken[1::2]] == stories
