"""`halftone artifacts`: what the store holds, whether it is sound, and room made in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.commands.options import AsJson

if TYPE_CHECKING:
    from serve.compression.artifact import Artifact, Store

__all__ = ["app"]

app = typer.Typer(
    help="What compressed models are kept: in the folder HALFTONE_ARTIFACTS, or the user's cache.",
    no_args_is_help=True,
)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Every artifact with its recipe and size.

    JSON: {"root", "artifacts": [{"fingerprint", "recipe", "bytes", "bits_per_weight", "state"}]}; state is "sound" (by
    its manifest; `verify` reads the files), "damaged: why" or "unfinished".
    """
    store = _store()
    _print(store, [_row(store, name) for name in _names(store)], as_json)


@app.command()
def verify(as_json: AsJson = False) -> None:
    """Check every file's digest. Ends with exit code 1 if any artifact is damaged.

    JSON: as of `list`.
    """
    from serve.errors import SetupError

    store = _store()
    rows = [_row(store, name, thorough=True) for name in _names(store)]
    _print(store, rows, as_json)
    damaged = [row["fingerprint"] for row in rows if row["state"].startswith("damaged")]
    if damaged:
        raise SetupError(
            f"damaged: {', '.join(damaged)}; `halftone artifacts prune` removes them, loading makes them anew"
        )


@app.command()
def prune(
    everything: Annotated[bool, typer.Option("--all", help="Remove sound artifacts too.")] = False,
    keep: Annotated[list[str] | None, typer.Option(help="With --all: a fingerprint to keep (repeatable).")] = None,
    as_json: AsJson = False,
) -> None:
    """Remove what is damaged or was never finished; with --all everything that is not kept and not being made.

    JSON: {"root", "removed": [name], "freed_bytes"}.
    """
    from serve.commands.terminal import print_json, size, standard_output
    from serve.errors import SetupError

    store = _store()
    rows = [_row(store, name, thorough=True) for name in _names(store)]
    sound = frozenset(row["fingerprint"] for row in rows if row["state"] == "sound")
    wanted = frozenset(keep or ())
    if unknown := wanted - sound:
        raise SetupError(f"--keep {', '.join(sorted(unknown))}: no such artifact, or a damaged one")
    before = _bytes(store)
    removed = store.prune(wanted if everything else sound) if store.root.is_dir() else []
    freed = before - _bytes(store)
    if as_json:
        print_json({"root": str(store.root), "removed": removed, "freed_bytes": freed})
    else:
        standard_output().print(f"Removed {len(removed)} of {store.root}: {size(freed)}", markup=False)


def _store() -> Store:
    from serve.compression.artifact import Store, default_root

    return Store(default_root())


def _names(store: Store) -> list[str]:
    return sorted(folder.name for folder in store.root.glob("*/")) if store.root.is_dir() else []


def _row(store: Store, name: str, *, thorough: bool = False) -> dict[str, Any]:
    from serve.errors import ArtifactError

    row: dict[str, Any] = {
        "fingerprint": name,
        "recipe": None,
        "bytes": _folder_bytes(store, name),
        "bits_per_weight": None,
    }
    if name.startswith(".partial-"):
        return {**row, "state": "unfinished"}
    try:
        artifact = store.open(name)
        row |= _facts(artifact)
        if thorough:
            artifact.verify()
    except ArtifactError as error:
        return {**row, "state": f"damaged: {error.message}"}
    return {**row, "state": "sound"}


def _facts(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "recipe": manifest.get("recipe_name"),
        "bits_per_weight": manifest.get("report", {}).get("bits_per_weight"),
    }


def _bytes(store: Store) -> int:
    return sum(_folder_bytes(store, name) for name in _names(store))


def _folder_bytes(store: Store, name: str) -> int:
    return sum(path.stat().st_size for path in (store.root / name).rglob("*") if path.is_file())


def _print(store: Store, rows: list[dict[str, Any]], as_json: bool) -> None:
    from rich.table import Table

    from serve.commands.terminal import print_json, size, standard_output

    if as_json:
        print_json({"root": str(store.root), "artifacts": rows})
        return
    table = Table(
        "fingerprint", "recipe", "bits/weight", "bytes", "state", box=None, header_style="bold", pad_edge=False
    )
    for row in rows:
        bits = "-" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        table.add_row(row["fingerprint"], row["recipe"] or "-", bits, size(row["bytes"]), row["state"])
    console = standard_output()
    console.print(table)
    console.print(f"{len(rows)} in {store.root}: {size(sum(row['bytes'] for row in rows))}", markup=False)
