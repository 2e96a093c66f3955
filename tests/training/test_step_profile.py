"""The profile of a step loses no time and puts operators where they belong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_ext.training import step_profile
from megatron_ext.training.loop import Trainer
from tests.training.tiny import tiny_config


class _Attention(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, x.transpose(1, 2)).tanh()


class _Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.attention = torch.nn.Linear(4, 4), _Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.linear(x).relu()).sigmoid()


class _Loss(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp().mean()


def test_operators_are_where_they_belong_forward_and_backward() -> None:
    layers, loss = _Layers(), _Loss()
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    x = torch.randn(2, 3, 4)

    def step() -> None:
        loss(layers(x)).backward()
        with record_function("optimizer step"):
            optimizer.step()
        with record_function("zero gradients"):
            optimizer.zero_grad(set_to_none=False)

    modules = {
        layers: step_profile.LAYERS,
        layers.attention: step_profile.ATTENTION,
        loss: step_profile.LOSS,
    }
    events = step_profile.record_steps(step, modules)
    assigned = list(step_profile.assign_groups(events))
    assert [event for event, _ in assigned] == events
    groups: dict[str, set[str]] = {}
    for event, group in assigned:
        groups.setdefault(event.name.removeprefix("autograd::engine::evaluate_function: "), set())
        groups[event.name.removeprefix("autograd::engine::evaluate_function: ")].add(group)
    expected = {
        "aten::addmm": step_profile.PRODUCTS,
        "aten::mm": step_profile.PRODUCTS,
        "aten::bmm": step_profile.ATTENTION,
        "aten::tanh": step_profile.ATTENTION,
        "TanhBackward0": step_profile.ATTENTION,
        "aten::tanh_backward": step_profile.ATTENTION,
        "aten::relu": step_profile.LAYERS,
        "ReluBackward0": step_profile.LAYERS,
        "aten::sigmoid": step_profile.LAYERS,
        "aten::sigmoid_backward": step_profile.LAYERS,
        "aten::exp": step_profile.LOSS,
        "ExpBackward0": step_profile.LOSS,
        "torch::autograd::AccumulateGrad": step_profile.GRADIENTS,
        "Optimizer.zero_grad#SGD.zero_grad": step_profile.GRADIENTS,
        "Optimizer.step#SGD.step": step_profile.OPTIMIZER,
    }
    assert {name: groups.get(name) for name in expected} == {k: {v} for k, v in expected.items()}


def test_a_training_step_has_time_in_every_group_and_none_is_lost() -> None:
    trainer = Trainer.build(tiny_config())
    batches = trainer.source.step(0)
    model = trainer.model[0].module
    modules = step_profile.modules_by_group(model)
    events = step_profile.record_steps(lambda: trainer.train_step(batches), modules)
    found: dict[str, float] = {}
    for event, group in step_profile.assign_groups(events):
        found[group] = found.get(group, 0.0) + event.self_cpu_time_total
    assert set(found) == set(step_profile.GROUPS)
    assert min(found.values()) > 0
    # The profiler takes a few microseconds per step for nobody's.
    roots = sum(event.cpu_time_total for event in events if event.cpu_parent is None)
    assert abs(sum(found.values()) / roots - 1) < 0.01
