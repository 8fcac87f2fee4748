"""The driver: walks a model's blocks, reads their weights, applies the recipe and puts the results in place.

One block is handled at a time, its weights read from the checkpoint's memory map when their turn comes, so that no more
than the finished layers and the block at hand is ever in memory. Without calibration each projection is read and
compressed by itself. With it, a block is first made whole and dense, its inputs (which earlier *compressed* blocks
produced) are run through it, and groups of projections are compressed with the statistics of what they read.

Methods bring the mathematics, formats the storage; this file knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from serve.compression.formats.linear import CompressedLinear
from serve.compression.memory import release
from serve.compression.method import Group, InputStatistics, Need, Projection
from serve.compression.plan import Plan, Treatment
from serve.compression.producers import find_producer, watch_norms
from serve.compression.restore import REST, finish_rest, move_buffers, restore_part
from serve.compression.skeleton import Skeleton, set_module, set_tensor, weight_of
from serve.errors import CompressionError

__all__ = ["Activations", "NoNotes", "Notes", "Progress", "Reader", "Sink", "compress", "silent"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, of how much)."""


def silent(stage: str, done: int, total: int) -> None:
    """No progress shown."""


class Sink(Protocol):
    """Receives every finished tensor in its plain layout, one part at a time: a block by its name, or `rest`."""

    def read(self, part: str) -> Mapping[str, Tensor] | None:
        """A part that an earlier, interrupted attempt has finished."""
        ...

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None: ...


class Notes(Protocol):
    """Remembers what was decided layer by layer before anything is compressed, beyond an interruption."""

    def remember(self, name: str, facts: Mapping[str, Any]) -> None: ...

    def recall(self, name: str) -> dict[str, Any] | None: ...


class NoNotes:
    """Remembers nothing."""

    def remember(self, name: str, facts: Mapping[str, Any]) -> None:
        return None

    def recall(self, name: str) -> dict[str, Any] | None:
        return None


class Reader(Protocol):
    """Gives the values of the model's parameters by name. `tied` maps a parameter to the one whose values it shares."""

    tied: dict[str, str]
    unused_keys: tuple[str, ...]

    def read(self, name: str) -> Tensor: ...


class Activations(Protocol):
    """Calibration text on its way through the model, one block at a time."""

    def groups(self, block: str) -> Sequence[Sequence[str]]:
        """The block's projections in the order they run, siblings (which read the same input) together."""
        ...

    def measure(self, block: str, names: Sequence[str], need: Need) -> Mapping[str, InputStatistics]:
        """Run the block as it now is; the statistics of each named projection's input."""
        ...

    def advance(self, block: str) -> None:
        """Run the block as it now is and keep its outputs as the next block's inputs."""
        ...


@torch.no_grad()
def compress(
    skeleton: Skeleton,
    weights: Reader,
    plan: Plan,
    *,
    activations: Activations | None = None,
    sink: Sink | None = None,
    progress: Progress = silent,
    mapped: bool = False,
) -> None:
    """Fill `skeleton.model` with weights as the plan says, in place. Raise `CompressionError` naming a bad layer.

    `mapped`: what stays as the file has it stays in the file's map, for a model that is only needed for a while.
    """
    job = _Job(skeleton, weights, plan, sink, mapped)
    total = len(skeleton.blocks)
    if not _resume(job, REST):
        _compress_rest(job)
    for done, block in enumerate(skeleton.blocks):
        progress("compress", done, total)
        if _resume(job, block):
            move_buffers(skeleton.model.get_submodule(block), plan.device)
        elif activations is None:
            _compress_alone(job, block)
        else:
            _compress_calibrated(job, block, activations)
        if activations is not None:
            activations.advance(block)
        job.flush(block)
        release()
    move_buffers(skeleton.model, plan.device)
    progress("compress", total, total)


@dataclass
class _Job:
    """What the steps below share, and the only place where the model changes."""

    skeleton: Skeleton
    weights: Reader
    plan: Plan
    sink: Sink | None
    mapped: bool = False
    finished: dict[str, Tensor] = field(default_factory=dict)  # plain tensors that the sink has not seen yet
    resumed: set[str] = field(default_factory=set)  # parts that came from the sink
    loaded: dict[str, Projection] = field(default_factory=dict)  # read early, because a scale was folded into them

    @property
    def model(self) -> nn.Module:
        return self.skeleton.model

    def read(self, name: str) -> Tensor:
        """A parameter, unless `mapped` in memory of its own, so that nothing holds on to the file's map."""
        stored = self.weights.read(name)
        return stored.to(self.plan.device, self.skeleton.dtype_of(name), copy=not self.mapped).contiguous()

    def load(self, name: str) -> Projection:
        """A projection's values in float32, as precise as the file has them but for what was folded into them."""
        if name in self.loaded:
            return self.loaded.pop(name)
        spec, module = self.skeleton.spec(name), self.model.get_submodule(name)
        weight = weight_of(module, self.weights.read(f"{name}.weight"))
        bias = self.read(f"{name}.bias") if spec.has_bias else None
        return Projection(spec, weight.to(self.plan.device, torch.float32).contiguous(), bias)

    def load_early(self, name: str) -> Projection:
        """The same values, kept until the projection's own turn comes."""
        if name not in self.loaded:
            self.loaded[name] = self.load(name)
        return self.loaded[name]

    def place(self, name: str, layer: CompressedLinear) -> None:
        """The plain tensors are noted for the sink first, for preparing releases them."""
        if self.sink is not None:
            self.finished |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        layer.prepare()
        if name in self.skeleton.projections:  # which keeps the dense layer for its shape alone
            self.skeleton.projections[name].to("meta")
        set_module(self.model, name, layer.eval())

    def place_dense(self, projection: Projection) -> None:
        """A projection that was changed but not quantized."""
        module = self.model.get_submodule(projection.name)
        stored = weight_of(module, projection.weight).to(self.skeleton.dtype).contiguous()
        set_tensor(self.model, f"{projection.name}.weight", stored)
        if projection.bias is not None:
            set_tensor(self.model, f"{projection.name}.bias", projection.bias)

    def fill(self, names: Iterable[str]) -> None:
        """Read those of the named parameters that have no values yet."""
        for name in names:
            if self.model.get_parameter(name).is_meta:
                set_tensor(self.model, name, self.read(name))

    def flush(self, part: str) -> None:
        """Hand the sink all that `part` holds, compressed or not."""
        if self.sink is None or part in self.resumed:
            return
        prefix = tuple(f"{block}." for block in self.skeleton.blocks) if part == REST else (f"{part}.",)
        dense = {
            name: parameter.data
            for name, parameter in self.model.named_parameters()
            if name.startswith(prefix) != (part == REST)
        }
        self.sink.write(part, self.finished | dense)
        self.finished = {}


def _resume(job: _Job, part: str) -> bool:
    """Take a finished part from the sink, if it has one."""
    tensors = job.sink.read(part) if job.sink is not None else None
    if tensors is None:
        return False
    restore_part(job.skeleton, job.plan, part, tensors)
    job.resumed.add(part)
    return True


def _compress_rest(job: _Job) -> None:
    """Everything outside the blocks: embeddings, norms and the head."""
    head = job.skeleton.head
    if job.plan.head is not None and head is not None:
        _apply(job, Treatment(quantizer=job.plan.head), Group([job.load(head)]), None)
    inside = tuple(f"{block}." for block in job.skeleton.blocks)
    outside = [n for n, _ in job.model.named_parameters(remove_duplicate=False) if not n.startswith(inside)]
    job.fill(name for name in outside if name not in job.weights.tied)
    for name, source in job.weights.tied.items():
        if name in outside and source in outside:
            set_tensor(job.model, name, job.model.get_parameter(source))
    job.fill(outside)
    finish_rest(job.skeleton, job.plan)
    job.flush(REST)


def _compress_alone(job: _Job, block: str) -> None:
    """Each projection by itself, straight from the file: no dense block is ever made."""
    for name in _projections(job, block):
        treatment = job.plan.treatment(name)
        if not treatment.is_dense:
            _apply(job, treatment, Group([job.load(name)]), None)
            release()
    job.fill(_parameters(job, block))


def _compress_calibrated(job: _Job, block: str, activations: Activations) -> None:
    """The whole block dense first, then group by group with what calibration saw at each input."""
    job.fill(_parameters(job, block))
    move_buffers(job.model.get_submodule(block), job.plan.device)
    with watch_norms(job.skeleton, block) as norms:
        groups = activations.groups(block)
    runs = [run for names in groups for run in _by_treatment(job, names)]
    if all(treatment.sequential for treatment, _ in runs):
        for treatment, names in runs:
            measured = _measure(activations, block, [(treatment, names)])
            _apply(job, treatment, Group([job.load(name) for name in names]), measured.get(names[0]))
    else:
        measured = _measure(activations, block, runs)
        for treatment, names in reversed(runs):
            producer = find_producer(job.skeleton, names, norms, job.load_early)
            group = Group([job.load(name) for name in names], producer)
            _apply(job, treatment, group, measured.get(names[0]))
        for name in list(job.loaded):  # changed, but left dense by the recipe
            job.place_dense(job.load(name))


def _by_treatment(job: _Job, names: Sequence[str]) -> list[tuple[Treatment, list[str]]]:
    """Siblings that are treated alike; those that stay dense are left out."""
    runs: dict[Treatment, list[str]] = {}
    for name in names:
        runs.setdefault(job.plan.treatment(name), []).append(name)
    return [(treatment, run) for treatment, run in runs.items() if not treatment.is_dense]


def _measure(
    activations: Activations, block: str, runs: Sequence[tuple[Treatment, list[str]]]
) -> Mapping[str, InputStatistics]:
    need = max((treatment.needs for treatment, _ in runs), default=Need.NOTHING)
    return activations.measure(block, [names[0] for _, names in runs], need) if need else {}


def _apply(job: _Job, treatment: Treatment, group: Group, statistics: InputStatistics | None) -> None:
    """Prune, quantize, and put the result in the model."""
    for projection in group.projections:
        if not torch.isfinite(projection.weight).all():
            raise CompressionError(f"{projection.name}: the weights hold NaN or infinite values")
    for pruner in treatment.pruners:
        pruner.prune(group, statistics)
    if treatment.quantizer is None:
        for projection in group.projections:
            job.place_dense(projection)
        return
    for projection, layer in zip(group.projections, treatment.quantizer.quantize(group, statistics), strict=True):
        job.place(projection.name, layer)


def _projections(job: _Job, block: str) -> list[str]:
    return [name for name in job.skeleton.projections if name.startswith(f"{block}.")]


def _parameters(job: _Job, block: str) -> list[str]:
    return [name for name, _ in job.model.get_submodule(block).named_parameters(block)]
