"""The commands ``tocom data fetch``, ``check`` and ``list``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tocom.errors import TocomError

data = typer.Typer(no_args_is_help=True, help="Public data sets: download, verify, unpack, list.")

RootOption = Annotated[
    Optional[Path],
    typer.Option("--root", help="Folder of all data sets; by default what TOCOM_DATA names, or else data/."),
]
CatalogueOption = Annotated[
    Optional[Path],
    typer.Option("--catalogue", help="Another catalogue; by default what TOCOM_CATALOGUE names, or the bundled one."),
]


@data.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Names from `tocom data list`, or patterns such as 'vtab.*'.")],
    root: RootOption = None,
    mirror: Annotated[
        Optional[str],
        typer.Option(help="Base URL tried first, as URL/NAME/FILE; by default what TOCOM_MIRROR says."),
    ] = None,
    source: Annotated[
        Optional[Path],
        typer.Option("--from", help="Your copy: its archives, or the unpacked folder, which is used where it lies."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again, and replace what is there.")] = False,
    keep_archives: Annotated[
        bool, typer.Option("--keep-archives", help="Keep archives in ROOT/.archives/NAME.")
    ] = False,
    catalogue: CatalogueOption = None,
) -> None:
    """Download data sets, verify and unpack them. Files that an earlier run verified are kept."""
    from tocom.data.catalogue import owner_of, read_catalogue, select, size_text
    from tocom.data.fetch import fetch as run
    from tocom.data.store import default_root, read_record

    entries = read_catalogue(catalogue)
    root = root or default_root()
    selected = list(dict.fromkeys(owner_of(name, entries) for name in select(names, entries)))
    if source is not None and len(selected) > 1:
        raise TocomError(f"--from is for one data set, and {len(selected)} are named; fetch them one by one")
    for name in selected:
        folder = run(name, root, entries, mirror=mirror, source=source, force=force, keep_archives=keep_archives)
        record = read_record(root / name)
        typer.echo(f"{name}: {record.count:,} files, {size_text(record.bytes)}, in {folder}", err=True)


@data.command()
def check(
    names: Annotated[
        Optional[list[str]], typer.Argument(help="Names or patterns; by default, all that are there.")
    ] = None,
    root: RootOption = None,
    catalogue: CatalogueOption = None,
) -> None:
    """Hash fetched data sets again; exit status 1 at the first file that is missing, changed or too many."""
    from tocom.data.catalogue import owner_of, read_catalogue, select, size_text
    from tocom.data.fetch import check as run
    from tocom.data.store import default_root, read_record

    entries = read_catalogue(catalogue)
    root = root or default_root()
    wanted = select(names, entries) if names else [name for name in entries if read_record(root / name)]
    if not wanted:
        raise TocomError(f"no data set is in {root}; fetch one with `tocom data fetch NAME --root {root}`")
    for name in dict.fromkeys(owner_of(name, entries) for name in wanted):
        record = run(name, root, entries)
        typer.echo(f"{name}: {record.count:,} files, {size_text(record.bytes)}, as they were fetched", err=True)


@data.command("list")
def list_(
    root: RootOption = None,
    catalogue: CatalogueOption = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/datasets.md.")] = False,
) -> None:
    """List all data sets: group, classes, size, licence, and whether they are there."""
    from rich.console import Console
    from rich.table import Table

    from tocom.data.catalogue import download_text, read_catalogue
    from tocom.data.catalogue import markdown as table_of
    from tocom.data.store import default_root, status

    entries = read_catalogue(catalogue)
    if markdown:
        typer.echo(table_of(entries), nl=False)
        return
    root = root or default_root()
    table = Table(caption=f"there: whether it is in {root}")
    for heading in ("name", "group", "classes", "download", "there", "licence"):
        table.add_column(heading, no_wrap=heading != "licence")
    for name, entry in entries.items():
        there = status(name, root, entries)
        table.add_row(name, entry.group, str(entry.classes), download_text(entry), there, entry.licence)
    # Names that are cut are of no use: in a narrow terminal, let it break the lines.
    Console(width=max(Console().width, 130)).print(table)


@data.command("unpack-imagenet")
def unpack_imagenet(
    parquet: Annotated[Path, typer.Argument(help="Folder of the Hub's parquet files of ImageNet-1k.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; `fetch imagenet1k --from` registers it.")],
) -> None:
    """Unpack the Hub's ImageNet-1k into a folder of images. Goes on where an earlier run was interrupted."""
    from tocom.data.families.imagenet import unpack_parquet

    typer.echo(f"imagenet1k: {unpack_parquet(parquet, output)}", err=True)
