"""One run from settings to result: stages one after another, each record written down as it comes."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO

from loadtest import server_metrics, sweep
from loadtest.arrivals import read_trace
from loadtest.errors import InputError
from loadtest.fleet import Fleet
from loadtest.frames import Health
from loadtest.generator import NOBODY_THERE, target_of
from loadtest.notes import notes
from loadtest.record import Record
from loadtest.results import Json
from loadtest.selfcheck import SelfCheck
from loadtest.settings import Load, Settings
from loadtest.summary import Window, coordinated_omission, summarise, window_of
from loadtest.timeline import timeline
from loadtest.workload import load_tokenizer, read_prompts

GIVE_UP_AFTER = 20
HOPELESS = (*NOBODY_THERE, "http_400", "http_401", "http_403", "http_404", "http_405", "http_422")


class Watcher(Protocol):
    """Sees a run go by: a progress display, or nothing."""

    def stage(self, load: Load) -> None: ...
    def record(self, record: Record) -> None: ...
    def health(self, health: Health) -> None: ...


@dataclass(slots=True)
class Stage:
    """What one stage brought."""

    load: Load
    records: list[Record] = field(default_factory=list)
    check: SelfCheck = field(default_factory=SelfCheck)
    problems: list[str] = field(default_factory=list)
    origin_s: float = 0.0
    server: Json | None = None


class Run:
    """One run. `stop` ends it early; its result then says so and holds everything measured until then."""

    def __init__(self, settings: Settings, watcher: Watcher, raw: TextIO | None = None) -> None:
        self._settings = settings
        self._watcher = watcher
        self._raw = raw
        self._tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
        self._prompt_count = len(read_prompts(settings.prompts)) if settings.prompts else None
        if settings.trace is not None:
            read_trace(settings.trace)  # what cannot be read is said before anything is sent
        self._tls = target_of(settings).tls
        self._stop = asyncio.Event()
        self._stages: list[Stage] = []
        self._status = "complete"

    def stop(self, status: str = "interrupted") -> None:
        """Gives up what is in flight and starts nothing more."""
        if not self._stop.is_set():
            self._status = status
            self._stop.set()

    async def measure(self) -> Json:
        """All stages, then the result."""
        started_at, started_s = datetime.now(UTC), time.monotonic()
        summaries: list[Json] = []
        for load in self._loads(summaries):
            stage = Stage(load)
            self._stages.append(stage)
            await self._run_stage(stage)
            summaries.append(self._summarise(stage))
            if self._stop.is_set():
                break
        return {
            "status": self._status,
            "started_at": started_at.isoformat(timespec="seconds"),
            "elapsed_s": time.monotonic() - started_s,
            "settings": _public(self._settings),
            **self._result(summaries),
        }

    def _loads(self, summaries: list[Json]) -> Iterator[Load]:
        """The stages that the settings name, or those of a search, which looks at the summaries so far."""
        if not self._settings.searches:
            yield from (self._following(load) for load in self._settings.loads())
            return
        tried: list[tuple[float, bool]] = []
        while (rate_per_s := sweep.next_rate(tried)) is not None:
            yield self._following(self._settings.load_at(rate_per_s))
            tried.append((rate_per_s, sweep.meets(summaries[-1]["overall"], self._settings.goodput_target)))

    def _following(self, load: Load) -> Load:
        """Numbers go on from stage to stage, so that no prompt comes twice and a prefix cache does not help."""
        used = max((record.index + 1 for stage in self._stages for record in stage.records), default=0)
        return replace(load, first_index=used)

    async def _run_stage(self, stage: Stage) -> None:
        self._watcher.stage(stage.load)

        def on_record(record: Record) -> None:
            self._keep(stage, record)

        def on_health(health: Health) -> None:
            stage.check.add(health)
            self._watcher.health(health)

        fleet = Fleet(self._settings, stage.load, on_record, on_health)
        before = await self._scrape(stage)
        try:
            await fleet.run(self._stop)
        finally:
            stage.problems += fleet.problems
            stage.origin_s = fleet.origin_s
        if before is not None:
            await self._compare_with_server(stage, before)

    async def _scrape(self, stage: Stage) -> server_metrics.Scrape | None:
        """The server's own metrics; where it gives none, the stage says so and goes on."""
        url = self._settings.server_metrics
        if url is None:
            return None
        try:
            return await server_metrics.scrape(url, self._tls)
        except InputError as error:
            stage.problems.append(str(error))
            return None

    async def _compare_with_server(self, stage: Stage, before: server_metrics.Scrape) -> None:
        assert self._settings.server_metrics is not None
        succeeded = sum(record.ok for record in stage.records)
        try:
            after = await server_metrics.scrape_until(self._settings.server_metrics, self._tls, before, succeeded)
        except InputError as error:
            stage.problems.append(str(error))
            return
        stage.server = server_metrics.beside(server_metrics.since(before, after), stage.records)

    def _keep(self, stage: Stage, record: Record) -> None:
        if self._tokenizer is not None and record.text:
            record.tokenizer_tokens = len(self._tokenizer.encode(record.text, add_special_tokens=False).ids)
        record.text = ""
        stage.records.append(record)
        if self._raw is not None:
            number = len(self._stages) - 1
            self._raw.write(json.dumps({"stage": number, **record.as_json()}) + "\n")
        self._watcher.record(record)
        if len(stage.records) == GIVE_UP_AFTER and all(one.error in HOPELESS for one in stage.records):
            self.stop("aborted")

    def _summarise(self, stage: Stage) -> Json:
        window = window_of(stage.load, stage.records)
        generator = stage.check.verdict(stage.records, self._settings.max_in_flight)
        return {
            "offered": stage.load.describe(),
            "origin_monotonic_s": stage.origin_s,
            **summarise(stage.records, window, self._settings),
            "coordinated_omission": coordinated_omission(stage.records, stage.load),
            "generator": generator,
            "server_metrics": stage.server,
            "timeline": _timeline(stage, window),
            "notes": [*stage.problems, *notes(stage.records, self._status, generator, self._prompt_count)],
        }

    def _result(self, summaries: list[Json]) -> Json:
        """The headline stage at the top; the others beside it where there are several."""
        target = self._settings.goodput_target
        knee = sweep.knee(summaries)
        best = sweep.highest_meeting(summaries, target) if self._settings.slo else None
        chosen = next((number for number in (best, knee) if number is not None), len(summaries) - 1)
        result = summaries[chosen] | {"slo": self._slo(summaries[chosen])}
        if len(summaries) == 1:
            return result | self._ramp(self._stages[0])
        return result | {
            "headline_stage": chosen,
            "knee": _found(summaries, knee),
            "highest_meeting_slo": _found(summaries, best),
            "stages": summaries,
        }

    def _ramp(self, stage: Stage) -> Json:
        """What a ramp shows on its way up; nothing where the stage was none. The headline is the whole ramp."""
        if stage.load.last_rate_per_s is None:
            return {}
        parts = [
            {"offered": load.describe(), **summarise(records, window, self._settings)}
            for load, window, records in sweep.ramp_parts(stage.load, stage.records)
        ]
        best = sweep.highest_meeting(parts, self._settings.goodput_target) if self._settings.slo else None
        return {
            "headline_stage": None,
            "knee": _found(parts, sweep.knee(parts)),
            "highest_meeting_slo": _found(parts, best),
            "stages": parts,
        }

    def _slo(self, summary: Json) -> Json | None:
        """Whether the SLO was met, and whether the sample is large enough to be sure."""
        if not self._settings.slo:
            return None
        target = self._settings.goodput_target
        interval = summary["overall"]["goodput_ratio_interval"]
        return {
            "limits": self._settings.slo,
            "target_ratio": target,
            "met": sweep.meets(summary["overall"], target),
            "is_sure": interval is not None and not interval[0] < target <= interval[1],
        }


def _found(summaries: list[Json], position: int | None) -> Json | None:
    if position is None:
        return None
    overall = summaries[position]["overall"]
    kept = ("requests_per_s", "tokens_per_s", "goodput_ratio", "goodput_requests_per_s")
    return {
        "stage": position,
        "offered": summaries[position]["offered"],
        **{name: overall[name] for name in kept},
    }


def _timeline(stage: Stage, window: Window) -> Json:
    return {"window_s": [window.start_s, window.end_s], **timeline(stage.records)}


def _public(settings: Settings) -> dict[str, Any]:
    """The settings without the values of headers, which may be secrets."""
    fields = settings.model_dump(mode="json")
    fields["headers"] = sorted(settings.headers)
    return fields
