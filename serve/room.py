"""Is there memory for two variants at once? The arithmetic, in words, from what the replicas report. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serve.errors import Conflict
from serve.heartbeat import ReplicaBeat

__all__ = ["room_for"]


def room_for(canary: str, stable: str, replicas: Sequence[ReplicaBeat]) -> str:
    """Raises Conflict, with the arithmetic, if a canary that was freed does not fit where its replicas run.

    A replica that is ready takes nothing more; of one that is loading nobody knows yet what it will take, and its
    failure, should it not fit, is the rollout's.
    """
    mine = [beat for beat in replicas if beat.variant == canary]
    beside = _added([beat.needs for beat in replicas if beat.variant == stable and beat.state == "ready"])
    kept = f"{stable} keeps {_parts(beside)}"
    for beat in mine:
        if beat.state == "ready":
            continue
        if beat.state != "freed" or beat.available_bytes is None:
            return f"{canary} is {beat.state}: what it takes is known once it has loaded; {kept}"
        needed = sum(beat.needs.values())
        arithmetic = f"{canary} needs {_parts(beat.needs)}, {_size(beat.available_bytes)} are free; {kept}"
        if needed > beat.available_bytes:
            raise Conflict(f"there is no room for both: {arithmetic}: {_size(needed - beat.available_bytes)} short")
        return arithmetic
    if not mine:
        return f"{canary} has no replica yet: what it takes is known once it has loaded; {kept}"
    taken = _added([beat.needs for beat in mine])
    return f"both are loaded: {canary} takes {_parts(taken)}, {kept}; nothing more is needed"


def _added(needs: Sequence[Mapping[str, int]]) -> dict[str, int]:
    components = dict.fromkeys(component for each in needs for component in each)
    return {component: sum(each.get(component, 0) for each in needs) for component in components}


def _parts(needs: Mapping[str, int]) -> str:
    if not needs:
        return "an unknown amount"
    parts = " + ".join(f"{component} {_size(size)}" for component, size in needs.items() if size)
    return f"{_size(sum(needs.values()))} ({parts})" if parts else "nothing"


def _size(count_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.3g} TB"
