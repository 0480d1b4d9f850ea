"""What is wrong with a recipe, all of it at once and before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from limbeck import _recipe_paths as paths
from limbeck.errors import Problem, listed, nearest

Schema = Mapping[str, Any]
Given = Mapping[str, Any]
MISSING = object()


# --- reading plain values ---


def look(data: Any, path: str) -> Any:
    """The value at ``train.lr`` or ``objective.0.loss``; MISSING where there is none."""
    for key in path.split("."):
        if isinstance(data, Mapping) and key in data:
            data = data[key]
        elif isinstance(data, list) and key.isdigit() and int(key) < len(data):
            data = data[int(key)]
        else:
            return MISSING
    return data


def given(data: Given, path: str) -> bool:
    """Whether a person wrote a value there (``null`` says: does not apply)."""
    return look(data, path) not in (MISSING, None)


def shown(value: Any, limit: int = 60) -> str:
    """A value as it stood in the recipe, cut to a readable length."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


# --- the schema in words ---


def resolve(schema: Schema, root: Schema) -> Schema:
    """``schema`` with a reference followed."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def branches(schema: Schema, root: Schema) -> list[Schema]:
    """The alternatives of a schema, references followed, ``null`` left out."""
    options = schema.get("anyOf", [schema])
    return [r for r in (resolve(option, root) for option in options) if r.get("type") != "null"]


def in_words(schema: Schema, root: Schema) -> str:
    """What a schema allows: ``a number greater than 0``, ``one of adamw, adam, sgd``, ``a whole number of at least 0 or 'auto'``."""
    schema = resolve(schema, root)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(in_words(option, root) for option in schema["anyOf"]))
    if "const" in schema:
        return shown(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(str(v) for v in schema["enum"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return str(schema["expected"]) if "expected" in schema else ("a whole number" if kind == "integer" else "a number") + _range(schema)
    if kind == "array":
        if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])}: " + ", ".join(in_words(s, root) for s in schema["prefixItems"])
        items = resolve(schema.get("items", {}), root)
        return f"a list of {'mappings' if items.get('type') == 'object' else in_words(items, root).removeprefix('one of ')}"
    if kind == "object":
        named = ", ".join(schema.get("properties", {}))
        return f"a mapping with the keys {named}" if named else "a mapping"
    if kind == "string":
        return str(schema.get("expected", "text"))
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "another value")


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _range(schema: Schema) -> str:
    low = f"at least {schema['minimum']:g}" if "minimum" in schema else ""
    low = f"greater than {schema['exclusiveMinimum']:g}" if "exclusiveMinimum" in schema else low
    high = f"at most {_plain(schema['maximum'])}" if "maximum" in schema and schema["maximum"] < 2**40 else ""
    high = f"less than {schema['exclusiveMaximum']:g}" if "exclusiveMaximum" in schema else high
    both = " and ".join(part for part in (low, high) if part)
    if not both:
        return ""
    return f" {both}" if both.startswith(("greater", "less")) else f" of {both}"


# --- what the schema finds ---


def schema_problems(errors: Sequence[Mapping[str, Any]], data: Given, root: Schema) -> list[Problem]:
    """pydantic's findings as sentences, one for each key, in the order in which they were found."""
    found: dict[str, Problem] = {}
    for error in errors:
        problem = _sentence(error, data, root)
        if problem is not None:
            found.setdefault(problem.where, problem)
    return list(found.values())


def _sentence(error: Mapping[str, Any], data: Given, root: Schema) -> Problem | None:
    schema: Schema = root
    value: Any = data
    keys: list[str] = []
    location = list(error["loc"])
    while location:
        options = branches(schema, root)
        if len(options) > 1:  # pydantic names the alternative that it tried: not a key, and of use only where a mapping was given
            objects = [o for o in options if o.get("type") == "object"]
            lists = [o for o in options if o.get("type") == "array" and resolve(o.get("items", {}), root).get("type") == "object"]
            tag = location.pop(0)
            if isinstance(value, list) and lists:
                if not str(tag).startswith("list["):
                    return None
                schema = lists[0]
                continue
            if not isinstance(value, Mapping) or not objects:
                return _unfit(keys, value, schema, root)
            if tag not in [o.get("title") for o in objects]:
                return None
            schema = next(o for o in objects if o.get("title") == tag)
            continue
        part = location.pop(0)
        schema = options[0] if options else schema
        properties = schema.get("properties", {})
        if not location and error["type"] == "extra_forbidden":
            hint = nearest(str(part), properties) or f"There are {listed(list(properties), 20)}."
            return Problem(".".join([*keys, str(part)]), "no such key.", hint)
        if not location and error["type"] == "missing":
            if isinstance(part, int):
                return _unfit(keys, value, schema, root)
            return Problem(".".join([*keys, str(part)]), f"is missing, expected {in_words(properties.get(part, {}), root)}.")
        keys.append(str(part))
        value = look(value, str(part))
        if isinstance(part, int):
            prefix = schema.get("prefixItems")
            schema = prefix[part] if prefix and part < len(prefix) else schema.get("items", {})
        else:
            schema = properties.get(part, {})
    return _unfit(keys, value, schema, root)


def _unfit(keys: list[str], value: Any, schema: Schema, root: Schema) -> Problem:
    words = [str(v) for option in branches(schema, root) for v in option.get("enum", [option["const"]] if "const" in option else [])]
    hint = nearest(value, words) if isinstance(value, str) else ""
    return Problem(".".join(keys), f"got {shown(value)}, expected {in_words(schema, root)}.", hint)


# --- settings that would be ignored ---


def not_applying(data: Given, value: Any, command: str) -> dict[str, str]:
    """Key -> why it has no effect in this recipe. Such a key is an error when given, and ``null`` when a complete recipe is written.

    ``value(path)`` is what was given or the default.
    """
    reasons: dict[str, str] = {}
    optimizer, task, kind = value("train.optimizer"), value("task"), paths.source_kind(value("data.source"))
    if optimizer in ("adam", "adamw"):
        reasons |= dict.fromkeys(("train.momentum", "train.nesterov"), f"is for the optimizer sgd, and train.optimizer is {optimizer}.")
    if optimizer == "sgd":
        reasons["train.betas"] = "is for the optimizers adam and adamw, and train.optimizer is sgd."
    if "step" not in (value("train.schedule"), *_of_teachers(data, "train.schedule")):
        reasons |= dict.fromkeys(
            ("train.milestones", "train.decay"), f"is for the schedule step, and train.schedule is {value('train.schedule')}."
        )
    if task == "image-classification":
        keys = ("data.text", "data.text_pair", "data.max_length")
        reasons |= dict.fromkeys(keys, f"is for texts, and the task is {task}.")
        if kind in paths.IMAGE_SOURCES:
            reasons["data.label"] = f"names a column, and {kind} has none."
    if task == "text-classification":
        layouts = ("train.layout", *(f"{where}.layout" for where, _ in paths.teachers_of(data)))
        reasons |= dict.fromkeys(layouts, f"is for images, and the task is {task}.")
    if kind == "digits":
        files = ("data.test", "data.valid", "data.unlabelled")
        reasons |= dict.fromkeys(files, "has no effect on the embedded digits, which take no further files.")
    if given(data, "data.test"):
        reasons.setdefault("data.test_fraction", "has no effect where data.test names the test data.")
    if given(data, "data.valid"):
        reasons.setdefault("data.valid_fraction", "has no effect where data.valid names the validation data.")
    reasons |= _cache_reasons(value) | stage_reasons(data)
    if not any(isinstance(term, Mapping) and term.get("weight") == "auto" for terms in _objectives_of(data) for term in terms):
        reasons["train.balance_every"] = "has no effect where no term has weight: auto."
    tables = [where for where, _ in paths.teachers_of(data) if str(look(data, f"{where}.model")).startswith("logits:")]
    for where in tables:
        names = [f"{where}.{name}" for name in ("weights", "train", "precision", "layout")]
        reasons |= dict.fromkeys(names, "has no effect where the teacher is a file of logits.")
    if tables and len(tables) == len(paths.teachers_of(data)):
        reasons["teacher_cache"] = "has no effect where the teacher is a file of logits."
    if len(paths.teachers_of(data)) < 2:
        reasons["ensemble"] = "is for several teachers (teacher: [A, B])."
    elif value("ensemble.average") == "logits":
        reasons["ensemble.temperature"] = "has no effect where ensemble.average is logits, which are averaged as they are."
    if command == "train" or (not paths.teachers_of(data) and self_taught(data)):
        reasons["teacher_cache"] = "has no effect without a teacher."
        if self_taught(data, ("mean_teacher",)):
            return reasons
        reasons["data.unlabelled"] = "has no effect without a teacher: nothing is learned from samples that have no label."
    return reasons


def _of_teachers(data: Given, key: str) -> list[Any]:
    """What a person wrote under a key of each teacher."""
    return [look(data, f"{where}.{key}") for where, _ in paths.teachers_of(data)]


def _objectives_of(data: Given) -> list[list[Any]]:
    found = [look(data, "objective"), *(look(stage, "objective") for stage in _stages_of(data))]
    return [terms for terms in found if isinstance(terms, list)]


def _cache_reasons(value: Any) -> dict[str, str]:
    names = [f"teacher_cache.{name}" for name in ("path", "store", "codec", "temperature", "top", "samples")]
    if value("teacher_cache.mode") == "off":
        return dict.fromkeys(names, "has no effect where teacher_cache.mode is off.")
    if value("teacher_cache.views") == "live":
        return dict.fromkeys(names, "has no effect where teacher_cache.views is live: the teacher is asked in every step.")
    if value("teacher_cache.codec") != "sparse":
        return dict.fromkeys(names[3:], "is for the codec sparse.")
    return {}


def stage_reasons(data: Given) -> dict[str, str]:
    """What every stage has of its own is not read from the whole recipe, unless a teacher is trained first by it."""
    stages = _stages_of(data)
    if not stages:
        return {}
    trained = [training for training in _of_teachers(data, "train") if training not in (MISSING, None)]
    trains = bool(trained)
    reasons = {}
    if all(given(s, "objective") for s in stages) and not trains:
        reasons["objective"] = "has no effect where every stage of train.stages has an objective of its own."
    if all(given(s, "lr") for s in stages) and not any(not given(training, "lr") for training in trained):
        reasons["train.lr"] = "has no effect where every stage of train.stages has an lr of its own."
    return reasons


def _stages_of(data: Given) -> list[Given]:
    """The stages that a person wrote, those that are mappings."""
    stages = look(data, "train.stages")
    return [s for s in stages if isinstance(s, Mapping)] if isinstance(stages, list) else []


def recipe_problems(data: Given, value: Any, command: str) -> Iterable[Problem]:
    """Everything beyond types and ranges. Takes plain values that need not fit the schema, so that all problems are told together."""
    for path, reason in not_applying(data, value, command).items():
        if given(data, path) and path != "objective":  # which is filled in where it was left out; see reading.py
            yield Problem(path, reason, "Leave it out.")
    yield from _roles(data, value, command)
    yield from _data(data, value)
    yield from _training(data, value)
    yield from _stages(data, value)
    for name in ("export", "track"):
        items = value(name)
        if isinstance(items, list) and len({str(i) for i in items}) < len(items):
            yield Problem(name, f"names something twice: {shown(items)}.")


def _roles(data: Given, value: Any, command: str) -> Iterable[Problem]:
    teacher = look(data, "teacher")
    if command == "train" and teacher not in (MISSING, None):
        yield Problem("teacher", "has no effect in `limbeck train`, which trains the student alone.", "Use `limbeck distill`.")
    elif command == "distill" and teacher in (MISSING, None) and not self_taught(data):
        yield Problem("teacher", "is missing: name the model to learn from (--teacher).", "To train without one, use `limbeck train`.")
    if command == "train" and look(data, "baseline") is True:
        yield Problem("baseline", "has no effect in `limbeck train`: a training has no baseline beside it.", "Leave it out.")
    for where, _ in paths.teachers_of(data):
        yield from paths.check_model(look(data, f"{where}.model"), f"{where}.model", "teacher")
    for where, _ in paths.students_of(data):
        yield from paths.check_model(look(data, f"{where}.model"), f"{where}.model", "student")
    yield from _several(data, value)


SELF_TAUGHT = ("byot", "mutual", "kdcl", "mean_teacher")
"""Losses that teach without a teacher."""


def self_taught(data: Given, names: Sequence[str] = SELF_TAUGHT) -> bool:
    """Whether a student learns from itself or its peers, by one of these losses."""
    return any(isinstance(term, Mapping) and term.get("loss") in names for terms in _objectives_of(data) for term in terms)


def _several(data: Given, value: Any) -> Iterable[Problem]:
    """What several teachers cannot do, or say together."""
    teachers = paths.teachers_of(data)
    if len(teachers) < 2:
        return
    for where, _ in teachers:
        if look(data, f"{where}.placement") not in (MISSING, None, "same"):
            yield Problem(f"{where}.placement", "is for one teacher; several sit beside the student.", "Leave it out.")
    if value("teacher_cache.codec") == "sparse":
        yield Problem("teacher_cache.codec", "is sparse, which is for one teacher: several are averaged over all classes.", "Use float16.")
    weights = value("ensemble.weights")
    if isinstance(weights, list) and all(_number(w) for w in weights):
        if len(weights) != len(teachers):
            yield Problem("ensemble.weights", f"has {len(weights)} numbers, and there are {len(teachers)} teachers.")
        elif not any(weights):
            yield Problem("ensemble.weights", "is 0 for every teacher; give one of them a number above 0.")


def _data(data: Given, value: Any) -> Iterable[Problem]:
    source, task = value("data.source"), value("task")
    kind = paths.source_kind(source)
    wrong = paths.check_source(source, "data.source")
    yield from wrong
    suggested = paths.task_of(source)
    if task is MISSING and not wrong and isinstance(source, str) and source:
        yield Problem("task", f"cannot be told from the data '{source}'; say image-classification or text-classification (--task).")
    if suggested and task in ("image-classification", "text-classification") and task != suggested:
        yield Problem("task", f"is {task}, but {kind} data are for {suggested}.")
    augment = look(data, "data.augment")
    if task == "text-classification" and augment not in (MISSING, None, "none"):
        yield Problem("data.augment", f"is for images, and the task is {task}.", "Leave it out.")
    if isinstance(augment, Mapping):
        if augment.get("crop") is not None and augment.get("resized_crop") is not None:
            yield Problem("data.augment", "has both crop and resized_crop; choose one of them.")
        box = augment.get("resized_crop")
        if isinstance(box, list) and len(box) == 2 and all(_number(b) for b in box) and box[0] > box[1]:
            yield Problem("data.augment.resized_crop", f"got {shown(box)}, expected the smaller fraction first.")
    if look(data, "data.corrupt") == "skip" and kind in ("digits", "npz"):
        yield Problem("data.corrupt", f"is for image files, and {kind} has none.", "Leave it out.")
    test, valid = value("data.test_fraction"), value("data.valid_fraction")
    if _number(test) and _number(valid) and test + valid >= 1:
        yield Problem("data.test_fraction", f"{test:g} and data.valid_fraction {valid:g} leave nothing to train on.")
    limit, labelled = value("data.train_limit"), value("data.labelled_limit")
    if _number(limit) and _number(labelled) and labelled > limit:
        yield Problem("data.labelled_limit", f"got {labelled}, more than data.train_limit ({limit}).")


def _training(data: Given, value: Any) -> Iterable[Problem]:
    if value("train.optimizer") == "sgd" and value("train.momentum") == 0 and look(data, "train.nesterov") is True:
        yield Problem("train.nesterov", "needs a momentum, and train.momentum is 0.")
    yield from _milestones(data, value)
    accumulate, batch = value("train.accumulate"), value("train.batch_size")
    if look(data, "train.batch_size") == "auto" and look(data, "train.accumulate") not in (MISSING, None, "auto"):
        text = "is auto, which looks for the number of microbatches that train.accumulate gives already."
        yield Problem("train.batch_size", text, "Leave train.accumulate out, or give train.batch_size as a number.")
    if _number(accumulate) and _number(batch) and accumulate > batch > 0:
        yield Problem("train.accumulate", f"got {accumulate}, more microbatches than train.batch_size ({batch}) has samples.")
    if value("teacher_cache.mode") == "require" and value("teacher_cache.views") == "live":
        yield Problem("teacher_cache.mode", "is require, but teacher_cache.views is live, which asks the teacher in every step.")
    yield from _placement(value)
    device, precision = value("train.device"), value("train.precision")
    if "auto" in (accumulate, batch) and device == "mps":
        yield Problem("train.accumulate", "auto is for the devices cpu and cuda, and train.device is mps.", "Give a number.")
    if value("train.deterministic") is True and device == "mps":
        yield Problem("train.deterministic", "true is for the devices cpu and cuda, and train.device is mps.", "Leave it out.")
    if not isinstance(device, str):
        return
    own = [(f"{where}.precision", look(data, f"{where}.precision")) for where, _ in paths.teachers_of(data)]
    for key, name in (("train.precision", precision), *own):
        if name == "float64" and device == "mps":
            yield Problem(key, "float64 is not available on the device mps.")
        if name == "fp16" and device.startswith(("cpu", "mps")):
            yield Problem(key, f"fp16 needs a CUDA device, and train.device is {device}.", "Use bf16, or auto.")
        elif name == "fp16" and device == "auto" and _cuda_devices() == 0:
            yield Problem(key, "fp16 needs a CUDA device, and none is available here.", "Use bf16, or auto.")
    yield from _device("train.device", device, "Use auto.")


def _milestones(data: Given, value: Any) -> Iterable[Problem]:
    given = value("train.milestones")
    if given in (MISSING, None):
        if "step" in (value("train.schedule"), *_of_teachers(data, "train.schedule")):
            yield Problem("train.milestones", "is missing: the schedule step needs to know when.", "Example: milestones: [0.5, 0.75].")
    elif isinstance(given, list) and all(_number(part) for part in given) and any(b <= a for a, b in pairwise(given)):
        yield Problem("train.milestones", f"got {given}, expected numbers that rise.")


def _placement(value: Any) -> Iterable[Problem]:
    """The teacher's device is there, and can do what it is asked for."""
    placement, model = value("teacher.placement"), value("teacher.model")
    if isinstance(model, str) and model.startswith("logits:") and placement not in (MISSING, None, "same"):
        yield Problem("teacher.placement", "has no effect where the teacher is a file of logits.", "Leave it out.")
    if not isinstance(placement, str) or not placement.startswith("device:"):
        return
    device = placement.removeprefix("device:")
    yield from _device("teacher.placement", device, "Use same.", "device:")
    own, train = value("teacher.precision"), value("train.precision")
    if "fp16" in (own, train if own in (MISSING, None, "auto") else None) and device in ("cpu", "mps"):
        hint = "Give teacher.precision: float32, or bf16."
        yield Problem("teacher.placement", f"is {placement}, and the teacher's precision is fp16, which needs a CUDA device.", hint)


def _device(where: str, device: str, hint: str, kind: str = "") -> Iterable[Problem]:
    """A device that torch could name is there. kind: what stands before its name."""
    got = f"got '{kind}{device}'"
    if device.startswith("cuda"):
        count, index = _cuda_devices(), device.partition(":")[2] or "0"
        if count == 0:
            yield Problem(where, f"{got}, but no CUDA device is available here.", hint)
        elif index.isdigit() and int(index) >= count:
            yield Problem(where, f"{got}, but there are {count} CUDA devices (cuda:0 to cuda:{count - 1}).")
    if device == "mps":
        import torch

        if not torch.backends.mps.is_available():
            yield Problem(where, f"{got}, which this machine does not have.", hint)


def _stages(data: Given, value: Any) -> Iterable[Problem]:
    stages, task = look(data, "train.stages"), value("task")
    if not isinstance(stages, list) or not stages:
        return
    own = {"text-classification": ("resolution", "images"), "image-classification": ("max_length", "texts")}.get(task)
    for i, stage in enumerate(stages):
        if own is not None and isinstance(stage, Mapping) and given(stage, own[0]):
            yield Problem(f"train.stages.{i}.{own[0]}", f"is for {own[1]}, and the task is {task}.", "Leave it out.")
    counts = [look(stage, "epochs") for stage in stages]
    epochs = look(data, "train.epochs")
    if given(data, "train.epochs") and _number(epochs) and all(_number(c) for c in counts) and epochs != sum(counts):
        text = f"is {shown(epochs)}, and the stages of train.stages have {sum(counts)} epochs in all."
        yield Problem("train.epochs", text, "Leave it out: it is the sum of theirs.")


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def differences(a: Any, b: Any, path: str) -> list[str]:
    """``train.lr: 0.001 -> 0.01`` for every difference of two plain values."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [line for k in keys for line in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}.{i}")]
    return [] if a == b and type(a) is type(b) else [f"{path}: {shown(a, 300)} -> {shown(b, 300)}"]
