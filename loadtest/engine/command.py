"""`python -m loadtest engine`: what is asked, in which order, and what is printed."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from loadtest.errors import SettingsError

if TYPE_CHECKING:
    from loadtest.engine.contestants import Contestant

_EXIT_FAILED = 3


def _default_model() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "halftone" / "bench-model"


def _default_tokenizer() -> Path:
    return Path(os.environ.get("HALFTONE_SHARED", "../shared")) / "data" / "gpt2-tokenizer"


def engine(
    peers: Annotated[bool, typer.Option("--peers", help="Measure the peers of `make peers` too.")] = False,
    engines: Annotated[str, typer.Option(help="Only these, as halftone,llama.cpp.")] = "",
    precisions: Annotated[str, typer.Option(help="Only ours of these precisions and their peers: bf16,int8.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How often every engine has its turn.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each figure in a turn.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every engine. Default: the usable cores.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 128,
    decode_tokens: Annotated[int, typer.Option(min=2, help="Output tokens of each sequence.")] = 64,
    batch_sizes: Annotated[str, typer.Option(help="Sequences decoding together.")] = "1,8,16",
    model: Annotated[Path | None, typer.Option(help="The bench model's folder, made if it is not there.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="GPT-2's tokenizer [$HALFTONE_SHARED/data/...].")] = None,
    peers_dir: Annotated[Path, typer.Option(envvar="HALFTONE_PEERS", help="Where `make peers` put them.")] = Path(
        ".peers"
    ),
    prepare: Annotated[bool, typer.Option("--prepare", help="Make the model, artifacts and files, and stop.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the result here, after every turn.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Add to what --output holds already.")] = False,
    render: Annotated[Path | None, typer.Option(help="Print this result as Markdown, and measure nothing.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Measure the engine's speed on the bench model, beside the machine's limits and, with --peers, other engines.

    Ends with the result as one line of JSON. Close other programs: they take from whoever's turn it is.
    """
    from loadtest import results
    from loadtest.engine import bars, contestants, measure
    from loadtest.engine.bench_model import build
    from loadtest.engine.render import markdown
    from loadtest.engine.session import Order

    if render is not None:
        print(markdown(results.read(render, "engine")), end="")
        return
    chosen = _chosen(peers, engines, precisions)
    standard_error = Console(stderr=True)

    def tell(what: str) -> None:
        standard_error.print(what, highlight=False)

    tell("the bench model")
    place = contestants.Place((model or _default_model()).resolve(), peers_dir.resolve())
    shape = build(place.model, tokenizer or _default_tokenizer())
    order = Order(
        model="",
        precision="",
        threads=threads or len(os.sched_getaffinity(0)),
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        batch_sizes=_sizes(batch_sizes),
        vocabulary_size=shape.vocabulary,
    )
    for one in chosen:
        tell(f"preparing {one.name}")
        contestants.prepare(one, order, place)
    if prepare:
        return
    found = measure.Found(shape, order)
    if resume:
        if output is None:
            raise SettingsError("resume: name the result to add to with --output")
        found.take(results.read(output, "engine"))

    def result() -> results.Json:
        body = measure.result(found)
        return results.envelope("engine", body | {"bars": bars.judge(body)}, ("halftone", "torch", "transformers"))

    def keep() -> None:
        if output is not None:
            results.write(result(), output)

    try:
        measure.measure(found, chosen, place, rounds, repeats, tell, keep)
    except KeyboardInterrupt:
        tell("interrupted: this is what was measured until then")
    if not found.runs:
        raise SettingsError("nothing was measured: " + "; ".join(found.failures.values()))
    final = result()
    if output is not None:
        results.write(final, output)
    if not as_json:
        print(markdown(final))
    print(json.dumps(final))
    sys.exit(_EXIT_FAILED if found.failures else 0)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"batch_sizes: write numbers as 1,8,16, not {text!r}") from error
    if min(sizes) < 1:
        raise SettingsError("batch_sizes: each must be at least 1")
    return sizes


def _chosen(peers: bool, engines: str, precisions: str) -> list["Contestant"]:
    from loadtest.engine.contestants import CONTESTANTS, OURS

    names = _among(engines, {one.engine for one in CONTESTANTS}, "engines")
    likes = _among(precisions, {one.like for one in CONTESTANTS}, "precisions")
    wanted = names or ({one.engine for one in CONTESTANTS} if peers else {OURS})
    return [one for one in CONTESTANTS if one.engine in wanted and (not likes or one.like in likes)]


def _among(text: str, known: set[str], name: str) -> set[str]:
    given = {part.strip() for part in text.split(",") if part.strip()}
    if unknown := given - known:
        raise SettingsError(f"{name}: {', '.join(sorted(unknown))} is none of {', '.join(sorted(known))}")
    return given
