"""What a step of a BERT-size pair takes in memory and time, by the choice of how it is trained.

    python benchmarks/memory.py [NAME ...]     measure all choices, or these; benchmarks/results/memory.json and the table in docs/scaling.md
    python benchmarks/memory.py --table        the table again, from what was measured
    python benchmarks/memory.py --table --check   say whether the table is what was measured

Teacher: 12 layers of 768; student: 6 layers of 768 with dropout 0.1; 32 sequences of 128 tokens a step; AdamW. Both have random weights, which
changes neither bytes nor times. Every choice is a process of its own that runs Limbeck's own loop for STEPS steps, after two sequences to warm
up. Memory is the process's largest resident size (VmHWM), libraries and models included. Time is that of the processor, which other work on the
machine disturbs less than the clock's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
RESULT = HERE / "results/memory.json"
PAGE = HERE.parent / "docs/scaling.md"
START, END = "<!-- memory -->", "<!-- /memory -->"

STEPS, ROWS, TOKENS, WIDTH, WORDS, CLASSES = 1, 32, 128, 768, 30522, 2
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("nothing of it; the teacher is asked in every step", {}),
    "accumulate": ("`accumulate: 4`", {"accumulate": 4}),
    "checkpointing": ("`gradient_checkpointing: true`", {"gradient_checkpointing": True}),
    "both": ("both", {"accumulate": 4, "gradient_checkpointing": True}),
    "bf16": ("`precision: bf16`", {"precision": "bf16"}),
    "cached": ("the teacher's answers are cached: it is not loaded", {"cached": True}),
    "cached-both": (
        "cached, `accumulate: 4` and `gradient_checkpointing: true`",
        {"cached": True, "accumulate": 4, "gradient_checkpointing": True},
    ),
}


def one(name: str) -> dict[str, Any]:
    """One choice, in this process."""
    import numpy as np
    import torch
    from speed.turns import peak_bytes
    from transformers import BertConfig, BertForSequenceClassification

    from limbeck.data import Request
    from limbeck.engine import Engine
    from limbeck.loop import Feed, Recorder, fit
    from limbeck.models import Model, Recomputed
    from limbeck.objective import Objective
    from limbeck.progress import Progress, resident_bytes
    from limbeck.recipe import Term, Train
    from limbeck.run import NoLog
    from limbeck.teacher import LiveTeacher
    from limbeck.types import Batch, Signal, TextPreprocessing

    how = dict(CHOICES[name][1])
    cached = how.pop("cached", False)

    def bert(layers: int) -> Model:
        torch.manual_seed(layers)
        config = BertConfig(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=12, num_labels=CLASSES)
        text = TextPreprocessing("", TOKENS, ("input_ids", "attention_mask"), "")
        return Model(BertForSequenceClassification(config), {}, "hf", text, None, CLASSES)

    train = Train(
        **{"epochs": 1, "batch_size": ROWS, "precision": "float32", "lr": 1e-5, "log_every": 10**6, "checkpoint_every": 10**6, **how}
    )
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(ROWS, CLASSES, generator=generator)

    class Kept:
        """What a cache gives; reading 2 numbers a sequence from a file would not show here."""

        def __init__(self) -> None:
            self.identity: dict[str, Any] = {}

        def __call__(self, batch: Batch, _: Any) -> Signal:
            return Signal(answers[: len(batch)])

        def ahead(self, coming: Any, _: Any) -> Any:
            return coming

    class Steps:
        total_steps = STEPS

        def request(self, step: int) -> Request:
            return Request(step, 0, 0, np.arange(ROWS))

    words = torch.randint(1, WORDS, (ROWS, TOKENS), generator=generator)
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    ids = np.arange(2 * ROWS, dtype=np.uint64).reshape(ROWS, 2)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    batch = Batch(ids, 0, inputs, None if cached else inputs, labels, torch.ones(ROWS, dtype=torch.bool))
    student, teacher = bert(6), Kept() if cached else LiveTeacher(bert(12), Engine(device, train.precision))
    terms = [Term(loss="kd", weight=0.7, temperature=4.0), Term(loss="cross_entropy", weight=0.3)]
    objective = Objective.build(terms, classes=["a", "b"], label_counts=[1, 1])
    moments: list[float] = []
    with Recomputed(student.module, train.gradient_checkpointing), Engine(device, train.precision).autocast():
        student({k: v[:2] for k, v in inputs.items()}).sum().backward()
    student.module.zero_grad(set_to_none=True)
    loaded = resident_bytes()

    def passed() -> bool:
        moments.append(time.process_time())
        return False

    def builder(_: Request) -> Batch:
        if not moments:
            moments.append(time.process_time())
        return batch

    plan: Any = Steps()
    built: Any = builder
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder("student", Path(folder), NoLog(), Progress("none"), passed)
        fit(student, teacher, objective, Feed(plan, built, (STEPS,)), Engine(device, train.precision), train, 0, recorder)
    seconds = [b - a for a, b in pairwise(moments)]
    return {"choice": name, "seconds": seconds, "loaded_bytes": loaded, "peak_bytes": peak_bytes(), "load": os.getloadavg()[0]}


def measure(names: list[str]) -> None:
    from speed.measuring import machine

    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {"rows": {}}
    facts = machine()
    if facts["matmul_gflops"]["bf16"] < facts["matmul_gflops"]["float32"] and "bf16" in names and len(names) > 1:
        names = [name for name in names if name != "bf16"]
        found["left_out"] = {"bf16": "this processor has no instructions for it, and takes many times as long"}
    found["machine"] = facts
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True)
        found["rows"][name] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(found["rows"][name]), file=sys.stderr, flush=True)
        RESULT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def table(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    base = rows["plain"]
    lines = [
        "| choice | peak memory | of it before the first step | of plain | processor time a step | of plain |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (what, _) in CHOICES.items():
        if name in rows:
            row = rows[name]
            peak, slow = row["peak_bytes"] / base["peak_bytes"], statistics.median(row["seconds"]) / statistics.median(base["seconds"])
            lines.append(
                f"| {what} | {row['peak_bytes'] / 1e9:.2f} GB | {row['loaded_bytes'] / 1e9:.2f} GB | {peak:.2f} | "
                f"{statistics.median(row['seconds']):.0f} s | {slow:.2f} |"
            )
    m, loads = found["machine"], [row["load"] for row in rows.values()]
    left = "".join(f" {CHOICES[name][0]} was left out: {why}." for name, why in found.get("left_out", {}).items() if name not in rows)
    missing = [what for name, (what, _) in CHOICES.items() if name not in {**rows, **found.get("left_out", {})}]
    left += f" Not measured yet: {'; '.join(missing)}." if missing else ""
    return [
        *lines,
        "",
        f"{m['cpu']} ({m['capability']}), {m['threads']} thread, torch {m['torch']}, load {min(loads):.1f} to {max(loads):.1f}; float32, steps "
        f"that were timed: {STEPS}, by the processor's time.{left} Raw figures: `benchmarks/results/memory.json`; `python benchmarks/memory.py` "
        "measures again.",
    ]


def write(*, check: bool = False) -> int:
    text = PAGE.read_text()
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    new = head + "\n".join([START, "", *table(json.loads(RESULT.read_text())), "", END]) + tail
    if check:
        if new != text:
            print(
                "docs/scaling.md is not what benchmarks/results/memory.json says: run python benchmarks/memory.py --table", file=sys.stderr
            )
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    asked = sys.argv[1:]
    if asked[:1] == ["--one"]:
        print(json.dumps(one(asked[1])))
    elif "--check" in asked:
        sys.exit(write(check=True))
    else:
        if asked != ["--table"]:
            measure(asked or list(CHOICES))
        sys.exit(write())
