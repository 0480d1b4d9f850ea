"""limbeck cache: what teachers have said already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck._cli_options import CacheFolder, Json
from limbeck._cli_run import emit
from limbeck._cli_show import table
from limbeck.errors import Problem, UsageError

cache_app = typer.Typer(help="What teachers have said already: list it, check it, remove it.", add_completion=False, rich_markup_mode=None)


@cache_app.command("ls")
def cache_ls(folder: CacheFolder = None, json: Json = False) -> None:
    """The caches, and what each holds."""

    def work() -> dict[str, Any]:
        from limbeck.cache import default_root, listing

        root = default_root() if folder is None else Path(folder)
        return {"root": str(root), "caches": listing(root)}

    result = emit(work, json)
    if json:
        return
    print(result["root"])
    rows = []
    for row in result["caches"]:
        if "damaged" in row:
            rows.append((row["name"], "damaged", "", "", "", "", ""))
            continue
        what = f"{', '.join(row['stores'])} in {row['codec']}, asked in {row['precision']}"
        state = "being filled" if row["unfinished"] else ""
        rows.append((row["name"], row["teacher"], row["for"], what, f"{row['rows']:,} ({row['views']} views)", f"{row['bytes']:,}", state))
    table(("name", "teacher", "for", "holds", "rows", "bytes", ""), rows)


@cache_app.command("verify")
def cache_verify(
    folder: CacheFolder = None,
    repair: Annotated[bool, typer.Option("--repair", help="Take out what is damaged; it is asked for again when it is wanted.")] = False,
    json: Json = False,
) -> None:
    """Compare every byte with its checksum."""

    def work() -> dict[str, Any]:
        from limbeck.cache import default_root, verify

        found = verify(default_root() if folder is None else Path(folder), repair=repair)
        problems = [Problem("", text) for one in found for text in one.problems]
        if problems and not repair:
            raise UsageError(problems)
        return {"caches": [{"folder": str(v.folder), "rows": v.rows, "problems": v.problems, "mended": v.mended} for v in found]}

    result = emit(work, json)
    if not json:
        for row in result["caches"]:
            for text in (*row["problems"], *row["mended"]):
                print(text)
            print(f"{row['folder']}: {row['rows']:,} rows are as they were written.")


@cache_app.command("rm")
def cache_rm(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", show_default=False, help="Names as `limbeck cache ls` has them, or beginnings.")
    ],
    path: Annotated[str | None, typer.Option("--path", metavar="FOLDER", help="The teacher_cache.path; by default the user's own.")] = None,
) -> None:
    """Remove caches by name."""
    from limbeck.cache import default_root, remove

    for folder in remove(default_root() if path is None else Path(path), names):
        print(f"{folder} was removed.")
