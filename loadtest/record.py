"""One request as measured, read from the bytes of its exchange.

All times are seconds after the run's start. `scheduled_s` is when the request was due: its arrival in an open
loop, in a closed loop the moment its client became free. Every latency counts from there:

- `queue_s`  due -> sent: waiting in the generator for a connection, for a place in flight, for a Retry-After
- `ttft_s`   due -> the first chunk that carries text (a chunk with only a role or an empty text is no token)
- `gaps_s`   between consecutive chunks that carry text: the inter-token latencies (ITL) as a reader sees them
- `e2e_s`    due -> the end of the answer
- `tpot_s`   (e2e - ttft) / (n - 1), n being the answer's tokens

A chunk may carry several tokens. A gap is then still one sample, because that is the pause the reader saw;
`tpot_s` does not depend on the chunking, and the summary says how many tokens a chunk carried.
"""

import json
from array import array
from bisect import bisect_left
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from loadtest import errors, sse
from loadtest.client import Exchange

DETAIL_LENGTH = 300


@dataclass(slots=True)
class Capture:
    """An exchange, and which request it was. What a generator process hands over."""

    index: int
    turn: int
    scheduled_s: float
    warmup: bool
    attempts: int
    process: int
    streamed: bool
    exchange: Exchange
    retry_after_s: float | None = None


@dataclass(slots=True)
class Record:
    """What one request turned out to be. `error` is the kind of failure, None where it succeeded."""

    index: int
    turn: int
    process: int
    warmup: bool
    attempts: int
    scheduled_s: float
    sent_s: float | None
    end_s: float
    connect_s: float | None
    chunks_s: "array[float]"
    status: int | None
    error: str | None
    error_detail: str
    retry_after_s: float | None
    variant: str | None
    precision: str | None
    route: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    usage_tokens: int | None
    text: str = field(repr=False)
    tokenizer_tokens: int | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def interrupted(self) -> bool:
        return self.error == errors.Kind.INTERRUPTED

    @property
    def tokens(self) -> int:
        """Tokens of the answer: the server's count, else the tokenizer's, else one a chunk."""
        for count in (self.usage_tokens, self.tokenizer_tokens):
            if count is not None:
                return count
        return len(self.chunks_s)

    @property
    def queue_s(self) -> float | None:
        return None if self.sent_s is None else self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        return self.chunks_s[0] - self.scheduled_s if self.chunks_s else None

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.chunks_s)]

    @property
    def e2e_s(self) -> float | None:
        return self.end_s - self.scheduled_s if self.ok else None

    @property
    def from_sent_s(self) -> float | None:
        """End to end as a client that forgets its own lateness would count it."""
        return self.end_s - self.sent_s if self.ok and self.sent_s is not None else None

    @property
    def tpot_s(self) -> float | None:
        ttft_s, e2e_s = self.ttft_s, self.e2e_s
        if ttft_s is None or e2e_s is None or self.tokens < 2:
            return None
        return (e2e_s - ttft_s) / (self.tokens - 1)

    def as_json(self) -> dict[str, Any]:
        """One line of the raw data: the fields, with the chunks' times as numbers, without the text."""
        fields = asdict(self)
        del fields["text"]
        fields["chunks_s"] = [round(at_s, 6) for at_s in self.chunks_s]
        return fields


def read(capture: Capture, origin_s: float) -> Record:
    """Interprets what arrived; an answer that makes no sense becomes an error of the record, never an exception."""
    exchange = capture.exchange
    answer = _Answer()
    failure = (exchange.error_kind, exchange.error_detail)
    try:
        _read_answer(capture, answer)
    except errors.RequestError as error:
        if failure[0] is None:
            failure = (error.kind, str(error))
    headers = exchange.headers
    connected_s = exchange.connected_s
    ended_s = exchange.ended_s if exchange.ended_s is not None else exchange.started_s
    return Record(
        index=capture.index,
        turn=capture.turn,
        process=capture.process,
        warmup=capture.warmup,
        attempts=capture.attempts,
        scheduled_s=capture.scheduled_s,
        sent_s=None if exchange.sent_s is None else exchange.sent_s - origin_s,
        end_s=ended_s - origin_s,
        connect_s=None if connected_s is None else connected_s - exchange.started_s,
        chunks_s=array("d", (at_s - origin_s for at_s in answer.chunks_s)),
        status=exchange.status,
        error=failure[0],
        error_detail=failure[1][:DETAIL_LENGTH],
        retry_after_s=capture.retry_after_s,
        variant=headers.get("x-halftone-variant"),
        precision=headers.get("x-halftone-precision"),
        route=headers.get("x-halftone-route"),
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.usage.get("prompt_tokens"),
        usage_tokens=answer.usage.get("completion_tokens"),
        text="".join(answer.texts),
    )


def answer_text(exchange: Exchange) -> str:
    """The text of a streamed or plain answer, as far as it can be read: what the next turn replies to."""
    answer = _Answer()
    streamed = exchange.headers.get("content-type", "").startswith("text/event-stream")
    with suppress(errors.RequestError):
        _read_stream(exchange, answer) if streamed else _read_plain(exchange, answer)
    return "".join(answer.texts)


@dataclass(slots=True)
class _Answer:
    texts: list[str] = field(default_factory=list)
    chunks_s: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    finish_reason: str | None = None


def _read_answer(capture: Capture, answer: _Answer) -> None:
    exchange = capture.exchange
    if exchange.status is None:
        return
    if not 200 <= exchange.status < 300:
        raise errors.RequestError(f"http_{exchange.status}", _message(exchange.body))
    if capture.streamed:
        _read_stream(exchange, answer)
    else:
        _read_plain(exchange, answer)


def _read_stream(exchange: Exchange, answer: _Answer) -> None:
    stream = sse.split(exchange.body)
    arrived = list(accumulate(exchange.lengths))
    done = stream.tail == b"[DONE]"
    for event in stream.events:
        if event.data == b"[DONE]":
            done = True
            break
        # the event is there when the read that holds its last byte is
        at_s = exchange.times_s[bisect_left(arrived, event.end)]
        _read_chunk(_json(event.data), at_s, answer)
    if stream.stray_lines:
        raise errors.RequestError(
            errors.Kind.MALFORMED, f"{stream.stray_lines} lines of the stream are no server-sent event"
        )
    if not done and answer.finish_reason is None:
        raise errors.RequestError(errors.Kind.CUT, "the stream ended without [DONE] and without a finish_reason")


def _read_chunk(chunk: dict[str, Any], at_s: float, answer: _Answer) -> None:
    if chunk.get("error"):
        raise errors.RequestError(errors.Kind.SERVER_ERROR, _error_message(chunk["error"]))
    if isinstance(chunk.get("usage"), dict):
        answer.usage = _counts(chunk["usage"])
    text = _read_choices(chunk, "delta", answer)
    if text:
        answer.texts.append(text)
        answer.chunks_s.append(at_s)


def _read_plain(exchange: Exchange, answer: _Answer) -> None:
    reply = _json(bytes(exchange.body))
    if reply.get("error"):
        raise errors.RequestError(errors.Kind.SERVER_ERROR, _error_message(reply["error"]))
    if not reply.get("choices"):
        raise errors.RequestError(errors.Kind.MALFORMED, "the answer has no choices")
    answer.usage = _counts(reply["usage"]) if isinstance(reply.get("usage"), dict) else {}
    answer.texts.append(_read_choices(reply, "message", answer))


def _read_choices(reply: dict[str, Any], part: str, answer: _Answer) -> str:
    """The text of all choices, whatever the server calls it: text, content, reasoning, arguments of a tool."""
    texts = []
    try:
        for choice in reply.get("choices") or ():
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            message = choice.get(part) or {}
            texts.append(choice.get("text") or message.get("content") or "")
            texts.append(message.get("reasoning_content") or message.get("reasoning") or "")
            texts += [call["function"].get("arguments") or "" for call in message.get("tool_calls") or ()]
        return "".join(texts)
    except (AttributeError, KeyError, TypeError) as error:
        raise errors.RequestError(errors.Kind.MALFORMED, f"choices of an unknown shape: {error!r}") from error


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise errors.RequestError(errors.Kind.MALFORMED, f"not JSON: {data[:80]!r}") from error
    if not isinstance(value, dict):
        raise errors.RequestError(errors.Kind.MALFORMED, f"not a JSON object: {data[:80]!r}")
    return value


def _counts(usage: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in usage.items() if isinstance(count, int)}


def _message(body: bytearray) -> str:
    try:
        reply = _json(bytes(body))
    except errors.RequestError:
        return bytes(body).decode("utf-8", "replace").strip()
    return _error_message(reply.get("error") or reply.get("message") or reply.get("detail") or reply)


def _error_message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
