"""Hugging Face models: heads, label names, layers of several families, tokenizers, folders that cannot be used."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.errors import UsageError
from limbeck.models import Model, build_model, class_map, load_saved, save_model, wrap_module
from limbeck.models._images import sample_inputs
from limbeck.types import TextPreprocessing
from models_support import NAMES, image_folder, images, spec, text_config, text_folder, texts, tokenizer_in


def build(
    name: str,
    data: Any,
    base: Path,
    *,
    role: Any = "student",
    seed: int = 0,
    new_head: bool = False,
    weights: str | None = None,
    **options: Any,
) -> Model:
    return build_model(spec(name, weights, **options), role=role, data=data, seed=seed, base=base, new_head=new_head)


def test_a_classifier_folder_as_teacher_and_student_and_back(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    text_folder(tmp_path / "bert", classes=("dog", "Cat ", "EEL", "bird"))
    teacher = build("bert", texts(), tmp_path, role="teacher")
    assert class_map(teacher, texts()).tolist() == [3, 1, 0, 2]  # type: ignore[union-attr]
    assert isinstance(teacher.preprocessing, TextPreprocessing)
    assert teacher.preprocessing.inputs == ("input_ids", "token_type_ids", "attention_mask")
    student = build("hf:bert", texts(), tmp_path, layers=[0, 2])
    save_model(student, tmp_path / "run/student", NAMES)
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/student").eval()
    assert [alone.config.id2label[i] for i in range(4)] == list(NAMES)
    assert alone.config.num_hidden_layers == 2
    tokens = AutoTokenizer.from_pretrained(tmp_path / "run/student")(["a w1", "w3 w4"], padding="longest", return_tensors="pt")
    assert torch.equal(alone(**tokens).logits, student(tokens))
    again = build("run:run", texts(), tmp_path, role="teacher")
    assert again.weights_sha256 == student.weights_sha256
    assert class_map(again, texts()) is None
    assert isinstance(again.preprocessing, TextPreprocessing)
    assert again.preprocessing.tokenizer_sha256 == teacher.preprocessing.tokenizer_sha256
    shorter = build("run:run", texts(), tmp_path, layers=[1], max_length=5)
    assert (len(shorter.module.bert.encoder.layer), shorter.preprocessing.max_length) == (1, 5)


@pytest.mark.parametrize(
    ("family", "stack"),
    [
        ("bert", "bert.encoder.layer"),
        ("distilbert", "distilbert.transformer.layer"),
        ("roberta", "roberta.encoder.layer"),
        ("modernbert", "model.layers"),
    ],
)
def test_layers_of_every_family(family: str, stack: str, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "m", family, layers=4, classes=NAMES)
    whole = build("m", texts(), tmp_path)
    model = build("m", texts(), tmp_path, layers=[0, 3])
    layers = list(model.module.get_submodule(stack).children())
    assert len(layers) == 2
    for new, old in ((0, 0), (1, 3)):
        old_state = whole.module.get_submodule(f"{stack}.{old}").state_dict()
        for name, value in layers[new].state_dict().items():
            assert torch.equal(value, old_state[name])
    rest = {k: v for k, v in model.module.state_dict().items() if not k.startswith(stack)}
    assert all(torch.equal(v, whole.module.state_dict()[k]) for k, v in rest.items())
    if family == "modernbert":
        kept = json.loads((folder / "config.json").read_text())["layer_types"]
        assert list(model.module.config.layer_types) == [kept[0], kept[3]]
    save_model(model, tmp_path / "s", NAMES)
    inputs = sample_inputs(model.preprocessing, torch.float32)
    assert torch.equal(load_saved(tmp_path / "s")(inputs), model(inputs))


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    text_folder(tmp_path / "body", body_only=True)
    with pytest.raises(UsageError, match=r"no trained classification head.*teacher: \{train: \{epochs: 3\}\}"):
        build("body", texts(), tmp_path, role="teacher")
    torch.manual_seed(5)
    first = build("body", texts(), tmp_path)
    torch.manual_seed(6)
    assert build("body", texts(), tmp_path).weights_sha256 == first.weights_sha256
    other = build("body", texts(), tmp_path, seed=1)
    changed = {k for k, v in other.module.state_dict().items() if not torch.equal(v, first.module.state_dict()[k])}
    assert changed == {"classifier.weight"}
    assert build("body", texts(), tmp_path, role="teacher", new_head=True).num_classes == 4
    assert first.module.config.num_labels == 4


def test_a_fresh_roberta_head_depends_on_the_seed_alone(tmp_path: Path) -> None:
    text_folder(tmp_path / "body", "roberta", body_only=True)
    heads = []
    for state in (5, 6):
        torch.manual_seed(state)
        heads.append(build("body", texts(), tmp_path).module.classifier.dense.weight)
    assert torch.equal(heads[0], heads[1])


def test_a_head_of_another_size(tmp_path: Path) -> None:
    text_folder(tmp_path / "bert", classes=("no", "yes"))
    with pytest.raises(UsageError, match=r"do not include.*bird, cat, dog, eel.*epochs: 3"):
        build("bert", texts(), tmp_path, role="teacher")
    student = build("bert", texts(), tmp_path)
    assert (student.num_classes, student.classes) == (4, NAMES)
    assert build("bert", texts(("NO", "yes ")), tmp_path).notes[1:] == []


def test_lengths(tmp_path: Path) -> None:
    text_folder(tmp_path / "bert")
    text_folder(tmp_path / "roberta", "roberta")
    data = texts(("x", "y"), known=False)
    model = build("bert", data, tmp_path)
    assert model.preprocessing.max_length == 16
    assert any("cut at 16 tokens" in note for note in model.notes)
    assert build("roberta", data, tmp_path).preprocessing.max_length == 12
    assert build("bert", data, tmp_path, max_length=7).preprocessing.max_length == 7
    for wrong, said in ((17, "more than the 16"), (1, "at least 2"), ("long", "whole number")):
        with pytest.raises(UsageError, match=said):
            build("bert", data, tmp_path, max_length=wrong)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    data = texts(("x", "y"), known=False)
    folder = text_folder(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(tmp_path / name)
    with pytest.raises(UsageError, match="holds no tokenizer"):
        build("bert", data, tmp_path)
    tokenizer_in(tmp_path / "other", words=40)
    with pytest.raises(UsageError, match="tokenizer has 40 tokens and the model 20"):
        build("bert", data, tmp_path, tokenizer="other")
    tokenizer_in(tmp_path / "fitting")
    assert build("bert", data, tmp_path, tokenizer="fitting").preprocessing.inputs[0] == "input_ids"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"limbeck convert .*pytorch_model.bin .*model.safetensors"):
        build("bert", data, tmp_path)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match="no weights"):
        build("bert", data, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither a run"):
        build("empty", data, tmp_path)
    with pytest.raises(UsageError, match=r"no config\.json"):
        build("hf:empty", data, tmp_path)


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "bert")
    from transformers import ByT5Tokenizer

    for file in folder.glob("*token*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(folder)
    (folder / "vocab.txt").write_text("a\n")
    with pytest.raises(UsageError, match="only a slow tokenizer"):
        build("bert", texts(("x", "y"), known=False), tmp_path)


def test_settings_of_the_configuration(tmp_path: Path) -> None:
    text_folder(tmp_path / "bert", classes=NAMES)
    assert build("bert", texts(), tmp_path, hidden_dropout_prob=0.3).module.config.hidden_dropout_prob == 0.3
    with pytest.raises(UsageError, match="Did you mean 'hidden_dropout_prob'"):
        build("bert", texts(), tmp_path, hidden_dropout=0.3, nonsense=1)
    with pytest.raises(UsageError, match="another shape"):
        build("bert", texts(), tmp_path, intermediate_size=20)
    with pytest.raises(UsageError, match="no form that is an image classifier"):
        build("bert", images(), tmp_path)
    fresh = build("bert", texts(), tmp_path, weights="scratch")
    assert fresh.weights_sha256 == build("bert", texts(), tmp_path, weights="scratch").weights_sha256
    assert fresh.weights_sha256 != build("bert", texts(), tmp_path).weights_sha256
    kept = build("bert", texts(), tmp_path, weights="bert/model.safetensors")
    assert kept.weights_sha256 == build("bert", texts(), tmp_path).weights_sha256


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "bert")
    text_folder(tmp_path / "distil", "distilbert")
    (tmp_path / "distil/model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(UsageError, match="are not those of a bert model"):
        build("bert", texts(), tmp_path)


def test_no_network_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UsageError, match=r"hub .*cannot be reached.*Did you mean 'bert-base'"):
        build("bert-bsae", texts(), tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'torchvision:vit_b_16'"):
        build("vit_b_16", images(), tmp_path)


def test_image_models_read_their_processor(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    image_folder(tmp_path / "vit", size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3)
    teacher = build("vit", images(), tmp_path, role="teacher")
    p = teacher.preprocessing
    assert (p.height, p.width, p.resize_shorter, p.mean, p.std, p.interpolation) == (
        16,
        16,
        None,
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        "bicubic",
    )  # type: ignore[union-attr]
    save_model(teacher, tmp_path / "s", NAMES)
    assert load_saved(tmp_path / "s").preprocessing == p
    x = torch.randn(2, 3, 16, 16)
    alone = AutoModelForImageClassification.from_pretrained(tmp_path / "s").eval()
    assert torch.equal(alone(x).logits, teacher({"image": x}))
    assert tuple(AutoImageProcessor.from_pretrained(tmp_path / "s").image_mean) == (0.1, 0.2, 0.3)
    image_folder(
        tmp_path / "crop",
        size={"shortest_edge": 20},
        do_center_crop=True,
        crop_size=16,
        do_rescale=False,
        image_mean=[51] * 3,
        image_std=[255] * 3,
    )
    cropped = build("crop", images(size=None), tmp_path).preprocessing
    assert (cropped.height, cropped.resize_shorter, cropped.mean, cropped.std) == (16, 20, (0.2,) * 3, (1.0,) * 3)  # type: ignore[union-attr]


def test_a_hugging_face_object_from_python(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification

    tokenizer_in(tmp_path)
    module = BertForSequenceClassification(text_config("bert", 1, num_labels=4))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="needs its tokenizer"):
        wrap_module(module, role="student", data=texts())
    model = wrap_module(module, role="student", data=texts(), tokenizer=tokenizer)
    assert model.module is module
    assert (model.kind, model.classes) == ("hf", NAMES)
    save_model(model, tmp_path / "s", NAMES)
    assert load_saved(tmp_path / "s").weights_sha256 == model.weights_sha256
    raw = wrap_module(module, role="student", data=texts(), tokenizer=tokenizer.backend_tokenizer)
    assert raw.preprocessing.inputs[0] == "input_ids"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="4 outputs and the data has 2"):
        wrap_module(module, role="student", data=texts(("x", "y")), tokenizer=tokenizer)
