from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from serve.engine.prompt import PromptEncoder
from serve.errors import ContextLengthExceeded, InvalidRequest
from serve.generation import Chat
from tests.engine.conftest import byte_tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HELLO = Chat(({"role": "user", "content": "Hello"},))
Encoders = Callable[[str | None], PromptEncoder]


@pytest.fixture
def encoders() -> Iterator[Encoders]:
    opened = []

    def open_encoder(template: str | None) -> PromptEncoder:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        opened.append(PromptEncoder(tokenizer, max_model_len=64, template_timeout_s=1.0))
        return opened[-1]

    yield open_encoder
    for encoder in opened:
        encoder.close()


def test_a_conversation_is_rendered_as_transformers_renders_it(encoders: Encoders) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    theirs = tokenizer.apply_chat_template([dict(m) for m in HELLO.messages], add_generation_prompt=True)
    assert list(encoders(CHATML).encode(HELLO)) == list(theirs["input_ids"])


def test_special_tokens_written_by_the_template_are_not_added_again(encoders: Encoders) -> None:
    assert encoders(CHATML).encode(HELLO).count(256) == 1


def test_a_final_message_is_continued_where_it_stops(encoders: Encoders) -> None:
    messages = (*HELLO.messages, {"role": "assistant", "content": "Once upon"})
    text = encoders(CHATML).render(Chat(messages, continue_final_message=True))
    assert text.endswith("assistant: Once upon")


@pytest.mark.parametrize(
    "template",
    [
        "{{ lipsum.__globals__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ range(10**9) | list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for _ in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x'.ljust(10**12) }}",
        "{{ raise_exception('no system message') }}",
        "{{ messages[7]['content'] }}",
        "{% for broken",
    ],
)
def test_a_hostile_or_broken_template_fails_closed_and_the_next_request_is_served(
    encoders: Encoders, template: str
) -> None:
    guarded = "{% if messages[0]['content'] == 'attack' %}" + template + "{% endif %}fine"
    encoder = encoders(guarded)
    with pytest.raises(InvalidRequest) as refused:
        encoder.encode(Chat(({"role": "user", "content": "attack"},)))
    assert refused.value.param == "messages"
    if "broken" not in template:
        assert encoder.render(HELLO) == "fine"


def test_a_model_without_a_template_names_the_other_route(encoders: Encoders) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        encoders(None).encode(HELLO)


def test_text_and_token_ids_are_encoded_without_a_template(encoders: Encoders) -> None:
    encoder = encoders(None)
    assert encoder.encode((1, 2, 3)) == (1, 2, 3)
    assert list(encoder.encode("héllo")) == byte_tokenizer()("héllo")["input_ids"]


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_is_no_text_is_refused(encoders: Encoders, text: str) -> None:
    with pytest.raises(InvalidRequest):
        encoders(None).encode(text)
    with pytest.raises(InvalidRequest):
        encoders(CHATML).encode(Chat(({"role": "user", "content": text},)))


def test_endless_text_is_refused_before_it_is_tokenized(encoders: Encoders) -> None:
    with pytest.raises(ContextLengthExceeded):
        encoders(None).encode("x" * 100_000)
