"""What a file takes in a process of its own: started, loaded, asked once, gone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["peak_rss_bytes"]

_PEAK = """
with open("/proc/self/status") as f:
    print(next(1024 * int(line.split()[1]) for line in f if line.startswith("VmHWM:")))
"""

_PROGRAMS = {
    "onnx": """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 4
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
case = numpy.load(sys.argv[2])
session.run(None, {v.name: case[str(i)] for i, v in enumerate(session.get_inputs())})
""",
    "torchscript": """
import sys, numpy, torch
torch.set_num_threads(1)
module = torch.jit.load(sys.argv[1], map_location="cpu")
case = numpy.load(sys.argv[2])
with torch.no_grad():
    module(*(torch.from_numpy(case[str(i)]) for i in range(len(case))))
""",
    "pt2": """
import sys, numpy, torch
torch.set_num_threads(1)
module = torch.export.load(sys.argv[1]).module()
case = numpy.load(sys.argv[2])
with torch.no_grad():
    module(*(torch.from_numpy(case[str(i)]) for i in range(len(case))))
""",
}
"""By format; none imports Limbeck, and that for ONNX no torch."""


def peak_rss_bytes(form: str, path: Path, case: tuple[Tensor, ...]) -> int | None:
    """The largest resident size of a process that does nothing but load ``path`` and answer ``case`` once, its libraries included.

    form: ``onnx``, ``torchscript`` or ``pt2``. None where the system does not tell (other than Linux), or the process fails.
    """
    if not os.path.exists("/proc/self/status"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "case.npz"
        arrays: dict[str, Any] = {str(i): value.numpy() for i, value in enumerate(case)}
        np.savez(inputs, **arrays)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _PROGRAMS[form] + _PEAK, str(path), str(inputs)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
            return int(done.stdout) if done.returncode == 0 else None
        except (OSError, subprocess.SubprocessError, ValueError):
            return None
