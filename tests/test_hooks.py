"""Ctrl-C at every step of going in and out leaves nothing behind: no hook, no changed weight, no mode of torch."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny
import torch
from torch.utils.hooks import RemovableHandle

import mmn
from mmn import Edit, Neuron
from mmn.hooks import hooked, uninterrupted
from mmn.trace import Recorder

NEURONS = [Neuron(0, 3), Neuron(2, 5)]
OURS = str(Path(mmn.__file__).parent)


def edit(vlm: mmn.VLM) -> Edit:
    return Edit(NEURONS, torch.ones(2, 16), vlm.hash, "a", "b")


BLOCKS: dict[str, Callable[[mmn.VLM], AbstractContextManager[Any]]] = {
    "zero": lambda vlm: mmn.zero(vlm, NEURONS),
    "perturb": lambda vlm: mmn.perturb(vlm, NEURONS, 1.0),
    "shuffle": lambda vlm: mmn.shuffle_image_tokens(vlm),
    "edit by hook": lambda vlm: edit(vlm).applied(vlm, "hook"),
    "edit in the weights": lambda vlm: edit(vlm).applied(vlm, "weights"),
    "recorder": lambda vlm: Recorder(vlm.anatomy).on(),
}


def state(vlm: mmn.VLM) -> tuple[Any, ...]:
    """All that an interrupted block could leave behind."""
    weights = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in vlm.model.named_modules()]
    wants = [parameter.requires_grad for parameter in vlm.model.parameters()]
    edits = vlm.model._active_edits
    kept = len(edits.edits), [layer for layer, units in edits.originals.items() if units]
    return weights, hooks, wants, kept, torch.is_grad_enabled(), signal.getsignal(signal.SIGINT)


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[1:] == other[1:] and all(torch.equal(value, other[0][name]) for name, value in one[0].items())


@contextlib.contextmanager
def interrupted_at(number: int) -> Iterator[list[str]]:
    """With a real signal at the `number`th line that runs of the package, of contextlib or of torch's hooks. Gives where it was."""
    where: list[str] = []
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        file = frame.f_code.co_filename
        if not file.startswith(OURS) and not file.endswith(("contextlib.py", "utils/hooks.py")):
            return None
        lines += event == "line"
        if event == "line" and lines == number:
            where.append(f"{Path(file).name}:{frame.f_lineno}")
            signal.raise_signal(signal.SIGINT)
        return trace

    born = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, born)


@pytest.mark.parametrize("block", BLOCKS)
def test_ctrl_c_at_every_line(block: str) -> None:
    vlm = tiny.vlm()
    with edit(vlm).applied(vlm):  # so that there is a place for edits
        pass
    before, number, stopped = state(vlm), 1, 0
    while True:
        try:
            with interrupted_at(number) as where, BLOCKS[block](vlm):
                pass
        except KeyboardInterrupt:
            stopped += 1
        assert same(before, state(vlm)), where
        if not where:
            break
        number += 1
    assert number > 20 and stopped > number / 4, "some lines hold it back, to be raised later; none swallows it"


class Handle:
    """A hook that counts."""

    on = 0

    def __init__(self) -> None:
        Handle.on += 1
        self.there = True

    def remove(self) -> None:
        Handle.on -= self.there
        self.there = False


def test_hooks_come_off_when_one_cannot_be_put_on() -> None:
    def handles() -> Iterator[Handle]:
        yield Handle()
        raise mmn.MmnError("no second")

    with pytest.raises(mmn.MmnError, match="no second"), hooked(handles()):
        pytest.fail("the block must not begin")
    assert Handle.on == 0
    with hooked(Handle() for _ in range(3)):
        assert Handle.on == 3
    assert Handle.on == 0


def test_ctrl_c_waits_and_comes() -> None:
    born = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted(), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(True)
    finally:
        signal.signal(signal.SIGINT, born)
    assert done == [True]


def test_ctrl_c_comes_also_where_the_block_raises() -> None:
    born = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, born)


def test_torchs_handles_may_be_removed_twice() -> None:
    module = torch.nn.Identity()
    handle: RemovableHandle = module.register_forward_hook(lambda *_: None)
    handle.remove()
    handle.remove()
    assert not module._forward_hooks


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_found_whatever_mode_torch_is_in(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    """A reader may have switched gradients off, and a Ctrl-C inside torch's own no_grad leaves them off."""
    plain = tiny.vlm()
    trace = plain.caption(tiny.pictures(1)[0], max_new_tokens=3)
    noun = mmn.Noun("x", "x", 7, 2, (0, 1))
    parts = tiny.llava_parts()
    with mode():
        vlm = mmn.VLM(*parts)
        assert vlm.anatomy.neurons == plain.anatomy.neurons
        for score in ("direct", "norm_aware", "gradient"):
            for one, other in zip(
                mmn.contributions(vlm, trace, noun, score), mmn.contributions(plain, trace, noun, score), strict=True
            ):
                assert torch.equal(one, other)
    inside = mmn.contributions(plain, trace, noun, "gradient")
    with mode():
        assert all(map(torch.equal, inside, mmn.contributions(plain, trace, noun, "gradient")))
