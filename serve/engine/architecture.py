"""Whether a model is served right, found out by trying, not from a list of names.

`describe` runs the model once to see how its layers attend, and refuses what has no K/V cache of ours: models that do
not use transformers' attention interface, that keep other state than keys and values, or mask in their own way.
`verify` then runs two short prompts through the paged path, side by side and in chunks, and holds the logits against
the model's own attention: a model that lets tokens of one row mix in any other way is found here, and refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from serve.engine.attention import AttentionOptions
from serve.engine.backend import NAME
from serve.engine.blocks import blocks_for
from serve.engine.head import tried_head
from serve.engine.inputs import make_inputs
from serve.engine.kv_cache import KVCache, LayerShape
from serve.engine.runner import Runner
from serve.engine.scheduler import Chunk
from serve.engine.sequence import Sequence
from serve.errors import UnsupportedArchitecture
from serve.generation import SamplingParams

__all__ = ["adopt"]

_PROBE_LENGTHS = (7, 5)
_PROBE_CUT = 3
_PROBE_BLOCK_SIZE = 4


def adopt(model: nn.Module) -> tuple[Runner, list[LayerShape]]:
    """Point a model's attention at ours and check that it still computes the same.

    Raises UnsupportedArchitecture, with the model left as it was.
    """
    name = type(model).__name__
    before = str(model.config._attn_implementation)  # type: ignore[union-attr]
    prompts = [_probe_prompt(model, length) for length in _PROBE_LENGTHS]
    try:
        _refuse_other_state(model)
        expected = _plain_logits(model, prompts)
        _set_attention(model, NAME)
        runner = Runner(model)
        layers = _describe(runner)
        _verify(runner, layers, prompts, expected)
    except UnsupportedArchitecture as error:
        _set_attention(model, before)
        raise UnsupportedArchitecture(f"{name} is not served: {error.message}") from error
    return runner, layers


def _refuse_other_state(model: nn.Module) -> None:
    """transformers marks models whose state cannot be rolled back to an earlier token: recurrent and hybrid ones."""
    if getattr(model, "_is_stateful", False):
        raise UnsupportedArchitecture("it keeps a recurrent state, which the paged cache does not hold")


@contextmanager
def _refusing(reason: str) -> Iterator[None]:
    """Turns what a foreign model may raise on an input that it was not made for into a refusal."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise UnsupportedArchitecture(f"{reason} ({error})") from error


class _Witness:
    """Stands in for attention, and notes what each layer asks for."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self.calls = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self.calls += 1
        self.layers[layer] = LayerShape(key.shape[0], key.shape[-1], value.shape[-1], key.dtype, key.device)
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])


def _describe(runner: Runner) -> list[LayerShape]:
    witness = _Witness()
    with _refusing("it cannot run without a cache of its own"):
        runner.describe(witness)
    config = runner.model.config
    count = config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    if not witness.calls:
        raise UnsupportedArchitecture("it does not use transformers' attention interface")
    if sorted(witness.layers) != list(range(count)) or witness.calls != count:
        raise UnsupportedArchitecture(
            f"{len(witness.layers)} of its {count} layers keep keys and values of their own; the others keep a state "
            "that the paged cache does not hold"
        )
    return [witness.layers[index] for index in range(count)]


def _verify(runner: Runner, layers: list[LayerShape], prompts: list[list[int]], expected: list[Tensor]) -> None:
    """Both prompts side by side, the second in two chunks: their last logits must be what each gives alone."""
    cache = KVCache(layers, len(prompts) * blocks_for(max(_PROBE_LENGTHS), _PROBE_BLOCK_SIZE), _PROBE_BLOCK_SIZE)
    first, second = _probe_sequences(prompts)
    step = [_probe_chunk(first, 0, len(first.tokens)), _probe_chunk(second, 0, _PROBE_CUT)]
    logits = [runner.run(make_inputs(step), cache).logits[0]]
    step = [_probe_chunk(second, _PROBE_CUT, len(second.tokens))]
    found = runner.run(make_inputs(step), cache)
    logits.append(found.logits[0])
    if found.hidden is not None:
        runner.head = tried_head(runner.model, found.hidden[-1:], found.logits, runner.logits_dtype)
    for ours, theirs in zip(logits, expected, strict=True):
        difference = float((ours - theirs).norm() / theirs.norm())
        if not difference <= _tolerance(layers[0].dtype):
            raise UnsupportedArchitecture(
                f"a probe through the paged cache gave other logits than the model alone (relative difference "
                f"{difference:.2g})"
            )


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype is torch.float32 else 0.1


def _plain_logits(model: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """What the model's own attention gives, in transformers' plainest form: [vocab] after each prompt."""
    _set_attention(model, "eager")
    device = next(model.parameters()).device
    with _refusing("it does not run at all"), torch.inference_mode():
        outputs: list[Any] = [model(input_ids=torch.tensor([p], device=device), use_cache=False) for p in prompts]
    return [output.logits[0, -1].float() for output in outputs]


def _set_attention(model: nn.Module, implementation: str) -> None:
    model.set_attn_implementation(implementation)  # type: ignore[operator]


def _probe_prompt(model: nn.Module, length: int) -> list[int]:
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    return [(length * 31 + 17 * index) % vocabulary for index in range(length)]


def _probe_sequences(prompts: list[list[int]]) -> list[Sequence]:
    width = blocks_for(max(_PROBE_LENGTHS), _PROBE_BLOCK_SIZE)
    sequences = [Sequence("probe", i, p, len(p), SamplingParams(), 1, i) for i, p in enumerate(prompts)]
    for index, sequence in enumerate(sequences):
        sequence.blocks = list(range(1 + index * width, 1 + (index + 1) * width))
    return sequences


def _probe_chunk(sequence: Sequence, start: int, stop: int) -> Chunk:
    kept = range(start, stop)
    return Chunk(sequence, start, stop - start, samples=stop == len(sequence.tokens), kept=kept)
