"""Measures a storyteller: bits per byte on held-out stories, and samples to read.

    python -m serve.storyteller.evaluate --data eval.jsonl [--checkpoint DIR] [--samples]

Bits per byte do not depend on the tokenizer: the bits of all tokens of a story, the first one predicted from
BOS alone, over the UTF-8 bytes that they spell. A story is cut at the model's context, and only the bytes
that remain are counted.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from serve.storyteller import PATH

__all__ = ["bits_per_byte", "read_stories", "tell"]

PROMPTS = ("Once upon a time", "Tom and his dog went to the park.")
REQUESTS = (
    "Tell me a story about a dog and a ball.",
    "Write a short story about a girl named Mia and a boat.",
)


def read_stories(file: Path) -> list[str]:
    """The texts of a JSONL file of `{"text": ...}`."""
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stories: Sequence[str]) -> float:
    """Bits over bytes of all stories together."""
    nats, bytes_ = 0.0, 0
    for story in stories:
        ids = torch.tensor([tokenizer(story)["input_ids"][: model.config.max_position_embeddings]])
        logits = model(ids).logits[0, :-1].float()
        nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        bytes_ += len(str(tokenizer.decode(ids[0, 1:])).encode())
    return nats / math.log(2) / bytes_


def tell(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, seed: int = 0) -> str:
    """A story sampled with the checkpoint's own settings: the prompt's continuation, or the answer to it."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    else:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    torch.manual_seed(seed)
    context = model.config.max_position_embeddings
    output = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), max_length=context)
    return str(tokenizer.decode(output[0, ids.shape[1] if chat else 0 :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures a storyteller checkpoint.")
    parser.add_argument("--data", type=Path, help="stories to score, JSONL")
    parser.add_argument("--checkpoint", type=Path, default=PATH)
    parser.add_argument("--samples", action="store_true", help="print a few stories")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    for chat, prompts in ((False, PROMPTS), (True, REQUESTS)) if arguments.samples else ():
        for prompt in prompts:
            print(f"{'request' if chat else 'prompt'}: {prompt}\n{tell(model, tokenizer, prompt, chat=chat)}\n")
    if arguments.data:
        stories = read_stories(arguments.data)
        print(
            json.dumps({"stories": len(stories), "bits_per_byte": round(bits_per_byte(model, tokenizer, stories), 4)})
        )


if __name__ == "__main__":
    main()
