"""Stories sampled from the teacher: text without limit, whose next-token distribution is known exactly.

Two habits of TinyStories-656K matter. It saw stories start right after BOS, without the space that its own
tokenizer puts in front, so sampling starts from BOS alone. And it saw their end spelled out as text: it
writes "<|", "end", "_story", "|>" before the real EOS, so its "<|" *is* the end of a story, and its
prediction of "<|" is our prediction of EOS.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .tokenizer import build_tokenizer

__all__ = ["BOS_ID", "EOS_ID", "TEACHER_EOS_ID", "load_teacher", "sample_stories"]

BOS_ID, EOS_ID = 1, 2
TEACHER_EOS_ID = 208  # "<|"


def load_teacher(folder: Path) -> LlamaForCausalLM:
    """In float32, ready to judge and to generate."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sample_stories(
    teacher: LlamaForCausalLM, tokenizer: Tokenizer, count: int, *, temperature: float, batch_size: int = 128
) -> Iterator[str]:
    """Yields `count` finished stories; those that do not end within the teacher's context are dropped."""
    made = 0
    while made < count:
        ids = _sample_batch(teacher, batch_size, temperature)
        for row in ids.tolist():
            if TEACHER_EOS_ID in row and made < count:
                made += 1
                yield tokenizer.decode(row[: row.index(TEACHER_EOS_ID)])


@torch.inference_mode()
def _sample_batch(teacher: LlamaForCausalLM, batch_size: int, temperature: float) -> torch.Tensor:
    """Ids after BOS, `[batch_size, tokens]`; sampled from the whole distribution, neither top-k nor top-p."""
    prompt = torch.full((batch_size, 1), BOS_ID)
    ids = cast(Any, teacher).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_length=teacher.config.max_position_embeddings,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        eos_token_id=TEACHER_EOS_ID,
        pad_token_id=TEACHER_EOS_ID,
    )
    return cast(torch.Tensor, ids[:, 1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Samples stories from the teacher into a JSONL file.")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    stories = sample_stories(
        load_teacher(arguments.teacher),
        build_tokenizer(arguments.teacher),
        arguments.count,
        temperature=arguments.temperature,
    )
    with arguments.out.open("w") as file:
        for story in stories:
            file.write(json.dumps({"text": story}) + "\n")


if __name__ == "__main__":
    main()
