"""A table of mistakes: exit 2, readable sentences that name the culprit, no traceback, and nothing written."""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer

from limbeck import cli
from limbeck._cli_run import call

MODELS = """
from torch import nn

NUMBER = 3

def net(num_classes=10, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

def words(num_classes):
    return "no module"

def breaks(num_classes):
    raise RuntimeError("the pipe is blocked")
"""

GOOD = "teacher: python:models.py:net\nstudent: python:models.py:net\ndata: digits\n"
ALONE = "student: python:models.py:net\ndata: digits\n"
SEVERAL = GOOD.replace("teacher: python:models.py:net", "teacher: ['python:models.py:net', 'python:models.py:net']")
PLACED = "teacher: {{model: 'python:models.py:net', placement: {}}}\nstudent: python:models.py:net\ndata: digits\n"
TEXTS = "teacher: bert-large\nstudent: bert-base\n"
DISTILL = ("distill", "--teacher", "python:models.py:net", "--student", "python:models.py:net")
DIGITS = (*DISTILL, "--data", "digits")
TRAIN = ("train", "--student", "python:models.py:net")


@dataclass(frozen=True)
class Row:
    """A command line (and the recipe that it names as ``r.yaml``), and what the message must say."""

    arguments: tuple[str, ...]
    said: tuple[str, ...]
    recipe: str = ""


def recipe(text: str, *said: str, command: str = "distill", options: tuple[str, ...] = ()) -> Row:
    return Row((command, "r.yaml", *options), said, text)


def line(arguments: tuple[str, ...], *said: str) -> Row:
    return Row(arguments, said)


# Found by the recipe alone.
READING = {
    # the file
    "no recipe": line(("distill", "recipe.yaml"), "recipe.yaml: no such file"),
    "nearest file": line(("distill", "modles.py"), "no such file", "Did you mean 'models.py'?"),
    "a folder as recipe": line(("distill", "photos"), "photos", "folder"),
    "not text": line(("distill", "good.npz"), "good.npz", "UTF-8"),
    "not YAML": recipe("teacher: [a\nstudent: b\n", "r.yaml, line 2", "not YAML"),
    "a list": recipe("- teacher\n", "a list", "expected a mapping"),
    "empty": recipe("", "empty"),
    "two keys of one name": recipe(GOOD + "seed: 1\nseed: 2\n", "line 5", "'seed' is given twice"),
    "a tag": recipe(GOOD + "seed: !!python/name:os.system\n", "tags"),
    "a bomb": recipe("a: &a [x]\n" + "".join(f"b{i}: *a\n" for i in range(99)), "aliases"),
    # keys
    "unknown key": recipe(GOOD + "sed: 1\n", "sed: no such key. Did you mean 'seed'?"),
    "unknown key in a section": recipe(GOOD + "train: {epoch: 1}\n", "train.epoch: no such key. Did you mean 'epochs'?"),
    "unknown key in data": recipe(TEXTS + "data: {source: csv:good.csv, lable: y}\n", "data.lable", "Did you mean 'label'?"),
    "unknown augmentation": recipe(GOOD.replace("digits", "{source: digits, augment: {flp: true}}"), "data.augment.flp", "'flip'"),
    "augment by a wrong name": recipe(GOOD.replace("digits", "{source: digits, augment: standrad}"), "data.augment", "'standard'"),
    "nothing but a teacher": recipe("teacher: a\n", "student: is missing", "data: is missing"),
    "no teacher": recipe("student: a\ndata: digits\n", "teacher: is missing", "limbeck train"),
    "several teachers": recipe(
        SEVERAL + "ensemble: {avrage: logits, weights: [1]}\nteacher_cache: {codec: sparse}\n",
        "3 problems",
        "ensemble.avrage: no such key. Did you mean 'average'?",
        "ensemble.weights: has 1 numbers, and there are 2 teachers",
        "teacher_cache.codec: is sparse, which is for one teacher",
    ),
    "weights of nobody": recipe(SEVERAL + "ensemble: {weights: [0, 0]}\n", "ensemble.weights: is 0 for every teacher"),
    "weights by a wrong name": recipe(SEVERAL + "ensemble: {weights: confidense}\n", "ensemble.weights", "Did you mean 'confidence'?"),
    "two temperatures": recipe(
        SEVERAL + "objective: [{loss: kd, temperature: 2}, {loss: dist}]\n", "ensemble.temperature: is to be given", "2.0, 1.0"
    ),
    "a temperature for logits": recipe(SEVERAL + "ensemble: {average: logits, temperature: 2}\n", "ensemble.temperature: has no effect"),
    "layers of several": recipe(
        SEVERAL + "objective: [{loss: kd}, {loss: hint, student: '1', teacher: '1'}]\n", "objective.1.loss: hint compares layers"
    ),
    "sigmoids of several": recipe(SEVERAL + "objective: [{loss: kd_sigmoid}]\n", "kd_sigmoid reads a probability of its own"),
    "mutual without peers": recipe(ALONE + "objective: [cross_entropy, mutual]\n", "objective.1.loss: mutual learns with peers"),
    "peers that nobody reads": recipe(
        ALONE.replace("student: python:models.py:net", "student: {model: 'python:models.py:net', peers: ['timmy:a']}")
        + "teacher: python:models.py:net\n",
        "student.peers: has no effect",
        "student.peers.0.model: got 'timmy:a'",
    ),
    "peers that are taught twice": recipe(
        ALONE.replace("student: python:models.py:net", "student: {model: 'python:models.py:net', peers: ['python:models.py:net']}")
        + "objective: [cross_entropy, mutual, kdcl]\n",
        "objective.2.loss: kdcl would train the peers of objective.1 once more",
    ),
    "peers that are taught twice in a later stage": recipe(
        ALONE.replace("student: python:models.py:net", "student: {model: 'python:models.py:net', peers: ['python:models.py:net']}")
        + "train: {stages: [{epochs: 1, objective: [cross_entropy, kdcl]}, {epochs: 1, objective: [cross_entropy, mutual, kdcl]}]}\n",
        "train.stages.1.objective.2.loss: kdcl would train the peers of train.stages.1.objective.1 once more",
    ),
    "a peer that is not there": recipe(
        ALONE.replace("student: python:models.py:net", "student: {model: 'python:models.py:net', peers: ['python:peers.py:net']}")
        + "objective: [cross_entropy, mutual]\n",
        "student.peers.0.model: no such file: 'peers.py'",
    ),
    "what nobody says with peers alone": recipe(
        ALONE.replace("student: python:models.py:net", "student: {model: 'python:models.py:net', peers: ['python:models.py:net']}")
        + "objective: [cross_entropy, mutual]\nteacher_cache: {mode: off}\n",
        "teacher_cache: has no effect without a teacher",
    ),
    "an ensemble of one": recipe(GOOD + "ensemble: {average: logits}\n", "ensemble: is for several teachers"),
    "no teachers": recipe(GOOD.replace("teacher: python:models.py:net", "teacher: []"), "teacher: got []"),
    "the second of several": recipe(
        GOOD.replace("teacher: python:models.py:net", "teacher: [{model: timmy:x, placment: same}, {model: 'run:gone', placement: auto}]"),
        "4 problems",
        "teacher.0.placment: no such key. Did you mean 'placement'?",
        "teacher.0.model: got 'timmy:x'",
        "teacher.1.placement: is for one teacher",
        "teacher.1.model: no such folder: 'gone'",
    ),
    "an empty section": recipe(GOOD + "train:\n", "train: got nothing"),
    # values
    "words for numbers": recipe(GOOD + "train: {epochs: abc, lr: fast}\n", "2 problems", "train.epochs", "'abc'", "train.lr", "'fast'"),
    "true for a number": recipe(GOOD + "train: {epochs: true}\n", "train.epochs", "got true"),
    "yes for true": recipe(GOOD + "export: yes\n", "export.0", "got 'yes'"),
    "zero epochs": recipe(GOOD + "train: {epochs: 0}\n", "train.epochs", "at least 1"),
    "half an epoch": recipe(GOOD + "train: {epochs: 0.5}\n", "train.epochs", "whole number"),
    "a negative rate": recipe(GOOD + "train: {lr: -1e-3}\n", "train.lr", "greater than 0"),
    "an infinite rate": recipe(GOOD + "train: {lr: .inf}\n", "train.lr"),
    "no number": recipe(GOOD + "train: {weight_decay: .nan}\n", "train.weight_decay"),
    "an unknown optimizer": recipe(GOOD + "train: {optimizer: adma}\n", "train.optimizer", "Did you mean 'adam'?"),
    "an unknown precision": recipe(GOOD + "train: {precision: half}\n", "train.precision", "bf16"),
    "an unknown device": recipe(GOOD + "train: {device: gpu}\n", "train.device", "cuda:N"),
    "an unknown export": recipe(GOOD + "export: [onnx, tflite]\n", "export.1", "'tflite'", "torchscript"),
    "an export twice": recipe(GOOD + "export: [onnx, onnx]\n", "export", "twice"),
    "warm-up in steps": recipe(GOOD + "train: {warmup: 500}\n", "train.warmup", "less than 1"),
    "one beta": recipe(GOOD + "train: {betas: [0.9]}\n", "train.betas", "a list of 2"),
    "more microbatches than samples": recipe(GOOD + "train: {batch_size: 4, accumulate: 8}\n", "train.accumulate", "train.batch_size"),
    "splits that leave nothing": recipe(GOOD.replace("digits", "{source: digits, test_fraction: 0.9}"), "data.test_fraction"),
    "more labels than rows": recipe(GOOD.replace("digits", "{source: digits, train_limit: 10, labelled_limit: 20}"), "labelled_limit"),
    "half types on a CPU": recipe(GOOD + "train: {precision: fp16, device: cpu}\n", "train.precision", "CUDA"),
    "checkpointing as a word": recipe(
        GOOD + "train: {gradient_checkpointing: blocks}\n", "gradient_checkpointing", "true or false or a list"
    ),
    "checkpointing of nothing": recipe(GOOD + "train: {gradient_checkpointing: []}\n", "gradient_checkpointing"),
    "an automatic batch by a wrong name": recipe(GOOD + "train: {batch_size: atuo}\n", "train.batch_size", "'auto'"),
    "an automatic cut by a wrong name": recipe(GOOD + "train: {accumulate: atuo}\n", "train.accumulate", "Did you mean 'auto'?"),
    "an automatic batch that is cut": recipe(
        GOOD + "train: {batch_size: auto, accumulate: 4}\n", "train.batch_size", "Leave train.accumulate out"
    ),
    "an automatic cut on mps": recipe(GOOD + "train: {accumulate: auto, device: mps}\n", "train.accumulate", "cpu and cuda"),
    "a teacher's place without its kind": recipe(PLACED.format("cuda:1"), "teacher.placement", "got 'cuda:1'", "device:NAME", "ranks:K"),
    "a device spelled wrong": recipe(PLACED.format("device:cpu:1"), "teacher.placement", "got 'device:cpu:1'", "device:cpu"),
    "no ranks for a teacher": recipe(PLACED.format("ranks:0"), "teacher.placement", "got 'ranks:0'"),
    "a teacher's device that is not there": recipe(
        PLACED.format("device:cuda:63"), "teacher.placement", "got 'device:cuda:63'", "CUDA device"
    ),
    "half types of a teacher on a CPU": recipe(
        PLACED.format("device:cpu, precision: fp16"), "teacher.placement: is device:cpu", "fp16", "teacher.precision"
    ),
    "a place for a file of logits": recipe(
        GOOD.replace("python:models.py:net", "{model: 'logits:good.npy', placement: device:cpu}", 1), "teacher.placement", "file of logits"
    ),
    # settings that would be ignored
    "momentum with adamw": recipe(GOOD + "train: {momentum: 0.9}\n", "train.momentum", "sgd"),
    "betas with sgd": recipe(GOOD + "train: {optimizer: sgd, betas: [0.9, 0.99]}\n", "train.betas", "adam"),
    "texts' settings for images": recipe(GOOD.replace("digits", "{source: digits, max_length: 64}"), "data.max_length", "texts"),
    "dkd with blended labels": recipe(
        "teacher: python:models.py:net\nstudent: python:models.py:net\ndata: {source: digits, augment: {mixup: 0.2}}\nobjective: [{loss: dkd}]\n",
        "objective.0.loss",
        "mixup blends",
    ),
    "standardised logits of a few": recipe(
        GOOD + "objective: [{loss: kd, standardize: true}]\nteacher_cache: {codec: sparse}\n", "objective.0.standardize", "float16"
    ),
    "standardize in words": recipe(GOOD + "objective: [{loss: kd, standardize: perhaps}]\n", "objective.0.standardize", "true or false"),
    "images' settings for texts": recipe(TEXTS + "data: {source: csv:good.csv, augment: {mixup: 0.2}}\n", "data.augment", "images"),
    "two sizes of test data": recipe(GOOD.replace("digits", "{source: npz:good.npz, test: good.npz, test_fraction: 0.5}"), "test_fraction"),
    "a teacher in train": recipe(GOOD, "teacher", "limbeck distill", command="train"),
    "a cache in train": recipe("student: a\ndata: digits\nteacher_cache: {views: 2}\n", "teacher_cache", command="train"),
    "unlabelled data in train": recipe("student: a\ndata: {source: npz:good.npz, unlabelled: good.npz}\n", "unlabelled", command="train"),
    # objectives
    "an unknown loss": recipe(GOOD + "objective: [{loss: kdd}]\n", "objective.0.loss", "Did you mean 'kd'?"),
    "an unknown parameter": recipe(GOOD + "objective: [{loss: kd, temp: 3}]\n", "objective.0.temp", "temperature"),
    "temperature 0": recipe(GOOD + "objective: [{loss: kd, temperature: 0}]\n", "objective.0.temperature"),
    "a negative weight": recipe(GOOD + "objective: [{loss: kd, weight: -1}]\n", "objective.0.weight"),
    "no weight at all": recipe(GOOD + "objective: [{loss: kd, weight: 0}]\n", "objective", "0"),
    "no term": recipe(GOOD + "objective: []\n", "objective"),
    "a teacher that nobody asks": recipe(GOOD + "objective: [cross_entropy]\n", "objective", "uses the teacher"),
    "kd in train": recipe("student: a\ndata: digits\nobjective: [kd]\n", "objective.0.loss", "kd needs a teacher", command="train"),
    "a broken schedule": recipe(GOOD + "objective: [{loss: kd, weight: {start: 1, stop: 0}}]\n", "weight.stop", "weight.end"),
    "a hint without layers": recipe(GOOD + "objective: [{loss: hint}]\n", "objective.0", "student", "teacher"),
    "lists of layers of two lengths": recipe(
        GOOD + "objective: [{loss: hint, student: ['1', '3'], teacher: '1'}]\n", "objective.0.teacher", "has 1 layer, and student has 2"
    ),
    "several layers of a loss of one": recipe(
        GOOD + "objective: [{loss: cka, student: ['1'], teacher: ['1']}]\n", "objective.0.student", "the path of a layer"
    ),
    "layers chosen and given": recipe(
        GOOD + "objective: [{loss: hint, layers: auto, student: '1'}]\n", "objective.0.student", "Leave one of the two out."
    ),
    "layers in another word": recipe(GOOD + "objective: [{loss: hint, layers: all}]\n", "objective.0.layers", "auto, in place of"),
    "layers: auto of a loss of one layer": recipe(
        GOOD + "objective: [{loss: minilm, layers: auto, heads: 2}]\n", "objective.0.layers", "no parameter 'layers'"
    ),
    "layers: auto without a teacher": recipe(
        "student: a\ndata: digits\nobjective: [cross_entropy, {loss: hint, layers: auto}]\n",
        "objective.1.loss",
        "needs a teacher",
        command="train",
    ),
    "temp beside an objective": recipe(GOOD + "objective: [kd]\n", "--temp", "objective", options=("--temp", "2")),
    "the schedule step without milestones": recipe(GOOD + "train: {schedule: step}\n", "train.milestones", "is missing", "[0.5, 0.75]"),
    "milestones that fall": recipe(GOOD + "train: {schedule: step, milestones: [0.75, 0.5]}\n", "train.milestones", "numbers that rise"),
    "a milestone in epochs": recipe(GOOD + "train: {schedule: step, milestones: [150]}\n", "train.milestones.0", "got 150"),
    "milestones of another schedule": recipe(GOOD + "train: {milestones: [0.5]}\n", "train.milestones", "schedule step", "cosine"),
    # stages
    "a stage of dkd with blended labels": recipe(
        "teacher: python:models.py:net\nstudent: python:models.py:net\ndata: {source: digits, augment: {mixup: 0.2}}\n"
        "train: {stages: [{epochs: 1}, {epochs: 1, objective: [{loss: dkd}]}]}\n",
        "train.stages.1.objective.0.loss",
        "mixup blends",
    ),
    "a stage without epochs": recipe(GOOD + "train: {stages: [{fraction: 0.1}]}\n", "train.stages.0.epochs: is missing"),
    "a fraction in percent": recipe(GOOD + "train: {stages: [{fraction: 10, epochs: 1}]}\n", "train.stages.0.fraction", "at most 1"),
    "no stage": recipe(GOOD + "train: {stages: []}\n", "train.stages: got []"),
    "a number of stages": recipe(GOOD + "train: {stages: 3}\n", "train.stages: got 3, expected a list of mappings"),
    "an unknown key of a stage": recipe(GOOD + "train: {stages: [{epochs: 1, fracton: 0.1}]}\n", "train.stages.0.fracton", "'fraction'"),
    "epochs beside stages": recipe(
        GOOD + "train: {epochs: 10, stages: [{epochs: 2}, {epochs: 3}]}\n", "train.epochs: is 10", "have 5 epochs in all", "Leave it out"
    ),
    "epochs beside stages on the command line": recipe(
        GOOD + "train: {stages: [{epochs: 2}]}\n", "--epochs: is 3", options=("--epochs", "3")
    ),
    "a rate that no stage reads": recipe(GOOD + "train: {lr: 0.1, stages: [{epochs: 1, lr: 0.2}]}\n", "train.lr: has no effect"),
    "an objective that no stage reads": recipe(
        GOOD + "objective: [kd]\ntrain: {stages: [{epochs: 1, objective: [kd]}]}\n", "objective: has no effect where every stage"
    ),
    "temp that no stage reads": recipe(
        GOOD + "train: {stages: [{epochs: 1, objective: [kd]}]}\n", "objective: has no effect", options=("--temp", "2")
    ),
    "a loss of a stage": recipe(
        GOOD + "train: {stages: [{epochs: 1}, {epochs: 1, objective: [kd, kdd]}]}\n",
        "train.stages.1.objective.1.loss",
        "Did you mean 'kd'?",
    ),
    "a temperature of a stage": recipe(
        GOOD + "train: {stages: [{epochs: 1, objective: [{loss: kd, temperature: 0}]}]}\n", "train.stages.0.objective.0.temperature"
    ),
    "a teacher that no stage asks": recipe(
        GOOD + "train: {stages: [{epochs: 1, objective: [cross_entropy]}]}\n", "objective", "uses the teacher"
    ),
    "kd in a stage of train": recipe(
        "student: a\ndata: digits\ntrain: {stages: [{epochs: 1, objective: [kd]}, {epochs: 1}]}\n",
        "train.stages.0.objective.0.loss: kd needs a teacher",
        command="train",
    ),
    "tokens in a stage of images": recipe(GOOD + "train: {stages: [{epochs: 1, max_length: 8}]}\n", "stages.0.max_length", "texts"),
    "pixels in a stage of texts": recipe(
        TEXTS + "data: csv:good.csv\ntrain: {stages: [{epochs: 1, resolution: 8}]}\n", "stages.0.resolution", "images"
    ),
    "two temperatures of a sparse cache": recipe(
        GOOD + "teacher_cache: {codec: sparse}\ntrain: {stages: [{epochs: 1}, {epochs: 1, objective: [{loss: kd, temperature: 2}]}]}\n",
        "train.stages.1.objective.0.temperature: is 2",
    ),
    # models
    "an unknown kind of model": line((*DISTILL[:4], "torchvison:resnet18", "--data", "digits"), "--student", "'torchvision:'"),
    "a kind without a name": line((*DISTILL[:4], "timm:", "--data", "digits"), "--student", "without a name"),
    "python without a callable": line((*DISTILL[:4], "python:models.py", "--data", "digits"), "python:FILE_OR_MODULE:CALLABLE"),
    "python without a file": line((*DISTILL[:4], "python:modles.py:net", "--data", "digits"), "--student", "'models.py'"),
    "a run that is not there": line(
        ("distill", "--teacher", "run:runs/x", "--student", "a", "--data", "digits"), "--teacher", "no such folder"
    ),
    "a folder that is no run": line(
        ("distill", "--teacher", "run:photos", "--student", "a", "--data", "digits"), "--teacher", "not a finished run"
    ),
    "an ONNX student": line((*DISTILL[:4], "onnx:a.onnx", "--data", "digits"), "--student", "onnx"),
    "weights that are not there": recipe(GOOD, "student.weights", "no such file", options=("--set", "student.weights=w.safetensors")),
    "pickled weights": recipe(GOOD, "student.weights", "limbeck convert", options=("--set", "student.weights=w.pth")),
    # data
    "data that are not there": line((*DISTILL, "--data", "npz:god.npz"), "--data", "no such file", "'good.npz'"),
    "an unknown kind of data": line((*DISTILL, "--data", "cvs:good.csv"), "--data", "Did you mean 'csv'?"),
    "data without a kind": line((*DISTILL, "--data", "stuff"), "--data", "imagefolder:DIR"),
    "a file for a folder": line((*DISTILL, "--data", "imagefolder:good.npz"), "--data", "expected a folder"),
    "a task for other data": line((*DIGITS, "--task", "text-classification"), "task", "digits"),
    "an unknown task": line((*DIGITS, "--task", "image-clasification"), "--task", "'image-classification'"),
    "a task that nothing tells": line((*DISTILL, "--data", "hf:org/name"), "task", "--task"),
    "no test file": recipe(GOOD.replace("digits", "{source: npz:good.npz, test: t.npz}"), "data.test", "no such file"),
    # options
    "all at once": line((*DIGITS, "--epochs", "abc", "--lr", "x", "--seeds", "0", "--temp", "-1"), "--epochs", "--lr", "--seeds", "--temp"),
    "an unknown option": line((*DIGITS, "--epoch", "3"), "--epoch: no such option", "Did you mean '--epochs'?"),
    "an option without a value": line((*DIGITS, "--epochs"), "--epochs"),
    "an option for a value": line((*DIGITS, "--lr", "--epochs", "3"), "--lr", "'--epochs'"),
    "an unknown command": line(("distil",), "Did you mean 'distill'?"),
    "two recipes": line(("distill", "a.yaml", "b.yaml"), "b.yaml"),
    "alpha above 1": line((*DIGITS, "--alpha", "1.5"), "--alpha", "at most 1"),
    "alpha 0": line((*DIGITS, "--alpha", "0"), "--alpha", "limbeck train"),
    "temperature 0 as an option": line((*DIGITS, "--temp", "0"), "--temp", "greater than 0"),
    "a teacher for train": line((*TRAIN, "--data", "digits", "--teacher", "x"), "--teacher", "limbeck distill"),
    "set without a value": line((*DIGITS, "--set", "train.lr"), "--set", "key.path=value"),
    "set of an unknown key": line((*DIGITS, "--set", "train.epoch=3"), "--set train.epoch", "Did you mean 'epochs'?"),
    "set inside a number": line((*DIGITS, "--set", "seed.x=3"), "seed"),
    "set beyond a list": line((*DIGITS, "--set", "objective.7.weight=1"), "objective"),
    "set twice": line((*DIGITS, "--lr", "1", "--set", "train.lr=2"), "train.lr", "--lr", "twice"),
    "set of no YAML": line((*DIGITS, "--set", "train.lr=[1"), "--set train.lr", "not a YAML value"),
    "no seeds": line((*DIGITS, "--seeds", "many"), "--seeds", "'many'"),
    "a negative seed": line((*DIGITS, "--seed", "-1"), "--seed", "at least 0"),
    "a file for a run": line((*DIGITS, "--out", "good.csv"), "--out", "file"),
    "no name for a run": line((*DIGITS, "--out", ""), "--out"),
    "a name for a run that no file system takes": line((*DIGITS, "--out", "x" * 300 + "/y"), "--out"),
    "an option where the run's name is missing": line((*DIGITS, "--out", "--dry-run"), "--out", "an option"),
    "a home that is not there": line((*DISTILL[:4], "python:~nobody/models.py:net", "--data", "npz:~nobody/a.npz"), "~nobody"),
    "a model's name that no file system takes": line((*DISTILL[:4], "y" * 300, "--data", "digits"), "student", "is no folder here"),
    "data with a name that no file system takes": line((*DISTILL, "--data", "npz:" + "z" * 300), "--data"),
    "a run with a name that no file system takes": line(("evaluate", "w" * 300), "no such folder"),
    "a demo into a file": line(("demo", "--out", "good.csv/x"), "--out", "file"),
    "a resolution beyond measure": recipe(GOOD, "at most 8,192", options=("--set", "student.options.resolution=100000")),
    "resume of nothing": line((*DIGITS, "--resume"), "--resume", "--out"),
    # other commands
    "evaluate nothing": line(("evaluate", "runs/none"), "no such folder"),
    "evaluate a folder": line(("evaluate", "photos"), "not a run"),
    "export in no known format": line(("export", "photos", "--format", "onxx"), "--format", "'onnx'", "not a run"),
    "report of nothing": line(("report", "a", "b"), "2 problems", "'a'", "'b'"),
    "report of no run": line(("report",), "RUN"),
    "convert nothing": line(("convert", "v.pth", "w.safetensors"), "no such file", "Did you mean 'w.pth'?"),
    "convert into a pickle": line(("convert", "good.npz", "w.pth"), ".safetensors"),
    "no such loss": line(("losses", "kld"), "no loss 'kld'"),
    "no such recipe": line(("recipes", "text"), "no recipe 'text'"),
}

# Found by the data, the models or the run's folder: before the first step, and before anything is written.
SPINE = {
    "a folder that is taken": line((*DIGITS, "--out", "photos"), "--out", "not empty"),
    "resume of another folder": line((*DIGITS, "--out", "photos", "--resume"), "--out", "recipe.yaml"),
    "no arrays": line((*DISTILL, "--data", "npz:odd.npz"), "train_x"),
    "a broken npz": line((*DISTILL, "--data", "npz:broken.npz"), "broken.npz"),
    "a label out of range": line((*DISTILL, "--data", "npz:negative.npz"), "label"),
    "an empty split": line((*DISTILL, "--data", "npz:empty.npz"), "train"),
    "no such column": line(("train", "--student", "bert-base", "--data", "csv:good.csv", "--set", "data.text=body"), "body", "text"),
    "a table without rows": line(("train", "--student", "bert-base", "--data", "csv:header.csv"), "header.csv"),
    "a folder without images": line((*TRAIN, "--data", "imagefolder:bare"), "bare"),
    "a corrupt image": line((*TRAIN, "--data", "imagefolder:corrupt"), "broken.png"),
    "no such callable": line((*DIGITS[:4], "python:models.py:nte", "--data", "digits"), "nte", "'net'"),
    "not callable": line((*DIGITS[:4], "python:models.py:NUMBER", "--data", "digits"), "NUMBER"),
    "a callable that gives no module": line((*DIGITS[:4], "python:models.py:words", "--data", "digits"), "words"),
    "a callable that fails": line((*DIGITS[:4], "python:models.py:breaks", "--data", "digits"), "the pipe is blocked"),
    "an option that the callable does not take": line((*DIGITS, "--set", "student.options.widht=8"), "widht"),
    "no such torchvision model": line((*DIGITS[:4], "torchvision:resnet81", "--data", "digits"), "resnet81", "'resnet18'"),
    "no such timm model": line((*DIGITS[:4], "timm:resnet5O", "--data", "digits"), "resnet5O"),
    "no blocks to compute again": recipe(GOOD + "train: {gradient_checkpointing: true}\n", "repeats a block", "[0, 1, 2, 3]"),
    "no such block": recipe(
        GOOD + "train: {gradient_checkpointing: ['4']}\n", "train.gradient_checkpointing", "'4' is no layer of Sequential"
    ),
    "ranks for a teacher in a single process": recipe(
        PLACED.format("ranks:1"), "teacher.placement", "this is a single process", "torchrun --nproc-per-node 2"
    ),
    "no such layer in a list": recipe(
        GOOD + "objective: [{loss: hint, student: ['1', '3'], teacher: ['1', nine]}]\n", "'nine' is not a layer of Sequential"
    ),
    "no attention in a layer": recipe(
        GOOD + "objective: [{loss: minilm_v2, student: '1', teacher: '1'}]\n", "student layer", "'1' has no attention", "teacher layer"
    ),
    "nothing to pair": recipe(
        GOOD + "objective: [{loss: hint, layers: auto}]\n", "layers: auto pairs", "the student is neither", "teacher: [...]"
    ),
    "no such layer": recipe(GOOD + "objective: [{loss: hint, student: '1', teacher: nine}]\n", "nine"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (40, 8, 8), dtype=np.uint8), np.arange(40) % 4
    arrays = {"train_x": x, "train_y": y, "test_x": x[:8], "test_y": y[:8]}
    np.savez(tmp_path / "good.npz", **arrays)
    np.savez(tmp_path / "odd.npz", x=x, y=y)
    np.savez(tmp_path / "negative.npz", **{**arrays, "train_y": y - 9})
    np.savez(tmp_path / "empty.npz", **{**arrays, "train_x": x[:0], "train_y": y[:0]})
    (tmp_path / "broken.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:300])
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "good.csv").write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(40)))
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "w.pth").write_bytes(b"PK")
    for name in ("photos", "bare/train", "corrupt/train"):
        (tmp_path / name / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "note.txt").write_text("not a run")
    for split in ("train", "test"):
        for name in "ab":
            at = tmp_path / "corrupt" / split / name
            at.mkdir(parents=True, exist_ok=True)
            for i in range(5):
                (at / f"{i}.png").write_bytes(_png(bytes(rng.integers(0, 255, 8 * 8, dtype=np.uint8))))
    (tmp_path / "corrupt" / "train" / "a" / "broken.png").write_bytes(_png(bytes(range(64)))[:80])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def _png(pixels: bytes) -> bytes:
    """An 8 x 8 grey PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + pixels[i : i + 8] for i in range(0, 64, 8))
    head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder, with its content's hash; byte code that Python itself keeps is none of ours."""
    files = (p for p in sorted(folder.rglob("*")) if "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for p in files}


def attempt(row: Row, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if row.arguments[1:2] == ("r.yaml",):
        (folder / "r.yaml").write_text(row.recipe)
    before = tree(folder)
    code = call(typer.main.get_command(cli.app), row.arguments, "limbeck")
    out, err = capsys.readouterr()
    assert code == 2, err
    assert "Traceback" not in err
    assert out == ""
    flat = " ".join(err.split())
    for part in row.said:
        assert part in flat, err
    assert len(err) < 3000
    assert not re.search(r"pydantic|ValidationError|<class |object at 0x", err), err
    assert tree(folder) == before


def test_the_table_is_as_long_as_promised() -> None:
    assert len(READING) + len(SPINE) >= 60


@pytest.mark.parametrize("name", READING)
def test_a_mistake_in_a_recipe_or_command_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(READING[name], folder, capsys)


@pytest.mark.parametrize("name", SPINE)
def test_a_mistake_that_the_data_or_the_models_show(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(SPINE[name], folder, capsys)
