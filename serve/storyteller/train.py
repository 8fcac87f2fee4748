"""Trains the embedded model: grows the teacher, then lets it learn from the teacher's judgement and from text.

    python -m serve.storyteller.train --data train.jsonl --sampled sampled.jsonl --teacher TEACHER --out DIR

Some documents are real stories, judged by the teacher and by their own text; the others were sampled from the teacher,
whose judgement then says all there is to know. A third of both become chats, learnt from the text alone, since the
teacher knows no requests; later, most documents are a request and the opening that answers it. Windows hold 1024 tokens
of packed documents, twice the teacher's context, so every position that the model offers has been trained.

An interrupted run goes on from `DIR/run.pt` to the same model: each stretch of steps draws its data from its own seed.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .documents import REQUESTS_LATER, STORIES_FIRST, Document, DocumentMaker, Window, pack
from .evaluate import bits_per_byte, read_stories
from .growth import grow, student_config
from .objective import window_loss
from .teacher import EOS_ID, load_teacher
from .tokenizer import save_tokenizer

__all__ = ["Plan", "Texts", "train"]

STRETCH_STEPS = 50


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn. The learning rate warms up, stays, and falls to zero over the last part."""

    steps: int = 700
    windows_per_step: int = 4
    window_tokens: int = 1024
    learning_rate: float = 1e-3
    warmup_steps: int = 40
    decay_ratio: float = 0.4
    weight_decay: float = 0.02
    real_ratio: float = 0.6
    real_teacher_share: float = 0.3
    requests_from_step: int = 450
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        falling = (self.steps - step) / (self.steps * self.decay_ratio)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, falling)


@dataclass(frozen=True)
class Texts:
    """Stories: real ones, ones that the teacher wrote, and real ones that are only measured, never learnt."""

    real: list[str]
    sampled: list[str]
    held_out: list[str]


def train(texts: Texts, teacher_folder: Path, out: Path, plan: Plan) -> None:
    """Writes the checkpoint folder `out`."""
    save_tokenizer(teacher_folder, out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    teacher = load_teacher(teacher_folder)
    student = _grown_student(teacher, plan)
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=plan.weight_decay)
    first = _resume(out / "run.pt", student, optimizer)
    started = time.monotonic()
    for start in range(first, plan.steps, STRETCH_STEPS):
        maker = DocumentMaker(tokenizer, STORIES_FIRST if start < plan.requests_from_step else REQUESTS_LATER)
        documents = _documents(maker, texts, plan, random.Random(f"{plan.seed} {start}"))  # noqa: S311
        windows = pack(documents, plan.window_tokens, teacher.config.max_position_embeddings)
        end = min(start + STRETCH_STEPS, plan.steps)
        for step in range(start, end):
            _set_learning_rate(optimizer, plan.learning_rate_at(step))
            loss = _learn(student, teacher, optimizer, [next(windows) for _ in range(plan.windows_per_step)])
        held_out = bits_per_byte(student, tokenizer, texts.held_out)
        elapsed_s = time.monotonic() - started
        print(f"step {end} loss {loss:.3f} held-out bits per byte {held_out:.4f} {elapsed_s:.0f} s", flush=True)
        _save_run(out / "run.pt", end, student, optimizer)
    _save_checkpoint(student, out)


def _grown_student(teacher: LlamaForCausalLM, plan: Plan) -> LlamaForCausalLM:
    student: LlamaForCausalLM = cast(Any, LlamaForCausalLM)(student_config())
    old, new = (model.config.hidden_size // model.config.num_attention_heads for model in (teacher, student))
    generator = torch.Generator().manual_seed(plan.seed)
    student.load_state_dict(grow(teacher.state_dict(), student.state_dict(), (old, new), generator))
    return student


def _learn(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, optimizer: torch.optim.Optimizer, windows: list[Window]
) -> float:
    inputs = torch.stack([window.inputs for window in windows])
    targets = torch.stack([window.targets for window in windows])
    with torch.autocast("cpu", torch.bfloat16):
        logits = student(input_ids=inputs).logits
    loss = window_loss(logits.float(), targets, windows, teacher)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _documents(maker: DocumentMaker, texts: Texts, plan: Plan, generator: random.Random) -> Iterator[Document]:
    while True:
        if generator.random() < plan.real_ratio:
            yield maker.make(generator.sample(texts.real, 3), plan.real_teacher_share, generator)
        else:
            yield maker.make(generator.sample(texts.sampled, 3), 1.0, generator)


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _resume(file: Path, student: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save_run(file: Path, step: int, student: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    state = {"step": step, "student": student.state_dict(), "optimizer": optimizer.state_dict()}
    aside = file.with_suffix(".new")
    torch.save(state, aside)
    aside.replace(file)


def _save_checkpoint(student: LlamaForCausalLM, out: Path) -> None:
    """bfloat16 weights, the config, and the sampling that suits so small a model."""
    cast(Any, student.to)(torch.bfloat16).save_pretrained(out)
    generation = {"bos_token_id": 1, "eos_token_id": EOS_ID, "pad_token_id": 0}
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (out / "generation_config.json").write_text(json.dumps(generation | sampling, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the embedded model.")
    parser.add_argument("--data", type=Path, required=True, help="real stories, JSONL")
    parser.add_argument("--sampled", type=Path, required=True, help="stories from serve.storyteller.teacher, JSONL")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of TinyStories-656K")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--held-out", type=int, default=64, help="the last so many real stories are only measured")
    arguments = parser.parse_args()
    real, plan = read_stories(arguments.data), Plan(steps=arguments.steps)
    learnt = len(real) - arguments.held_out
    texts = Texts(real[:learnt], read_stories(arguments.sampled), real[learnt:])
    print(json.dumps({"real": learnt, "sampled": len(texts.sampled), "plan": asdict(plan)}), flush=True)
    train(texts, arguments.teacher, arguments.out, plan)


if __name__ == "__main__":
    main()
