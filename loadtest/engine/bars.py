"""What our engine has to reach beside its peers, and whether it does: issue by issue the same table, computed."""

from collections.abc import Iterator
from dataclasses import dataclass

from loadtest.engine.contestants import CONTESTANTS, OURS
from loadtest.results import Json

OVERHEAD_LIMIT_BYTES = 450 * 10**6
READY_LIMIT_S = 2.0
LIMIT_RATIOS = {"bf16": 0.85, "int8": 0.85, "gptq4": 0.75, "nf4": 0.75}
LLAMA_CPP = {"bf16": ("llama.cpp", "BF16"), "int8": ("llama.cpp", "Q8_0"), "gptq4": ("llama.cpp", "Q4_0")}
DYNAMIC_INT8 = ("transformers", "dynamic-int8")
BITSANDBYTES = ("transformers", "bitsandbytes-nf4")


@dataclass(frozen=True)
class Bar:
    """Ours must reach `factor` times the faster of the `peers`; none named are all that compete at this precision."""

    precision: str
    phase: str
    batch_size: int
    factor: float
    peers: tuple[tuple[str, str], ...] = ()


BARS = (
    Bar("bf16", "decode", 1, 0.95, (LLAMA_CPP["bf16"],)),
    Bar("bf16", "decode", 8, 1.2),
    Bar("bf16", "decode", 16, 1.2),
    Bar("bf16", "prefill", 1, 1.1),
    Bar("int8", "decode", 1, 1.0, (LLAMA_CPP["int8"],)),
    Bar("int8", "decode", 8, 1.5),
    Bar("int8", "decode", 16, 2.0),
    Bar("int8", "prefill", 1, 1.0, (DYNAMIC_INT8,)),
    Bar("int8", "prefill", 1, 2.0, (LLAMA_CPP["int8"],)),
    Bar("gptq4", "decode", 1, 1.0, (LLAMA_CPP["gptq4"],)),
    Bar("gptq4", "decode", 8, 1.3, (LLAMA_CPP["gptq4"],)),
    Bar("gptq4", "decode", 16, 1.3, (LLAMA_CPP["gptq4"],)),
    Bar("gptq4", "prefill", 1, 1.1, (LLAMA_CPP["gptq4"],)),
    Bar("nf4", "decode", 1, 2.0, (BITSANDBYTES,)),
    Bar("nf4", "decode", 8, 2.0, (BITSANDBYTES,)),
    Bar("nf4", "decode", 16, 2.0, (BITSANDBYTES,)),
    Bar("nf4", "prefill", 1, 1.3, (BITSANDBYTES,)),
)


def judge(result: Json) -> list[Json]:
    """Every bar whose two sides were measured: `{"precision", "what", "required", "measured", "met"}`."""
    return [*_beside_peers(result), *_beside_limits(result), *_memory_and_load(result)]


def _beside_peers(result: Json) -> Iterator[Json]:
    speeds = {
        (row["engine"], row["precision"], row["phase"], row["batch_size"]): row["tokens_per_s"]
        for row in result["rows"]
    }
    for bar in BARS:
        ours = speeds.get((OURS, bar.precision, bar.phase, bar.batch_size))
        rivals = {
            peer: speeds[(*peer, bar.phase, bar.batch_size)]
            for peer in bar.peers or _rivals(bar.precision)
            if (*peer, bar.phase, bar.batch_size) in speeds
        }
        if ours is None or not rivals:
            continue
        best = max(rivals, key=lambda peer: rivals[peer])
        against = " ".join(best) + ("" if bar.peers else f", the best of {len(rivals)}")
        yield {
            "precision": bar.precision,
            "what": f"{bar.phase} {bar.batch_size} against {against}",
            "required": bar.factor,
            "measured": ours / rivals[best],
            "met": ours >= bar.factor * rivals[best],
        }


def _rivals(precision: str) -> tuple[tuple[str, str], ...]:
    return tuple((one.engine, one.precision) for one in CONTESTANTS if one.like == precision and one.engine != OURS)


def _beside_limits(result: Json) -> Iterator[Json]:
    for row in result["rows"]:
        if row["engine"] == OURS and (row["phase"], row["batch_size"]) == ("decode", 1):
            required = LIMIT_RATIOS[row["precision"]]
            yield {
                "precision": row["precision"],
                "what": "decode 1 against the bandwidth limit",
                "required": required,
                "measured": row["limit_ratio"],
                "met": row["limit_ratio"] >= required,
            }


def _memory_and_load(result: Json) -> Iterator[Json]:
    load_s = {(row["engine"], row["precision"]): row["load_s"] for row in result["rows"]}
    for engine in result["engines"]:
        if engine["engine"] != OURS:
            continue
        overhead, ready_s = engine["overhead_bytes"], load_s[OURS, engine["precision"]]
        yield {
            "precision": engine["precision"],
            "what": "resident bytes beyond weights and KV cache",
            "required": OVERHEAD_LIMIT_BYTES,
            "measured": overhead,
            "met": overhead <= OVERHEAD_LIMIT_BYTES,
        }
        yield {
            "precision": engine["precision"],
            "what": "ready from an artifact, seconds",
            "required": READY_LIMIT_S,
            "measured": ready_s,
            "met": ready_s <= READY_LIMIT_S,
        }
