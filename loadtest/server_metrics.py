"""What the server says about itself, beside what was measured from outside.

Two Prometheus scrapes, before and after a stage, give the histograms of what happened in between. The server's clock
starts when a request reaches it, so its numbers stand beside ours counted from the send, warm-up included. A histogram
knows a percentile only to its bucket: the two agree where ours falls into the same bucket or a neighbour.
"""

import asyncio
import math
import ssl
import urllib.error
import urllib.request
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from loadtest.errors import InputError
from loadtest.record import Record
from loadtest.results import Json
from loadtest.statistics import Samples, describe

# The ends of the names that vLLM, and others after it, give these histograms.
NAMES = {
    "ttft_s": ("time_to_first_token_seconds",),
    "itl_s": ("inter_token_latency_seconds", ":time_per_output_token_seconds"),
    "e2e_s": ("e2e_request_latency_seconds",),
    "queue_s": ("request_queue_time_seconds",),
}
COMPARED = ("p50", "p90", "p99")
SETTLE_S = 5.0
SCRAPE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Buckets:
    """A histogram as Prometheus counts it: how many were at most `edge`, and their sum."""

    reached: dict[float, float] = field(default_factory=lambda: defaultdict(float))
    total_s: float = 0.0

    @property
    def count(self) -> float:
        return self.reached.get(math.inf, 0.0)

    def since(self, before: "Buckets") -> "Buckets":
        """What was added after `before`."""
        added = {edge: reached - before.reached.get(edge, 0.0) for edge, reached in self.reached.items()}
        return Buckets(added, self.total_s - before.total_s)

    def bucket_of(self, share: float) -> int:
        """Position, among the sorted edges, of the bucket that holds this share."""
        edges = sorted(self.reached)
        return next(number for number, edge in enumerate(edges) if self.reached[edge] >= share * self.count)


Scrape = dict[str, Buckets]


async def scrape(url: str, tls: ssl.SSLContext | None) -> Scrape:
    """The histograms of `NAMES`, summed over all their labels. InputError where the server gives none."""
    return parse(await asyncio.to_thread(_fetch, url, tls))


def _fetch(url: str, tls: ssl.SSLContext | None) -> str:
    if not url.startswith(("http://", "https://")):
        raise InputError(f"server_metrics {url}: write http://HOST:PORT/metrics")
    try:
        with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_S, context=tls) as answer:  # noqa: S310 - checked above
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError) as error:
        raise InputError(f"server_metrics {url}: {error}") from error


def parse(text: str) -> Scrape:
    """Prometheus's text form; metrics that are none of `NAMES` are passed over."""
    found: Scrape = defaultdict(Buckets)
    for family in text_string_to_metric_families(text):
        metric = next((name for name, ends in NAMES.items() if family.name.endswith(ends)), None)
        for sample in family.samples if metric and family.type == "histogram" else ():
            if sample.name.endswith("_bucket"):
                found[str(metric)].reached[float(sample.labels["le"])] += sample.value
            elif sample.name.endswith("_sum"):
                found[str(metric)].total_s += sample.value
    return dict(found)


async def scrape_until(url: str, tls: ssl.SSLContext | None, before: Scrape, requests: int) -> Scrape:
    """Servers that gather from several processes publish late: waits a little until they have counted `requests`."""
    for _ in range(int(SETTLE_S / 0.25)):
        after = await scrape(url, tls)
        e2e = since(before, after).get("e2e_s")
        if e2e is None or e2e.count >= requests:
            return after
        await asyncio.sleep(0.25)
    return await scrape(url, tls)


def since(before: Scrape, after: Scrape) -> Scrape:
    """What each histogram gained."""
    return {name: buckets.since(before.get(name, Buckets())) for name, buckets in after.items()}


def beside(server: Scrape, records: Sequence[Record]) -> Json:
    """For each metric the server's count, mean and buckets, ours, and whether they agree; its queue only it can see."""
    done = [record for record in records if record.ok]
    values: dict[str, Callable[[Record], Sequence[float]]] = {
        "ttft_s": lambda r: [r.chunks_s[0] - r.sent_s] if r.chunks_s and r.sent_s is not None else [],
        "itl_s": lambda r: r.gaps_s,
        "e2e_s": lambda r: [r.from_sent_s] if r.from_sent_s is not None else [],
        "queue_s": lambda r: [],
    }
    return {
        name: _compare(buckets, describe(Samples.of([values[name](record) for record in done])))
        for name, buckets in server.items()
        if buckets.count
    }


def _compare(buckets: Buckets, ours: Json) -> Json:
    edges = sorted(buckets.reached)
    found: Json = {
        "server_count": buckets.count,
        "count": ours["count"],
        "server_mean": buckets.total_s / buckets.count,
        "mean": ours["mean"],
    }
    for name in COMPARED:
        number = buckets.bucket_of(float(name[1:]) / 100)
        # infinity is not JSON: the last bucket is open above
        low, high = (edges[number - 1] if number else 0.0), (edges[number] if edges[number] < math.inf else None)
        found[name] = {"server_bucket": [low, high], "ours": ours[name], "agrees": None}
        if ours["count"]:
            found[name]["agrees"] = abs(bisect_left(edges, ours[name]) - number) <= 1
    return found
