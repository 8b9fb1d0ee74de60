"""The explorer's numbers against a model whose weights are zeroed by hand, its controls without a browser, and when it shows them.

A browser clicks and drags it in test_browser.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import tiny
import torch
from jupyter_client.manager import start_new_kernel
from PIL import Image

import mmn
from mmn import Neuron, explorer, families


@pytest.fixture(scope="module")
def vlm() -> mmn.VLM:
    return tiny.llava(style="pieces")  # whose nonsense has words in it


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return tiny.pictures(1)[0]


@pytest.fixture(scope="module")
def made(vlm: mmn.VLM, image: Image.Image) -> explorer.Explorer:
    return explorer.Explorer(vlm, image, k=5)


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def without(vlm: mmn.VLM, neurons: list[Neuron]) -> mmn.VLM:
    """A copy of the model in whose weights the neurons write nothing."""
    model = copy.deepcopy(vlm.model)
    for layer, unit in neurons:
        mmn.anatomy.find(model).ffns[layer].projection.weight.data[:, unit] = 0
    return mmn.VLM(model, vlm.processor, lexicon=vlm.lexicon)


def test_words_stand_where_their_tokens_were_produced(made: explorer.Explorer) -> None:
    trace = made.trace
    assert len(made.words) >= 3
    assert len({word.lemma for word in made.words}) == len(made.words)
    for word in made.words:
        first, last = word.span
        assert trace.text[first:last] == word.text and first >= len(trace.prefix)
        assert word.token == int(trace.tokens[word.step])
        assert trace.ends[word.step] > first >= (trace.ends[word.step - 1] if word.step else len(trace.prefix))
    assert made.first in made.words


def test_every_word_of_a_caption_of_the_shipped_model_can_be_clicked() -> None:
    vlm = mmn.load("tiny-llava")
    made = explorer.Explorer(vlm, mmn.scenes.draw(3).image)
    written = made.trace.text.removeprefix(made.trace.prefix).replace(",", "").replace(".", "").split()
    assert [word.text for word in made.words] == list(dict.fromkeys(written))
    assert made.first.lemma == made.trace.nouns[0].lemma
    assert made.first.text in made.trace.nouns[0].text  # a noun of two words is entered at its first


def test_a_caption_without_words_ends_with_a_sentence(made: explorer.Explorer) -> None:
    with pytest.raises(mmn.MmnError, match="no words"):
        explorer.words(replace(made.trace, prefix=made.trace.text, tokens=made.trace.tokens[:0]))


def test_contributions_are_activation_times_write_times_word(made: explorer.Explorer) -> None:
    vlm, word = made.vlm, made.words[1]
    found = made.neurons(word)
    assert list(found["score"]) == sorted(found["score"], reverse=True) and len(found) == 5
    unembedding = vlm.model.lm_head.weight
    for row in found.itertuples():
        write = vlm.anatomy.ffns[row.layer].projection.weight[:, row.unit]
        active = float(made.trace.activations[row.layer][word.step, row.unit])
        assert row.activation == pytest.approx(active)
        assert row.score == pytest.approx(active * float(write @ unembedding[word.token]), rel=1e-4)
        best = int((unembedding[: len(vlm.tokenizer)] @ write).argmax())
        assert row.tokens[0] == mmn.semantics.token_text(vlm, best)


def test_with_a_factor_of_one_probabilities_are_those_of_the_caption(made: explorer.Explorer) -> None:
    steps = [word.step for word in made.words]
    expected = made.trace.logprobs[steps].exp().tolist()
    assert made.probabilities(made.words) == pytest.approx(expected, rel=1e-4)
    neurons = [Neuron(0, 1), Neuron(2, 5)]
    assert made.probabilities(made.words, neurons, 1.0) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_zero_is_a_model_without_the_neurons(made: explorer.Explorer, image: Image.Image) -> None:
    word = made.words[0]
    neurons = [Neuron(layer, unit) for layer in (0, 2) for unit in range(12)]
    change = made.change(word, neurons, 0.0)
    bare = without(made.vlm, neurons)
    assert change.caption == bare.caption(image).text != made.trace.text
    row = change.probabilities.loc[word.text]
    logits = bare.model(**bare.replay(made.trace, word.step)).logits[0, -1]
    expected = float(logits.softmax(-1)[word.token])
    assert row["after"] == pytest.approx(expected, rel=1e-4)
    assert abs(row["after"] - row["before"]) > 1e-3
    control = mmn.same_layer_random(made.vlm, neurons, draws=1)[0]
    assert not set(control) & set(neurons)
    logits = without(made.vlm, control).model(**bare.replay(made.trace, word.step)).logits[0, -1]
    assert row["random"] == pytest.approx(float(logits.softmax(-1)[word.token]), rel=1e-4)
    assert change.heat is not None and change.heat_before is not None
    assert not change.heat.grid.any() and change.heat_before.grid.any()


def test_the_heat_of_one_layer_grows_with_the_factor(made: explorer.Explorer) -> None:
    change = made.change(made.words[0], [Neuron(1, 3), Neuron(1, 7)], 2.5)
    assert change.heat is not None and change.heat_before is not None
    torch.testing.assert_close(change.heat.grid, 2.5 * change.heat_before.grid)
    figure = explorer.draw(made, change)
    shown = figure.axes[0].images[-1]
    usual = change.heat_before.grid.mean(0)
    assert shown.get_clim() == pytest.approx((float(usual.min()), float(usual.max())))  # more heat must look hotter
    torch.testing.assert_close(torch.tensor(shown.get_array().data, dtype=torch.float32), 2.5 * usual)


def test_captions_beside_each_other_are_text_and_never_code() -> None:
    shown = explorer.marked("a cat <script>alert(1)</script> here", "a dog <script>alert(1)</script> here")
    assert "<script" not in shown
    assert "<del>cat</del>" in shown and "<ins>dog</ins>" in shown
    assert "del" not in explorer.marked("a cat", "a cat")


# ---------------------------------------------------------------------------------------------------------------- controls


def test_the_controls_follow_each_other(vlm: mmn.VLM, image: Image.Image) -> None:
    other = tiny.pictures(2)[1]
    panel = explorer.Panel(vlm, {"one": image, "two": other}, k=4)
    assert [label for label, _ in panel.word.options] == [word.text for word in panel.explorer.words]
    assert len(panel.chosen.value) == 4 and "Ready" in panel.status.value

    lines, shown = panel.chosen.options, panel.view.value
    panel.word.value = panel.explorer.words[2]
    assert panel.chosen.options != lines and panel.view.value != shown and len(panel.chosen.value) == 4

    shown, before = panel.view.value, panel.captions.value
    panel.factor.value = -1
    assert panel.view.value != shown and panel.captions.value != before
    expected = panel.explorer.change(panel.word.value, panel.chosen.value, -1.0)
    assert panel.captions.value == explorer.marked(panel.explorer.trace.text, expected.caption)

    shown = panel.view.value
    panel.chosen.value = panel.chosen.value[:1]
    assert panel.view.value != shown

    panel.chosen.value = ()
    assert "choose at least one neuron" in panel.status.value

    panel.picture.value = "two"
    assert panel.explorer.image is other and len(panel.chosen.value) == 4 and "Ready" in panel.status.value


def test_the_picture_shown_has_its_numbers_as_alternative_text(vlm: mmn.VLM, image: Image.Image) -> None:
    panel = explorer.Panel(vlm, {"one": image}, k=4)
    value = panel.explorer.change(panel.word.value, panel.chosen.value, 1.0).probabilities.iloc[0]["before"]
    assert f"{value:.2f}, now {value:.2f}" in panel.view.value.partition("src=")[0]


def test_no_pictures_end_with_a_sentence(vlm: mmn.VLM) -> None:
    with pytest.raises(mmn.MmnError, match="no pictures"):
        explorer.explore(vlm, [])


def test_a_still_says_that_it_is_one(vlm: mmn.VLM, image: Image.Image) -> None:
    explorer.explore(vlm, image, k=3)  # nobody sits before a test
    figure = plt.gcf()
    assert "still" in figure.get_suptitle() and "JupyterLab" in figure.get_suptitle()
    assert explorer.Explorer(vlm, image, 3).first.text in "".join(ax.get_title() for ax in figure.axes)


SHOW = "import tiny; from mmn import explorer; explorer.explore(tiny.vlm(), tiny.pictures(1), k=3)"


@pytest.fixture(scope="module")
def kernel() -> Iterator[object]:
    manager, client = start_new_kernel(kernel_name="python3", cwd=tiny.__file__.rpartition("/")[0])
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("asks", [True, False])
def test_controls_where_a_reader_can_be_asked_and_a_picture_elsewhere(kernel, asks: bool) -> None:
    kinds: set[str] = set()

    def see(message: dict) -> None:
        kinds.update(message["content"].get("data", {}))
        assert message["msg_type"] != "error", message["content"]

    kernel.execute_interactive(SHOW, allow_stdin=asks, timeout=120, output_hook=see)
    assert ("application/vnd.jupyter.widget-view+json" in kinds) == asks
    assert ("image/png" in kinds) != asks


# ---------------------------------------------------------------------------------------------------------------- families


class Signs:
    """A tokenizer: token n is a space and one sign."""

    padding_side, bos_token, eos_token_id = "left", None, 2

    def __len__(self) -> int:
        return 60

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f" {chr(0x4E00 + int(token))}" for token in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.decode([token])


class Family(mmn.VLM):
    """A family's tiny model, which reads the family's own picture and no prompt."""

    def __init__(self, family: str):
        model = families.randomised(families.build(family))
        super().__init__(model, SimpleNamespace(tokenizer=Signs()), family, lexicon=tiny.every_letter)
        self.given = families.with_picture(model)
        self.given.pop("position_ids", None)  # which no processor gives, and which would have to grow with the answer

    def inputs(self, images: object, prompts: object, prefixes: object) -> dict[str, torch.Tensor]:
        return dict(self.given)


# Tiles with separators between, queries in place of patches, routed experts, a picture read aside: first and last have no heatmap.
@pytest.mark.parametrize("family", ["llava_next", "instructblip", "qwen3_5_moe", "mllama"])
def test_families(family: str) -> None:
    made = explorer.Explorer(Family(family), tiny.pictures(1)[0], k=4)
    expected = made.trace.logprobs[[word.step for word in made.words]].exp().tolist()
    assert made.probabilities(made.words) == pytest.approx(expected, rel=1e-3)
    table = made.neurons(made.first)
    change = made.change(made.first, explorer._named(table), 0.0)
    row = change.probabilities.loc[made.first.text]
    assert row["before"] != row["after"] and change.caption.startswith(made.trace.prefix)
    assert (change.heat is None) == (family in ("llava_next", "mllama"))
    assert explorer.still(made).axes
