"""Results as one HTML page that needs nothing else: no scripts, no fonts, no network; and its plots as PNG files."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.figure import Figure

from loadtest.plots import draw
from loadtest.results import Json
from loadtest.tables import COLUMNS, METRICS, agreement, milliseconds, percent

TEMPLATE = "report.html.jinja"


def write_report(
    results: Sequence[Json], path: Path, png_folder: Path | None = None, labels: Sequence[str] = ()
) -> None:
    """Writes the page, and every plot into `png_folder` if given. Default labels are the models' names."""
    names = list(labels) or [str(result["settings"]["model"]) for result in results]
    plots = draw(results, names)
    if png_folder is not None:
        png_folder.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            plot.figure.savefig(png_folder / f"{plot.name}.png", dpi=120)
    pictures = [{"title": plot.title, "source": _data_uri(plot.figure)} for plot in plots]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(results, names, pictures))


def _page(results: Sequence[Json], labels: Sequence[str], pictures: Sequence[dict[str, str]]) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=select_autoescape(default=True))
    return environment.get_template(TEMPLATE).render(
        labels=labels,
        runs=list(zip(labels, results, strict=True)),
        plots=pictures,
        metrics=METRICS,
        columns=COLUMNS,
        groups=_groups,
        ms=milliseconds,
        percent=percent,
        offered=_offered,
        agreement=agreement,
    )


def _groups(result: Json) -> Iterator[tuple[str, Json]]:
    yield "overall", result["overall"]
    yield from result["by_variant"].items()


def _offered(stage: Json) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in stage["offered"].items() if name != "loop")


def _data_uri(figure: Figure) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()
