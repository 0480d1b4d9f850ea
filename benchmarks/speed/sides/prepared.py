"""Reading the prepared work (see speed/work.py), for the sides that are not Limbeck: torch, numpy and safetensors alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Work:
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.about: dict[str, Any] = json.loads((self.folder / "work.json").read_text())
        with np.load(self.folder / "train.npz") as file:
            self.x, self.y = file["train_x"], file["train_y"].astype(np.int64)
        self.rows = torch.from_numpy(np.load(self.folder / "rows.npy"))

    def model(self, role: str) -> nn.Module:
        spec = importlib.util.spec_from_file_location("prepared_models", self.about["module"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model: nn.Module = getattr(module, role)(self.about["classes"])
        model.load_state_dict(load_file(self.folder / f"{role}.safetensors"))
        if self.about["layout"] == "channels_last":
            model.to(memory_format=torch.channels_last)
        return model


def keep(model: nn.Module, config: dict[str, Any]) -> None:
    """Save the trained student for the parent, which evaluates all sides alike."""
    path = Path(config["out"]) / f"{config['name']}.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)


class Pictures(torch.utils.data.Dataset[Any]):
    """One sample at a time, as torchvision's CIFAR10 does it: a PIL image through transforms."""

    def __init__(self, work: Work, transform: Any) -> None:
        self.x, self.y, self.transform = work.x, work.y, transform

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.x[index])), int(self.y[index])


def pictures(work: Work) -> Pictures:
    from torchvision import transforms

    about = work.about
    size = work.x.shape[1]
    steps: list[Any] = [transforms.RandomCrop(size, padding=about["crop"])] if about["crop"] else []
    steps += [transforms.RandomHorizontalFlip()] if about["flip"] else []
    return Pictures(work, transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(about["mean"], about["std"])]))
