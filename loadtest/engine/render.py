"""A result as Markdown, for a terminal and for docs/PERFORMANCE.md alike."""

from collections.abc import Iterator, Sequence

from loadtest.results import Json


def markdown(result: Json) -> str:
    """Machine, command, versions, speeds, memory and bars."""
    parts = [_head(result), _speeds(result), _engines(result), _bars(result)]
    if result["failures"]:
        parts.append("\n".join(f"- {name} did not run: {why}" for name, why in result["failures"].items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(result: Json) -> str:
    machine = result["machine"]
    runs = [len(row["runs_tokens_per_s"]) for row in result["rows"]]
    counts = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    return "\n".join(
        [
            f"- Machine: {machine['cpu']}, {machine['usable_cpus']} cores, "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}; {result['written_at']}",
            f"- Limits, measured beside: {result['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s read, "
            f"{result['bf16_ops_per_s'] / 1e9:,.0f} G operations/s in bf16, "
            f"{result['int8_ops_per_s'] / 1e9:,.0f} in int8",
            f"- Prompt {result['prompt_tokens']} tokens, {result['decode_tokens']} decoded, "
            f"{result['threads']} threads; medians of {counts} runs, engines taking turns",
            f"- Command: `{result['command']}`",
        ]
    )


def _speeds(result: Json) -> str:
    """Tokens per second, and in brackets the share of the limit."""
    jobs = list(dict.fromkeys((row["phase"], row["batch_size"]) for row in result["rows"]))
    cells = {
        (row["engine"], row["precision"], row["phase"], row["batch_size"]): (
            f"{row['tokens_per_s']:,.0f} ({row['limit_ratio']:.0%})"
        )
        for row in result["rows"]
    }
    engines = [(engine["engine"], engine["precision"]) for engine in result["engines"]]
    titles = [f"{phase} {result['prompt_tokens'] if phase == 'prefill' else size}" for phase, size in jobs]
    return _table(
        ["tokens/s (of the limit)", *titles],
        [[" ".join(engine), *(cells.get((*engine, *job), "–") for job in jobs)] for engine in engines],
    )


def _engines(result: Json) -> str:
    load_s = {(row["engine"], row["precision"]): row["load_s"] for row in result["rows"]}
    rows = []
    for engine in result["engines"]:
        last = engine["turns"][-1]
        rows.append(
            [
                f"{engine['engine']} {engine['precision']}",
                f"{engine['bytes_per_step'] / 1e6:,.0f}",
                f"{last['resident_bytes'] / 1e6:,.0f}",
                f"{last['peak_bytes'] / 1e6:,.0f}",
                f"{load_s[engine['engine'], engine['precision']]:.2f}",
                str(engine["version"]).partition(":")[0],
            ]
        )
    return _table(["", "MB read per step", "resident MB", "peak MB", "ready s", "what ran"], rows)


def _bars(result: Json) -> str:
    rows = [
        [
            bar["precision"],
            bar["what"],
            _number(bar["required"]),
            _number(bar["measured"]),
            "yes" if bar["met"] else "**no**",
        ]
        for bar in result["bars"]
    ]
    return _table(["", "bar", "required", "measured", "met"], rows) if rows else ""


def _number(value: float) -> str:
    return f"{value / 1e6:,.0f} MB" if abs(value) > 1e5 else f"{value:.2f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(_lines(titles, rows))


def _lines(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(titles) + " |"
    yield "|---" + "|---:" * (len(titles) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
