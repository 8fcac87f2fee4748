"""transformers' `generate` on a static batch: in bf16, with torch's dynamic INT8, and with bitsandbytes' NF4.

The environment is the project's own, which has all three in its lock.
"""

import time
import warnings
from importlib import metadata
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from loadtest.engine.session import Order, Step, attend


class StaticGenerate:
    """One model behind `generate`."""

    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        self.version = _version(order.precision)
        self._model, self.bytes_per_step = _LOAD[order.precision](order.model)
        self._model.eval()
        self._model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Step]:
        steps = _Steps(len(prompts))
        ids = torch.tensor(prompts)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=steps,
        )
        return steps.given[1:]  # the prompts come first


class _Steps(BaseStreamer):
    """`generate` puts the new token of every sequence here."""

    def __init__(self, batch_size: int) -> None:
        self._sequences = range(batch_size)
        self.given: list[Step] = []

    def put(self, value: Any) -> None:
        self.given.append(Step(time.perf_counter(), self._sequences))

    def end(self) -> None:
        pass


def _bf16(path: str) -> tuple[Any, int]:
    model = _read(path, dtype=torch.bfloat16)
    return model, _dense_bytes(model)


def _dynamic_int8(path: str) -> tuple[Any, int]:
    """torch's own: int8 weights per channel, activations quantized per tensor on the way in, in between fp32."""
    model = _read(path, dtype=torch.float32)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    torch.backends.quantized.engine = "onednn"
    quantize: Any = torch.ao.quantization.quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its successor, torchao, is no part of torch
        return quantize(model, {torch.nn.Linear}, dtype=torch.qint8), linear


def _nf4(path: str) -> tuple[Any, int]:
    """As transformers' own loader does it, which wants accelerate only to place layers: every linear but the head."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    linear4bit: Any = Linear4bit  # they are not typed
    params4bit: Any = Params4bit
    model = _read(path, dtype=torch.bfloat16)
    total = _dense_bytes(model)
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            layer = linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            layer.weight = params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4").to("cpu")
            model.model.set_submodule(name, layer)
            total += layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes - linear.weight.nbytes
    return model, total


def _read(path: str, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def _dense_bytes(model: Any) -> int:
    """Of all parameters but the embedding's table, of which a step reads one row a sequence."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    return int(total - model.get_input_embeddings().weight.nbytes)


_LOAD = {"bf16": _bf16, "dynamic-int8": _dynamic_int8, "bitsandbytes-nf4": _nf4}


def _version(precision: str) -> str:
    names = ["transformers", "torch", *(["bitsandbytes"] if precision == "bitsandbytes-nf4" else [])]
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


if __name__ == "__main__":
    attend(StaticGenerate)
