"""The weights of a linear map as numbers, wherever they are kept: in memory, offloaded to CPU or disk, or quantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def device(module: Any) -> torch.device:
    """Where a module computes; the weights of an offloaded one are elsewhere until then."""
    weight = next(module.parameters(recurse=False))
    return torch.device(module._hf_hook.execution_device) if weight.is_meta else weight.device


def quantised(linear: Any) -> bool:
    """Whether the weights are codes that only the module itself turns into numbers."""
    weight = linear.weight
    return not weight.is_meta and (type(weight) is not nn.Parameter or not weight.is_floating_point())


@torch.no_grad()
def matrix(linear: Any) -> Tensor:
    """The weight `[outputs, inputs]`, to be read, not written. Offloaded weights are fetched, quantised ones made numbers."""
    if quantised(linear):
        return columns(linear, range(linear.in_features)).T
    if linear.weight.is_meta:
        from accelerate.utils import align_module_device  # it is what has offloaded them

        with align_module_device(linear):
            return linear.weight.detach().clone()
    return linear.weight.detach()


@torch.no_grad()
def columns(linear: Any, units: Sequence[int]) -> Tensor:
    """Some of the weight's columns as rows, float32 `[units, outputs]`.

    A quantised map is asked for them: what it gives for an input of 1 at one unit, less what it gives for none (its bias). That
    needs no knowledge of the library that quantised it."""
    chosen = list(units)
    if not quantised(linear):
        return matrix(linear)[:, chosen].T.float()
    ask = torch.zeros(len(chosen) + 1, linear.in_features, device=device(linear))
    ask[range(len(chosen)), chosen] = 1
    given = linear.forward(ask).float()  # not the module itself, whose hooks belong to somebody
    return given[:-1] - given[-1]
