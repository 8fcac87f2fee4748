"""The commands: `run` and `engine` measure, `compare` and `report` read what `run` wrote.

Standard output holds the result (with `--json`, the JSON alone), standard error the progress. Exit codes: 0
measured and within the SLO, 1 the SLO was missed, 2 wrong usage, 3 no request succeeded, 130 interrupted.
"""

import asyncio
import inspect
import json
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loadtest import options
from loadtest.engine.command import engine
from loadtest.errors import LoadTestError, SettingsError

SLO_MISSED, WRONG_USAGE, NOTHING_SUCCEEDED, INTERRUPTED = 1, 2, 3, 130
PACKAGES = ("halftone", "httptools", "uvloop", "hdrhistogram", "numpy")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


def main() -> None:
    """Runs the command line; our own errors become one line and an exit code."""
    try:
        app()
    except LoadTestError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(WRONG_USAGE)


@app.callback()
def _commands() -> None:
    """Measure any OpenAI-compatible server from outside, over HTTP."""


@app.command()
def run(
    context: typer.Context,
    scenario: Annotated[Path | None, typer.Option(help="YAML with any of these settings.")] = None,
    url: options.Url = None,
    model: options.Model = None,
    api: options.Api = None,
    stream: options.Stream = None,
    timeout: options.Timeout = None,
    header: options.Header = None,
    api_key_env: options.ApiKeyEnv = None,
    ca: options.CA = None,
    insecure: options.Insecure = None,
    keepalive: options.KeepAlive = None,
    retries: options.Retries = None,
    concurrency: options.Concurrency = None,
    rate: options.Rate = None,
    arrivals: options.Arrivals = None,
    burstiness: options.Burstiness = None,
    trace: options.Trace = None,
    trace_speed: options.TraceSpeed = None,
    num_requests: options.NumRequests = None,
    duration: options.Duration = None,
    warmup: options.Warmup = None,
    max_in_flight: options.MaxInFlight = None,
    processes: options.Processes = None,
    prompts: options.Prompts = None,
    prompt_tokens: options.PromptTokens = None,
    output_tokens: options.OutputTokens = None,
    shared_prefix_tokens: options.SharedPrefixTokens = None,
    prefix_groups: options.PrefixGroups = None,
    turns: options.Turns = None,
    think_time: options.ThinkTime = None,
    users: options.Users = None,
    temperature: options.Temperature = None,
    ignore_eos: options.IgnoreEos = None,
    extra_body: options.ExtraBody = None,
    tokenizer: options.Tokenizer = None,
    seed: options.Seed = None,
    slo: options.Slo = None,
    goodput_target: options.GoodputTarget = None,
    server_metrics: options.ServerMetrics = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    raw: Annotated[Path | None, typer.Option(help="Write every request to this JSON lines file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report to this HTML file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send a load and report latencies, rates and errors, overall and by variant."""
    from loadtest import results, tables
    from loadtest.scenario import override, read_scenario
    from loadtest.settings import Settings

    given = {name: value for name, value in context.params.items() if name in _OPTIONS and value is not None}
    settings = Settings.parse(override(read_scenario(scenario) if scenario else {}, _parsed(given)))
    result = results.envelope("run", _measure(settings, raw, quiet), PACKAGES)
    if output is not None:
        results.write(result, output)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        tables.print_run(result, Console())
    if html is not None:
        from loadtest.report import write_report

        write_report([result], html)
    sys.exit(_exit_code(result))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A result of `run --output`.")],
    b: Annotated[Path, typer.Argument(help="Another; may be the same, to compare two of its variants.")],
    more_a: Annotated[list[Path] | None, typer.Option(help="Another run of A; may be repeated.")] = None,
    more_b: Annotated[list[Path] | None, typer.Option(help="Another run of B; may be repeated.")] = None,
    a_variant: Annotated[str | None, typer.Option(help="Take this variant of A.")] = None,
    b_variant: Annotated[str | None, typer.Option(help="Take this variant of B.")] = None,
    fail_if_worse: Annotated[bool, typer.Option("--fail-if-worse", help="Exit 1 where B is worse.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which differences between two results are real."""
    from loadtest import results, tables
    from loadtest.compare import compare as compare_results

    paths = {"a": [a, *(more_a or ())], "b": [b, *(more_b or ())]}
    runs = {side: [results.read(path, "run") for path in paths[side]] for side in paths}
    for side, variant in (("a", a_variant or b_variant), ("b", b_variant or a_variant)):
        for path, found in zip(paths[side], runs[side], strict=True):
            if variant is not None and variant not in found["by_variant"]:
                names = ", ".join(found["by_variant"]) or "none"
                raise SettingsError(f"{path} has no variant {variant}, only {names}")
    comparison = compare_results(runs["a"], runs["b"], a_variant, b_variant)
    files = {side: [str(path) for path in paths[side]] for side in paths}
    if as_json:
        print(json.dumps(results.envelope("compare", files | comparison), indent=1))
    else:
        tables.print_comparison(comparison, Console())
    sys.exit(SLO_MISSED if fail_if_worse and comparison["worse"] else 0)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Results of `run --output`.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("loadtest.html"),
    png: Annotated[Path | None, typer.Option(help="Also write the plots into this folder.")] = None,
) -> None:
    """Write one self-contained HTML page with tables and plots."""
    from loadtest import results
    from loadtest.report import write_report

    found = [results.read(path, "run") for path in paths]
    write_report(found, out, png, [path.stem for path in paths])
    print(out)


app.command()(engine)

_OPTIONS = frozenset(inspect.signature(run).parameters) - frozenset(
    ("context", "scenario", "output", "raw", "html", "quiet", "as_json")
)


def _parsed(given: dict[str, Any]) -> dict[str, Any]:
    """Options whose text stands for something else, under the settings' names."""
    if "slo" in given:
        given["slo"] = dict(_pair(text, "=", "slo", "METRIC=LIMIT") for text in given["slo"])
    if "header" in given:
        given["headers"] = dict(_pair(text, ":", "header", "'Name: value'") for text in given.pop("header"))
    if "extra_body" in given:
        try:
            given["extra_body"] = json.loads(given["extra_body"])
        except ValueError as error:
            raise SettingsError(f"extra_body: not JSON: {error}") from error
    return given


def _pair(text: str, separator: str, name: str, form: str) -> tuple[str, str]:
    key, found, value = text.partition(separator)
    if not found:
        raise SettingsError(f"{name}: write {form}, not {text!r}")
    return key.strip(), value.strip()


def _measure(settings: Any, raw: Path | None, quiet: bool) -> dict[str, Any]:
    """Runs to the end, or until Ctrl-C or SIGTERM asks for what there is so far."""
    from loadtest.progress import Progress, Silence
    from loadtest.run import Run

    async def measure(run: Run) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, run.stop)
        return await run.measure()

    with ExitStack() as stack:
        lines = stack.enter_context(raw.open("w", buffering=1)) if raw is not None else None
        watcher = Silence() if quiet else stack.enter_context(Progress(Console(stderr=True)))
        return asyncio.run(measure(Run(settings, watcher, lines)))


def _exit_code(result: dict[str, Any]) -> int:
    if result["status"] == "interrupted":
        return INTERRUPTED
    if not result["overall"]["requests"]["succeeded"]:
        return NOTHING_SUCCEEDED
    slo = result["slo"]
    return SLO_MISSED if slo is not None and not slo["met"] else 0
