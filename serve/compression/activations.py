"""Calibration text on its way through a model that exists one block at a time.

The hidden states of every sample wait in front of a block. To run the block, the model's own forward is called with
all earlier blocks skipped, so that it prepares masks, positions and whatever else its architecture hands to a block;
the waiting states are put in place of what comes out of the skipped ones, and nothing after the block is run. Knows
nothing about what is done with the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from serve.compression.compress import Activations
from serve.compression.formats.linear import CompressedLinear
from serve.compression.memory import TensorPeak
from serve.compression.method import InputStatistics, Need
from serve.compression.methods.structured import block_influence
from serve.compression.skeleton import Skeleton, is_projection
from serve.errors import CalibrationError

__all__ = ["BlockActivations", "InputMeter"]

_BATCH_TOKENS = 2048  # samples of equal length run together up to this
_FACTORING = 3  # what factorizing a Gram matrix takes beside it, in float64, as multiples of its own bytes
_PANEL = 512  # columns of the Gram matrix computed at a time, and only on one side of its diagonal


class _Reached(Exception):
    """All that was wanted of the model has been run."""


class BlockActivations(Activations):
    """`samples` are token ids, each within the model's context. Their hidden states live on `device`.

    `activation_bytes`: the most that the text took at once: the hidden states of all samples, outputs that are kept,
    and what one batch takes on its way through a block. `hessian_bytes`: the most that Gram matrices took, with what
    factorizing the largest takes.
    """

    def __init__(self, skeleton: Skeleton, samples: Sequence[Sequence[int]], device: torch.device) -> None:
        if not any(len(sample) for sample in samples):
            raise CalibrationError("calibration: the text holds no token")
        self._skeleton, self.device = skeleton, device
        self._batches = _batches(samples, device)
        self._states: list[Tensor] | None = None  # None: in front of the first block
        self._finished: dict[str, dict[int, Any]] = {}  # outputs of the block's compressed children, batch by batch
        self._returns_tuple = False
        self._batch_bytes = 0
        self.activation_bytes = self.hessian_bytes = 0

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self._batches)

    def groups(self, block: str) -> list[list[str]]:
        """The block's projections in the order they run, siblings (which read the same tensor) together.

        Projections that a first batch doesn't reach (an expert, say) come last, each by itself.
        """
        names = [name for name in self._skeleton.projections if name.startswith(f"{block}.")]
        found: dict[int, list[str]] = {}
        inputs: list[Tensor] = []  # kept alive, so that no two share an id

        def note(name: str, x: Tensor) -> None:
            inputs.append(x)
            found.setdefault(id(x), []).append(name)

        with self._watched(names, note), TensorPeak() as taken:
            self._run(block, 0)
        self._batch_bytes = max(self._batch_bytes, taken.peak_bytes)
        reached = {name for group in found.values() for name in group}
        return [*found.values(), *([name] for name in names if name not in reached)]

    def measure(self, block: str, names: Sequence[str], need: Need) -> Mapping[str, InputStatistics]:
        """Run the block as it now is; statistics of the named projections' inputs, of those that were reached."""
        meters = {name: InputMeter(self._skeleton.spec(name).in_features, need) for name in names}
        waiting: set[str] = set()

        def note(name: str, x: Tensor) -> None:
            meters[name].update(x)
            waiting.discard(name)
            if not waiting:
                raise _Reached

        with self._watched(names, note):
            for index in range(len(self._batches)):
                waiting = set(names)
                self._run(block, index)
        widths = [meter.width for meter in meters.values()]
        if need >= Need.GRAM:
            matrices = [4 * width * width for width in widths]
            self.hessian_bytes = max(self.hessian_bytes, sum(matrices) + _FACTORING * max(matrices, default=0))
        scratch = 2 * 4 * max(widths, default=0) * max(batch.numel() for batch in self._batches)
        self._note_bytes(scratch)
        return {name: meter.statistics() for name, meter in meters.items() if meter.tokens}

    def advance(self, block: str) -> None:
        """Run the block as it now is and keep its outputs as the next block's inputs."""
        self._advance(block, lambda before, after: None)

    def influence(self, block: str) -> float:
        """Advance, and say how far the block turned what passed through it: mean 1 - cos(before, after) over tokens."""
        angles: list[Tensor] = []
        self._advance(block, lambda before, after: angles.append(block_influence(before, after)))
        return torch.cat(angles).mean().item()

    def _advance(self, block: str, observe: Callable[[Tensor, Tensor], None]) -> None:
        states: list[Tensor] = []
        for index in range(len(self._batches)):
            with nullcontext() if self._batch_bytes else TensorPeak() as taken:
                before, output = self._run(block, index, last=True) or _unreached(block)
                self._returns_tuple = isinstance(output, tuple)
                states.append(output[0] if isinstance(output, tuple) else output)
                observe(before, states[index])
            self._batch_bytes = max(self._batch_bytes, taken.peak_bytes if taken else 0)
            if self._states is not None:
                self._states[index] = states[index]  # the old ones are not needed, and take as much memory
        self._states = states
        self._note_bytes()
        self._finished.clear()

    @torch.no_grad()
    def _run(self, block: str, index: int, *, last: bool = False) -> tuple[Tensor, Any] | None:
        """What enters and what leaves the block on one batch, or None where a watcher had seen enough."""
        result: list[tuple[Tensor, Any]] = []

        def skip(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            return (hidden_states,) if self._returns_tuple else hidden_states

        def run(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            states = hidden_states if self._states is None else self._states[index]
            result.append((states, real(states, *args, **kwargs)))
            raise _Reached

        blocks = self._skeleton.blocks
        real: Any = blocks[block].forward
        earlier = list(blocks)[: list(blocks).index(block)]
        finished = self._replays(blocks[block], index, last=last)
        with _forwards({blocks[name]: skip for name in earlier} | finished | {blocks[block]: run}):
            try:
                self._skeleton.model(input_ids=self._batches[index], use_cache=False)
            except _Reached:
                return result[0] if result else None
        return _unreached(block)

    def _replays(self, block: nn.Module, index: int, *, last: bool) -> dict[nn.Module, Callable[..., object]]:
        """Children whose projections are all compressed give what they gave before: attention is not run once more
        for each group of the MLP. Exact, for whatever runs before a child's last projection was compressed before it.
        """

        def replay(child: nn.Module, outputs: dict[int, Any]) -> Callable[..., object]:
            real: Any = child.forward

            def forward(*args: object, **kwargs: object) -> object:
                if index not in outputs:
                    outputs[index] = real(*args, **kwargs)
                return outputs.pop(index) if last else outputs[index]

            return forward

        done = {name: child for name, child in block.named_children() if _is_finished(child)}
        return {child: replay(child, self._finished.setdefault(name, {})) for name, child in done.items()}

    def _note_bytes(self, scratch_bytes: int = 0) -> None:
        kept = [self._states or (), *(outputs.values() for outputs in self._finished.values())]
        held = sum(_bytes(value) for values in kept for value in values)
        self.activation_bytes = max(self.activation_bytes, held + self._batch_bytes + scratch_bytes)

    @contextmanager
    def _watched(self, names: Sequence[str], note: Callable[[str, Tensor], None]) -> Iterator[None]:
        """`note` is called with the name and the input of each named projection when it runs."""
        handles = []
        for name in names:
            module = self._skeleton.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class InputMeter:
    """Adds up what one projection reads: `[..., in_features]`, tensor by tensor."""

    def __init__(self, in_features: int, need: Need) -> None:
        self.tokens, self.width = 0, in_features
        self._sums = torch.zeros(3, in_features)  # of |x|, of x^2, and the largest |x|
        self._gram = torch.zeros(in_features, in_features) if need >= Need.GRAM else None

    def update(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if self.tokens == 0:
            self._sums = self._sums.to(x.device)
            self._gram = None if self._gram is None else self._gram.to(x.device)
        self.tokens += x.shape[0]
        if x.shape[0] == 0:
            return
        size = x.abs()
        self._sums[0] += size.sum(0)
        self._sums[2] = torch.maximum(self._sums[2], size.amax(0))
        self._sums[1] += size.square_().sum(0)
        if self._gram is not None:
            for start in range(0, x.shape[1], _PANEL):
                panel = x[:, start : start + _PANEL]
                self._gram[start : start + _PANEL, start:].addmm_(panel.t(), x[:, start:])

    def statistics(self) -> InputStatistics:
        """Means over all tokens. The meter must not be used afterwards."""
        gram = None
        if self._gram is not None:
            gram = self._gram.triu_().div_(self.tokens)
            gram += gram.triu(1).t()
        mean_abs, mean_square = self._sums[0] / self.tokens, self._sums[1] / self.tokens
        return InputStatistics(self.tokens, mean_abs, self._sums[2], mean_square, gram)


def _bytes(value: object) -> int:
    """Of the tensors in an output, however it is nested."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


def _is_finished(child: nn.Module) -> bool:
    """Whether the child held projections, and holds only compressed ones now."""
    modules = list(child.modules())
    return any(isinstance(m, CompressedLinear) for m in modules) and not any(is_projection(m) for m in modules)


def _unreached(block: str) -> NoReturn:
    raise AssertionError(f"{block} was never run to its end")


def _batches(samples: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Samples of equal length together, in the order of first appearance: int64 `[batch, tokens]` each."""
    alike: dict[int, list[Sequence[int]]] = {}
    for sample in samples:
        if len(sample):
            alike.setdefault(len(sample), []).append(sample)
    batches = []
    for length, group in alike.items():
        together = max(1, _BATCH_TOKENS // length)
        batches += [torch.tensor(group[i : i + together], device=device) for i in range(0, len(group), together)]
    return batches


@contextmanager
def _forwards(replaced: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """These modules compute something else for a while."""
    for module, forward in replaced.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in replaced:
            del module.__dict__["forward"]
