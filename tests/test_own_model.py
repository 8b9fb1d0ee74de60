"""A model with code of its own, on the miniature of mPLUG-Owl2: the page of the book runs, and what it says is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import mmn
from mmn import oracle, properties
from mmn.anatomy import find
from mmn.edit import Edit

PAGE = Path(__file__).parent.parent / "book" / "bring_your_own_model.md"
CELL = re.compile(r"^```\{code-cell\} python3\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="there is no book beside the tests")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's cells define, run from top to bottom."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PAGE.parent)
        for cell in CELL.findall(PAGE.read_text(encoding="utf-8")):
            exec(cell, names)
    return names


def test_the_page_runs(page: dict[str, Any]) -> None:
    assert page["vlm"].anatomy.neurons == [24] * 3
    assert len(page["gaps"]) == 3 and max(page["gaps"]) < 1e-4
    assert page["silenced"].text != page["trace"].text


def test_what_is_found_is_what_is_described(page: dict[str, Any]) -> None:
    found, described = find(page["model"]), page["anatomy"]
    assert found.decoder is described.decoder and found.layers == described.layers
    assert found.final_norm is described.final_norm and found.unembedding is described.unembedding
    assert [ffn.projection for ffn in found.ffns] == [ffn.projection for ffn in described.ffns]
    assert [ffn.gate for ffn in found.ffns] == [ffn.gate for ffn in described.ffns]


def test_the_picture_stands_where_it_is_said_to(page: dict[str, Any]) -> None:
    """All named positions but the end mark change with the picture, and no other."""
    named = page["vlm"].image_positions(page["inputs"])[0].nonzero()[:, 0].tolist()
    assert page["changed"].nonzero()[:, 0].tolist() == named[:-1] and len(named) == 5
    assert page["streams"][0].shape[1] == page["inputs"]["input_ids"].shape[1] + 4


def test_norms_and_keys_are_those_of_the_modality(page: dict[str, Any]) -> None:
    """The miniature does what makes mPLUG-Owl2 what it is: a change of the picture's modules moves only what reads the picture."""
    model, vlm = page["model"], page["vlm"]
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert type(getattr(model.model.layers[0], name)).__name__ == "MultiwayNetwork"
    inputs = vlm.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])
    words = vlm.inputs([None], [mmn.PROMPT], [mmn.PREFIX])
    weight = model.model.layers[1].self_attn.v_proj.multiway[1].weight.data
    with torch.no_grad():
        before = model(**inputs).logits, model(**words).logits
        weight += 1
        after = model(**inputs).logits, model(**words).logits
        weight -= 1
    assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])


def test_a_batch_is_its_rows(page: dict[str, Any]) -> None:
    vlm, images = page["vlm"], tiny.pictures(3)
    prompts = ["Describe.", mmn.PROMPT, "Describe the image in few words. " * 2]
    together = vlm.caption(images, prompts, max_new_tokens=6, batch_size=3)
    single = [vlm.caption(image, prompt, max_new_tokens=6) for image, prompt in zip(images, prompts, strict=True)]
    for alone, trace in zip(single, together, strict=True):
        assert alone.text == trace.text
        for one, other in zip(alone.activations, trace.activations, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_trace_is_what_the_model_does_without_its_cache(page: dict[str, Any]) -> None:
    vlm = page["vlm"]
    trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=8)
    with torch.no_grad():
        logits = vlm.model(**vlm.replay(trace, 7), use_cache=False).logits[0, -8:]
    assert logits.argmax(-1).tolist() == trace.tokens.tolist()


def test_shuffling_moves_the_five_vectors(page: dict[str, Any]) -> None:
    vlm, text = page["vlm"], page["text"]
    seen: list[torch.Tensor] = []
    handle = text.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    inputs = vlm.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])
    with torch.no_grad():
        vlm.model(**inputs)
        with mmn.shuffle_image_tokens(vlm, seed=1) as shuffle:
            vlm.model(**inputs)
    handle.remove()
    where = vlm.image_positions(inputs)[0]
    assert torch.equal(seen[1][where], seen[0][where][shuffle.permutation]) and not torch.equal(seen[0], seen[1])


def test_what_is_measured_at_a_position_counts_all_five_vectors(page: dict[str, Any]) -> None:
    vlm, images = page["vlm"], tiny.pictures(2)
    trace = vlm.caption(images[0], max_new_tokens=4)
    noun = mmn.Noun("", "", int(trace.tokens[2]), 2, (0, 0))
    with torch.no_grad():
        log_p = oracle.Moment(vlm, trace, noun).logits(1).log_softmax(-1)
    assert float(log_p[0, noun.token]) == pytest.approx(float(trace.logprobs[2]), abs=1e-4)
    case = properties.cases(vlm, images)[0]
    for where in ("image", "all", "last"):
        moved = properties.transplant(vlm, case, case.trace.image, {"found": case.top(3)}, where)
        assert moved["gain"].abs().max() < 1e-4, "the own activations change nothing"


def test_an_edit_is_protected_by_what_is_active_at_every_position(page: dict[str, Any]) -> None:
    vlm, images = page["vlm"], tiny.pictures(2)
    source = properties.cases(vlm, images)[0].lemma
    edit = Edit.fit(vlm, images, source, "zz", [mmn.Neuron(1, 1)], keep=images, steps=1, protect=0.1, progress=False)
    assert edit.changes.abs().sum() > 0


def test_edits_in_the_weights_and_by_hook(page: dict[str, Any]) -> None:
    vlm = page["vlm"]
    inputs = vlm.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])
    neurons = [mmn.Neuron(0, 3), mmn.Neuron(2, 7)]
    edit = Edit(neurons, torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), vlm.hash, "a", "b")
    with torch.no_grad():
        plain = vlm.model(**inputs).logits
        with edit.applied(vlm, "weights"):
            weighed = vlm.model(**inputs).logits
        with edit.applied(vlm, "hook"):
            hooked = vlm.model(**inputs).logits
        assert torch.equal(vlm.model(**inputs).logits, plain)
    torch.testing.assert_close(hooked, weighed, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hooked, plain)
