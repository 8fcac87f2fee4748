"""vLLM on the CPU, driven step by step through its engine, in this process, as `LLM.generate` does."""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import itertools
import time
from pathlib import Path

import torch
import vllm
from safetensors import safe_open
from vllm import LLM, SamplingParams

from loadtest.engine.session import Order, Step, attend


class VLLM:
    """vLLM as it comes: compiled, paged, chunked prefill; only its prefix cache is off, as nothing is shared."""

    version = f"vllm {vllm.__version__}, torch {torch.__version__}"

    def __init__(self, order: Order) -> None:
        self._engine = LLM(
            order.model,
            dtype="bfloat16",
            max_model_len=order.context_tokens,
            max_num_seqs=max(order.batch_sizes),
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine
        self._names = itertools.count()
        self.bytes_per_step = _bytes_per_step(Path(order.model) / "model.safetensors")

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Step]:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        places: dict[str, int] = {}
        for place, prompt in enumerate(prompts):
            name = str(next(self._names))
            places[name] = place
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        steps: list[Step] = []
        given = dict.fromkeys(places, 0)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            at_s = time.perf_counter()
            counts = {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
            grown = [name for name, count in counts.items() if count > given[name]]
            given |= counts
            if grown:
                steps.append(Step(at_s, [places[name] for name in grown]))
        return steps


def _bytes_per_step(weights: Path) -> int:
    with safe_open(str(weights), "pt") as file:
        names = [name for name in file.keys() if "embed_tokens" not in name]  # noqa: SIM118 - no mapping
        return sum(2 * _elements(file.get_slice(name).get_shape()) for name in names)


def _elements(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


if __name__ == "__main__":
    attend(VLLM)
