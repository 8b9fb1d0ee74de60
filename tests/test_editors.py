"""Ways of editing beside each other: what each promises by construction, and the measures against a count by hand."""

from collections.abc import Iterator

import pytest
import torch

import mmn
from mmn import editors, scenes
from mmn.edit import located
from mmn.editors import Judge, Task, Way
from mmn.lesson import says


@pytest.fixture(scope="module")
def vlm() -> Iterator[mmn.VLM]:
    """The shipped model; every test must leave it as it was."""
    vlm = mmn.load("tiny-llava")
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    yield vlm
    after = vlm.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def job() -> Task:
    return editors.task("cat", "dog", fit=4, keep=4, texts=3)


@pytest.fixture(scope="module")
def judge(vlm: mmn.VLM, job: Task) -> Judge:
    return Judge(vlm, job, 6)


def test_scenes_styles_and_prompts_are_disjoint(job: Task, judge: Judge) -> None:
    assert {s.style for s in job.fit + job.keep} <= set(editors.FIT_STYLES)
    assert not set(editors.NEW_STYLES) & set(editors.FIT_STYLES) and scenes.HELD_OUT_STYLE not in editors.FIT_STYLES
    assert not set(scenes.HELD_OUT_PARAPHRASES) & set(job.prompts)
    assert all("cat" in s.names for s in job.fit) and not any("cat" in s.names for s in job.keep)
    fitted = {picture.tobytes() for picture in job.pictures + job.others}
    judged = [image for name, (some, _) in judge.asked.items() if name != "fitted" for image in some if image]
    assert not fitted & {image.tobytes() for image in judged}
    assert not set(job.texts) & set(judge.asked["text"][1]) and not any(
        "cat" in q or "dog" in q.split() for q in job.texts + judge.asked["text"][1]
    )


def test_active_rows_are_those_that_speak_at_the_noun(vlm: mmn.VLM, job: Task) -> None:
    """Against activations read caption by caption; a change of rows that are always silent there moves no logit of the noun."""
    traces = [trace for trace in vlm.caption(job.pictures) if says(trace, "cat")]
    often = editors.firing(traces, "cat")
    by_hand = [sum(bool(t.activations[7][t.noun("cat").step, unit] != 0) for t in traces) / len(traces) for unit in range(512)]
    assert often[7].tolist() == pytest.approx(by_hand) and len(often) == len(vlm.anatomy.ffns)
    found = editors.in_one_layer(vlm, traces, "cat", 6)
    drawn = editors.active_random(often, found, seed=1)
    assert len(set(drawn)) == 6 and not set(drawn) & set(found) and {n.layer for n in drawn} == {n.layer for n in found}
    assert all(often[layer][unit] >= 0.5 for layer, unit in drawn)
    assert editors.active_random(often, found, seed=1) == drawn != editors.active_random(often, found, seed=2)
    silent = [mmn.Neuron(7, int(unit)) for unit in (often[7] == 0).nonzero()[:5]]
    noun, loud = traces[0].noun("cat"), torch.full((5, vlm.hidden), 9.0)
    inputs = vlm.replay(traces[0], noun.step)
    with torch.no_grad():
        before = vlm.model(**inputs).logits[0, -1]
        with mmn.Edit(silent, loud, vlm.hash, "cat", "dog").applied(vlm):
            torch.testing.assert_close(vlm.model(**inputs).logits[0, -1], before)
    with pytest.raises(mmn.MmnError, match="says 'zebra'"):
        editors.firing([trace for trace in traces if not says(trace, "zebra")], "zebra")
    with pytest.raises(mmn.MmnError, match="No other neuron"):
        editors.active_random(often, found, least=1.1)


def test_counts_are_the_captions_behind_a_share(judge: Judge) -> None:
    counts = judge.counts()
    assert counts.keys() == editors.MEASURES.keys()
    said = {name: sum(says(trace, "cat") for trace in some) for name, some in judge.before.items()}
    assert counts["reliability"] == said["reliability"] and counts["captions_kept"] == len(judge.before["captions_kept"])
    assert counts["rest"] == counts["rest_content"] == sum(said.get(name, 0) for name in editors.FRESH)
    assert counts["text_top1"] == len(judge.before["text"]) and counts["image_top10"] == counts["captions_kept"]


def test_no_change_changes_nothing(vlm: mmn.VLM, judge: Judge) -> None:
    from contextlib import nullcontext

    figures = judge.of(Way("nothing", nullcontext))
    kept = ("image_top1", "image_top10", "captions_kept", "other_image", "text_top1", "text_top10")
    assert all(figures[name] == 1 for name in kept)
    assert all(figures[name] == 0 for name in ("fitted", "reliability", "new_style", "rephrased", "rest", "by_text"))
    assert figures.keys() == editors.MEASURES.keys()


def test_figures_are_what_a_count_by_hand_gives(vlm: mmn.VLM, job: Task, judge: Judge) -> None:
    edit = mmn.Edit(
        [mmn.Neuron(6, unit) for unit in range(512)],
        torch.randn(512, 256, generator=torch.Generator().manual_seed(0)),
        vlm.hash,
        "cat",
        "dog",
    )
    figures = judge.of(editors.of_edit(vlm, "noise", edit))
    with edit.applied(vlm):
        now = [vlm.caption(image, record=False).text for image in judge.asked["captions_kept"][0]]
    kept = [trace.text == text for trace, text in zip(judge.before["captions_kept"], now, strict=True)]
    assert figures["captions_kept"] == pytest.approx(sum(kept) / len(kept)) and sum(kept) < len(kept)
    agree = []
    for image, trace in zip(judge.asked["captions_kept"][0], judge.before["captions_kept"], strict=True):
        inputs = vlm.inputs([image], [mmn.PROMPT], [trace.text])
        with torch.no_grad():
            old = vlm.model(**inputs).logits[0]
            with edit.applied(vlm):
                new = vlm.model(**inputs).logits[0]
        steps = len(trace.tokens) + 1
        agree.append((old[-steps:].argmax(-1) == new[-steps:].argmax(-1)).float().mean())
    assert figures["image_top1"] == pytest.approx(float(torch.stack(agree).mean()), abs=1e-6)


def test_reading_says_what_generating_says(vlm: mmn.VLM, job: Task, judge: Judge) -> None:
    found = mmn.edit.located(vlm, vlm.caption(job.pictures), "cat", 20)
    way = editors.gradient(vlm, job, found, steps=4, rate=0.02)
    read = judge.of(way)
    with way.on():
        for name in ("fitted", "reliability", "captions_kept"):
            images, prompts = judge.asked[name]
            texts = [trace.text for trace in vlm.caption(images, prompts, record=False)]
            before = judge.before[name]
            if name == "captions_kept":
                good = [old.text == now for old, now in zip(before, texts, strict=True)]
            else:
                now = [set(scenes.mentions(text)) for text, old in zip(texts, before, strict=True) if says(old, "cat")]
                good = ["dog" in said and "cat" not in said for said in now]
            assert read[name] == pytest.approx(sum(good) / len(good)), name
    assert read["fitted"] > 0


def test_ways_that_touch_no_weight(vlm: mmn.VLM, job: Task, judge: Judge) -> None:
    ban = editors.banned(vlm, job)
    with ban.on():
        texts = [trace.text for trace in vlm.caption(job.pictures, record=False)]
    assert not any("cat" in scenes.mentions(text) for text in texts) and ban.norm == 0
    figures = judge.of(editors.logit_bias(vlm, job))
    assert figures["fitted"] == 1, "the bias is as large as the pictures fitted on need"
    said = [trace for trace in judge.before["fitted"] if says(trace, "cat")]
    assert said and vlm.caption(job.pictures[0], record=False).text == judge.before["fitted"][0].text, "and gone after the block"


def test_fine_tuning_rank_one_and_lora_are_what_they_say(vlm: mmn.VLM, job: Task) -> None:
    few = Task(job.source, job.target, job.fit[:2], job.keep[:1], [])
    bounded = editors.fine_tuned(vlm, few, layer=5, bound=0.2, steps=2, rate=0.01)
    assert bounded.norm <= 0.2 + 1e-5 and {n.layer for n in bounded.edit.neurons} == {5} and bounded.rows == vlm.anatomy.neurons[5]
    one = editors.rank_one(vlm, few, layer=7, steps=1)
    assert torch.linalg.matrix_rank(one.edit.changes, rtol=1e-4) == 1
    adapted = editors.lora(vlm, few, rank=2, steps=2)
    for layer, width in enumerate(vlm.anatomy.neurons):
        part = adapted.edit.changes[sum(vlm.anatomy.neurons[:layer]) :][:width]
        assert 1 <= torch.linalg.matrix_rank(part, rtol=1e-4) <= 2
    assert not any("lora" in name for name, _ in vlm.model.named_modules())
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())


def test_the_oracle_is_the_true_effect_of_silencing(vlm: mmn.VLM, job: Task) -> None:
    traces = [trace for trace in vlm.caption(job.pictures) if says(trace, "cat")]
    best = editors.by_oracle(vlm, traces, "cat", 5, candidates=12, most=1)
    noun, inputs = traces[0].noun("cat"), vlm.replay(traces[0], traces[0].noun("cat").step)

    def log_p(neurons: list[mmn.Neuron]) -> float:
        with torch.no_grad(), mmn.zero(vlm, neurons):
            return float(vlm.model(**inputs).logits[0, -1].log_softmax(-1)[noun.token])

    candidates = editors.by_gradient(vlm, traces[:1], "cat", 12)
    order = sorted(candidates, key=lambda neuron: log_p([neuron]))
    assert set(best) == set(order[:5])


def test_content_is_what_is_said_however_it_is_joined() -> None:
    said = editors.content("An image of a lion with two cars and an apple at night")
    assert said == (["a lion", "an apple", "two cars"], ["at night"])
    assert said == editors.content("An image of two cars, an apple and a lion at night")
    assert said != editors.content("An image of two cars, an apple and a lion") and said != editors.content(
        "An image of a lion at night"
    )


def test_settings_of_decoding_leave_nothing_behind(vlm: mmn.VLM) -> None:
    before = vlm.generation(3).to_dict()
    with editors.decoding(vlm, num_beams=2), editors.decoding(vlm, length_penalty=0.5):
        inner = vlm.generation(3)
        assert (inner.num_beams, inner.length_penalty) == (2, 0.5)
    assert "generation" not in vars(vlm) and vlm.generation(3).to_dict() == before


def test_a_judge_needs_a_picture_of_each_kind(vlm: mmn.VLM, job: Task) -> None:
    with pytest.raises(mmn.MmnError, match="count is a whole number of at least 3"):
        editors.Judge(vlm, job, 2)


def test_refusals() -> None:
    with pytest.raises(mmn.MmnError, match="no concept 'unicorn'"):
        editors.task("cat", "unicorn")


def test_a_rank_one_edit_of_a_silent_layer_is_refused(vlm: mmn.VLM, job: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = vlm.caption(job.pictures)
    for trace in traces:
        trace.activations[5].zero_()
    monkeypatch.setattr(vlm, "caption", lambda *args, **kwargs: traces)
    with pytest.raises(mmn.MmnError, match="No neuron of layer 5 is active where 'cat' is said"):
        editors.rank_one(vlm, job, layer=5)


def test_a_closed_form_of_silent_rows_is_refused(vlm: mmn.VLM, job: Task) -> None:
    traces = vlm.caption(job.pictures)
    silent = torch.stack([trace.activations[7].abs().amax(0) for trace in traces]).amax(0).eq(0).nonzero()[:5, 0]
    assert len(silent) == 5
    with pytest.raises(mmn.MmnError, match="None of these neurons is active where 'cat' is said"):
        mmn.Edit.closed_form(vlm, job.pictures, "cat", "dog", [mmn.Neuron(7, int(unit)) for unit in silent])


@pytest.mark.parametrize(("source", "target"), [("elephant", "guitar"), ("strawberry", "lemon")])
def test_ways_without_gradients_swap_the_noun_behind_another_article_and_of_other_length(
    vlm: mmn.VLM, source: str, target: str
) -> None:
    """Side by side *an elephant* and *a guitar* differ in one run of tokens, *strawberry* and *lemon* in their number."""
    job = editors.task(source, target, fit=6, keep=2)
    traces = [trace for trace in vlm.caption(job.pictures) if says(trace, source)]
    assert len(traces) >= 4
    with editors.logit_bias(vlm, job).on():
        said = [scenes.mentions(trace.text) for trace in vlm.caption([trace.image for trace in traces], record=False)]
    assert not any(source in some for some in said) and sum(target in some for some in said) >= len(said) - 1

    new = vlm.tokenizer(f" {target}", add_special_tokens=False).input_ids[0]

    def lead(trace: mmn.Trace) -> float:
        noun = trace.noun(source)
        logits = vlm.model(**vlm.replay(trace, noun.step)).logits[0, -1]
        return float(logits[new] - logits[noun.token])

    neurons = located(vlm, traces, source, 40)
    edit = mmn.Edit.closed_form(vlm, job.pictures, source, target, neurons)
    with torch.no_grad():
        before = [lead(trace) for trace in traces]
        with edit.applied(vlm):
            after = [lead(trace) for trace in traces]
    assert sum(after) / len(after) > sum(before) / len(before) + 5
