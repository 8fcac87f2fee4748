"""A world to try rollouts in, without models: thousands of them in lockstep, one numpy axis.

Two servers, one per arm, each with its own queue and a batch that slows as it fills; users who come back (Zipf) and
differ in prompt length, speed and luck; a load that rises and falls; noise that lingers on one server for half a
minute; hangs that swallow the requests of their time; a canary that starts cold after every change of its weight. In
other words: everything that makes requests dependent and a naive test lie. Effects are planted on the canary by
factors; all 1 means that there is nothing to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CANARY, STABLE = 1, 0
_SLOTS = 64  # how many running requests one server remembers


@dataclass(frozen=True)
class World:
    users: int = 2000
    zipf: float = 1.0
    user_deviation: float = 0.3  # of a user's habits, log scale: answer length, and a third of it in speed
    luck_deviation: float = 0.3  # of a user's own failure rate, log scale
    rate_per_s: float = 5.0
    drift: float = 0.6  # amplitude of the day, relative
    day_s: float = 3600.0
    batch_limit: int = 24
    slowdown: float = 0.04  # of each token, per sequence that runs beside it
    lingering_deviation: float = 0.05
    lingering_s: float = 30.0
    noise_deviation: float = 0.15
    failure_rate: float = 0.01
    hangs_per_hour: float = 0.25  # per server
    hang_s: float = 20.0
    cold_s: float = 20.0
    cold_factor: float = 3.0
    deadline_s: float = 60.0
    sampled: float = 0.1  # share of canary answers that are scored again
    kl_nats: float = 0.05
    top1: float = 0.9
    flip_rate: float = 0.03

    def plain(self) -> World:
        """Independent requests: one request per user, no queue, no hangs, no drift."""
        return replace(
            self, users=10**6, zipf=0.0, user_deviation=0.0, luck_deviation=0.0, drift=0.0, slowdown=0.0,
            batch_limit=_SLOTS, lingering_deviation=0.0, hangs_per_hour=0.0, cold_s=0.0,
        )  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """What is true of the canary, as factors on what is true of stable (or on what was expected of its quality)."""

    latency: float = 1.0
    failures: float = 1.0
    kl: float = 1.0
    length: float = 1.0


@dataclass(frozen=True)
class Arrivals:
    """The i-th request of every rollout. All arrays are `[rollouts]`; quality is NaN where it was not scored."""

    time_s: Floats
    arm: Ints
    user: Ints
    prompt_tokens: Floats
    completion_tokens: Floats
    running: Ints
    ttft_s: Floats
    itl_s: Floats
    e2e_s: Floats
    failed: Bools
    step: int
    settling: Bools
    kl_nats: Floats
    top1: Floats
    flipped: Floats


Steps = tuple[tuple[int, float], ...]  # (first request, canary weight 0-100)


def simulate(
    world: World, effect: Effect, *, rollouts: int, requests: int, steps: Steps, seed: int, settle_s: float = 30.0
) -> Iterator[Arrivals]:
    """`requests` times the next request of each of `rollouts` independent rollouts."""
    rng = np.random.default_rng(seed)
    every = np.arange(rollouts)
    time_s = np.zeros(rollouts)
    point = _Users(world, rollouts, rng)
    servers = _Servers(world, rollouts, rng)
    step, changed_s = 0, np.zeros(rollouts)
    for index in range(requests):
        if step + 1 < len(steps) and index >= steps[step + 1][0]:
            step, changed_s = step + 1, time_s.copy()
        load = 1.0 + world.drift * np.sin(2.0 * np.pi * time_s / world.day_s)
        gap_s = rng.exponential(1.0, rollouts) / (world.rate_per_s * load)
        time_s = time_s + gap_s
        user = point.draw(rng)
        arm = (point.layout[every, user] * 100.0 < steps[step][1]).astype(np.int64)
        canary = arm == CANARY
        servers.advance(time_s, gap_s, rng)
        running, wait_s = servers.seize(arm, time_s)
        cold = canary & (time_s - changed_s < world.cold_s)
        pace = (1.0 + world.slowdown * running) * np.exp(servers.lingering[every, arm])
        pace *= np.where(cold, world.cold_factor, 1.0) * np.where(canary, effect.latency, 1.0)
        pace *= np.exp(point.habit[every, user] / 3.0)
        noise = rng.standard_normal((4, rollouts))
        prompt = np.ceil(np.exp(5.0 + 0.7 * noise[0] + point.habit[every, user]))
        length = np.where(canary, effect.length, 1.0)
        completion = np.ceil(length * np.exp(4.0 + 0.5 * noise[1] + point.habit[every, user]))
        itl_s = 0.02 * pace * np.exp(world.noise_deviation * noise[2])
        ttft_s = wait_s + (0.03 + 2e-4 * prompt) * pace * np.exp(2.0 * world.noise_deviation * noise[3])
        e2e_s = ttft_s + completion * itl_s
        chance = world.failure_rate * point.luck[every, user] * np.where(canary, effect.failures, 1.0)
        coins = rng.random((4, rollouts))
        failed = (coins[0] < chance) | (servers.hanging(arm, time_s) & (coins[1] < 0.5))
        servers.occupy(arm, time_s + np.where(failed, 1.0, e2e_s))
        scored = canary & ~failed & (coins[2] < world.sampled)
        kl = world.kl_nats * effect.kl * np.exp(0.6 * noise[2] + point.habit[every, user]) / _lognormal_mean(world, 0.6)
        top1 = np.clip(world.top1 + 0.3 * (world.kl_nats - kl), 0.0, 1.0)
        flipped = (coins[3] < world.flip_rate * effect.kl).astype(float)
        yield Arrivals(
            time_s, arm, user, prompt, completion, running, ttft_s, itl_s, e2e_s, failed, step,
            time_s - changed_s < settle_s,
            *(np.where(scored, value, np.nan) for value in (kl, top1, flipped)),
        )  # fmt: skip


def _lognormal_mean(world: World, deviation: float) -> float:
    return float(np.exp(0.5 * (deviation**2 + world.user_deviation**2)))


class _Users:
    """Who comes next, what they are like, and where they lie in the layout of the split."""

    def __init__(self, world: World, rollouts: int, rng: np.random.Generator) -> None:
        self.alike = world.zipf == 0.0
        self.count = 1 if self.alike else world.users
        shares = np.arange(1, self.count + 1) ** -world.zipf
        self.cumulative = np.cumsum(shares) / shares.sum()
        shape = (rollouts, self.count)
        self.layout = rng.random(shape)
        self.habit = world.user_deviation * rng.standard_normal(shape)
        self.luck = np.exp(world.luck_deviation * rng.standard_normal(shape) - 0.5 * world.luck_deviation**2)

    def draw(self, rng: np.random.Generator) -> Ints:
        points = rng.random(len(self.layout))
        if self.alike:  # nobody returns: a new point in the layout for every request
            self.layout = points[:, None]
            return np.zeros(len(points), dtype=np.int64)
        return np.searchsorted(self.cumulative, points).astype(np.int64)


class _Servers:
    """Two queues per rollout, and what befalls each of them."""

    def __init__(self, world: World, rollouts: int, rng: np.random.Generator) -> None:
        self.world = world
        self.every = np.arange(rollouts)
        self.finish_s = np.zeros((rollouts, 2, _SLOTS))
        self.next_slot = np.zeros((rollouts, 2), dtype=np.int64)
        self.lingering = world.lingering_deviation * rng.standard_normal((rollouts, 2))
        self.hang_start_s = rng.exponential(self._between_hangs_s, (rollouts, 2))
        self.hang_end_s = self.hang_start_s + rng.exponential(world.hang_s, (rollouts, 2))

    @property
    def _between_hangs_s(self) -> float:
        return 3600.0 / max(self.world.hangs_per_hour, 1e-9)

    def advance(self, time_s: Floats, gap_s: Floats, rng: np.random.Generator) -> None:
        """Let the noise linger on (an Ornstein-Uhlenbeck process) and let hangs end and be drawn anew."""
        keep = np.exp(-gap_s / self.world.lingering_s)[:, None]
        fresh = rng.standard_normal(self.lingering.shape) * np.sqrt(1.0 - keep**2)
        self.lingering = keep * self.lingering + self.world.lingering_deviation * fresh
        over = self.hang_end_s < time_s[:, None]
        if over.any():
            count = int(over.sum())
            self.hang_start_s[over] = self.hang_end_s[over] + rng.exponential(self._between_hangs_s, count)
            self.hang_end_s[over] = self.hang_start_s[over] + rng.exponential(self.world.hang_s, count)

    def seize(self, arm: Ints, time_s: Floats) -> tuple[Ints, Floats]:
        """Sequences running on the request's server, and how long it waits for a place in the batch."""
        finish_s = self.finish_s[self.every, arm]
        running = (finish_s > time_s[:, None]).sum(axis=1)
        limit = self.world.batch_limit
        place_s = np.partition(finish_s, _SLOTS - limit, axis=1)[:, _SLOTS - limit]
        return np.minimum(running, limit), np.maximum(place_s - time_s, 0.0)

    def occupy(self, arm: Ints, finish_s: Floats) -> None:
        slot = self.next_slot[self.every, arm]
        self.finish_s[self.every, arm, slot] = finish_s
        self.next_slot[self.every, arm] = (slot + 1) % _SLOTS

    def hanging(self, arm: Ints, time_s: Floats) -> Bools:
        start_s, end_s = self.hang_start_s[self.every, arm], self.hang_end_s[self.every, arm]
        return (start_s < time_s) & (time_s < end_s)
