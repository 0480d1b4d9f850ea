"""What every command shares: mistakes as sentences, exit codes, and one JSON document on standard output where that is asked for."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

from limbeck.errors import Interrupted, LimbeckError, Problem, UsageError, nearest

# Newer versions of typer carry click inside; the base of its exceptions is reached through one that typer exports in all versions.
_ClickError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

USAGE, BUG, INTERRUPTED = 2, 1, 130

_RESUMABLE = ("distill", "train", "label", "sweep")
"""What a signal stops is done by the same command, run again; and what several processes that a launcher started do together."""


def call(command: Any, arguments: Sequence[str], program: str) -> int:
    """Runs a click command; returns the exit code of the process. Bugs pass through with their traceback, unless --json asks for JSON."""
    as_json = "--json" in arguments
    arguments = list(arguments) or ["--help"]
    resumable = arguments[0] in _RESUMABLE
    if arguments[0] in command.commands and arguments[0] not in _RESUMABLE and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ.get("RANK", "0") != "0":
            return USAGE
        text = f"`{program} {arguments[0]}` is done by one process, and {os.environ['WORLD_SIZE']} were started."
        return _fail(
            UsageError(Problem("torchrun", text, f"Start it without a launcher; it is for {', '.join(_RESUMABLE)}.")), as_json, program
        )
    if arguments[0] in command.commands:
        # Straight to it: the way through the group makes some versions of typer import pydantic, for --help too.
        command, program, arguments = command.commands[arguments[0]], f"{program} {arguments[0]}", arguments[1:]
    try:
        with _leaving(as_json) if resumable else contextlib.nullcontext():
            result = command.main(args=arguments, prog_name=program, standalone_mode=False, help_option_names=["-h", "--help"])
        if result == INTERRUPTED:  # how newer versions of typer tell of Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except _ClickError as error:
        return _fail(UsageError(_click_problem(error)), as_json, _spelt(error, program))
    except LimbeckError as error:
        return _fail(error, as_json, program)
    except (KeyboardInterrupt, typer.Abort):
        print("Stopped.", file=sys.stderr)
        return _document(as_json, "Interrupted", INTERRUPTED, "Stopped from the keyboard.", [])
    except BrokenPipeError:  # the reader of a listing has seen enough (`limbeck losses | head -1`)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not as_json:
            raise
        traceback.print_exc()
        return _document(True, type(error).__name__, BUG, str(error), [])


@contextlib.contextmanager
def _leaving(as_json: bool) -> Iterator[None]:
    """SIGTERM and SIGINT end the process with 75, before a run has begun to write and after it has written everything.

    An exception would not do: raised while a library is being imported, it may come out as another one, or not at all.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    error = Interrupted("Stopped by a signal while nothing was being written; what was finished before is kept.")
    document = json.dumps({"error": {"kind": "Interrupted", "exit_code": 75, "message": str(error), "problems": []}}, indent=2) + "\n"
    out = os.dup(1) if as_json and os.environ.get("RANK", "0") == "0" else None  # descriptor 1 is led elsewhere meanwhile

    def leave(number: int, frame: object) -> None:
        # it may be half imported
        getattr(sys.modules.get("limbeck.ranks"), "leaving", lambda code: None)(error.exit_code)
        os.write(2, f"{error}\n".encode())
        if out is not None:
            os.write(out, document.encode())
        os._exit(error.exit_code)

    old: dict[signal.Signals, Any] = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Interrupted:
        old = dict.fromkeys(old, signal.SIG_IGN)  # the process is leaving: another signal would only change its exit code
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if out is not None:
            os.close(out)


def emit(result: Callable[[], dict[str, Any]], as_json: bool) -> dict[str, Any]:
    """Calls ``result``; with ``as_json`` whatever is printed meanwhile goes to standard error, and the result alone to standard output."""
    with _launched():
        if not as_json:
            return result()
        with _aside():
            value = result()
    if os.environ.get("RANK", "0") == "0":
        print_json(value)
    return value


def _launched() -> contextlib.AbstractContextManager[Any]:
    """The other processes of this run, where a launcher has started several: joined before anything can go wrong."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return contextlib.nullcontext()
    # before torch is loaded: DDP looks for parameters that a step did not use, and warns on every rank where it finds none
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from limbeck.ranks import joined

    return joined()


def print_json(value: Any) -> None:
    """One JSON document on standard output; NaN and infinities, which JSON does not have, are null."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Standard output goes to standard error, for libraries that write to the file descriptor too."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as undo:
        out = sys.__stdout__
        try:
            descriptor = None if out is None else out.fileno()
        except (OSError, ValueError):
            descriptor = None
        if descriptor == 1 and out is not None:
            out.flush()
            saved = os.dup(1)
            undo.callback(os.close, saved)
            undo.callback(os.dup2, saved, 1)
            os.dup2(2, 1)
        yield


def _fail(error: LimbeckError, as_json: bool, program: str) -> int:
    if not str(error):  # another rank says it
        return error.exit_code
    problems: Sequence[Problem] = error.problems if isinstance(error, UsageError) else ()
    text = str(error)
    if len(problems) > 1 and type(error) is UsageError:
        text = "\n".join([f"{program}: {len(problems)} problems", *(f"  {p}" for p in problems)])
    elif type(error) is UsageError:
        text = f"{program}: {text}"
    print(text, file=sys.stderr)
    return _document(as_json, type(error).__name__, error.exit_code, str(error), problems)


def _document(as_json: bool, kind: str, code: int, message: str, problems: Sequence[Problem]) -> int:
    if as_json and os.environ.get("RANK", "0") == "0":
        listed = [{"where": p.where, "message": p.message, "hint": p.hint} for p in problems]
        print_json({"error": {"kind": kind, "exit_code": code, "message": message, "problems": listed}})
    return code


def _spelt(error: Any, program: str) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else program


def _click_problem(error: Any) -> Problem:
    """What click found, with the nearest option or command."""
    context = getattr(error, "ctx", None)
    command = context.command if context is not None else None
    help_hint = f"See `{context.command_path} --help`." if context is not None else ""
    option = getattr(error, "option_name", None)
    if option and type(error).__name__ == "NoSuchOption" and command is not None:
        known = [o for p in command.params for o in [*p.opts, *p.secondary_opts] if o.startswith("--")]
        if option in ("--teacher", "--temp", "--alpha", "--fit-teacher") and command.name == "train":
            return Problem(option, "`limbeck train` trains the student alone and has no teacher.", "Use `limbeck distill`.")
        return Problem(option, "no such option.", nearest(option, known) or help_hint)
    message = str(error.format_message())
    if message.startswith("No such command") and command is not None:
        given = message.split("'")[1]
        return Problem("", f"no such command '{given}'.", nearest(given, command.commands) or f"There are {', '.join(command.commands)}.")
    message = message if message.endswith((".", "?", "!")) else f"{message}."
    return Problem("", message, "" if "Did you mean" in message else help_hint)
