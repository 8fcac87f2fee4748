"""What a KV cache in int8 costs in quality: python -m tests.engine.measure_kv_cache MODEL TEXT.jsonl [RECIPE] [RECORDS]

Each record is scored by two engines over the same weights, whose KV caches differ alone, in chunks of 64 tokens, so
that most keys and values are read back from the cache. One JSON line: KL(model's own type || int8) in nats per token.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve.compression.recipe import Recipe
from serve.engine import EngineSettings
from serve.engine.core import EngineCore
from serve.generation import GenerationRequest, SamplingParams
from serve.loading import load

__all__ = ["compare", "logprobs"]


def logprobs(loaded: Any, records: list[list[int]], kv_cache_dtype: str) -> Tensor:
    """`[tokens, vocabulary]`, fp32: what is predicted at every position of every record."""
    settings = EngineSettings(
        kv_cache_dtype=kv_cache_dtype, max_num_batched_tokens=64, max_num_seqs=1, prefix_cache=False, native=False
    )
    core = EngineCore(loaded.model, loaded.tokenizer, settings)
    rows, run = [], core._runner.run

    def recording(*arguments: Any) -> Any:
        outputs = run(*arguments)
        rows.append(outputs.logits.log_softmax(-1))
        return outputs

    core._runner.run = recording
    for number, ids in enumerate(records):
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        core.accept(GenerationRequest(str(number), tuple(ids), params), 0.0)
        while not core.is_idle:
            core.step()
    return torch.cat(rows)


@torch.inference_mode()
def compare(loaded: Any, records: list[list[int]]) -> dict[str, float]:
    own, int8 = (logprobs(loaded, records, dtype) for dtype in ("auto", "int8"))
    divergence = (own.exp() * (own - int8)).sum(-1)
    truth = torch.tensor([token for ids in records for token in ids[1:]])[:, None]
    shift = (own.gather(-1, truth) - int8.gather(-1, truth)).mean().exp() - 1
    return {
        "tokens": len(divergence),
        "kl_divergence": float(divergence.mean()),
        "kl_divergence_p99": float(divergence.quantile(0.99)),
        "top1_agreement": float((own.argmax(-1) == int8.argmax(-1)).float().mean()),
        "perplexity_change_ratio": float(shift),
    }


def main(model: str, text: str, recipe: str = "bf16", count: str = "60") -> None:
    loaded = load(model, Recipe.parse(recipe))
    with Path(text).open() as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, int(count))]
    records = [list(loaded.tokenizer(each)["input_ids"])[: loaded.context_length] for each in texts]
    print(json.dumps({"model": model, "recipe": recipe, **compare(loaded, records)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
