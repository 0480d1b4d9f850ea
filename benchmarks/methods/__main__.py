"""What each method of distillation buys: the main method of each family, three seeds, one budget, weights chosen on validation.

    python benchmarks/methods r52 20newsgroups        the tracks named, one after the other (hours; a run that is stopped goes on)
    python benchmarks/methods cifar10 --only kd hint  some of their methods
    python benchmarks/methods cifar10 --jobs 14       so many at once, and the time of a step left for later
    python benchmarks/methods cifar10 --time          the time of a step, of the methods whose other figures are there
    python benchmarks/methods --page [--check]        docs/methods.md from what is under benchmarks/results/methods/

For each pair a teacher is trained once. A baseline and three students by kd (0.7 at T = 4, as a recipe without an objective has it) give what
the teacher and plain distillation are worth. Each method is run at three weights with seed 0, and at one or two further ones while the best on
validation stands at an end of them; the best is run with seeds 1 and 2. All of them have the same steps, batch size and learning rate, and read
the teacher from its cache. The time of a step is measured apart, in turns with the same student without a teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import page
import yaml
from speed import measuring
from speed.turns import Side, timed
from tracks import TRACKS, Method, Track, methods_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks/results/methods"
RUNS = ROOT / "runs/methods"
SEEDS = (0, 1, 2)
PAIRS = 7
FURTHER = 2  # weights outside those of a method, where the best stands at an end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tracks", nargs="*", choices=[*TRACKS, []], metavar="TRACK", help=f"of {', '.join(TRACKS)}")
    parser.add_argument("--only", nargs="+", metavar="METHOD", default=None)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="methods at once; with several no step is timed")
    parser.add_argument("--time", action="store_true", help="only the time of a step, where it is missing")
    parser.add_argument("--page", action="store_true", help="write docs/methods.md")
    parser.add_argument("--check", action="store_true", help="with --page: only say whether it is what the results say")
    parser.add_argument("--quick", action="store_true", help="an epoch of 400 rows, to try the script; nothing is kept under results")
    asked = parser.parse_args()
    if asked.page:
        sys.exit(page.main(ROOT, RESULTS, {name: list(methods_of(track)) for name, track in TRACKS.items()}, check=asked.check))
    if asked.jobs < 1:
        parser.error("--jobs: at least 1")
    if asked.time and (asked.quick or asked.jobs > 1):
        parser.error("--time measures one method after the other, of results that are kept: without --jobs and --quick")
    known = {label for name in asked.tracks for label in methods_of(TRACKS[name])}
    if unknown := sorted(set(asked.only or ()) - known):
        parser.error(f"--only: {', '.join(map(repr, unknown))}, none of these tracks' methods, which are {', '.join(sorted(known))}")
    for name in asked.tracks:
        if not asked.time:
            train_track(name, TRACKS[name], asked.only, asked.jobs, asked.quick)
        if asked.jobs == 1 and not asked.quick:
            time_track(name, TRACKS[name], asked.only)


def train_track(name: str, track: Track, only: list[str] | None, jobs: int, quick: bool) -> None:
    """Everything that is trained. After each method what is known is written."""
    runs = runs_of(name, quick)
    recipe = recipe_of(track, runs)
    subprocess.run([sys.executable, str(HERE.parent / "fetch.py"), *track.needs], check=True)
    limbeck("train", written(runs / "teacher.yaml", track.teacher, quick), "--no-baseline", "--out", teacher_of(track, runs))
    plain = written(
        runs / "plain.yaml",
        {**recipe, "objective": [{"loss": "kd", "weight": 0.7, "temperature": 4.0}, {"loss": "cross_entropy", "weight": 0.3}]},
        quick,
    )
    if jobs > 1:
        limbeck("label", plain, resume=False)  # once, and not by each of them
    works: dict[str, Callable[[], Any]] = {"": partial(beginning, runs, plain)}
    for label, method in methods_of(track).items():
        if only is None or label in only:
            works[label] = partial(outcome, runs, label, method, recipe, quick)
    head = {"track": name, "title": track.title, "machine": measuring.machine(), "recipe": shown(track.recipe)}
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(jobs) as pool:
        asked = {pool.submit(work): label for label, work in works.items()}
        try:
            for future in as_completed(asked):
                found[asked[future]] = future.result()
                if "" in found:
                    keep(
                        name, {**head, **found[""], "methods": {label: found[label] for label in works if label and label in found}}, quick
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def joined(result: dict[str, Any], methods: dict[str, Any], path: Path) -> dict[str, Any]:
    """The result with these methods, and with those that the file has beside the same teacher, baseline and plain kd; times of steps stay."""
    before = read(path) if path.is_file() else None
    if before is None or any(before[key] != result[key] for key in ("recipe", "teacher", "baseline", "plain")):
        if before is not None and set(before["methods"]) - set(methods):
            aside = path.with_name(f"{path.stem}-before.json")
            path.replace(aside)  # another teacher, or another machine: what is there is not mixed with this, and not lost
            print(f"{path.name} has other figures of teacher, baseline or plain kd; it is {aside.name} now.")
        return {**result, "methods": methods}
    old = before["methods"]
    for label, own in methods.items():
        if "step" in old.get(label, {}) and old[label]["weight"] == own["weight"]:
            own["step"] = old[label]["step"]
    return {**result, "machine": before["machine"], "methods": {**old, **methods}}


def time_track(name: str, track: Track, only: list[str] | None) -> None:
    """The time of a step of each method, in turns with a student that has no teacher."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"There is no {path.name} whose methods could be timed: run python benchmarks/methods {name} first.")
    runs, result = runs_of(name), read(path)
    recipe = recipe_of(track, runs)
    floor = {k: v for k, v in recipe.items() if k not in ("teacher", "teacher_cache")} | {"objective": [{"loss": "cross_entropy"}]}
    for label, method in methods_of(track).items():
        own = result["methods"].get(label)
        if own is None or "step" in own or (only is not None and label not in only):
            continue
        own["step"] = step_time(runs / "time", {**recipe, "objective": weighted(method, own["weight"])}, floor, track.timed)
        keep(name, result, quick=False)


def runs_of(name: str, quick: bool = False) -> Path:
    runs = RUNS / (name if not quick else f"{name}-quick")
    runs.mkdir(parents=True, exist_ok=True)
    return runs


def teacher_of(track: Track, runs: Path) -> Path:
    """Beside the folder of the track: tracks of one pair have one teacher."""
    return runs.parent / f"{track.pair}-teacher{'-quick' * runs.name.endswith('-quick')}"


def recipe_of(track: Track, runs: Path) -> dict[str, Any]:
    """What all methods of a track have in common."""
    teacher = teacher_of(track, runs)
    recipe = filled(track.recipe, teacher)
    recipe["teacher"] = {"model": f"run:{teacher}"}
    recipe["teacher_cache"] = {**recipe["teacher_cache"], "path": str(runs.parent / "cache")}
    return dict(recipe)


def outcome(runs: Path, label: str, method: Method, recipe: dict[str, Any], quick: bool) -> dict[str, Any]:
    """One method: the sweep over its weights, further ones while the best stands at an end, then the seeds that are missing at the best."""
    short = "".join(c if c.isalnum() or c == "_" else "-" for c in label)

    def sweep(weights: Sequence[float], name: str) -> dict[float, dict[str, Any]]:
        recipe_file = written(runs / f"{name}.yaml", {**recipe, "objective": weighted(method, weights[0])}, quick)
        varied = f"objective.0.weight={','.join(map(str, weights))}"
        limbeck("sweep", recipe_file, "--vary", varied, "--no-baseline", "--out", runs / name)
        return dict(zip(weights, read(runs / name / "sweep.json")["rows"], strict=True))

    rows = sweep(method.weights, short)
    for _ in range(FURTHER):
        weight = beyond({w: row["validation"] for w, row in rows.items()})
        if weight is None:
            break
        rows |= sweep([weight], f"{short}-at-{weight:g}")
    best = best_of({w: row["validation"] for w, row in rows.items()})
    chosen = written(runs / f"{short}-chosen.yaml", {**recipe, "objective": weighted(method, best)}, quick)
    more = ("--seeds", len(SEEDS) - 1, "--seed", SEEDS[1], "--no-baseline")
    limbeck("distill", chosen, *more, "--out", runs / f"{short}-seeds")
    others = [read(runs / f"{short}-seeds" / f"seed-{seed}" / "metrics.json") for seed in SEEDS[1:]]
    return {
        "loss": method.term["loss"],
        "objective": weighted(method, best),
        "weight": best,
        "tried": [{"weight": w, "valid": row["validation"], "test": row["student"]} for w, row in sorted(rows.items())],
        "accuracy": [rows[best]["student"], *(m["models"]["student"]["metrics"]["accuracy"] for m in others)],
    }


def best_of(validation: Mapping[float, Mapping[str, float]]) -> float:
    """The weight that is best on validation, as `limbeck sweep` chooses."""
    return max(validation, key=lambda w: (validation[w]["accuracy"], -validation[w]["nll"]))


def beyond(validation: Mapping[float, Mapping[str, float]]) -> float | None:
    """Where the best of the weights stands at an end, the next one outside, as far from it as its neighbour; None where it stands inside."""
    weights = sorted(validation)
    best = best_of(validation)
    if best not in (weights[0], weights[-1]):
        return None
    neighbour = weights[1] if best == weights[0] else weights[-2]
    return float(f"{best * best / neighbour:.3g}")


def beginning(runs: Path, plain: Path) -> dict[str, Any]:
    """Teacher, baseline and plain kd."""
    limbeck("distill", plain, "--seeds", len(SEEDS), "--out", runs / "plain")
    return first(runs / "plain")


def first(run: Path) -> dict[str, Any]:
    """Teacher, baseline and plain kd, by seed."""
    found = [read(run / f"seed-{seed}" / "metrics.json") for seed in SEEDS]
    accuracy = {role: [m["models"][role]["metrics"]["accuracy"] for m in found] for role in ("teacher", "baseline", "student")}
    return {"teacher": accuracy["teacher"][0], "baseline": accuracy["baseline"], "plain": accuracy["student"], "seeds": list(SEEDS)}


def step_time(folder: Path, recipe: dict[str, Any], floor: dict[str, Any], steps: int) -> dict[str, Any]:
    """Milliseconds of a step with and without the teacher, in turns, and their ratio."""
    where = measuring.machine()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    quiet = {"baseline": False, "export": []}
    common = {"steps": steps, "out": str(folder), "work": str(folder)}
    sides = [
        Side("method", "limbeck_side.py", {**common, "name": "method", "recipe": {**recipe, **quiet}}),
        Side("floor", "limbeck_side.py", {**common, "name": "floor", "recipe": {**floor, **quiet}}),
    ]
    try:
        seconds = timed(sides, PAIRS)
    finally:
        for side in sides:
            side.close()
    return {
        **measuring.ratio(seconds["method"], seconds["floor"]),
        "floor_ms": 1000 * measuring.median(seconds["floor"]) / steps,
        "machine": where,
    }


def weighted(method: Method, weight: float) -> list[dict[str, Any]]:
    return [{**method.term, "weight": weight}, *map(dict, method.beside)]


def filled(plain: Any, teacher: Path | None = None) -> Any:
    """A recipe with the places of data, models and teacher written out."""
    text = json.dumps(plain).replace("DATA/", f"{ROOT / 'data'}/").replace("MODELS/", f"{ROOT / 'benchmarks/models'}/")
    return json.loads(text.replace('"TEACHER"', json.dumps(f"run:{teacher}")))


def shown(plain: Any) -> Any:
    return json.loads(json.dumps(plain).replace("DATA/", "data/").replace("MODELS/", "benchmarks/models/"))


def written(path: Path, recipe: Any, quick: bool) -> Path:
    whole = {**filled(recipe), "export": []}
    if quick:
        whole["train"] = {**whole["train"], "epochs": 1}
        few = {"labelled_limit": 100} if "labelled_limit" in whole["data"] else {}
        whole["data"] = {**whole["data"], "train_limit": 400, **few}
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path


def limbeck(*arguments: Any, resume: bool = True) -> None:
    """A command that goes on where it was stopped."""
    command = [sys.executable, "-m", "limbeck", *map(str, arguments), *["--resume"] * resume]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}, check=False)
    if done.returncode:
        raise RuntimeError(f"limbeck {' '.join(map(str, arguments))} left with {done.returncode}.")


def keep(name: str, result: dict[str, Any], quick: bool) -> None:
    if not quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
