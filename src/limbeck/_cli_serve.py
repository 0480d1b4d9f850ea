"""Commands that put an exported student to work: serve and predict."""

from __future__ import annotations

import csv
import json as jsonlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck._cli_judge import refuse, served_folder, whole
from limbeck._cli_options import Run
from limbeck.errors import Problem, nearest

if TYPE_CHECKING:
    from limbeck.serve._process import Named

SOME_FAILED = 3

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _limit(option: str, metavar: str, text: str) -> Any:
    return typer.Option(option, metavar=metavar, help=text)


def serve(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", show_default=False, help="Folders of runs or artifacts; NAME=RUN names one, NAME@2=RUN gives a version too."
        ),
    ],
    host: Annotated[str, _limit("--host", "ADDRESS", "Where to listen; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[str, _limit("--port", "N", "0 takes a free one.")] = "8000",
    workers: Annotated[str, _limit("--workers", "N", "Processes, each with its own copy of the models.")] = "1",
    threads: Annotated[str, _limit("--threads", "N", "Of ONNX Runtime for a model; 0: as many as it takes.")] = "0",
    max_batch: Annotated[str, _limit("--max-batch", "ROWS", "Rows that run at once, and the most of a request.")] = "32",
    batch_window: Annotated[str, _limit("--batch-window", "MS", "How long a batch waits for more, under load only.")] = "1",
    queue: Annotated[str, _limit("--queue", "ROWS", "Rows that may wait for a model; beyond: 503.")] = "256",
    timeout: Annotated[str, _limit("--timeout", "S", "How long a request may wait; beyond: 503.")] = "30",
    max_body: Annotated[str, _limit("--max-body", "BYTES", "Of a request; beyond: 413.")] = "16777216",
    max_header: Annotated[str, _limit("--max-header", "BYTES", "Of a request; beyond: 431.")] = "32768",
    max_pixels: Annotated[str, _limit("--max-pixels", "N", "Of an image; beyond: 413.")] = "25000000",
    max_text: Annotated[str, _limit("--max-text", "N", "Characters of a text; beyond: 400.")] = "20000",
    max_connections: Annotated[str, _limit("--max-connections", "N", "Open at once; beyond: 503.")] = "1000",
    read_timeout: Annotated[str, _limit("--read-timeout", "S", "For a body, and a third of it for a header; beyond: 408.")] = "30",
    drain: Annotated[str, _limit("--drain", "S", "After SIGTERM, for answers that are being made.")] = "60",
    no_access_log: Annotated[bool, typer.Option("--no-access-log", help="No line of JSON on standard output for each request.")] = False,
) -> None:
    """Put exported students behind HTTP.

    The Open Inference Protocol v2, /predict for texts and image files, and a page at / to try them. A key in
    LIMBECK_API_KEY is required of every client. SIGTERM ends it once all accepted requests are answered.
    """
    problems: list[Problem] = []

    def number(option: str, text: str, least: int, most: int) -> int:
        wrong, value = whole(option, text, least, most)
        problems.extend(wrong)
        return value or 0

    def seconds(option: str, text: str, most: float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= most:
            problems.append(Problem(option, f"got '{text}', expected a number from 0 to {most:g}."))
        return value

    read = seconds("--read-timeout", read_timeout, 3600)
    if read == 0:
        problems.append(Problem("--read-timeout", "got 0, expected more: no request comes in no time."))
    limits: dict[str, Any] = {
        "host": host,
        "port": number("--port", port, 0, 65535),
        "workers": number("--workers", workers, 1, 256),
        "threads": number("--threads", threads, 0, 1024),
        "max_batch": number("--max-batch", max_batch, 1, 4096),
        "window_ms": seconds("--batch-window", batch_window, 1000),
        "queue": number("--queue", queue, 1, 1_000_000),
        "timeout": seconds("--timeout", timeout, 3600),
        "max_body": number("--max-body", max_body, 1024, 1 << 30),
        "max_header": number("--max-header", max_header, 1024, 1 << 20),
        "max_pixels": number("--max-pixels", max_pixels, 1, 89_478_485),
        "max_text": number("--max-text", max_text, 1, 10_000_000),
        "max_connections": number("--max-connections", max_connections, 1, 100_000),
        "header_timeout": read / 3,
        "body_timeout": read,
        "drain": seconds("--drain", drain, 3600),
        "access_log": not no_access_log,
    }
    if not problems and limits["queue"] < limits["max_batch"]:
        problems.append(Problem("--queue", f"got {queue}, less than --max-batch {max_batch}: a full batch could never wait."))
    named = _named(runs, problems)
    refuse(problems)
    from limbeck.serve import Settings
    from limbeck.serve._process import serve as run

    run([_folder(*one) for one in named], Settings(**limits))


def _named(runs: list[str], problems: list[Problem]) -> list[tuple[str, str, str]]:
    """(name, version, folder) of each; what is wrong goes to ``problems``."""
    found: list[tuple[str, str, str]] = []
    for given in runs:
        label, sign, folder = given.rpartition("=")
        if not sign or os.path.isdir(given):  # a folder may have the sign in its name
            label, folder = "", given
        name, _, version = label.partition("@")
        name, version = name or Path(folder).resolve().name, version or "1"
        if not _NAME.fullmatch(name):
            problems.append(
                Problem(given, f"'{name}' cannot stand in an address: letters, digits, '.', '_' and '-' can.", "Name it: NAME=RUN")
            )
        elif not (version.isascii() and version.isdigit() and len(version) < 10):
            problems.append(Problem(given, f"the version '{version}' is not a whole number."))
        elif any(one[:2] == (name, version) for one in found):
            problems.append(Problem(given, f"another model is '{name}', version {version}.", "Name them: NAME=RUN, or NAME@2=RUN"))
        if not os.path.isdir(folder):
            beside = [p.name for p in Path(folder).parent.iterdir()][:2000] if os.path.isdir(Path(folder).parent) else []
            problems.append(Problem(given, f"no such folder: '{folder}'.", nearest(Path(folder).name, beside)))
        found.append((name, version, folder))
    return found


def _folder(name: str, version: str, folder: str) -> Named:
    from limbeck.serve._process import Named

    return Named(name, version, Path(folder))


def predict(
    run: Run,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...", show_default=False, help="Image files or folders; CSV (column text) or text files; - for standard input."
        ),
    ],
    form: Annotated[str, typer.Option("--format", metavar="NAME", help="jsonl, or csv (the best class alone).")] = "jsonl",
    top: Annotated[str, typer.Option("--top", metavar="K", help="Classes with their probability; 0: all.")] = "5",
    batch_size: Annotated[str, typer.Option("--batch-size", metavar="N", help="Samples that run at once.")] = "32",
) -> None:
    """Answer files or standard input with a student.

    A line for each on standard output. Inputs that cannot be read get a line with their error, and the exit code is 3.
    """
    problems, count = whole("--top", top, 0, 1_000_000)
    wrong, size = whole("--batch-size", batch_size, 1, 4096)
    problems += wrong
    if form not in ("jsonl", "csv"):
        problems.append(Problem("--format", f"got '{form}', expected jsonl or csv.", nearest(form, ("jsonl", "csv"))))
    if form == "csv" and top != "5":
        problems.append(Problem("--top", "has no effect with --format csv, which has the best class alone."))
    folder = served_folder(run, problems)
    from limbeck.serve import answers, open_model

    found = answers(open_model(folder), inputs, stdin=sys.stdin, batch_size=size or 32, top=count if count is not None else 5)
    table = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        table.writerow(("input", "row", "label", "probability", "error"))
    failed = 0
    for line in found:
        failed += "error" in line
        if form == "csv":
            table.writerow([line.get(key, "") for key in ("input", "row", "label", "probability", "error")])
        else:
            print(jsonlib.dumps(line, ensure_ascii=False), flush=False)
    sys.stdout.flush()
    if failed:
        print(f"{failed} of the inputs could not be answered.", file=sys.stderr)
        sys.exit(SOME_FAILED)


__all__ = ["predict", "serve"]
