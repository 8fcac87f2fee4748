import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from serve.storyteller import PATH

USER = {"role": "user", "content": "Tell me a story about a dog."}
STORY = {"role": "assistant", "content": "Once upon a time."}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PATH)


def render(tokenizer: PreTrainedTokenizerBase, *messages: dict[str, str]) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def test_a_request_is_followed_by_the_assistants_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render(tokenizer, USER) == "<|start_story|><|user|>Tell me a story about a dog.<|assistant|>"


def test_answers_end_like_stories(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Be kind."}
    assert render(tokenizer, system, USER, STORY, USER) == (
        "<|start_story|><|system|>Be kind.<|user|>Tell me a story about a dog."
        "<|assistant|>Once upon a time.<|end_story|><|user|>Tell me a story about a dog.<|assistant|>"
    )


def test_unknown_roles_speak_as_the_user(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render(tokenizer, {"role": "tool", "content": "7"}) == "<|start_story|><|user|>7<|assistant|>"


def test_tokenized_chat_has_one_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
