"""An engine's process: it loads once, then measures whenever it is told to, so that engines can take turns.

Runs in the engine's own environment, so it needs the standard library alone. Commands come in on standard input and
answers leave on standard output, a JSON object a line; whatever the engine prints goes to standard error instead.

An engine only has to say when each token came out. What counts is the same for all of them, and the same as in
`halftone bench`: prefill is a prompt's tokens over the time to its first output token; decode is counted while the
whole batch decodes, from the step that gave the last sequence its first token to the first in which one ends.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Order:
    """What an engine's process is started with."""

    model: str
    precision: str
    threads: int
    prompt_tokens: int
    decode_tokens: int
    batch_sizes: tuple[int, ...]
    vocabulary_size: int

    @property
    def context_tokens(self) -> int:
        """Of one sequence."""
        return self.prompt_tokens + self.decode_tokens

    def dump(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Order":
        data = json.loads(text)
        return cls(**{**data, "batch_sizes": tuple(data["batch_sizes"])})


@dataclass(frozen=True)
class Step:
    """Which sequences (by their place in the batch) got a token at `at_s`, on `time.perf_counter`."""

    at_s: float
    sequences: Sequence[int]


class Engine(Protocol):
    """A loaded engine. `bytes_per_step` are the bytes of weights that one decoding step reads."""

    version: str
    bytes_per_step: int

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Step]:
        """Exactly `max_tokens` tokens for each prompt, all prompts together; every step that gave tokens."""
        ...


def prefill_rate(prompt_tokens: int, start_s: float, steps: Sequence[Step]) -> float:
    """Prompt tokens per second until the first output token."""
    return prompt_tokens / (steps[0].at_s - start_s)


def decode_rate(steps: Sequence[Step], batch_size: int, max_tokens: int) -> float:
    """Tokens per second of all sequences together, while all of them decode."""
    given = dict.fromkeys(range(batch_size), 0)
    window: list[Step] = []
    for step in steps:
        for sequence in step.sequences:
            given[sequence] += 1
        if all(given.values()):
            window.append(step)
        if max(given.values()) == max_tokens:
            break
    if len(window) < 2:
        raise RuntimeError(f"a batch of {batch_size} never decoded together; more decode tokens are needed")
    return sum(len(step.sequences) for step in window[1:]) / (window[-1].at_s - window[0].at_s)


def measure(engine: Engine, order: Order, phase: str, batch_size: int, seed: str) -> float:
    """One run. Prompts are random and never repeat, so that no prefix can be reused."""
    rng = random.Random(seed)
    prompts = [rng.choices(range(order.vocabulary_size), k=order.prompt_tokens) for _ in range(batch_size)]
    start_s = time.perf_counter()
    if phase == "prefill":
        return prefill_rate(order.prompt_tokens, start_s, engine.generate(prompts, 1))
    return decode_rate(engine.generate(prompts, order.decode_tokens), batch_size, order.decode_tokens)


def attend(load: Callable[[Order], Engine]) -> None:
    """The main loop of an engine's process; ends when its standard input does."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    order = Order.load(sys.argv[1])
    start_s = time.perf_counter()
    engine = load(order)
    engine.generate([[1, 2, 3]], 1)
    ready_s = time.perf_counter() - start_s
    print(
        json.dumps({"version": engine.version, "bytes_per_step": engine.bytes_per_step, "load_s": ready_s}),
        file=answers,
    )
    for line in sys.stdin:
        job = json.loads(line)
        rate = measure(engine, order, job["phase"], job["batch_size"], job["seed"])
        print(json.dumps({"tokens_per_s": rate, **memory()}), file=answers)


def memory() -> dict[str, Any]:
    """Resident bytes of this process, now and at most; None where the system does not tell."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    found = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return {"resident_bytes": found.get("VmRSS"), "peak_bytes": found.get("VmHWM")}
