"""What the server costs over bare ONNX Runtime, and what its batches are worth under load.

    python benchmarks/serving.py RUN [--seconds 3] [--pairs 7] [--connections 32]

Two servers take turns (A B B A ...): `limbeck serve RUN`, and the same model in plain FastAPI that runs each request by itself. Both get the
same tensors as bytes over loopback from one client process (JSON of an image takes longer to read than a small model to run), and answer in
JSON. Batch 1 is one connection: the median of the server's answer less that of ONNX Runtime called in this process. Ratios are medians over
pairs with a bootstrap 95 % interval. The client shares the machine, so absolute rates are lower bounds. Writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PLAIN = """
import json, sys
import numpy as np, onnxruntime, uvicorn
from fastapi import FastAPI, Request
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
app = FastAPI()
@app.get("/v2/health/ready")
async def ready(): return {"ready": True}
@app.post("/v2/models/m/infer")
async def infer(request: Request):
    body, size = await request.body(), int(request.headers["inference-header-content-length"])
    kinds, at, given = {"FP32": np.float32, "INT64": np.int64}, size, {}
    for one in json.loads(body[:size])["inputs"]:
        kind, count = np.dtype(kinds[one["datatype"]]), int(np.prod(one["shape"]))
        given[one["name"]] = np.frombuffer(body, kind, count, at).reshape(one["shape"])
        at += count * kind.itemsize
    logits = session.run(["logits"], given)[0]
    return {"outputs": [{"name": "logits", "shape": list(logits.shape), "data": logits.ravel().tolist()}]}
uvicorn.run(app, port=int(sys.argv[2]), http="httptools", log_level="critical", access_log=False)
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def question(run: Path) -> tuple[bytes, dict[str, Any]]:
    """One row of noise (or of token 1) as a request of the protocol, whole, and as arrays."""
    from limbeck.serve import open_model

    model = open_model(run, 1)
    inputs, arrays = [], {}
    for port in model.inputs:
        shape = [1, *(n if n > 0 else min(32, model.max_length or 32) for n in port.shape[1:])]
        array = np.random.default_rng(0).normal(size=shape).astype(np.float32) if port.datatype == "FP32" else np.ones(shape, np.int64)
        arrays[port.name] = array
        inputs.append({"name": port.name, "shape": shape, "datatype": port.datatype, "parameters": {"binary_data_size": array.nbytes}})
    told = json.dumps({"inputs": inputs}).encode()
    body = told + b"".join(array.tobytes() for array in arrays.values())
    head = f"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ninference-header-content-length: {len(told)}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body, {"model": model, "arrays": arrays}


async def load(port: int, request: bytes, connections: int, seconds: float) -> list[float]:
    """Milliseconds of every answer, from so many connections that ask one after the other."""
    times: list[float] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            writer.write(request)
            got = await reader.readuntil(b"\r\n\r\n")
            assert got.startswith(b"HTTP/1.1 200"), got
            length = next(line for line in got.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
            times.append((time.perf_counter() - start) * 1000)
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return times


def wait_for(port: int) -> None:
    import urllib.request

    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready") as answer:
                if answer.status == 200:
                    return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def interval(values: list[float]) -> dict[str, float]:
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serving.json")
    given = parser.parse_args()
    body, local = question(given.run)
    ports = {"limbeck": free_port(), "plain": free_port()}
    ours = ["-m", "limbeck", "serve", f"m={given.run}", "--port", str(ports["limbeck"]), "--threads", "1", "--no-access-log"]
    plain = ["-c", PLAIN, str(given.run / "export" / "model.onnx"), str(ports["plain"])]
    servers = [subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL) for arguments in (ours, plain)]
    try:
        for port in ports.values():
            wait_for(port)
            asyncio.run(load(port, body, 4, 1.0))  # warm-up, left out
        bare: list[float] = []
        alone: dict[str, list[float]] = {"limbeck": [], "plain": []}
        rates: dict[str, list[float]] = {"limbeck": [], "plain": []}
        tails: dict[str, list[float]] = {"limbeck": [], "plain": []}
        overheads: list[float] = []
        for pair in range(given.pairs):
            until, took = time.perf_counter() + given.seconds / 3, []
            while time.perf_counter() < until:
                start = time.perf_counter()
                local["model"].run(local["arrays"])
                took.append((time.perf_counter() - start) * 1000)
            bare.append(float(np.median(took)))
            for name in ("limbeck", "plain") if pair % 2 == 0 else ("plain", "limbeck"):
                alone[name].append(float(np.median(asyncio.run(load(ports[name], body, 1, given.seconds / 3)))))
                times = asyncio.run(load(ports[name], body, given.connections, given.seconds))
                rates[name].append(len(times) / given.seconds)
                tails[name].append(float(np.quantile(times, 0.99) / np.median(times)))
            overheads.append(alone["limbeck"][-1] - bare[-1])
        ratios = [a / b for a, b in zip(rates["limbeck"], rates["plain"], strict=True)]
        result = {
            "model_bytes": local["model"].bytes,
            "connections": given.connections,
            "pairs": given.pairs,
            "seconds": given.seconds,
            "bare_ms": interval(bare),
            "alone_ms": {name: interval(values) for name, values in alone.items()},
            "overhead_ms": interval(overheads),
            "requests_per_second": {name: interval(values) for name, values in rates.items()},
            "ratio_to_plain": interval(ratios),
            "p99_over_p50": {name: interval(values) for name, values in tails.items()},
            "machine": {"cpus": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "platform": platform.platform()},
        }
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(60)
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
