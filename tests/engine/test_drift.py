"""Drift from a recording is what comparing two whole models would give, in little memory, and says what is missing."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from serve.drift import Keeper, Pairing, Room
from serve.engine.head import Head
from serve.generation import Delta
from serve.pairs import Recording, Scores, Side
from serve.quality import TokenScores, model_logits, score_rows
from tests.engine.conftest import Desk, tiny_llama
from tests.engine.test_witness import watch

Desks = Callable[..., Desk]
Wants = Literal["hidden", "logits"]
PROMPT = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]


def shaken(model: Any, by: float = 0.05) -> Any:
    """The same head, other layers."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "mlp" in name:
                parameter += by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return other


def recorded(desk: Desk, wants: Wants, room: Room | None = None, limit: int = 2**20, **params: Any) -> Keeper:
    keeper = Keeper(wants, tuple(PROMPT), desk.engine.head, room or Room(2**24), limit)
    answer = desk.wait(watch(desk, f"kept-{id(keeper)}", PROMPT, keeper, **{"max_tokens": 20, **params}))[0]
    for delta in answer.deltas[0]:
        keeper.hear(delta)
    return keeper


def read(desk: Desk, recording: Recording, side: Side = "variant") -> Scores:
    pairing = Pairing(recording, side, desk.engine.head)
    desk.wait(watch(desk, f"read-{id(pairing)}", list(recording.token_ids), pairing, max_tokens=0))
    return pairing.scores()


def compared(reference: Any, variant: Any, tokens: tuple[int, ...]) -> TokenScores:
    """Both models over the whole text, in one pass each."""
    for model in (reference, variant):
        model.set_attn_implementation("eager")
    targets = torch.tensor(tokens[1:])
    return score_rows(model_logits(reference)(tokens)[:-1], model_logits(variant)(tokens)[:-1], targets)


@pytest.mark.parametrize("wants", ["hidden", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recording_gives_what_comparing_the_two_models_gives(desks: Desks, dtype: torch.dtype, wants: Wants) -> None:
    reference, variant = tiny_llama().to(dtype), shaken(tiny_llama()).to(dtype)
    plain = copy.deepcopy(reference), copy.deepcopy(variant)
    recording = recorded(desks(variant), wants, temperature=1.0, seed=3).recording()
    assert recording is not None
    assert (recording.head is None) == (wants == "logits")
    scores = read(desks(reference), recording)
    expected = compared(*plain, recording.token_ids)
    answer = expected.select(torch.arange(len(expected.record)) >= len(PROMPT) - 1)
    assert scores.tokens == len(answer.record) == len(recording.token_ids) - len(PROMPT)
    assert sum(scores.kl_nats) / scores.tokens == pytest.approx(float(answer.kl_divergence.mean()), rel=0.05)
    assert abs(scores.top1_agreements - int(answer.same_top.sum())) <= (dtype == torch.bfloat16)
    # Likelihoods are summed where the variant had no say in the text: over the prompt.
    fair = expected.select(torch.arange(len(expected.record)) < len(PROMPT) - 1) if wants == "hidden" else None
    assert scores.nll_tokens == (len(PROMPT) - 1 if fair else 0)
    if fair:
        assert scores.nll_variant_nats == pytest.approx(float(fair.nll_variant.sum()), rel=0.02)
        assert scores.nll_reference_nats == pytest.approx(float(fair.nll_reference.sum()), rel=0.02)


def test_a_variant_has_no_drift_from_itself(desks: Desks) -> None:
    recording = recorded(desks(tiny_llama()), "hidden").recording()
    assert recording is not None
    scores = read(desks(tiny_llama(), max_num_batched_tokens=64), recording)
    assert max(scores.kl_nats) < 1e-6
    assert scores.top1_agreements == scores.tokens
    assert scores.first_divergence is None
    assert scores.delta_p == pytest.approx(0.0, abs=1e-5)


def test_what_the_reference_served_is_read_the_other_way_round_and_its_likelihoods_are_fair(desks: Desks) -> None:
    reference, variant = tiny_llama(), shaken(tiny_llama())
    plain = copy.deepcopy(reference), copy.deepcopy(variant)
    recording = recorded(desks(reference), "hidden").recording()
    assert recording is not None
    scores = read(desks(variant), recording, side="reference")
    expected = compared(*plain, recording.token_ids)
    answer = expected.select(torch.arange(len(expected.record)) >= len(PROMPT) - 1)
    assert sum(scores.kl_nats) / scores.tokens == pytest.approx(float(answer.kl_divergence.mean()), rel=0.01)
    assert scores.nll_tokens == len(expected.record)
    assert scores.nll_variant_nats == pytest.approx(float(expected.nll_variant.sum()), rel=0.01)
    assert scores.nll_reference_nats == pytest.approx(float(expected.nll_reference.sum()), rel=0.01)


def test_hidden_states_of_another_head_are_refused(desks: Desks) -> None:
    recording = recorded(desks(tiny_llama()), "hidden").recording()
    assert recording is not None
    with pytest.raises(ValueError, match="another output head"):
        Pairing(recording, "variant", desks(tiny_llama(seed=1)).engine.head)


def test_positions_that_are_not_finite_are_counted_apart() -> None:
    served = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    served[3, 5] = torch.nan
    tokens = tuple(range(8))
    recording = Recording(tokens, 2, 1, served.numpy(), "float32", None, "float32")
    pairing = Pairing(recording, "variant", None)
    pairing.see(1, torch.nan_to_num(served, 0.5))
    scores = pairing.scores()
    assert (scores.tokens, scores.nonfinite_tokens) == (5, 1)
    assert max(map(abs, scores.kl_nats)) < 1e-6


def test_the_first_divergence_is_counted_from_the_first_token_of_the_answer() -> None:
    served, reading = torch.zeros(5, 8), torch.zeros(5, 8)
    served[:, 1] = reading[:, 1] = 3.0
    reading[3, 2] = 9.0
    pairing = Pairing(Recording(tuple(range(7)), 2, 1, served.numpy(), "float32", None, "float32"), "variant", None)
    for row in range(5):
        pairing.see(1 + row, reading[row : row + 1])
    scores = pairing.scores()
    assert (scores.first_divergence, scores.top1_agreements, scores.tokens) == (3, 4, 5)


def test_a_reader_that_stopped_early_gives_no_numbers() -> None:
    recording = Recording(tuple(range(7)), 2, 1, torch.zeros(5, 8).numpy(), "float32", None, "float32")
    pairing = Pairing(recording, "variant", None)
    pairing.see(1, torch.zeros(3, 8))
    with pytest.raises(ValueError, match="3 of 5"):
        pairing.scores()


def test_recordings_share_a_bounded_room_and_give_it_back(desks: Desks) -> None:
    desk = desks(tiny_llama())
    row = 32 * 4
    room = Room(40 * row)
    first = recorded(desk, "hidden", room)
    second = recorded(desk, "hidden", room)
    assert first.recording() is not None
    assert second.recording() is None
    first.close()
    second.close()
    assert recorded(desk, "hidden", room).recording() is not None
    assert recorded(desk, "hidden", Room(2**20), limit=20 * row).recording() is None


def test_of_a_long_prompt_the_end_is_kept() -> None:
    keeper = Keeper("hidden", tuple(range(1000)), None, Room(2**24), 2**24)
    keeper.see(0, torch.zeros(512, 4))
    keeper.see(512, torch.zeros(488, 4))
    keeper.see(1000, torch.zeros(1, 4))
    keeper.hear(Delta("r", 0, "", (1, 2)))
    recording = keeper.recording()
    assert recording is not None
    assert recording.first == 1000 - 256
    assert len(recording.rows) == 257


FLAT = """
import resource, sys, torch
from serve.drift import Pairing
from serve.engine.head import Head
from serve.pairs import Recording
torch.set_num_threads(1)
vocabulary, positions = 131072, int(sys.argv[1])
weight = torch.randn(vocabulary, 8)
head = Head("same", torch.float32, torch.float32, lambda rows: rows @ weight.T)
rows = torch.randn(positions, 8)
recording = Recording(tuple(range(positions + 1)), 1, 0, rows.numpy(), "float32", "same", "float32")
pairing = Pairing(recording, "variant", head)
for at in range(0, positions, 32):
    pairing.see(at, rows[at : at + 32] @ weight.T)
assert pairing.scores().tokens == positions
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_length_of_the_text_at_a_vocabulary_of_128_k() -> None:
    def peak_kib(positions: int) -> int:
        command = [sys.executable, "-c", FLAT, str(positions)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    short, long = peak_kib(32), peak_kib(288)
    assert long - short < 64 * 1024, "256 positions more of both sides' logits would be 256 MiB"


RETAINED = """
import ctypes, psutil, sys, torch
from serve.api.backend import Call
from serve.drift import Keeper, Pairing, Room
from serve.engine.head import Head
from serve.generation import Delta, GenerationRequest, SamplingParams
from serve.heartbeat import VariantState
from serve.journal import Journal
from serve.rollout import Drift, Split
torch.set_num_threads(1)
vocabulary, hidden, prompt, answer = 131072, 64, 8, 16
weight = torch.randn(vocabulary, hidden)
head = Head("same", torch.float32, torch.float32, lambda rows: rows @ weight.T)
room, journal, state = Room(2**26), Journal("m", "i"), VariantState("nf4", "nf4")
rows = torch.randn(prompt + answer - 1, hidden)
for number in range(int(sys.argv[1])):
    keeper = Keeper("hidden", tuple(range(prompt)), head, room, 2**24)
    keeper.see(0, rows)
    keeper.hear(Delta("r", 0, "", tuple(range(answer))))
    recording = keeper.recording()
    pairing = Pairing(recording, "variant", head)
    for at in range(0, len(rows), 16):
        pairing.see(at, rows[at : at + 16] @ weight.T)
    keeper.close()
    scores = pairing.scores()
    call = Call("m", (GenerationRequest("r", recording.token_ids, SamplingParams()),))
    trace = journal.open(call, state, None, Split("nf4", {"nf4": 100.0}))
    journal.scored(state, scores)
    trace.scored("nf4", Drift(**scores.summary()))
    journal.acknowledge(journal.batch())
assert room.take(2**26), "every recording gave its room back"
ctypes.CDLL(None).malloc_trim(0)
print(psutil.Process().memory_info().rss)
"""


@pytest.mark.slow
def test_nothing_is_retained_of_what_was_scored_at_a_vocabulary_of_128_k() -> None:
    def resident_bytes(samples: int) -> int:
        command = [sys.executable, "-c", RETAINED, str(samples)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    few, many = resident_bytes(3), resident_bytes(35)
    assert many - few < 4 * 2**20, "one row of logits more per sample would be 16 MiB"


def test_a_head_keeps_its_digest_over_dtypes_apart() -> None:
    def head(dtype: torch.dtype) -> Head | None:
        from serve.engine.architecture import adopt

        return adopt(tiny_llama().to(dtype))[0].head

    one, other = head(torch.float32), head(torch.bfloat16)
    assert one is not None
    assert other is not None
    assert one.digest != other.digest
