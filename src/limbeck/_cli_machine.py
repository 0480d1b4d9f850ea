"""Commands about the machine: doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from limbeck._cli_options import Json
from limbeck._cli_run import print_json

FAILED = 3

NoNetwork = Annotated[bool, typer.Option("--no-network", help="Do not ask whether the hub answers.")]


def doctor(json: Json = False, no_network: NoNetwork = False) -> None:
    """What this machine can do, and what to mend.

    Ends with 0 where nothing fails (warnings included), with 3 where something does.
    """
    import sys

    from limbeck.doctor import examine

    found = examine(network=not no_network)
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
