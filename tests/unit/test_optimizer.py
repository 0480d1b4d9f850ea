"""The optimiser's step is torch's own to the bit, and a step that is left out leaves everything as it was, the very first one too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.checkpoint import restore_optimizer
from limbeck.optimizer import Step, decay_groups, make_optimizer
from support import settings

KINDS: list[dict[str, Any]] = [
    {"optimizer": "adamw"},
    {"optimizer": "adam"},
    {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    {"optimizer": "sgd", "momentum": 0.9, "nesterov": False},
    {"optimizer": "sgd", "momentum": 0.0, "nesterov": False},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(str(v) for v in k.values()))


def net() -> nn.Module:
    torch.manual_seed(4)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(7, 5), nn.Linear(5, 2))
    return module.to(memory_format=torch.channels_last)


def gradients(step: int, module: nn.Module, without: tuple[str, ...] = ()) -> None:
    draw = torch.Generator().manual_seed(step)
    for name, p in module.named_parameters():
        value = torch.randn(p.shape, generator=draw).to(memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
        p.grad = None if name in without else value


def torchs(kind: dict[str, Any], module: nn.Module) -> torch.optim.Optimizer:
    """torch's own, which makes its state in its first step."""
    groups = decay_groups([module], 0.1)
    if kind["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=kind["momentum"], nesterov=kind["nesterov"], fused=True)
    return (torch.optim.AdamW if kind["optimizer"] == "adamw" else torch.optim.Adam)(groups, lr=0.1, betas=(0.8, 0.95), fused=True)


def ours(kind: dict[str, Any], module: nn.Module) -> torch.optim.Optimizer:
    adam = {"betas": (0.8, 0.95)} if "adam" in kind["optimizer"] else {}
    return make_optimizer(settings(lr=0.1, weight_decay=0.1, **kind, **adam), [module])


def everything(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [optimizer.state[p] for p in module.parameters()]
    return [t.detach().clone() for t in (*module.parameters(), *(v for s in states for _, v in sorted(s.items()) if v is not None))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


@kinds
def test_a_step_is_torchs_to_the_bit(kind: dict[str, Any]) -> None:
    module, other = net(), net()
    optimizer, reference = ours(kind, module), torchs(kind, other)
    touch = Step(optimizer)
    for step in range(4):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.1 / (step + 1)
        for m in (module, other):
            gradients(step, m)
        touch(None)
        reference.step()
        assert same(everything(module, optimizer), everything(other, reference)), f"step {step}"
    assert not torch.equal(next(module.parameters()), next(net().parameters()))


@kinds
def test_a_parameter_without_a_gradient_stays_with_its_state(kind: dict[str, Any]) -> None:
    module, other = net(), net()
    optimizer, reference = ours(kind, module), torchs(kind, other)
    touch = Step(optimizer)
    for step, without in enumerate([(), ("1.weight", "2.bias"), ("0.bias", "1.bias", "2.bias"), ()]):
        for m in (module, other):
            gradients(step, m, without)
        touch(None)
        reference.step()
        assert same(everything(module, optimizer), everything(other, reference)), f"step {step}"


@kinds
@pytest.mark.parametrize("left_out", [{0}, {0, 1, 4}, {2}])
@pytest.mark.parametrize("saved", [False, True], ids=["straight", "through a checkpoint after every step"])
def test_a_step_that_is_left_out_changes_nothing(kind: dict[str, Any], left_out: set[int], saved: bool) -> None:
    """As if it had not been: compared with a run of the other steps alone."""
    module, other = net(), net()
    optimizer, reference = ours(kind, module), ours(kind, other)
    touch, plainly = Step(optimizer), Step(reference)
    for step in range(6):
        gradients(step, module)
        before = everything(module, optimizer)
        touch(torch.tensor(float(step in left_out)))
        assert same(everything(module, optimizer), before) == (step in left_out)
        if step not in left_out:
            gradients(step, other)
            plainly(None)
        if saved:
            state = optimizer.state_dict()
            optimizer = ours(kind, module)
            restore_optimizer(optimizer, state)
            touch = Step(optimizer)
    assert same(everything(module, optimizer), everything(other, reference))


def test_the_first_momentum_is_the_gradient_by_the_formula() -> None:
    """In NumPy: v = m v + g from v = 0, and Nesterov's w = w - lr (g + m v)."""
    module = nn.Linear(3, 1, bias=False).double()
    optimizer = make_optimizer(settings(lr=0.1, optimizer="sgd", momentum=0.9, nesterov=True, weight_decay=0.0), [module])
    touch = Step(optimizer)
    weight, velocity = module.weight.detach().numpy().copy(), np.zeros((1, 3))
    for step in range(5):
        gradient = np.random.default_rng(step).normal(size=(1, 3))
        module.weight.grad = torch.from_numpy(gradient.copy())
        touch(torch.tensor(float(step == 0)))
        if step > 0:
            velocity = 0.9 * velocity + gradient
            weight -= 0.1 * (gradient + 0.9 * velocity)
    np.testing.assert_allclose(module.weight.detach().numpy(), weight, rtol=0, atol=1e-14)


@kinds
def test_one_look_sees_every_moment(kind: dict[str, Any]) -> None:
    module = net()
    optimizer = ours(kind, module)
    touch = Step(optimizer)
    gradients(0, module)
    touch(None)
    moments = [(p, t) for p, state in optimizer.state.items() for name, t in state.items() if name != "step"]
    assert len(moments) == (6 * (2 if "adam" in kind["optimizer"] else 1) if kind.get("momentum", 0.9) else 0)
    total = sum(float(t.double().sum()) for _, t in moments)
    assert float(touch.total()) == pytest.approx(total, rel=1e-5, abs=1e-9)
    for p, t in moments:
        for place in (0, t.numel() - 1):
            memory = t.as_strided((t.numel(),), (1,), t.storage_offset())
            kept = memory[place].clone()
            for value in (float("nan"), float("-inf")):
                memory[place] = value
                assert not touch.total().isfinite()
                assert [id(q) for q in touch.spoilt()] == [id(p)]
            memory[place] = kept
    assert float(touch.total()) == pytest.approx(total, rel=1e-5, abs=1e-9)
