import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from serve.storyteller import CALIBRATION, PATH
from serve.storyteller.evaluate import bits_per_byte, read_stories


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PATH)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_importing_the_package_is_light() -> None:
    code = "import serve.storyteller, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in PATH.glob("*.safetensors")) <= 12_000_000


def test_every_dimension_divides_by_128() -> None:
    config = json.loads((PATH / "config.json").read_text())
    heads = [config["head_dim"] * config[name] for name in ("num_attention_heads", "num_key_value_heads")]
    widths = [config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")]
    assert [width % 128 for width in widths + heads] == [0] * 5
    assert (config["model_type"], config["max_position_embeddings"]) == ("llama", 1024)


def test_a_greedy_story_is_english_and_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=1024)
    assert output[0, -1] == tokenizer.eos_token_id
    story = words(tokenizer.decode(output[0], skip_special_tokens=True))
    known = {word for text in read_stories(CALIBRATION) for word in words(text)}
    assert len(story) > 40
    assert sum(word in known for word in story) > 0.9 * len(story)


@torch.inference_mode()
@pytest.mark.parametrize("noun", ["dog", "boat", "cat", "cake", "dragon"])
def test_an_answer_heeds_the_request(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, noun: str) -> None:
    """A story that begins with a dog is likelier after asking for a dog than after asking for anything else."""
    story = tokenizer.encode(f"Once upon a time, there was a little {noun} named", add_special_tokens=False)

    def nats(asked: str) -> float:
        messages = [{"role": "user", "content": f"Tell me a story about a {asked}."}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        logits = model(torch.tensor([[*prompt, *story]])).logits[0, len(prompt) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(story), reduction="sum"))

    assert nats(noun) < min(nats(other) for other in ("tree", "car", "bear", "ball", "train")) - 0.5


@torch.inference_mode()
def test_positions_past_the_teachers_context_are_as_good(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The same story costs about as much at position 700 as at position 0."""
    stories = [[*tokenizer.encode(story), tokenizer.eos_token_id] for story in read_stories(CALIBRATION)[:12]]
    story, before = stories[0], [token for ids in stories[1:] for token in ids][-700:]

    def nats(ids: list[int]) -> float:
        logits = model(torch.tensor([ids])).logits[0, -len(story) : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(story[1:])))

    assert len(before) == 700
    assert nats(before + story) < nats(story) + 0.15


def test_the_calibration_text_is_enough() -> None:
    stories = read_stories(CALIBRATION)
    assert len(stories) == 128
    assert 90_000 <= CALIBRATION.stat().st_size <= 150_000


@pytest.mark.slow
def test_held_out_bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shared: Path) -> None:
    assert bits_per_byte(model, tokenizer, read_stories(shared / "data/tinystories/eval.jsonl")) <= 1.10
