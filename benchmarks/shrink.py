"""From the teacher in eager float32 to the student in 8 bits: what the whole chain makes faster and smaller, and what it costs.

    python benchmarks/shrink.py NAME RUN TEACHER_RUN      after `limbeck export RUN --quantize int8`; writes benchmarks/results/shrink-NAME.json
    python benchmarks/shrink.py --table [--check]         the table of docs/artifacts.md from all of them

One process and one thread. The four take turns (A B C D D C B A ...), each turn the first 40 test samples one after the other (of a file of texts, or
of an NPZ file), prepared beforehand. Accuracy is what the run and the export measured on the whole test split; nothing is trained here.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from speed import measuring

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
START, END = "<!-- shrink -->", "<!-- /shrink -->"
PAIRS, SAMPLES = 9, 40
SIDES = {
    "teacher": "teacher, eager float32",
    "student": "student, eager float32",
    "onnx": "student, ONNX float32",
    "int8": "student, ONNX int8",
}


def main() -> None:
    if "--table" in sys.argv:
        sys.exit(table(check="--check" in sys.argv))
    name, run, teacher = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    where = measuring.machine()
    seconds = turns(sides(run, teacher))
    result = {
        "name": name,
        "command": f"python benchmarks/shrink.py {name} runs/{run.name} runs/{teacher.name}",
        "machine": where,
        "sides": known(run),
        "ms": {side: 1000 * measuring.median(s) / SAMPLES for side, s in seconds.items()},
        "faster": {side: measuring.ratio(seconds["teacher"], seconds[side]) for side in ("student", "onnx", "int8")},
        "int8_over_onnx": measuring.ratio(seconds["onnx"], seconds["int8"]),
        "drop": json.loads((run / "export/onnx-int8/manifest.json").read_text())["body"]["quantization"]["drop"],
        "quantization": json.loads((run / "export/onnx-int8/manifest.json").read_text())["body"]["about"],
    }
    (RESULTS / f"shrink-{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(rows(result)))


def sides(run: Path, teacher: Path) -> dict[str, Callable[[], None]]:
    """By name: what answers all samples once."""
    import onnxruntime

    from limbeck import load
    from limbeck.serve import open_model

    artifact = run / "export/onnx-int8"
    inputs = samples(run, open_model(artifact, threads=1))
    asked = [{k: torch.from_numpy(v) for k, v in one.items()} for one in inputs]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def eager(folder: Path) -> Callable[[], None]:
        module = load(folder)

        def answer() -> None:
            with torch.inference_mode():
                for one in asked:
                    module(**one) if len(one) > 1 else module(*one.values())

        return answer

    def file(path: Path) -> Callable[[], None]:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        wanted = {port.name for port in session.get_inputs()}
        given = [{k: v for k, v in one.items() if k in wanted} for one in inputs]

        def answer() -> None:
            for one in given:
                session.run(None, one)

        return answer

    return {
        "teacher": eager(teacher),
        "student": eager(run),
        "onnx": file(run / "export/model.onnx"),
        "int8": file(artifact / "model.onnx"),
    }


def samples(run: Path, model: Any) -> list[dict[str, Any]]:
    """The first test samples, as both runtimes take them."""
    data = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["data"]
    kind, _, source = data["source"].partition(":")
    if kind == "npz":
        images = np.load(run / source)["test_x"][:SAMPLES]
        how = json.loads((run / "export/onnx-int8/preprocess.json").read_text())
        mean, std = (np.asarray(how[k], dtype=np.float32).reshape(-1, 1, 1) for k in ("mean", "std"))
        name = model.inputs[0].name
        return [{name: ((x.transpose(2, 0, 1).astype(np.float32) / 255 - mean) / std)[None]} for x in images]
    with (run / data["test"]).open(encoding="utf-8", newline="") as file:
        texts = [row[data["text"]] for row in itertools.islice(csv.DictReader(file), SAMPLES)]
    return [dict(model.from_text(text)) for text in texts]


def turns(each: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for number in range(1 + PAIRS):
        for name in each if number % 2 == 0 else reversed(each):
            began = time.perf_counter()
            each[name]()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def known(run: Path) -> dict[str, dict[str, Any]]:
    """Test accuracy and bytes, as the run (of several seeds: that whose student is exported) and the export have measured them."""
    metrics = json.loads((run / "metrics.json").read_text())
    own = metrics if "best_seed" not in metrics else json.loads((run / f"seed-{metrics['best_seed']}" / "metrics.json").read_text())
    models, exported = own["models"], metrics["export"]
    primary = metrics["primary_metric"]
    found = {role: {"accuracy": models[role]["metrics"][primary], "bytes": models[role]["bytes"]} for role in ("teacher", "student")}
    body = json.loads((run / "export/onnx-int8/manifest.json").read_text())["body"]
    whole = body["quantization"]["float32"]
    found["onnx"] = {"accuracy": whole["test"]["metrics"][primary], "bytes": exported["onnx"]["bytes"]}
    found["int8"] = {"accuracy": body["test"]["metrics"][primary], "bytes": body["bytes"]}
    return found


def rows(result: dict[str, Any]) -> list[str]:
    lines = [
        f"**{result['name']}** (`{result['command']}`; {result['machine']['cpu']}, one thread, torch {result['machine']['torch']})",
        "",
        "| | test accuracy | MB | one sample | faster than the teacher |",
        "|---|---|---|---|---|",
    ]
    for side, label in SIDES.items():
        own, faster = result["sides"][side], result["faster"].get(side)
        told = "" if faster is None else f"{faster['median']:.1f}x [{faster['interval'][0]:.1f}, {faster['interval'][1]:.1f}]"
        lines.append(f"| {label} | {100 * own['accuracy']:.2f} % | {own['bytes'] / 1e6:.2f} | {result['ms'][side]:.2f} ms | {told} |")
    teacher, int8, gain = result["sides"]["teacher"], result["sides"]["int8"], result["int8_over_onnx"]
    return [
        *lines,
        "",
        f"The whole chain: **{result['faster']['int8']['median']:.1f} times faster, {teacher['bytes'] / int8['bytes']:.1f} times smaller, "
        f"{100 * (int8['accuracy'] - teacher['accuracy']):+.2f} points**. Of that 8 bits are {gain['median']:.2f}x "
        f"[{gain['interval'][0]:.2f}, {gain['interval'][1]:.2f}] in time. {result['quantization']}",
        "",
    ]


def table(*, check: bool) -> str | None:
    target = ROOT / "docs/artifacts.md"
    text = target.read_text(encoding="utf-8")
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("shrink-*.json"))]
    new = "\n".join([f"{head}{START}", "", *[line for result in results for line in rows(result)], f"{END}{tail}"])
    if check:
        return None if new == text else "docs/artifacts.md is not what the results say: run python benchmarks/shrink.py --table"
    target.write_text(new, encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
