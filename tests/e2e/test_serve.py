"""A server in a process of its own: its end, its limits on connections, and clients that others wrote."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.export import export_model, onnx
from limbeck.models import Model
from limbeck.run import write_json
from limbeck.types import ImagePreprocessing
from running import Started, start

onnxruntime = pytest.importorskip("onnxruntime")
for package in ("fastapi", "uvicorn", "httptools"):
    pytest.importorskip(package)

CHROMIUM = os.environ.get("LIMBECK_CHROMIUM") or shutil.which("chromium")
HOW = ImagePreprocessing(1, (0.5,), (0.25,), height=8, width=8)
X = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("serve") / "pics"
    folder.mkdir()
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), {}, "module", HOW, None, 3)
    traced = dict(onnx.writers())["trace"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "writers", lambda: (("trace", traced),))
        records = export_model(
            model,
            ["onnx"],
            folder / "export",
            inputs={"image": torch.randn(17, 1, 8, 8)},
            classes=("a", "b", "c"),
            task="image-classification",
        )
    write_json(folder / "metrics.json", {"task": "image-classification", "export": records})
    return folder


@contextmanager
def server(run: Path, *options: str, **environment: str) -> Iterator[tuple[Started, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start("serve", run, "--port", port, "--threads", 1, "--no-access-log", *options, **environment)
    end = time.monotonic() + 300
    try:
        while True:
            assert process.poll() is None, process.communicate(timeout=60)
            assert time.monotonic() < end, "it did not start"
            try:
                if ask(port, "GET", "/v2/health/ready")[0] == 200:
                    break
            except OSError:
                time.sleep(0.05)
        yield process, port
    finally:
        if process.poll() is None:
            process.kill()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def infer() -> bytes:
    one = {"name": "image", "shape": list(X.shape), "datatype": "FP32", "data": X.ravel().tolist()}
    return json.dumps({"inputs": [one]}).encode()


class Asker(threading.Thread):
    """Asks on connections that it keeps open, until the server is gone. lost: questions that were sent whole and not answered whole. reset: of new
    connections, without a byte of an answer: the kernel takes them until the moment in which the last process closes the socket, and nobody can
    accept what comes between looking for the last one and closing."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.good, self.lost, self.reset = port, 0, 0, 0

    def run(self) -> None:
        while True:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
            try:
                connection.connect()
            except OSError:
                return
            before = self.good
            try:
                while connection.sock is not None:  # closed once an answer says so
                    connection.request("POST", "/v2/models/pics/infer", infer())
                    answer = connection.getresponse()
                    assert answer.status == 200
                    answer.read()
                    self.good += 1
            except (ConnectionResetError, BrokenPipeError):  # RemoteDisconnected is one
                self.lost += self.good > before
                self.reset += self.good == before
            except Exception:
                self.lost += 1
            finally:
                connection.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_under_load_loses_no_accepted_request(run: Path, workers: int) -> None:
    with server(run, "--workers", str(workers)) as (process, port):
        askers = [Asker(port) for _ in range(4)]
        for asker in askers:
            asker.start()
        while not all(asker.good > 3 for asker in askers):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert "all accepted requests were answered" in said
        for asker in askers:
            asker.join(60)
        assert [asker.lost for asker in askers] == [0] * 4
        assert sum(asker.reset for asker in askers) <= 2


def raw(port: int, *parts: bytes, wait: float = 0.0) -> bytes:
    """What comes back, to the end of the connection, for bytes sent as they are."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(wait)
        got = b""
        while piece := connection.recv(65536):
            got += piece
        return got


def test_headers_bodies_and_connections_have_limits(run: Path) -> None:
    limits = ("--max-header", "2000", "--max-body", "2000", "--read-timeout", "1.5", "--max-connections", "4")
    with server(run, *limits, LIMBECK_API_KEY="sesame") as (_, port):
        line = b"POST /predict HTTP/1.1\r\nhost: x\r\nx-api-key: sesame\r\n"
        assert raw(port, line + b"a: " + b"x" * 3000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431")
        assert raw(port, line + b"a: " + b"x" * 3000).startswith(b"HTTP/1.1 431")  # and before it ends
        assert raw(port, b"GET /" + b"x" * 3000).startswith(b"HTTP/1.1 431")
        assert raw(port, line).startswith(b"HTTP/1.1 408")  # a header that does not end
        assert raw(port, b"") == b""  # a connection on which nothing is asked
        assert raw(port, line + b"content-length: 3000\r\n\r\n").startswith(b"HTTP/1.1 413")  # no byte of the body was sent
        assert raw(port, line + b"content-length: 30\r\n\r\nx").startswith(b"HTTP/1.1 408")
        chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
        assert raw(port, line + b"transfer-encoding: chunked\r\n\r\n" + 3 * chunk).startswith(b"HTTP/1.1 413")
        assert raw(port, b"NO SUCH THING\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert ask(port, "GET", "/v2")[0] == 401
        assert ask(port, "GET", "/v2", authorization="Bearer sesame")[0] == 200
        kept = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        time.sleep(0.2)
        assert b"503" in raw(port, b"").split(b"\r\n")[0]
        for one in kept:
            one.close()


def test_kserves_client_gets_what_onnx_runtime_says(run: Path) -> None:
    kserve = pytest.importorskip("kserve", reason="pip install kserve")
    (wanted,) = onnxruntime.InferenceSession(str(run / "export/model.onnx")).run(["logits"], {"image": X})

    async def asked(port: int, binary: bool) -> Any:
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2"))
        base = f"http://127.0.0.1:{port}"
        assert await client.is_server_ready(base)
        assert await client.is_server_live(base)
        assert await client.is_model_ready(base, "pics")
        given = kserve.InferInput("image", list(X.shape), "FP32")
        given.set_data_from_numpy(X, binary_data=binary)
        answer = await client.infer(base, kserve.InferRequest("pics", [given]), model_name="pics")
        await client.close()
        return answer.outputs[0].as_numpy()

    with server(run) as (_, port):
        for binary in (True, False):
            assert np.array_equal(asyncio.run(asked(port, binary)), wanted)


def test_tritons_client_gets_what_onnx_runtime_says(run: Path) -> None:
    triton = pytest.importorskip("tritonclient.http", reason='pip install "tritonclient[http]"')
    (wanted,) = onnxruntime.InferenceSession(str(run / "export/model.onnx")).run(["logits"], {"image": X})
    with server(run) as (_, port):
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        assert client.is_server_ready()
        assert client.is_model_ready("pics", "1")
        assert client.get_model_repository_index()[0]["name"] == "pics"
        for binary in (True, False):
            given = triton.InferInput("image", list(X.shape), "FP32")
            given.set_data_from_numpy(X, binary_data=binary)
            asked = triton.InferRequestedOutput("logits", binary_data=binary)
            assert np.array_equal(client.infer("pics", [given], outputs=[asked]).as_numpy("logits"), wanted)
        with pytest.raises(triton.InferenceServerException, match="there is no model 'nobody'"):
            client.infer("nobody", [given])
        client.close()


def test_a_person_drops_an_image_on_the_page(run: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    if CHROMIUM is None:
        pytest.skip("the browser test needs Chromium: install it, or name it in LIMBECK_CHROMIUM")
    from PIL import Image

    Image.fromarray(np.full((30, 20), 200, np.uint8)).save(tmp_path / "a.png")
    with server(run) as (_, port), playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in ((1280, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            errors: list[str] = []
            page.on("console", lambda message, errors=errors: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("#drop", state="visible")
            page.set_input_files("#file", str(tmp_path / "a.png"))
            page.wait_for_selector(".best")
            assert page.locator("#result li").count() == 3
            assert "ms" in page.locator(".time").inner_text()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            if os.environ.get("LIMBECK_PICTURES"):
                page.screenshot(path=str(Path(os.environ["LIMBECK_PICTURES"]) / f"serve-{width}.png"))
            assert not errors
        browser.close()
