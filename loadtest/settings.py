"""What a run is told: where to send, how fast, what, and what counts as good. The one place with defaults.

The names are those of the command line's options (`--num-requests` is `num_requests`) and of a scenario's
keys. Nothing here reads a file or a clock. `Settings.loads()` resolves rates like `1,2,4` into one `Load` per
stage.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from loadtest.arrivals import Process
from loadtest.errors import SettingsError
from loadtest.lengths import Lengths

METRICS_WITH_LIMITS = ("ttft_s", "itl_s", "tpot_s", "e2e_s", "queue_s")


def seconds(value: object) -> object:
    """`90`, `90s`, `5m`, `2h` and `500ms` in seconds; anything else is left for the validator to refuse."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(ms|s|m|h)\s*", value) if isinstance(value, str) else None
    if match is None:
        return value
    return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def _text(value: object) -> object:
    """YAML reads `rate: 4` as a number and `rate: [1, 2]` as a list; both are written as on the command line."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value)
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Number = TypeVar("Number", int, float)
Seconds = Annotated[float, BeforeValidator(seconds), Field(gt=0)]
Text = Annotated[str, BeforeValidator(_text)]


@dataclass(frozen=True, slots=True)
class Load:
    """One stage: a closed loop of `concurrency` clients, or an open loop; then how much of it, and how it
    warms up.

    `rate_per_s` rises to `last_rate_per_s` where that is given. Warm-up comes first, in the same process of
    arrivals, and is left out of what is reported; `num_requests` and `duration_s` are the measured part.
    """

    concurrency: int | None = None
    rate_per_s: float | None = None
    last_rate_per_s: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    warmup_requests: int = 0
    warmup_s: float = 0.0
    first_index: int = 0

    @property
    def total_requests(self) -> int | None:
        return None if self.num_requests is None else self.num_requests + self.warmup_requests

    @property
    def total_s(self) -> float | None:
        return None if self.duration_s is None else self.duration_s + self.warmup_s

    @property
    def is_open(self) -> bool:
        return self.concurrency is None

    def describe(self) -> dict[str, float | int | str]:
        """What this stage offers, for a result."""
        if self.concurrency is not None:
            return {"loop": "closed", "concurrency": self.concurrency}
        offered: dict[str, float | int | str] = {"loop": "open"}
        if self.rate_per_s is not None:
            offered["rate_per_s"] = self.rate_per_s
        if self.last_rate_per_s is not None:
            offered["last_rate_per_s"] = self.last_rate_per_s
        return offered


class Settings(BaseModel):
    """Everything about a run; `url` and `model` have no default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    model: str
    api: Literal["chat", "completions"] = "chat"
    stream: bool = True
    timeout: Seconds = 600.0
    headers: dict[str, str] = Field(default_factory=dict)
    api_key_env: str | None = None
    ca: Path | None = None
    insecure: bool = False
    keepalive: bool = True
    retries: int = Field(default=0, ge=0)

    concurrency: Text | None = None
    rate: Text | None = None
    arrivals: Process = "poisson"
    burstiness: float = Field(default=0.25, gt=0)
    trace: Path | None = None
    trace_speed: float = Field(default=1.0, gt=0)
    num_requests: int | None = Field(default=None, gt=0)
    duration: Seconds | None = None
    warmup: Text = "5%"
    max_in_flight: int = Field(default=4096, gt=0)
    processes: int = Field(default=1, gt=0)

    prompts: Path | None = None
    prompt_tokens: Text = "128"
    output_tokens: Text = "64"
    shared_prefix_tokens: int = Field(default=0, ge=0)
    prefix_groups: int = Field(default=1, gt=0)
    turns: int = Field(default=1, gt=0)
    think_time: Annotated[float, BeforeValidator(seconds), Field(ge=0)] = 0.0
    users: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.0, ge=0)
    ignore_eos: bool = False
    extra_body: dict[str, Any] = Field(default_factory=dict)
    tokenizer: Path | None = None
    seed: int = 0

    slo: dict[str, Seconds] = Field(default_factory=dict)
    goodput_target: float = Field(default=0.99, gt=0, le=1)
    server_metrics: str | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """SettingsError names the key, what is wrong with it, and for an unknown key the allowed ones."""
        unknown = sorted(set(values) - set(cls.model_fields))
        if unknown:
            allowed = ", ".join(cls.model_fields)
            raise SettingsError(f"unknown setting {', '.join(unknown)}; allowed are {allowed}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(item) for item in error.errors())) from error

    @model_validator(mode="after")
    def _check(self) -> Self:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ValueError("url: write http://HOST:PORT or https://HOST:PORT")
        if "@" in urlsplit(self.url).netloc:
            raise ValueError("url: credentials do not belong there; use api_key_env or a header")
        unknown = sorted(set(self.slo) - set(METRICS_WITH_LIMITS))
        if unknown:
            raise ValueError(f"slo: no metric {', '.join(unknown)}; allowed are {', '.join(METRICS_WITH_LIMITS)}")
        Lengths.parse(self.prompt_tokens)
        Lengths.parse(self.output_tokens)
        self._check_load()
        return self

    def _check_load(self) -> None:
        ways = [name for name in ("concurrency", "rate", "trace") if getattr(self, name) is not None]
        if len(ways) != 1:
            given = " and ".join(ways) or "none of them"
            raise ValueError(f"give one of concurrency (closed loop), rate or trace (open loop), not {given}")
        if self.arrivals == "trace" and self.trace is None:
            raise ValueError("arrivals: trace needs the file trace")
        if self.num_requests is not None and self.duration is not None:
            raise ValueError("give num_requests or duration, not both")
        if self.num_requests is None and self.duration is None and self.trace is None:
            raise ValueError("give num_requests or duration, so that the run ends")
        if self.rate is not None and ".." in self.rate and self.duration is None:
            raise ValueError("rate: a ramp A..B needs duration")
        if self.searches and not self.slo:
            raise ValueError("rate: auto searches for the highest rate that meets an slo; give one")
        self._warmup(1, 1.0)
        self.loads()

    @property
    def searches(self) -> bool:
        """Whether the rate is to be found by search."""
        return self.rate == "auto"

    def loads(self) -> list[Load]:
        """The stages, in order. A search has none of its own: it makes them as it goes, with `load_at`."""
        if self.concurrency is not None:
            return [self._load(concurrency=count) for count in _numbers(self.concurrency, int, "concurrency")]
        if self.rate is None:
            return [self._load()]
        if self.searches:
            return []
        if ".." in self.rate:
            first, last = _numbers(self.rate.replace("..", ","), float, "rate")
            return [self._load(rate_per_s=first, last_rate_per_s=last)]
        return [self.load_at(rate) for rate in _numbers(self.rate, float, "rate")]

    def load_at(self, rate_per_s: float) -> Load:
        """An open loop at one rate."""
        return self._load(rate_per_s=rate_per_s)

    def _load(self, **shape: Any) -> Load:
        requests, warmup_s = self._warmup(self.num_requests, self.duration)
        return Load(
            num_requests=self.num_requests,
            duration_s=self.duration,
            warmup_requests=requests,
            warmup_s=warmup_s,
            **shape,
        )

    def _warmup(self, num_requests: int | None, duration_s: float | None) -> tuple[int, float]:
        """Requests and seconds of warm-up: a share of the run, or in the unit that the run is measured in."""
        share = re.fullmatch(r"([0-9.]+)%", self.warmup)
        if share:
            ratio = float(share[1]) / 100
            return math.ceil(ratio * (num_requests or 0)), ratio * (duration_s or 0.0)
        if self.warmup.isdecimal():
            count = int(self.warmup)
            if count and self.duration is not None:
                raise ValueError(f"warmup: a run by duration warms up for a time; write {count}s or a share like 5%")
            return count, 0.0
        time_s = seconds(self.warmup)
        if not isinstance(time_s, float):
            raise ValueError(f"warmup: write requests (20), a time (10s) or a share (5%), not {self.warmup!r}")
        if self.duration is None:
            raise ValueError("warmup: a run by num_requests warms up for a number of requests or a share like 5%")
        return 0, time_s


def _numbers(text: str, kind: type[Number], name: str) -> list[Number]:
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"{name}: write a number above 0, or several as 1,2,4, not {text!r}")
    return numbers


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
