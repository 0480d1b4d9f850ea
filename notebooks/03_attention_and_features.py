# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where teacher and student look
#
# Attention heat maps of a teacher and its student on the same sentence, side by side, and feature maps of two convolutional networks. The sentences
# are made by a small grammar in which "not" turns a judgement around, so that there is something to look at.

# %%
import itertools
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import limbeck
from limbeck import plots

work = Path("runs/notebook-attention")
work.mkdir(parents=True, exist_ok=True)
good, bad = ["good", "fine", "great", "lovely"], ["bad", "dull", "poor", "awful"]
subjects, verbs, ends = ["film", "book", "song", "play"], ["was", "seemed"], ["today", "again", "to us", "at first"]
sentences = [
    (f"the {s} {v} {'not ' if negated else ''}{word} {end}", int((word in good) != negated))
    for s, v, word, end, negated in itertools.product(subjects, verbs, good + bad, ends, (False, True))
]
random.Random(0).shuffle(sentences)
texts, labels = [t for t, _ in sentences], torch.tensor([label for _, label in sentences])

# %%
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for t in texts for w in t.split()})]
tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
torch.manual_seed(0)
config = BertConfig(
    vocab_size=len(words), hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, max_position_embeddings=32,
    id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
)  # fmt: skip
BertForSequenceClassification(config).save_pretrained(work / "untrained")
fast.save_pretrained(work / "untrained")

# %% [markdown]
# A teacher of four layers is trained on labels; its student keeps two of them and learns from the teacher.

# %%
half = len(texts) // 2
data = {"train": (texts[:half], labels[:half]), "test": (texts[half:], labels[half:]), "classes": ["bad", "good"]}
common = {"progress": "none", "export": [], "lr": 2e-3, "batch_size": 32, "data_options": {"max_length": 16}}
teacher = limbeck.train(student=f"hf:{work / 'untrained'}", epochs=12, out=work / "teacher", **data, **common)
student = limbeck.distill(
    teacher=f"run:{work / 'teacher'}",
    student={"model": f"hf:{work / 'teacher/student'}", "options": {"layers": [0, 3]}},
    epochs=8,
    out=work / "student",
    **data,
    **common,
)
print(student.verdict)

# %%
sentence = "the film was not good today"
inputs = dict(fast(sentence, return_tensors="pt"))
tokens = fast.convert_ids_to_tokens(inputs["input_ids"][0])
plots.attention({"teacher": teacher.student, "student": student.student}, inputs, tokens=tokens, layer=-1)

# %% [markdown]
# ## Feature maps
#
# The channels with the most energy in a layer of each network, for one picture.

# %%
from sklearn.datasets import load_digits  # noqa: E402
from torch import nn  # noqa: E402


def net(width):
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))  # fmt: skip


big = limbeck.train(student=net(32), data="digits", epochs=6, lr=3e-3, export=[], progress="none", out=work / "big")
small = limbeck.distill(
    teacher=big.student, student=net(8), data="digits", epochs=6, lr=3e-3, export=[], progress="none", baseline=False, out=work / "small"
)
image = torch.tensor(load_digits().images[3], dtype=torch.float32)[None, None] / 16
plots.feature_maps({"teacher": big.student, "student": small.student}, image, {"teacher": "2", "student": "2"})
