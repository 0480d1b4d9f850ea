"""From a file, options or plain values to a :class:`~limbeck.recipe.Recipe`, with everything that is wrong told at once.

Four ways lead here: a YAML file, options on the command line, ``kd_train.py`` and a Python call. :func:`load_recipe` merges a file with
options, :func:`build_recipe` judges plain values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from limbeck import _recipe_check as check
from limbeck import _recipe_merge as merging
from limbeck import _recipe_paths as paths
from limbeck._recipe_yaml import read_yaml
from limbeck.errors import Problem, UsageError, listed
from limbeck.losses import LOSSES
from limbeck.objective import check_terms, needs_of, temperatures_of
from limbeck.published import is_published, published
from limbeck.recipe import Command, Recipe, Term, defaulted

__all__ = [
    "RecipeError",
    "absolute",
    "build_recipe",
    "default_objective",
    "differences",
    "json_schema",
    "load_recipe",
    "read_yaml",
    "recipe_from_yaml",
]


class RecipeError(UsageError):
    """All problems of one recipe; ``source`` is the file or the command line that they are in."""

    def __init__(self, problems: Sequence[Problem], source: str) -> None:
        super().__init__(problems)
        self.source = source

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}"
        return "\n".join([f"{self.source}: {len(self.problems)} problems", *(f"  {p}" for p in self.problems)])


def default_objective(temp: float | None = None, alpha: float | None = None) -> list[dict[str, Any]]:
    """``alpha * kd(temp) + (1 - alpha) * cross_entropy``, by default 0.7 at T = 4; a term at weight 0 is left out.

    >>> default_objective(alpha=1.0)
    [{'loss': 'kd', 'weight': 1.0, 'temperature': 4.0}]
    """
    return merging.default_objective(temp, alpha)


def build_recipe(data: Mapping[str, Any], *, command: Command, where: str = "recipe", spelt: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from plain values (as YAML or JSON give them), everything judged that can be judged without loading data or models.

    ``where`` names the recipe in messages; ``spelt`` maps keys to how the person wrote them (``train.lr`` -> ``--lr``). Left out: the task
    where the data tell it, and the objective (for ``train`` cross entropy). Raises :class:`RecipeError` with all problems.
    """
    plain = _expand(data, command)
    value = defaulted(plain)
    dropped = merging.without_nulls(_automatic(plain), check.not_applying(plain, value, command))
    problems: list[Problem] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(dropped)
    except ValidationError as error:
        problems += check.schema_problems(error.errors(), dropped, Recipe.model_json_schema())
    further = [*check.recipe_problems(plain, value, command), *_objective_problems(plain, command)]
    reasons = check.stage_reasons(plain)
    if "objective" in reasons and data.get("objective") is not None:
        further.append(Problem("objective", reasons["objective"], "Leave it out."))
    told = {p.where for p in further}  # these know more about a key than its type
    if "data.source" in told:
        told.add("task")  # right data tell it
    problems = [*(p for p in problems if p.where not in told), *further]
    if problems or recipe is None:
        raise RecipeError([_respelt(p, spelt or {}) for p in problems], where)
    if recipe.train.optimizer == "sgd" and recipe.train.momentum == 0:
        recipe.train.nesterov = False
    recipe.train.epochs = sum(stage.epochs for stage in recipe.stages)
    return recipe


def load_recipe(path: Path | None, options: Mapping[str, Any], sets: Sequence[str], command: Command) -> tuple[Recipe, Path]:
    """The recipe in the file ``path`` (or, where there is no such file, the published one of that name; None: options alone) with options and
    ``--set key.path=value`` over it, and the folder that its relative paths are relative to: the file's, or the working directory without one.

    ``options`` has strings (or None) under the names of the command line: teacher, student, data, task, temp, alpha, epochs,
    batch_size, lr, seed, baseline (bool), fit_teacher (bool). Raises :class:`RecipeError` with all
    problems, files that are not there included.
    """
    here = Path.cwd()
    where = "command line" if path is None else str(path)
    ready = published(path.as_posix()) if path is not None and not os.path.exists(path) and is_published(path.as_posix()) else None
    path = None if ready is not None else path
    base = here if path is None else path.resolve().parent
    try:
        data = ready or {} if path is None else merging.expand_names(read_yaml(path))
    except UsageError as error:
        raise UsageError([*error.problems, *_option_problems(options, sets, command)]) from None
    merged, spelt, problems = merging.merge(data, options, sets, command)
    if path is not None:
        merged = paths.absolute_paths(merging.expand_names(merged), here, only=spelt)
    source = check.look(merged, "data.source")
    if isinstance(source, str):
        merged["data"] = {**merged["data"], "source": paths.complete_source(source, base)}
    missing = [_respelt(p, spelt) for p in [*paths.from_python(merged), *paths.missing_files(merged, base)]]
    recipe: Recipe | None = None
    try:
        recipe = build_recipe(merged, command=command, where=where, spelt=spelt)
    except RecipeError as error:
        known = {p.where for p in problems}
        problems += [p for p in error.problems if p.where not in known]
    known = {p.where for p in problems}
    problems += [p for p in missing if p.where not in known]
    if problems or recipe is None:
        raise RecipeError(problems, where)
    return recipe, base


def _option_problems(options: Mapping[str, Any], sets: Sequence[str], command: Command) -> list[Problem]:
    """What is wrong with the options themselves, whatever the recipe says."""
    merged, spelt, problems = merging.merge({}, options, sets, command)
    try:
        build_recipe(merged, command=command, spelt=spelt)
    except RecipeError as error:
        problems += [p for p in error.problems if p.where.startswith("--") and p.where not in {q.where for q in problems}]
    return problems


def recipe_from_yaml(path: Path) -> Recipe:
    """The recipe in a complete file such as a run's recipe.yaml, for the command that it was written by."""
    data = read_yaml(path)
    alone = data.get("teacher") is None and not data.get("baseline")
    return build_recipe(data, command="train" if alone else "distill", where=str(path))


def absolute(recipe: Recipe, base: Path) -> Recipe:
    """The same recipe with its local paths absolute, so that it means the same wherever its file lies."""
    return Recipe.model_validate(paths.absolute_paths(recipe.model_dump(), base))


def differences(a: Recipe, b: Recipe) -> list[str]:
    """``train.lr: 0.001 -> 0.01`` for every key in which two recipes differ, in the order of the recipe."""
    return check.differences(a.model_dump(mode="json"), b.model_dump(mode="json"), "")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, for editors (completion and checks while typing)."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    definitions["Term"]["properties"]["weight"]["anyOf"][0].pop("expected")
    definitions["Term"]["properties"]["weight"]["anyOf"].append({"const": PAPER, "type": "string"})
    definitions["Term"]["properties"]["loss"] = {"type": "string", "enum": list(LOSSES), "description": "see `limbeck losses`"}
    for name in ("teacher", "student", "data"):  # a bare name is short for the mapping that has only the name
        schema["properties"][name] = {"anyOf": [{"type": "string"}, schema["properties"][name]]}
    several = next(one for one in schema["properties"]["teacher"]["anyOf"][1]["anyOf"] if one.get("type") == "array")
    several |= {"items": {"anyOf": [{"type": "string"}, several["items"]]}, "minItems": 1}
    for name in ("export", "track"):
        schema["properties"][name] = {"anyOf": [schema["properties"][name]["items"], schema["properties"][name]]}
    size = definitions["Train"]["properties"]["batch_size"]
    size.pop("expected")
    size["anyOf"] = [{key: size.pop(key) for key in ("type", "minimum")}, {"const": "auto", "type": "string"}]
    never = set(check.not_applying({}, lambda _: None, "train"))
    for path in never | _NULLABLE:
        _allow_null(schema, path)
    schema["required"] = ["student", "data"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Limbeck recipe"}


PAPER = "paper"
"""As the weight of a term: the one of its authors."""

_NULLABLE = {
    "train.momentum",
    "train.nesterov",
    "train.betas",
    "data.text",
    "data.label",
    "data.max_length",
    "data.valid_fraction",
    "teacher_cache",
}


def _allow_null(schema: dict[str, Any], path: str) -> None:
    holder = schema
    for key in path.split(".")[:-1]:
        found = dict(check.branches(holder["properties"][key], schema)[-1])
        holder = next(d for d in schema["$defs"].values() if d.get("title") == found.get("title"))
    key = path.split(".")[-1]
    held = holder["properties"][key]
    if {"type": "null"} not in held.get("anyOf", []):
        holder["properties"][key] = {"anyOf": [held, {"type": "null"}]}


def _expand(data: Mapping[str, Any], command: Command) -> dict[str, Any]:
    plain = merging.expand_names(data)
    for holder in (plain, *(check.look(plain, "train.stages") or [] if isinstance(check.look(plain, "train.stages"), list) else [])):
        _publish(holder)
    if plain.get("objective") is None:
        plain["objective"] = merging.default_objective(None, None) if command == "distill" else [{"loss": "cross_entropy", "weight": 1.0}]
    source = check.look(plain, "data.source")
    if isinstance(source, str):
        plain["data"]["source"] = paths.complete_source(source, None)
    if plain.get("task") is None:
        plain.pop("task", None)
        task = paths.task_of(check.look(plain, "data.source"))
        if task is not None:
            plain["task"] = task
    if command == "train" and plain.get("baseline") in (None, False):
        plain["baseline"] = False
    if isinstance(plain.get("train", {}), dict):
        plain["train"] = {**_customary(plain), **plain.get("train", {})}
        if plain["train"].get("stages") is not None and plain["train"].get("epochs", 0) is None:
            del plain["train"]["epochs"]  # the sum of theirs
    return plain


def _publish(holder: Any) -> None:
    """``weight: paper`` written out: the weight at which the loss was published."""
    terms = holder.get("objective") if isinstance(holder, dict) else None
    if isinstance(terms, list):
        holder["objective"] = [
            {**term, "weight": LOSSES[term["loss"]].weight if str(term.get("loss")) in LOSSES else 1.0}
            if isinstance(term, dict) and term.get("weight") == PAPER
            else term
            for term in terms
        ]


def _automatic(plain: dict[str, Any]) -> dict[str, Any]:
    """``train.batch_size: auto`` written out: the customary batch in as few microbatches as fit."""
    train = plain.get("train")
    if not isinstance(train, dict) or train.get("batch_size") != "auto":
        return plain
    given = {key: value for key, value in train.items() if key != "batch_size"}
    return {**plain, "train": {"accumulate": "auto", **_customary({**plain, "train": given}), **given}}


def _customary(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ``train`` that depend on what is trained: a pretrained encoder is ruined by the learning rate that a fresh CNN wants."""
    text = {"lr": 5e-5, "batch_size": 32} if plain.get("task") == "text-classification" else {}
    # AdamW's decay is apart from its gradient; added to the gradient, as SGD and Adam do, 0.05 would be a hundred times what is usual.
    by_optimizer: dict[str, dict[str, float]] = {"sgd": {"lr": 0.05, "weight_decay": 5e-4}, "adam": {"weight_decay": 0.0}}
    found = {**text, **by_optimizer.get(str(check.look(plain, "train.optimizer")), {})}
    return {name: value for name, value in found.items() if f"train.{name}" not in check.stage_reasons(plain)}


def _objective_problems(plain: Mapping[str, Any], command: Command) -> list[Problem]:
    """What is wrong with the terms of all stages, and with the pair of terms and teacher."""
    stages = check.look(plain, "train.stages")
    stages = stages if isinstance(stages, list) else []
    own = {f"train.stages.{i}.objective": check.look(stage, "objective") for i, stage in enumerate(stages)}
    raw = {"objective": plain.get("objective"), **own}
    placed: dict[str, list[Term]] = {}
    problems: list[Problem] = []
    whole = True
    for where, items in raw.items():
        if not isinstance(items, list) or not items:
            whole = whole and items in (check.MISSING, None) and where != "objective"
            continue
        placed[where], fine = _terms(items)
        whole = whole and fine
        for p in check_terms(placed[where]):
            problems.append(Problem(re.sub(r"\[(\d+)\]", r".\1", p.where.replace("objective", where, 1)), p.message, p.hint))
    if problems or not whole:
        return problems
    if "objective" in check.stage_reasons(plain):
        placed.pop("objective")
    terms = {f"{where}.{i}": term for where, found in placed.items() for i, term in enumerate(found)}
    if command == "train":
        for where, term in terms.items():
            _, teacher = needs_of([term])
            if teacher.logits or teacher.features:
                text = f"{term.loss} needs a teacher, and `limbeck train` has none."
                problems.append(Problem(f"{where}.loss", text, "Use `limbeck distill --teacher ...`, or leave it out."))
    elif plain.get("teacher") is None:
        for where, term in terms.items():
            if check.self_taught(plain) and ("teacher.logits" in LOSSES[term.loss].reads or "teacher.features" in LOSSES[term.loss].reads):
                problems.append(
                    Problem(f"{where}.loss", f"{term.loss} needs a teacher, and the recipe names none.", "Name one, or leave it out.")
                )
    else:
        _, teacher = needs_of(list(terms.values()))
        if not (teacher.logits or teacher.features):
            used = ", ".join(dict.fromkeys(t.loss for t in terms.values()))
            text = f"no term of the objective uses the teacher (the terms: {used})."
            problems.append(Problem("objective", text, "Add kd (--alpha above 0), or use `limbeck train`."))
        problems += _kept_answers(plain, terms)
        problems += _of_several(plain, terms)
    problems += _of_peers(plain, terms)
    mixed = check.look(plain, "data.augment.mixup")
    if isinstance(mixed, int | float) and mixed > 0:
        for where, term in terms.items():
            if LOSSES[term.loss].hard_labels:
                text = f"{term.loss} needs one class a sample, and data.augment.mixup blends the labels of two."
                problems.append(Problem(f"{where}.loss", text, "Use kd, which reads no labels, or set mixup to 0."))
    return problems


def _of_peers(plain: Mapping[str, Any], terms: Mapping[str, Term]) -> Iterator[Problem]:
    """Peers and the losses that learn with them go together."""
    reading = {where: term.loss for where, term in terms.items() if "peers.logits" in LOSSES[term.loss].reads}
    there = bool(check.look(plain, "student.peers")) and check.look(plain, "student.peers") is not check.MISSING
    if there and not reading:
        text = "has no effect: no term of the objective learns with peers."
        yield Problem("student.peers", text, "Add {loss: mutual} or {loss: kdcl}, or leave it out.")
    firsts: dict[str, str] = {}  # by stage
    for where, loss in reading.items():
        first = firsts.setdefault(where.rpartition(".")[0], where)
        if not there:
            yield Problem(f"{where}.loss", f"{loss} learns with peers, and the student has none.", "Name them: student: {peers: [MODEL]}.")
        elif first != where:
            yield Problem(f"{where}.loss", f"{loss} would train the peers of {first} once more.", "Leave one of the two out.")


def _of_several(plain: Mapping[str, Any], terms: Mapping[str, Term]) -> list[Problem]:
    """What terms cannot learn from several teachers."""
    if len(paths.teachers_of(plain)) < 2:
        return []
    problems = [
        Problem(f"{where}.loss", f"{term.loss} compares layers, which is for one teacher; of several, logits are averaged.", "Name one.")
        for where, term in terms.items()
        if needs_of([term])[1].features
    ]
    ensemble = plain.get("ensemble")
    own = ensemble.get("temperature") if isinstance(ensemble, Mapping) else None
    average = ensemble.get("average") if isinstance(ensemble, Mapping) else None
    found = temperatures_of(list(terms.values()))
    if average == "logits":
        return problems
    for where, term in terms.items():
        if term.loss == "kd_sigmoid":
            text = "reads a probability of its own for each class, and ensemble.average: probabilities has them sum to 1."
            problems.append(Problem(f"{where}.loss", f"kd_sigmoid {text}", "Use ensemble.average: logits."))
    if own is None and (len(found) > 1 or "a schedule" in found):
        text = f"is to be given: probabilities are averaged at one temperature, and the terms have {', '.join(map(str, found))}."
        problems.append(Problem("ensemble.temperature", text, "Give the one at which they are averaged, or ensemble.average: logits."))
    return problems


def _terms(items: Sequence[Any]) -> tuple[list[Term], bool]:
    """The terms that can be read, and whether all of them can: a stand-in for one that is told already keeps the numbers of the others."""
    terms: list[Term] = []
    whole = True
    for item in items:
        try:
            terms.append(Term.model_validate(item))
        except ValidationError:
            loss = check.look(item, "loss")
            rest = {**item, "weight": 1.0} if isinstance(item, dict) and isinstance(loss, str) and loss else {"loss": "cross_entropy"}
            terms.append(Term.model_validate(rest))
            whole = False
    return terms, whole


def _kept_answers(plain: Mapping[str, Any], terms: Mapping[str, Term]) -> Iterator[Problem]:
    """What a term asks of a teacher's answers, against the form in which they are kept or given. terms: by where they stand."""
    value = defaulted(plain)
    _, needs = needs_of(list(terms.values()))
    model, store, codec = value("teacher.model"), value("teacher_cache.store"), value("teacher_cache.codec")
    if isinstance(model, str) and paths.split_name(model)[0] == "logits" and needs.features:
        yield Problem("objective", f"a term reads the teacher's layer '{needs.features[0]}', and {model} has logits alone.")
    if store == "features" and needs.logits:
        yield Problem("teacher_cache.store", "is features, and a term of the objective reads the teacher's logits.", "Use both.")
    if store == "logits" and needs.features:
        yield Problem("teacher_cache.store", f"is logits, and a term reads the teacher's layer '{needs.features[0]}'.", "Use both.")
    if store in ("features", "both") and not needs.features:
        yield Problem("teacher_cache.store", f"is {store}, and no term of the objective names a layer of the teacher.", "Leave it out.")
    if codec != "sparse" or value("teacher_cache.mode") == "off" or value("teacher_cache.views") == "live":
        return
    told = value("teacher_cache.temperature")
    temperatures: list[Any] = [told] if isinstance(told, int | float) else []
    for where, term in terms.items():
        entry = LOSSES[term.loss]
        if "teacher.logits" not in entry.reads:
            continue
        if entry.sparse is None:
            exact = listed([e.name for e in LOSSES.values() if e.sparse is not None])
            text = f"{term.loss} would be biased on the sparse codec, which is for {exact} alone."
            yield Problem(f"{where}.loss", text, "Use teacher_cache.codec: float16.")
            continue
        if (term.model_extra or {}).get("standardize"):
            text = "is true, which takes all logits, and the sparse codec keeps a few."
            yield Problem(f"{where}.standardize", text, "Use teacher_cache.codec: float16.")
            continue
        own = (term.model_extra or {}).get("temperature", entry.parameters["temperature"].default)
        if not isinstance(own, int | float):
            yield Problem(
                f"{where}.temperature", "changes over training, and the sparse codec keeps one temperature.", "Use codec: float16."
            )
        elif temperatures and own != temperatures[0]:
            text = f"is {own:g}, and the sparse codec keeps probabilities of temperature {temperatures[0]:g}: any other would be biased."
            yield Problem(f"{where}.temperature", text, "Use codec: float16, or one temperature.")
        else:
            temperatures.append(own)
    if not needs.logits:
        yield Problem("teacher_cache.codec", "sparse is for logits, and no term reads the teacher's.", "Leave it out.")


def _respelt(problem: Problem, spelt: Mapping[str, str]) -> Problem:
    key = problem.where
    while key and key not in spelt:
        key = key.rpartition(".")[0]
    if not key:
        return problem
    rest = problem.where.removeprefix(key)
    return Problem(f"{spelt[key]}{rest}", problem.message, problem.hint)
