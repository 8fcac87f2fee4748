"""Made-up traffic whose truth is known: users with habits, a server whose noise lingers, and parcels of outcomes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from serve.experiment.clusters import USER_GROUPS, Values
from serve.rollout import Batch, Outcome, Split, assign, unit_hash


@dataclass(frozen=True)
class World:
    """Latencies are log-normal: exp(user's habit + the server's mood + the request's own noise)."""

    users: int = 200
    habit: float = 0.3
    mood: float = 0.2
    mood_s: float = 30.0
    noise: float = 0.4
    median_s: float = 0.05
    rate_per_s: float = 3.0

    @property
    def spread(self) -> float:
        return math.sqrt(self.habit**2 + self.mood**2 + self.noise**2)

    def quantile(self, z: float) -> float:
        return self.median_s * math.exp(z * self.spread)

    @property
    def mean(self) -> float:
        return self.median_s * math.exp(self.spread**2 / 2)

    def values(self, rng: random.Random, seconds: float) -> Iterator[tuple[float, int, float]]:
        """(time, user, latency) of one request after another."""
        habits = [rng.gauss(0, self.habit) for _ in range(self.users)]
        shares = [1 / (rank + 5) for rank in range(self.users)]
        now_s, mood, keep = 0.0, rng.gauss(0, self.mood), 0.0
        while True:
            gap_s = rng.expovariate(self.rate_per_s)
            now_s += gap_s
            if now_s >= seconds:
                return
            keep = math.exp(-gap_s / self.mood_s)
            mood = keep * mood + math.sqrt(1 - keep**2) * rng.gauss(0, self.mood)
            user = rng.choices(range(self.users), shares)[0]
            yield now_s, user, self.median_s * math.exp(habits[user] + mood + rng.gauss(0, self.noise))


def watched(world: World, rng: random.Random, seconds: float, look_s: float, width_s: float) -> Iterator[Values]:
    """The same sums again and again, as a dashboard would look at them; blocks of `width_s`, doubled past 64."""
    values, next_s = Values(), look_s
    for at_s, user, latency_s in world.values(rng, seconds):
        if at_s >= 64 * width_s:
            width_s *= 2
            values.join_blocks()
        values.add((hash((7, user)) % USER_GROUPS, int(at_s // width_s)), latency_s)
        if at_s >= next_s:
            next_s += look_s
            yield values


def parcels(
    split: Split,
    rng: random.Random,
    *,
    seconds: int,
    per_s: int = 10,
    users: int = 300,
    slower: float = 1.0,
    load: dict[str, int] | None = None,
    ingress: str = "i",
    start_s: float = 0.0,
) -> Iterator[Batch]:
    """One parcel a second. Latencies rise with the load of the variant (about `load`); int8's are `slower` times as
    long as bf16's at the same load."""
    record = 0
    habits = [rng.gauss(0, 0.2) for _ in range(users)]
    for second in range(seconds):
        outcomes = []
        for _ in range(per_s):
            record += 1
            user = rng.randrange(users)
            dealt = assign(split, f"user-{user}", "")
            running = max(1, round((load or {}).get(dealt.variant, 4) * rng.uniform(0.5, 1.5)))
            itl_s = 0.01 * (1 + 0.2 * running) * math.exp(habits[user] + rng.gauss(0, 0.2))
            itl_s *= slower if dealt.variant == "int8" else 1.0
            tokens = rng.randrange(8, 64)
            at_s = start_s + second + rng.random()
            e2e_s = itl_s * (tokens + 2)
            outcomes.append(
                Outcome(
                    record, dealt.variant, dealt.route, split.revision, at_s, unit_hash(split.salt, f"user-{user}"),
                    at_s + e2e_s, finish_reason="stop", prompt_tokens=rng.choice([20, 100]), completion_tokens=tokens,
                    ttft_s=3 * itl_s, itl_mean_s=itl_s, tpot_s=itl_s, e2e_s=e2e_s, running_sequences=running,
                    held_out=dealt.held_out,
                )
            )  # fmt: skip
        yield Batch(ingress, second + 1, start_s + second + 1.0, tuple(outcomes))
