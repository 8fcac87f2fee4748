"""llama.cpp through its C interface: one `llama_decode` a step for all sequences, the likeliest token of each next."""

import ctypes
import time
from pathlib import Path

import gguf
import llama_cpp as llama
import numpy as np

from loadtest.engine.session import Order, Step, attend


class LlamaCpp:
    """One context with room for the largest batch."""

    version = f"llama-cpp-python {llama.__version__}"

    def __init__(self, order: Order) -> None:
        llama.llama_backend_init()
        path = Path(order.model)
        self._vocabulary_size = order.vocabulary_size
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        params.n_threads = params.n_threads_batch = order.threads
        params.n_seq_max = max(order.batch_sizes)
        params.n_ctx = params.n_seq_max * (order.context_tokens + 32)
        params.n_batch = max(2048, params.n_seq_max * order.prompt_tokens)
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not open {path}")
        self._batch = llama.llama_batch_init(params.n_batch, 0, 1)
        self.bytes_per_step = _bytes_per_step(path)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Step]:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        places = range(len(prompts))
        self._batch.n_tokens = 0
        for place, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._add(token, position, place, position == len(prompt) - 1)
        ends = np.cumsum([len(prompt) for prompt in prompts]) - 1
        steps = []
        for number in range(max_tokens):
            if llama.llama_decode(self._context, self._batch):
                raise RuntimeError("llama.cpp could not decode")
            tokens = [self._likeliest(int(row)) for row in ends]
            steps.append(Step(time.perf_counter(), places))
            self._batch.n_tokens = 0
            for place, token in enumerate(tokens):
                self._add(token, len(prompts[place]) + number, place, True)
            ends = np.arange(len(prompts))
        return steps

    def _add(self, token: int, position: int, sequence: int, wants_logits: bool) -> None:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = wants_logits
        batch.n_tokens = row + 1

    def _likeliest(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(logits, ctypes.c_void_p).value
        assert address is not None
        return int(np.ctypeslib.as_array((ctypes.c_float * self._vocabulary_size).from_address(address)).argmax())


def _bytes_per_step(path: Path) -> int:
    """Of every tensor but the embedding's table, of which a step reads one row a sequence."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if tensor.name != "token_embd.weight")


if __name__ == "__main__":
    attend(LlamaCpp)
