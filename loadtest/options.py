"""The options of `run`, one for each setting. None means not given: the defaults are in `settings`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def _option(panel: str, help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=False)


def _where(help_text: str, *names: str) -> Any:
    return _option("Where", help_text, *names)


def _how_fast(help_text: str, *names: str) -> Any:
    return _option("How fast", help_text, *names)


def _what(help_text: str, *names: str) -> Any:
    return _option("What", help_text, *names)


def _judging(help_text: str, *names: str) -> Any:
    return _option("Judging", help_text, *names)


Url = Annotated[str | None, _where("http(s)://HOST:PORT of the server.")]
Model = Annotated[str | None, _where("The model's name there.")]
Api = Annotated[str | None, _where("chat (default) or completions.")]
Stream = Annotated[bool | None, _where("Streamed answers (default), or whole ones.")]
Timeout = Annotated[str | None, _where("Longest wait for a complete answer [10m].")]
Header = Annotated[list[str] | None, _where("A header, as 'Name: value'; may be repeated.")]
ApiKeyEnv = Annotated[str | None, _where("Environment variable that holds the bearer token.")]
CA = Annotated[Path | None, _where("Certificate authority to trust.")]
Insecure = Annotated[bool | None, _where("Trust any certificate.", "--insecure")]
KeepAlive = Annotated[bool | None, _where("Reuse connections (default), or open one a request.")]
Retries = Annotated[int | None, _where("Times to come back after 429 or 503, when Retry-After says [0].")]

Concurrency = Annotated[str | None, _how_fast("Closed loop: number of clients, or several as 1,2,4.")]
Rate = Annotated[str | None, _how_fast("Open loop: requests/s, several as 1,2,4, a ramp 1..8, or auto.")]
Arrivals = Annotated[str | None, _how_fast("poisson (default), constant, bursty or trace.")]
Burstiness = Annotated[float | None, _how_fast("Shape of bursty gaps; 1 is Poisson [0.25].")]
Trace = Annotated[Path | None, _how_fast("Arrivals to replay (JSONL or CSV).")]
TraceSpeed = Annotated[float | None, _how_fast("2 replays twice as fast [1].")]
NumRequests = Annotated[int | None, _how_fast("How many requests, after the warm-up.")]
Duration = Annotated[str | None, _how_fast("How long, after the warm-up: 90, 5m, 2h.")]
Warmup = Annotated[str | None, _how_fast("Sent first and left out: 20, 10s or 5% [5%].")]
MaxInFlight = Annotated[int | None, _how_fast("Most requests in flight [4096].")]
Processes = Annotated[int | None, _how_fast("Generator processes [1].")]

Prompts = Annotated[Path | None, _what("JSON lines with text, prompt or turns.")]
PromptTokens = Annotated[str | None, _what("Made-up prompts: 128, uniform:64,256, lognormal:512,0.6 ... [128].")]
OutputTokens = Annotated[str | None, _what("Limit of an answer, written likewise [64].")]
SharedPrefixTokens = Annotated[int | None, _what("Length of a system prompt that all share [0].")]
PrefixGroups = Annotated[int | None, _what("How many different such prompts [1].")]
Turns = Annotated[int | None, _what("Turns of a conversation [1].")]
ThinkTime = Annotated[str | None, _what("Pause before the next turn, or a client's next request [0].")]
Users = Annotated[int | None, _what("Send the field `user`, from this many users [0].")]
Temperature = Annotated[float | None, _what("Of sampling [0].")]
IgnoreEos = Annotated[bool | None, _what("Ask for answers of full length.", "--ignore-eos")]
ExtraBody = Annotated[str | None, _what("JSON that is merged into every request.")]
Tokenizer = Annotated[Path | None, _what("tokenizer.json, to check the server's counts.")]
Seed = Annotated[int | None, _what("Of arrivals and prompts [0].")]

Slo = Annotated[list[str] | None, _judging("Limit of a request: ttft_s=0.5, itl_s=200ms; may be repeated.")]
GoodputTarget = Annotated[float | None, _judging("Share of requests that must be within [0.99].")]
ServerMetrics = Annotated[str | None, _judging("URL of the server's own Prometheus metrics, to compare.")]
