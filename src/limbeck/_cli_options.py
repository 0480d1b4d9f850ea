"""The options of the commands, each with its text once."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeFile = Annotated[str | None, typer.Argument(metavar="RECIPE.yaml", show_default=False, help="A recipe file (see `limbeck recipes`).")]
Teacher = Annotated[
    list[str] | None,
    typer.Option("--teacher", metavar="SPEC", help="The model to learn from (see `limbeck models`); again for a further one."),
]
Student = Annotated[str | None, typer.Option("--student", metavar="SPEC", help="The model to train (see `limbeck models`).")]
DataSource = Annotated[
    str | None, typer.Option("--data", metavar="SPEC", help="digits, npz:FILE, imagefolder:DIR, csv:FILE, jsonl:FILE, parquet:FILE, hf:ID.")
]
Task = Annotated[
    str | None, typer.Option("--task", metavar="TASK", help="image-classification or text-classification; where the data do not tell.")
]
Temp = Annotated[str | None, typer.Option("--temp", metavar="T", help="Temperature of the distillation loss (4 by default).")]
Alpha = Annotated[
    str | None, typer.Option("--alpha", metavar="A", help="Weight of the distillation loss; cross entropy has 1 - A (0.7 by default).")
]
FitTeacher = Annotated[
    bool, typer.Option("--fit-teacher", help="Fine-tune the teacher first where its head does not fit the classes of the data.")
]
Epochs = Annotated[str | None, typer.Option("--epochs", metavar="N", help="Passes over the training data.")]
BatchSize = Annotated[str | None, typer.Option("--batch-size", metavar="N", help="Samples of one optimiser step; auto: cut to fit memory.")]
Lr = Annotated[str | None, typer.Option("--lr", metavar="X", help="Peak learning rate.")]
Seed = Annotated[
    str | None, typer.Option("--seed", metavar="N", help="Of initial weights, order and dropout; splits and views have their own.")
]
Seeds = Annotated[str | None, typer.Option("--seeds", metavar="N", help="Run N seeds; report mean and deviation.")]
Out = Annotated[str | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default a new one under runs/.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
NoBaseline = Annotated[bool, typer.Option("--no-baseline", help="Do not train the same student without the teacher beside it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure and print the plan: memory, time, cache. Nothing is written.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output; everything else goes to standard error.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", show_default=False, help="Any recipe key, e.g. --set train.optimizer=sgd (a YAML value)."),
]
VerifyCache = Annotated[
    str | None,
    typer.Option(
        "--verify-cache",
        metavar="N",
        show_default=False,
        help="Compare N cached answers with the teacher, which is loaded for it; by default 32 where it is loaded anyway.",
    ),
]
MetricsPort = Annotated[
    str | None,
    typer.Option(
        "--metrics-port", metavar="PORT", show_default=False, help="Serve Prometheus text at this port (or HOST:PORT) while it trains."
    ),
]
CacheFolder = Annotated[
    str | None,
    typer.Argument(metavar="FOLDER", show_default=False, help="A teacher_cache.path, or one directory in it; by default the user's own."),
]
Vary = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="KEY=V,V",
        show_default=False,
        help="A recipe key and its values, e.g. objective.0.temperature=2,4,8; or temp=2,4 and alpha=0.5,0.9. Repeatable.",
    ),
]
Ids = Annotated[
    str | None,
    typer.Option("--ids", metavar="FILE.csv", help="Only write split, row, id and label of every sample: what logits:FILE is keyed by."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", show_default=False, help="The folder of a run.")]
