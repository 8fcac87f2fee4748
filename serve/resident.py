"""A loaded model with its engine running, as a replica holds it.

Knows no event loop, no ingress and no controller; torch is first imported when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from serve.errors import OutOfMemory
from serve.generation import Event, GenerationRequest, Prompt, Tokenized
from serve.pairs import Recording, Side
from serve.variant import Variant

if TYPE_CHECKING:
    from serve.drift import Keeper, Pairing, Room
    from serve.engine.engine import Engine
    from serve.engine.prompt import PromptEncoder
    from serve.loading import LoadedModel
    from serve.upkeep import Upkeep

__all__ = ["Resident"]

_RECORDED_BYTES = 64 * 2**20
"""What all requests that are being recorded may hold together; one of them at most a quarter."""
_SECOND_COPY_RATIO = 1.2


class Resident:
    """A loaded model with its engine running. Its methods block."""

    def __init__(self, loaded: LoadedModel, engine: Engine, encoder: PromptEncoder, room: Room, upkeep: Upkeep) -> None:
        self.loaded = loaded
        self.engine = engine
        self._encoder = encoder
        self._room = room
        self.upkeep = upkeep
        self.path = engine.path
        """Which path makes the engine's steps, for the load report."""

    @classmethod
    def of(cls, loaded: LoadedModel, variant: Variant, sink: Callable[[list[Event]], None], upkeep: Upkeep) -> Resident:
        from serve.drift import Room
        from serve.engine.engine import Engine
        from serve.engine.prompt import PromptEncoder

        engine = Engine(loaded.model, loaded.tokenizer, variant.engine, sink)
        encoder = PromptEncoder(loaded.tokenizer, max_model_len=engine.settings.max_model_len)
        engine.start()
        made = cls(loaded, engine, encoder, Room(_RECORDED_BYTES), upkeep)
        made.begin()
        return made

    def renewed(self, loaded: LoadedModel, sink: Callable[[list[Event]], None]) -> Resident:
        """The same with the model loaded again, its engine not started: `begin` once this one has ended."""
        from serve.engine.engine import Engine

        engine = Engine(loaded.model, loaded.tokenizer, self.engine.settings, sink)
        return Resident(loaded, engine, self._encoder, self._room, self.upkeep)

    def begin(self) -> None:
        """Account for this model from now on."""
        report = self.loaded.report
        self.upkeep.begin(
            self.engine,
            weights=report.weight_bytes + report.embedding_bytes,
            quantization=report.quantization_bytes,
            mapped=0 if self.path.startswith("native") else report.mapped_bytes,  # the native path holds copies
        )

    @property
    def gains_by_kernels(self) -> bool:
        """Whether loaded with them, the model or any of its layers would be multiplied by them."""
        from serve.kernels import BEING_BUILT

        return BEING_BUILT in self.path or any(not name.startswith("dense") for name in self.loaded.report.kernels)

    def require_room(self, available_bytes: int) -> None:
        """Raise OutOfMemory where there is no room for a second copy of the weights."""
        if available_bytes < _SECOND_COPY_RATIO * self.loaded.report.total_bytes:
            raise OutOfMemory("no memory for a second copy of the weights meanwhile")

    @property
    def context_length(self) -> int:
        return self.engine.settings.max_model_len or self.loaded.context_length

    def encode(self, request: GenerationRequest) -> tuple[int, ...]:
        return self._encoder.encode(request.prompt, add_special_tokens=request.add_special_tokens)

    def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> Tokenized:
        ids = self._encoder.encode(prompt, add_special_tokens=add_special_tokens)
        pieces = tuple(str(self.loaded.tokenizer.decode([token])) for token in ids)
        return Tokenized(ids, pieces, self.context_length)

    def detokenize(self, ids: tuple[int, ...]) -> str:
        return str(self.loaded.tokenizer.decode(list(ids)))

    def keeper(self, wants: Literal["hidden", "logits"], prompt: tuple[int, ...]) -> Keeper:
        from serve.drift import Keeper

        return Keeper(wants, prompt, self.engine.head, self._room, _RECORDED_BYTES // 4)

    def pairing(self, recording: Recording, side: Side) -> Pairing:
        from serve.drift import Pairing

        return Pairing(recording, side, self.engine.head)

    def report(self) -> Mapping[str, Any]:
        """The load report, with the path that makes the engine's steps."""
        return {**self.loaded.report.to_dict(), "path": self.path}

    def close(self) -> None:
        self.engine.close()
        self._encoder.close()
