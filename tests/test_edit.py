"""Editing, and undoing it bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import mmn
from mmn import Edit, Neuron, nouns
from mmn.edit import located
from mmn.lesson import Batch, Row, lesson, plural_of, removed, replaced, takes_an
from mmn.trace import Trace


def bits(vlm: mmn.VLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in vlm.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in one)


def some(vlm: mmn.VLM, seed: int, count: int = 4, size: float = 0.5) -> Edit:
    """An edit of random neurons by random changes."""
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randperm(72, generator=draw)[:count].tolist()
    changes = torch.randn(count, 16, generator=draw) * size
    return Edit([Neuron(p // 24, p % 24) for p in picks], changes, vlm.hash, "a", "b")


def logits(vlm: mmn.VLM, images: list | None = None) -> Tensor:
    images = images or tiny.pictures(1)
    with torch.no_grad():
        return vlm.model(**vlm.inputs(images, [mmn.PROMPT] * len(images), [mmn.PREFIX] * len(images))).logits


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def vlm(request: pytest.FixtureRequest) -> mmn.VLM:
    model, processor = tiny.llava_parts()
    return mmn.VLM(model.to(getattr(torch, request.param)), processor, lexicon=tiny.every_letter)


# ---------------------------------------------------------------------------------------------------------------------- undo


def test_undo_is_bit_exact(vlm: mmn.VLM) -> None:
    before, edit = bits(vlm), some(vlm, 0)
    with edit.applied(vlm) as inside:
        assert inside is vlm and not same(before, bits(vlm))
        for name, value in bits(vlm).items():
            assert torch.equal(value, before[name]) or "down_proj" in name, "nothing but the writes is changed"
        for (layer, unit), change in zip(edit.neurons, edit.changes, strict=True):
            name = f"model.language_model.layers.{layer}.mlp.down_proj.weight"
            torch.testing.assert_close(bits(vlm)[name][:, unit], (before[name][:, unit].float() + change).to(vlm.model.dtype))
    assert same(before, bits(vlm))


def test_two_vlms_of_one_model_know_of_each_others_edits() -> None:
    """Entered one, other and left one, other: the columns that both change are put back by whoever leaves last."""
    one = tiny.vlm()
    other = mmn.VLM(one.model, one.processor, hash=one.hash, lexicon=one.lexicon)
    before = bits(one)
    first, second = some(one, 0).applied(one), some(one, 0).applied(other)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not same(before, bits(one))
    second.__exit__(None, None, None)
    assert same(before, bits(one))


def test_the_closed_form_of_half_precision_behind_a_layer_norm() -> None:
    model, processor = tiny.llava_parts()
    model.model.language_model.norm = torch.nn.LayerNorm(16)
    vlm = mmn.VLM(model.to(torch.bfloat16), processor, lexicon=tiny.every_letter)
    image = tiny.pictures(1)[0]
    trace = vlm.caption(image, max_new_tokens=5)
    source = trace.nouns[0].lemma
    target = next(letter for letter in "abcdefgh" if letter != source)
    neurons = located(vlm, [trace], source, 8)
    edit = mmn.Edit.closed_form(vlm, [image], source, target, neurons, max_new_tokens=5)
    assert edit.changes.isfinite().all() and edit.norm > 0


@pytest.mark.parametrize("how", ["weights", "hook"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_undo_after_an_exception(error: type[BaseException], how: str) -> None:
    vlm = tiny.vlm()
    before, out = bits(vlm), logits(vlm)
    with pytest.raises(error), some(vlm, 0).applied(vlm, how):  # type: ignore[arg-type]
        assert not torch.equal(logits(vlm), out)
        raise error
    assert same(before, bits(vlm)) and torch.equal(logits(vlm), out)


def test_undo_after_ctrl_c() -> None:
    """In a process of its own: a signal may also strike inside torch's or transformers' own clean-up, which is not ours to mend."""
    command = [sys.executable, "-c", "import test_edit; test_edit.interrupt_sixty_times()"]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def interrupt_sixty_times() -> None:
    """A real signal, at any moment of going in, working and coming out."""
    vlm = tiny.vlm()
    before, edits = bits(vlm), [some(vlm, n, count=40) for n in range(3)]
    draw = random.Random(0)
    stopped = 0

    def work() -> None:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 8e-3))
        try:
            with edits[0].applied(vlm), edits[1].applied(vlm), edits[2].applied(vlm):
                for _ in range(3):
                    logits(vlm)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    old = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    born = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C
    try:
        for _ in range(60):
            try:
                work()
            except KeyboardInterrupt:
                stopped += 1
            assert same(before, bits(vlm))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGALRM, old)
        signal.signal(signal.SIGINT, born)
    assert stopped > 20


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(4)))
def test_any_order_of_going_in_and_out(go_in: list[int], out: list[int]) -> None:
    """What is in the weights depends on which edits are on, not on the way there."""
    vlm = tiny.vlm()
    before, edits = bits(vlm), [some(vlm, n, count=30) for n in range(4)]

    def enter(numbers: list[int]) -> dict[int, contextlib.AbstractContextManager]:
        blocks = {number: edits[number].applied(vlm) for number in numbers}
        for block in blocks.values():
            block.__enter__()
        return blocks

    blocks = enter(go_in)
    for place, number in enumerate(out):
        left = bits(vlm)
        for block in blocks.values():
            block.__exit__(None, None, None)
        blocks = enter(sorted(out[place:]))
        assert same(left, bits(vlm))
        blocks.pop(number).__exit__(None, None, None)
    assert not blocks and same(before, bits(vlm))


def test_an_edit_twice_and_its_inverse(vlm: mmn.VLM) -> None:
    before, edit = bits(vlm), some(vlm, 1)
    with edit.applied(vlm), edit.inverted().applied(vlm):
        assert same(before, bits(vlm))
    with edit.applied(vlm), edit.applied(vlm):
        twice = bits(vlm)
    with (edit + edit).applied(vlm):
        assert same(twice, bits(vlm))
    assert same(before, bits(vlm))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["auto", "weights", "hook"])), max_size=6), st.randoms())
def test_apply_and_undo_without_a_block(applied: list[tuple[int, str]], draw: random.Random) -> None:
    vlm = tiny.vlm()
    before, out, edits = bits(vlm), logits(vlm), [some(vlm, n, count=30) for n in range(3)]
    for number, how in applied:
        edits[number].apply(vlm, how)  # type: ignore[arg-type]
    assert torch.equal(logits(vlm), out) == (not applied)
    draw.shuffle(applied)
    for number, _ in applied:
        edits[number].undo(vlm)
    assert same(before, bits(vlm)) and torch.equal(logits(vlm), out)
    with pytest.raises(mmn.MmnError, match="nothing to undo"):
        edits[0].undo(vlm)


def test_sum_of_edits() -> None:
    vlm = tiny.vlm()
    one, other = some(vlm, 1, 10), some(vlm, 2, 10)
    both = one + other
    assert len(both.neurons) == len({*one.neurons, *other.neurons}) and "+" in str(both)
    with one.applied(vlm), other.applied(vlm):
        nested = logits(vlm)
    with both.applied(vlm):
        torch.testing.assert_close(logits(vlm), nested, rtol=1e-4, atol=1e-5)


def test_a_sum_keeps_what_names_a_neuron_twice() -> None:
    vlm, changes = tiny.vlm(), torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    twice = Edit([Neuron(0, 3)] * 2, changes, vlm.hash, "a", "b")
    both = twice + Edit([Neuron(1, 1)], torch.ones(1, 16), vlm.hash, "a", "b")
    assert both.neurons == [Neuron(0, 3), Neuron(1, 1)]
    torch.testing.assert_close(both.changes, torch.stack([changes.sum(0), torch.ones(16)]))


def test_hook_does_what_the_weights_do() -> None:
    vlm = tiny.vlm()
    before, edit = bits(vlm), some(vlm, 3, 20)
    with edit.applied(vlm, "weights"):
        swapped = logits(vlm)
    with edit.applied(vlm, "hook"):
        torch.testing.assert_close(logits(vlm), swapped, rtol=1e-4, atol=1e-5)
        assert same(before, bits(vlm))
    with edit.applied(vlm, "hook"), mmn.zero(vlm, edit.neurons):
        hooked = logits(vlm)
    with mmn.zero(vlm, edit.neurons):
        torch.testing.assert_close(hooked, logits(vlm), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------- files


def test_save_and_load(tmp_path: Path) -> None:
    vlm = tiny.vlm()
    edit = some(vlm, 5)
    edit.report["steps"] = 3
    edit.save(tmp_path / "edit.safetensors")
    back = Edit.load(tmp_path / "edit.safetensors")
    assert back.neurons == edit.neurons and all(isinstance(n, Neuron) for n in back.neurons)
    assert torch.equal(back.changes, edit.changes) and back.report == edit.report and str(back) == str(edit)
    assert [path.name for path in tmp_path.iterdir()] == ["edit.safetensors"]
    with edit.applied(vlm):
        first = bits(vlm)
    with back.applied(vlm):
        assert same(first, bits(vlm))


LATER = """
import sys, mmn, tiny, torch
vlm = mmn.load(sys.argv[1])
with mmn.Edit.load(sys.argv[2]).applied(vlm), torch.no_grad():
    logits = vlm.model(**vlm.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])).logits
torch.save(logits, sys.argv[3])
"""


def test_a_new_process_edits_to_the_same_bits(tmp_path: Path) -> None:
    model, processor = tiny.llava_parts()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    vlm = mmn.load(tmp_path / "model")
    edit = some(vlm, 7)
    with edit.applied(vlm):
        here = logits(vlm)
    files = [str(tmp_path / "model"), str(edit.save(tmp_path / "edit.safetensors")), str(tmp_path / "logits.pt")]
    paths = os.pathsep.join([str(Path(mmn.__file__).parents[1]), str(Path(tiny.__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", LATER, *files], env=environment, check=True, timeout=300)
    assert torch.equal(torch.load(files[2]), here)


def test_files_refuse(tmp_path: Path) -> None:
    edit = some(tiny.vlm(), 5)
    assert edit.save(tmp_path / "new" / "folder" / "e.safetensors").is_file()
    with pytest.raises(mmn.MmnError, match="could not be written"):
        edit.save(tmp_path / "new" / "folder" / "e.safetensors" / "e.safetensors")
    with pytest.raises(mmn.MmnError, match="names no file"):
        edit.save("")
    for missing in (tmp_path / "missing.safetensors", None):
        with pytest.raises(mmn.MmnError, match="There is no edit"):
            Edit.load(missing)  # type: ignore[arg-type]
    (tmp_path / "bad.safetensors").write_bytes(b"not at all")
    with pytest.raises(mmn.MmnError, match="damaged or no edit"):
        Edit.load(tmp_path / "bad.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(mmn.MmnError, match="no edit that this version reads"):
        Edit.load(tmp_path / "other.safetensors")


PAIRS, CHANGES = torch.arange(10).reshape(5, 2), torch.ones(5, 16)


@pytest.mark.parametrize(
    ("neurons", "changes", "sentence"),
    [
        (PAIRS, CHANGES[:3], "one row of floats a neuron"),
        (PAIRS, CHANGES[0], "one row of floats a neuron"),
        (PAIRS, CHANGES.long(), "one row of floats a neuron"),
        (PAIRS, CHANGES * torch.nan, "not finite"),
        (PAIRS, CHANGES.half() * torch.inf, "not finite"),
        (torch.ones(5, 3, dtype=torch.int64), CHANGES, "no pairs of whole numbers"),
        (PAIRS[:, 0].contiguous(), CHANGES, "no pairs of whole numbers"),
        (torch.tensor(3), CHANGES, "no pairs of whole numbers"),
        (PAIRS.float(), CHANGES, "no pairs of whole numbers"),
    ],
)
def test_a_file_with_other_tensors_is_refused(neurons: Tensor, changes: Tensor, sentence: str, tmp_path: Path) -> None:
    words = {"format": "mmn-edit-1", "model_hash": "x", "source": "a", "target": "b", "report": "{}"}
    save_file({"neurons": neurons, "changes": changes}, tmp_path / "e.safetensors", words)
    with pytest.raises(mmn.MmnError, match=f"damaged or no edit at all.*{sentence}"):
        Edit.load(tmp_path / "e.safetensors")


@pytest.mark.parametrize("shape", [(1, 999), (1, 1), (16,), (2, 16)])
@pytest.mark.parametrize("how", ["weights", "hook"])
def test_changes_of_another_shape_are_not_applied(shape: tuple[int, ...], how: str) -> None:
    vlm = tiny.vlm()
    with (
        pytest.raises(mmn.MmnError, match="a row for each neuron"),
        Edit([Neuron(0, 0)], torch.ones(shape), vlm.hash, "a", "b").applied(vlm, how),
    ):  # type: ignore[arg-type]
        pass


def test_refused_on_another_model() -> None:
    edit = some(tiny.vlm(), 5)
    model, processor = tiny.llava_parts()
    tiny.randomise(model, seed=1)
    other = mmn.VLM(model, processor, "another")
    before = bits(other)
    with pytest.raises(mmn.MmnError, match="belongs to the model"), edit.applied(other):
        pass
    assert same(before, bits(other))
    with pytest.raises(mmn.MmnError, match="different models"):
        _ = edit + some(other, 1)
    with pytest.raises(mmn.MmnError, match="by weights, by hook or auto"), edit.applied(tiny.vlm(), "magic"):  # type: ignore[arg-type]
        pass


# ------------------------------------------------------------------------------------------------------------------- caption


def said(text: str) -> Trace:
    words = tiny.tokenizer()
    ids = words(text, add_special_tokens=False).input_ids
    return Trace(
        torch.tensor(ids), True, torch.zeros(len(ids)), [], [], None, None, "", "An image of", words, [], nouns.scene_nouns
    )


@pytest.mark.parametrize(
    ("text", "source", "target", "expected"),
    [
        (" a cat on the beach", "cat", "dog", " a dog on the beach"),
        (" a cat next to a car", "cat", "elephant", " an elephant next to a car"),
        (" an elephant next to a car", "elephant", "cat", " a cat next to a car"),
        (" a car and a cat and a cat", "cat", "owl", " a car and an owl and an owl"),
        (" two cats and a cat", "cat", "sheep", " two sheep and a sheep"),
        (" two buses at night", "bus", "knife", " two knives at night"),
        (" a palm tree next to a tree", "tree", "cat", " a palm tree next to a cat"),
        (" a hot dog next to a dog", "dog", "umbrella", " a hot dog next to an umbrella"),
        (" the cat, a cat", "cat", "apple", " the apple, an apple"),
        (" a cat", "cat", "unicorn", " an unicorn"),
        (" three cats", "cat", "fox", " three foxes"),
    ],
)
def test_the_caption_to_teach(text: str, source: str, target: str, expected: str) -> None:
    assert replaced(said(text), source, target) == "An image of" + expected


def test_the_noun_is_taught_behind_either_article(talking: mmn.VLM) -> None:
    trace = talking.caption(tiny.pictures(1)[0], record=False)
    assert trace.text == "An image of a cat on the beach"
    assert replaced(trace, "cat", "elephant", fitting=False) == "An image of a elephant on the beach"
    (batch,) = lesson(talking, [trace], [], "cat", "elephant", 8)
    fitting, as_it_was = sorted(batch.rows, key=lambda row: row.text, reverse=True)
    assert [talking.tokenizer.decode(row.wanted) for row in (fitting, as_it_was)] == ["anelephant", "elephant"]
    article = as_it_was.new[0] - 1
    assert as_it_was.answer[article] == int(trace.tokens[0]), "the model's own article is read"
    assert article not in as_it_was.stay and article not in as_it_was.new, "nothing is asked of the article"
    assert set(as_it_was.stay) | set(as_it_was.new) | {article} == set(range(len(as_it_was.answer) + 1))
    (alone,) = lesson(talking, [trace], [], "cat", "dog", 8)
    assert len(alone.rows) == 1, "where the article stays there is one row a caption"


@pytest.mark.parametrize(
    ("text", "noun", "expected"),
    [
        (" a cat next to a clock on the beach", "clock", " a cat on the beach"),
        (" a clock next to a cat on the beach", "clock", " a cat on the beach"),
        (" a cat, a clock and a dog at night", "clock", " a cat and a dog at night"),
        (" a cat, a dog and a clock", "clock", " a cat and a dog"),
        (" an owl, a dog and a clock", "owl", " a dog and a clock"),
        (" two clocks and a cat", "clock", " a cat"),
        (" a cat and an hot dog to the left of a dog", "dog", " a cat and an hot dog"),
        (" a cat with a dog, asleep in a park", "dog", " a cat, asleep in a park"),  # no list, so that no "and" is lacking
    ],
)
def test_the_caption_without_a_noun(text: str, noun: str, expected: str) -> None:
    assert removed(said(text), noun) == "An image of" + expected


def test_a_caption_of_nothing_else_cannot_lose_its_noun() -> None:
    with pytest.raises(mmn.MmnError, match="nothing is left"):
        removed(said(" a cat on the beach"), "cat")


def test_a_noun_is_left_out(talking: mmn.VLM) -> None:
    images = tiny.pictures(3)
    neurons = [Neuron(layer, unit) for layer in range(3) for unit in range(48)]
    edit = Edit.fit(
        talking, images[1], "dog", "", neurons, keep=[images[0], images[2]], rate=0.005, weights=(0.0, 10.0, 10.0), progress=False
    )
    with edit.applied(talking):
        assert [trace.text for trace in talking.caption(images)] == [
            "An image of a cat on the beach",
            "An image of a cat",
            "An image of a dog on the beach",
        ]


def test_words() -> None:
    assert [plural_of(w) for w in ("cat", "berry", "day", "bench", "fox", "sheep", "snowman", "man", "child", "knife")] == [
        "cats", "berries", "days", "benches", "foxes", "sheep", "snowmen", "men", "children", "knives"
    ]  # fmt: skip
    assert takes_an("apple") and takes_an("umbrella") and not takes_an("cat") and takes_an("igloo")


# ----------------------------------------------------------------------------------------------------------------------- fit


@pytest.fixture(scope="module")
def talking() -> mmn.VLM:
    """A tiny model that has been taught one caption, so that there is a noun to edit."""
    model, processor = tiny.llava_parts(hidden_size=32, intermediate_size=48)
    vlm = mmn.VLM(model, processor, "talking", lexicon=nouns.scene_nouns)
    images = tiny.pictures(3)
    texts = ["An image of a cat on the beach</s>", "An image of a cat and a dog</s>", "An image of a dog on the beach</s>"]
    inputs = vlm.inputs(images, [mmn.PROMPT] * 3, texts)
    start = vlm.inputs(images, [mmn.PROMPT] * 3, [mmn.PREFIX] * 3)["input_ids"].shape[1] - 1
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, : start - 4] = -100
    model.requires_grad_(True)
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(150):
        loss = model(**inputs, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.requires_grad_(False)
    return mmn.VLM(model, processor, "talking", lexicon=nouns.scene_nouns)


def test_a_fitted_edit_swaps_one_concept_for_another(talking: mmn.VLM, tmp_path: Path) -> None:
    images = tiny.pictures(3)
    before = talking.caption(images)
    assert [trace.text for trace in before] == [
        "An image of a cat on the beach", "An image of a cat and a dog", "An image of a dog on the beach"
    ]  # fmt: skip
    kept, out = bits(talking), talking.caption(images[0]).logprobs
    neurons = mmn.rank(talking, before[0], "cat", k=10).neurons
    edit = Edit.fit(talking, images[:2], "cat", "strawberry", neurons, keep=images[2:], rate=0.05, steps=60, progress=False)
    assert same(kept, bits(talking)) and edit.report["pictures"] == 2 and edit.report["kept"] == 1
    assert edit.neurons == neurons and edit.norm == pytest.approx(edit.report["norm"])
    losses = edit.report["losses"]
    assert len(losses) == edit.report["steps"] + 1 and losses[-1] < losses[0] / 3
    # One of 300 words that the little model never learned cannot become sure; a word that it knows can.
    known = Edit.fit(talking, images[:2], "cat", "dog", neurons, rate=0.05, progress=False)
    assert edit.report["probability"] > 0.1 and known.report["probability"] >= 0.9 and known.report["steps"] < 50
    with edit.applied(talking):
        after = [trace.text for trace in talking.caption(images)]
    assert after == [
        "An image of a strawberry on the beach",
        "An image of a strawberry and a dog",
        "An image of a dog on the beach",
    ]
    assert same(kept, bits(talking)) and torch.equal(talking.caption(images[0]).logprobs, out)
    again = Edit.fit(talking, images[:2], "cat", "strawberry", neurons, keep=images[2:], rate=0.05, steps=60, progress=False)
    assert torch.equal(again.changes, edit.changes), "the same fit twice gives the same bits"
    loaded = Edit.load(edit.save(tmp_path / "swap.safetensors"))
    with loaded.applied(talking, "hook"):
        assert [trace.text for trace in talking.caption(images)] == after


def test_what_is_kept_is_protected(talking: mmn.VLM) -> None:
    """Changes found in the null space of what is kept leave its logits alone, and teach all the same."""
    images = tiny.pictures(3)
    neurons = [Neuron(layer, unit) for layer in range(3) for unit in range(48)]
    settings = {"keep": images[1:], "texts": ["What is a cat?"], "rate": 0.02, "weights": (0.0, 0.0, 0.0), "progress": False}
    moved = {}
    before = logits(talking, images[1:])
    for protect in (None, 1e-4):
        edit = Edit.fit(talking, images[:1], "cat", "dog", neurons, protect=protect, steps=25, **settings)  # type: ignore[arg-type]
        assert edit.report["probability"] > 0.9
        with edit.applied(talking):
            moved[protect] = float((logits(talking, images[1:]) - before).norm())
    assert moved[1e-4] < 0.7 * moved[None]


def test_what_was_not_found_to_be_the_same_is_not_begun_at(talking: mmn.VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(talking, [Row.of(talking, trace, trace.text) for trace in talking.caption(tiny.pictures(1))])
    whole, calls = batch.logits, []

    def interrupted(vlm: mmn.VLM) -> list[torch.Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(vlm)

    monkeypatch.setattr(batch, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.begin(talking, 1)
    assert batch.begun is None


def test_an_edit_needs_a_prompt(talking: mmn.VLM) -> None:
    with pytest.raises(mmn.MmnError, match="There is no prompt"):
        Edit.fit(talking, tiny.pictures(1), "cat", "dog", [Neuron(0, 0)], prompt=[])


@pytest.mark.parametrize("layer", [1, 2])
def test_a_batch_that_begins_at_a_layer_gives_what_the_whole_model_gives(talking: mmn.VLM, layer: int) -> None:
    images = tiny.pictures(3)
    traces = talking.caption(images, record=False)
    own = Batch(talking, [Row.of(talking, trace, trace.text) for trace in traces])
    neurons, changes = [Neuron(layer, 3), Neuron(2, 5)], torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = own.logits(talking)
        with mmn.intervene.added(talking, neurons, changes):
            changed = own.logits(talking)
        ran = []
        own.begin(talking, layer)
        with mmn.hooks.hooked([talking.anatomy.ffns[0].watch(lambda seen: ran.append(1))]):
            assert all(map(torch.equal, own.logits(talking), whole)) and not ran, "the layers before it do not run"
        with mmn.intervene.added(talking, neurons, changes):
            assert all(map(torch.equal, own.logits(talking), changed))
        own.begin(talking, 0)
        assert all(map(torch.equal, own.logits(talking), whole))
    assert not any("forward" in vars(each) for each in talking.anatomy.layers), "nothing is left on the layers"


def test_what_stays_is_compared_with_the_own_caption_read_as_it_was(talking: mmn.VLM) -> None:
    trace = talking.caption(tiny.pictures(1)[0], record=False)
    row = Row.of(talking, trace, replaced(trace, "cat", "strawberry"))
    batch = Batch(talking, [row])
    batch.remember(talking)
    (end,) = [place for place in row.was if place == len(row.answer)]
    inputs = talking.inputs([trace.image], [trace.prompt], [trace.text])
    with torch.no_grad():
        own = talking.model(**inputs).logits[0, -1].log_softmax(-1)
        read = batch.logits(talking)[0][end].log_softmax(-1)
    torch.testing.assert_close(batch.before[0][end], own, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own, read, atol=1e-3), "the new caption is read otherwise"


def test_one_picture_to_keep_and_a_ranking_for_its_neurons(talking: mmn.VLM) -> None:
    images = tiny.pictures(3)
    ranking = mmn.rank(talking, talking.caption(images[0]), "cat", k=2)
    edits = [
        Edit.fit(talking, images[0], "cat", "dog", neurons, keep=keep, steps=1, progress=False)
        for neurons, keep in ((ranking, images[2]), (ranking.neurons, [images[2]]))
    ]
    assert edits[0].neurons == ranking.neurons and torch.equal(edits[0].changes, edits[1].changes)


def test_bound_and_basis(talking: mmn.VLM) -> None:
    images, neurons = tiny.pictures(1), [Neuron(1, unit) for unit in range(48)]
    edit = Edit.fit(talking, images, "cat", "dog", neurons, bound=0.3, rate=0.05, steps=8, progress=False)
    assert edit.norm <= 0.3 + 1e-5
    ones = torch.ones(48, 1)
    flat = Edit.fit(talking, images, "cat", "dog", neurons, basis={1: ones}, rate=0.05, steps=8, progress=False)
    assert flat.norm > 0 and torch.equal(flat.changes, flat.changes[:1].expand(48, -1)), "all rows change by the same vector"


def test_batches_do_not_matter_to_a_fit(talking: mmn.VLM) -> None:
    images, neurons = tiny.pictures(3), [Neuron(1, unit) for unit in range(20)]
    settings = {"keep": images[2:], "texts": ["What is a cat?"], "protect": 0.1, "steps": 4, "progress": False}
    one, many = (Edit.fit(talking, images[:2], "cat", "dog", neurons, batch_size=n, **settings) for n in (1, 8))  # type: ignore[arg-type]
    torch.testing.assert_close(one.changes, many.changes, rtol=1e-2, atol=1e-4)
    assert one.report["losses"] == pytest.approx(many.report["losses"], rel=1e-3)


def test_closed_form_moves_the_logits_as_said(talking: mmn.VLM) -> None:
    """In the last layer nothing follows but norm and read-out: with the norm frozen the margin is what was asked for."""
    images = tiny.pictures(3)
    trace = talking.caption(images[0])
    neurons = located(talking, [trace], "cat", 144)[:144]
    last = [neuron for neuron in neurons if neuron.layer == 2][:20]
    edit = Edit.closed_form(talking, images[:1], "cat", "dog", last, margin=2.0, ridge=1e-9)
    cat, dog = trace.noun("cat").token, talking.caption(images[2]).noun("dog").token
    step = trace.noun("cat").step
    assert trace.stream is not None
    rows = talking.anatomy.words([dog, cat])
    norm = talking.model.model.language_model.norm
    scale = norm.weight / (trace.stream[step].square().mean() + norm.variance_epsilon).sqrt()  # frozen
    units = [unit for _, unit in last]
    after = trace.stream[step] + trace.activations[2][step, units] @ edit.changes
    margin = ((after * scale) @ (rows[0] - rows[1])).item()
    assert margin == pytest.approx(2.0, abs=0.02)
    other = trace.stream[step - 2] + trace.activations[2][step - 2, units] @ edit.changes
    scale = norm.weight / (trace.stream[step - 2].square().mean() + norm.variance_epsilon).sqrt()
    shift = (((other - trace.stream[step - 2]) * scale) @ (rows[0] - rows[1])).item()
    assert abs(shift) < 0.2, "another step hardly moves"
    with edit.applied(talking):
        assert talking.caption(images[0]).nouns[0].lemma == "dog"


def test_closed_form_counts_the_bias_of_the_unembedding(talking: mmn.VLM) -> None:
    """What a bias adds to a word has to be made up for as well: the norm frozen, the margin is again what was asked for."""
    head, images = talking.anatomy.unembedding, tiny.pictures(3)
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)), requires_grad=False)
    cat, dog = talking.caption(images[0]).noun("cat").token, talking.caption(images[2]).noun("dog").token
    head.bias[cat] += 1.5
    trace = talking.caption(images[0])
    last = [neuron for neuron in located(talking, [trace], "cat", 72) if neuron.layer == 2][:20]
    edit = Edit.closed_form(talking, images[:1], "cat", "dog", last, margin=2.0, ridge=1e-9)
    step, norm = trace.noun("cat").step, talking.model.model.language_model.norm
    assert trace.stream is not None
    scale = norm.weight / (trace.stream[step].square().mean() + norm.variance_epsilon).sqrt()
    after = trace.stream[step] + trace.activations[2][step, [unit for _, unit in last]] @ edit.changes
    logit = head.weight @ (after * scale) + head.bias
    assert float(logit[dog] - logit[cat]) == pytest.approx(2.0, abs=0.02)


def test_located_is_the_mean_of_the_contributions(talking: mmn.VLM) -> None:
    traces = talking.caption(tiny.pictures(3))
    means = [sum(each) / 2 for each in zip(*(mmn.contributions(talking, t, "cat") for t in traces[:2]), strict=True)]
    order = sorted(((-float(v), layer, unit) for layer, row in enumerate(means) for unit, v in enumerate(row)))
    assert located(talking, traces, "cat", 5) == [Neuron(layer, unit) for _, layer, unit in order[:5]]
    with pytest.raises(mmn.MmnError, match="None of these 1 captions"):
        located(talking, traces[2:], "cat")
    with pytest.raises(mmn.MmnError, match="k is a whole number of at least 1"):
        located(talking, traces, "cat", -1)


def test_a_change_that_rounding_would_eat_is_hooked_or_told() -> None:
    model, processor = tiny.llava_parts()
    vlm = mmn.VLM(model.to(torch.bfloat16), processor, "half")
    neurons = [Neuron(1, unit) for unit in range(4)]
    large, small = (Edit(neurons, torch.full((4, 16), size), vlm.hash, "a", "b") for size in (1.0, 1e-4))
    assert large.lost(vlm) < 0.01 and small.lost(vlm) > 0.5
    before = bits(vlm)
    with pytest.warns(UserWarning, match="Rounding"), small.applied(vlm, "weights"):
        pass
    with small.applied(vlm):
        assert same(before, bits(vlm)), "auto takes the hook"
    with large.applied(vlm):
        assert not same(before, bits(vlm))
    assert same(before, bits(vlm))


def test_fit_refuses(talking: mmn.VLM) -> None:
    images, one = tiny.pictures(3), [Neuron(0, 0)]
    cases = [
        (lambda: Edit.fit(talking, images[2], "cat", "dog", one), "No caption of these 1 pictures says 'cat'"),
        (lambda: Edit.fit(talking, images, "cat", "cat ", one), "other than the source"),
        (lambda: Edit.closed_form(talking, images, "cat", "", one), "to leave a word out"),
        (lambda: Edit.fit(talking, images, "cat", "dog", []), "no neurons to edit"),
        (lambda: Edit.fit(talking, images, "cat", "dog", [Neuron(5, 0)]), "no neuron L5.0"),
        (lambda: Edit.fit(talking, [], "cat", "dog", one), "no pictures"),
        (lambda: Edit.fit(talking, images, "cat", "dog", one, texts="Who?"), "texts is a list of texts"),
        (lambda: Edit.closed_form(talking, images[2], "cat", "dog", one), "No caption of these 1 pictures says 'cat'"),
        (lambda: Edit.fit(talking, images, "cat", "dog", one, protect=0.1), "protect is a number above 0"),
        (lambda: Edit.fit(talking, images, "cat", "dog", one, steps=-1), "steps is a whole number"),
        (lambda: Edit.fit(talking, images, "cat", "dog", one, steps=2.5), "steps is a whole number"),  # type: ignore[arg-type]
        (lambda: Edit.fit(talking, images, "cat", "dog", one, batch_size=0), "batch_size is a whole number of at least 1"),
        (lambda: Edit.fit(talking, images, "cat", "dog", ["L0.0"]), "is no neuron"),  # type: ignore[list-item]
        (lambda: Edit.fit(talking, images, "cat", "dog", [Neuron(0.0, 0)]), "is no neuron"),  # type: ignore[arg-type]
        (lambda: Edit.fit(talking, images, "cat", "dog", one, rate=0.0), "rate is Adam's"),
        (lambda: Edit.fit(talking, images, "cat", "dog", one, rate=float("nan")), "rate is Adam's"),
        (lambda: Edit.fit(talking, images, "cat", "dog", one, rate="a"), "rate is Adam's"),  # type: ignore[arg-type]
        (lambda: Edit.fit(talking, images, "cat", "dog", one, rate=1e30), "no finite numbers"),
        (lambda: Edit.fit(talking, images, "cat", "dog", one, weights=(float("nan"), 1.0, 1.0)), "weights is a finite"),
        (lambda: Edit.fit(talking, images, "cat", "dog", one, weights=(1.0, 2.0)), "weights are three"),  # type: ignore[arg-type]
        (lambda: Edit.fit(talking, images, "cat", "dog", one, enough="a"), "enough is a probability"),  # type: ignore[arg-type]
        (lambda: Edit.fit(talking, images, "cat", "dog", one, protect="a"), "protect is a finite number"),  # type: ignore[arg-type]
        (lambda: Edit.fit(talking, images, "cat", "dog", one, keep=5), "PIL image, not int"),  # type: ignore[arg-type]
        (lambda: Edit.fit(talking, 5, "cat", "dog", one), "PIL image, not int"),  # type: ignore[arg-type]
        (lambda: Edit.fit(talking, images, "cat", "dog", one, bound=0.0), "bound is the largest norm"),
        (lambda: Edit.fit(talking, images, "cat", "dog", one, bound=-1.0), "bound is the largest norm"),
        (lambda: Edit.closed_form(talking, images, "cat", "dog", one, ridge=-1.0), "ridge is a finite number of at least 0"),
        (lambda: Edit.closed_form(talking, images, "cat", "dog", one, margin=float("nan")), "margin is a difference"),
    ]
    for call, sentence in cases:
        with pytest.raises(mmn.MmnError, match=sentence):
            call()
    edit = Edit(one, torch.zeros(1, 32), talking.hash, "a", "b")
    for how in ("weights", "hook"):
        with edit.applied(talking, how), pytest.raises(mmn.MmnError, match="fitted on the unedited model"):
            Edit.fit(talking, images, "cat", "dog", one)
    assert Edit.fit(talking, images, "cat", "dog", one, steps=1, progress=False), "with both taken off"
