"""``hspsam weights``: what there is, where it is, fetch it, verify it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hspsam_monai.cli.console import out, progress, say, tell
from hspsam_monai.errors import WeightsError

app = typer.Typer(no_args_is_help=True, help="Pretrained weights: list, fetch, verify.")


@app.command("list")
def list_weights() -> None:
    """List the known weight files, their licences and where they were found."""
    from hspsam_monai.encoders.catalogue import CATALOGUE, FOLDER_VARIABLE, search_folders

    table = Table("name")
    for column in ("file", "licence", "found"):
        table.add_column(column, overflow="fold")
    for name, entry in CATALOGUE.items():
        table.add_row(name, entry.file_name, entry.licence, str(_found(name) or "–"))
    out.print(table)
    say(f"Looked for in: {', '.join(map(str, search_folders()))} (set {FOLDER_VARIABLE} to add a folder).")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A name of `hspsam weights list`.")],
    folder: Annotated[Path | None, typer.Option(help="Where to put it; else the first folder searched.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Hash to demand, for files whose hash is not known.")] = None,
) -> None:
    """Download an official file; it is kept only if its hash is right."""
    from hspsam_monai.encoders.catalogue import CATALOGUE
    from hspsam_monai.encoders.catalogue import fetch as download

    if name in CATALOGUE:
        tell(f"{CATALOGUE[name].url} ({CATALOGUE[name].licence})")
    with progress(f"Fetching {name}") as bar:
        path = download(name, folder, bar, sha256)
    say(f"{path}: verified.", "green")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="Name or file; without, all that are found.")] = None,
) -> None:
    """Compare files with their official hashes; exit code 1 if one differs."""
    from hspsam_monai.encoders.catalogue import CATALOGUE
    from hspsam_monai.encoders.catalogue import verify as check

    names = [name] if name else [known for known in CATALOGUE if _found(known)]
    if not names:
        raise WeightsError("No known weights were found; `hspsam weights list` says where they are looked for.")
    failed = 0
    for one in names:
        try:
            found = check(one)
        except WeightsError as error:
            tell(str(error), "bold red")
            failed += 1
            continue
        say(
            f"{found.path}: {'verified' if found.verified else 'no official hash is known'}, sha256 {found.sha256}",
            "green" if found.verified else "yellow",
        )
    if failed:
        raise typer.Exit(1)


def _found(name: str) -> Path | None:
    from hspsam_monai.encoders.catalogue import locate

    try:
        return locate(name)
    except WeightsError:
        return None
