"""Commands that look on: doctor, watch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck._cli_judge import no_such, refuse
from limbeck._cli_options import Json, Run
from limbeck._cli_run import print_json

FAILED = 3


def doctor(json: Json = False) -> None:
    """What this machine can do, and what to mend.

    Ends with 0 where nothing fails (warnings included), with 3 where something does.
    """
    from limbeck.doctor import examine

    found = examine()
    if json:
        print_json(found)
    else:
        width = max(len(f["name"]) for f in found["findings"])
        for f in found["findings"]:
            print(f"{f['level']:5} {f['name']:{width}}  {f['found']}")
            if f["mend"]:
                print(f"{'':5} {'':{width}}  -> {f['mend']}")
        counts = found["counts"]
        print(f"\n{counts['ok']} ok, {counts['warn']} to think about, {counts['fail']} to mend.")
    if found["level"] == "fail":
        sys.exit(FAILED)


def watch(
    run: Run,
    once: Annotated[bool, typer.Option("--once", help="Say how far it is, and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The same as one JSON document.")] = False,
) -> None:
    """Follow a run from another terminal.

    Its folder is only read, so a shared volume will do. Runs of several seeds and sweeps are followed too. Ends with the run.
    """
    folder = Path(run)
    refuse([] if folder.is_dir() else [no_such(folder, "folder")])
    from limbeck.watch import look
    from limbeck.watch import watch as follow

    if json:
        print_json(vars(look(folder)))
    elif once:
        seen = look(folder)
        print(seen.result or seen.line())
    else:
        _followed(folder, follow)


def _followed(folder: Path, follow: Any) -> None:
    """On a terminal one line that changes; else a line a step."""
    if not sys.stdout.isatty():
        follow(folder, lambda line: print(line, flush=True))
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        last = follow(folder, lambda line: live.update(Text(line)))
    console.print(Text(last.result or last.line()))
