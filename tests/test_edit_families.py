"""One edit fitted, applied and undone on models of several families, each tiny and random, with a tokenizer of one sign a token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

import mmn
from mmn import families

FIRST = 0x4E00  # the sign of token 0: signs without upper and lower case


class Signs:
    """A tokenizer: token n is one sign."""

    padding_side, bos_token, eos_token_id = "left", None, 2

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(FIRST + int(token)) for token in ids)


class Family(mmn.VLM):
    """A family's model that reads the family's own picture, and answers in signs."""

    def __init__(self, family: str):
        model = families.randomised(families.build(family))
        super().__init__(model, SimpleNamespace(tokenizer=Signs()), family, lexicon=tiny.every_letter)
        self.given = families.with_picture(model)

    def inputs(self, images: Any, prompts: Any, prefixes: Any) -> dict[str, torch.Tensor]:
        assert len(images) == 1
        ids = self.given["input_ids"]
        more = torch.tensor([[ord(sign) - FIRST for sign in prefixes[0]]], dtype=ids.dtype)
        longer = dict(self.given)
        for key, value in self.given.items():
            if value.shape == ids.shape:
                new = more if key == "input_ids" else torch.full_like(more, 1 if "attention" in key else 0)
                longer[key] = torch.cat([value, new.to(value.dtype)], 1)
            elif value.shape[:2] == ids.shape:  # what each token may see of the pictures
                longer[key] = torch.cat([value, value[:, -1:].expand(-1, more.shape[1], *value.shape[2:])], 1)
        return longer


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "instructblip", "idefics3", "mllama"])
def test_fit_effect_and_undo(family: str) -> None:
    vlm = Family(family)
    image = Image.new("RGB", (8, 8))
    ask = {"prompt": "", "prefix": "", "max_new_tokens": 4}
    trace = vlm.caption(image, **ask)
    source, token = trace.text[0], int(trace.tokens[0])
    target = chr(FIRST + (token + 40) % 250 + 10)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    neurons = mmn.edit.located(vlm, [trace], source, 40)
    edit = mmn.Edit.fit(vlm, image, source, target, neurons, batch_size=1, rate=0.05, steps=60, progress=False, **ask)
    assert edit.report["probability"] > 5 * torch.softmax(_logits(vlm), -1)[ord(target) - FIRST], "the target became likelier"
    plain = _logits(vlm)
    for how in ("weights", "hook"):
        with edit.applied(vlm, how):  # type: ignore[arg-type]
            edited = _logits(vlm)
        moved = (edited - plain)[ord(target) - FIRST] - (edited - plain)[token]
        assert moved > 1, "the target gained on the source"
    after = vlm.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and torch.equal(_logits(vlm), plain)


@torch.no_grad()
def _logits(vlm: mmn.VLM) -> torch.Tensor:
    return vlm.model(**vlm.inputs([None], [""], [""]), use_cache=False).logits[0, -1].float()
