"""A process that has imported everything and run nothing: it forks a child for every run, which saves the seconds of the imports.

Orders come as JSON lines on standard input, answers go out on standard output: ``{"arguments", "said", "environment", "patches"}`` forks
``limbeck ARGUMENTS`` and answers its process id; ``{"wait": PID}`` answers its exit code once it has one. A child of a process that has run
OpenMP work may hang, so the server itself computes nothing and has one thread.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_PRELOADED = (
    "torch",
    "torch.export",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "tensorboard.compat.proto.summary_pb2",
    "torchvision",
    "torchmetrics.functional.classification",
    "onnx",
    "onnxscript",
    "torch.onnx._internal.torchscript_exporter.utils",
    "sklearn.datasets",
    "sklearn.metrics",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "jinja2",
    "PIL.Image",
    "safetensors.torch",
    "pyarrow.ipc",
    "rich.progress",
    "rich.console",
    "limbeck.cli",
    "limbeck.spine",
    "limbeck.api",
    "limbeck.label",
    "limbeck.data.loader",
    "limbeck.export.onnx",
    "limbeck.report",
    "faults.inside",
)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is no answer
    absent = [name for name in _PRELOADED if not _imported(name)]
    from limbeck.data import loader

    forkserver.set_forkserver_preload(["limbeck.data.loader"])
    loader._start_fork_server()
    gc.collect()
    gc.freeze()
    answers.write(json.dumps({"threads": _threads(), "absent": absent}) + "\n")
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if "wait" in order:
            _, status, used = os.wait4(order["wait"], 0)
            answers.write(json.dumps({"code": os.waitstatus_to_exitcode(status), "cpu": used.ru_utime + used.ru_stime}) + "\n")
            continue
        pid = os.fork()
        if pid == 0:
            answers.close()
            _child(order)
        answers.write(json.dumps({"pid": pid}) + "\n")


def _threads() -> int:
    """Threads but that of pyarrow's allocator, which knows about forks. (onnxruntime would start one, so it is not imported here.)"""
    names = [Path(f"/proc/self/task/{number}/comm").read_text().strip() for number in os.listdir("/proc/self/task")]
    return len([name for name in names if name != "jemalloc_bg_thd"])


def _imported(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _child(order: dict[str, Any]) -> None:
    """Never returns. Leaves as a program of its own would, but for taking every imported module down, which is much of a short run's time."""
    os.environ.update(order["environment"])
    file = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for given, number in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(given, number)
    # loader workers are forked from the server's own fork server, which is up and has their imports
    forkserver._forkserver.ensure_running = forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from limbeck.cli import main as limbeck

    for module, function, arguments in order["patches"]:
        getattr(importlib.import_module(module), function)(*arguments)
    try:
        limbeck(order["arguments"])
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
