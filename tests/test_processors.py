"""Prompts as the processors of several families make them: where the picture, the prompt and the beginning of the answer stand,
and what ends an answer."""

from __future__ import annotations

import copy
import functools

import pytest
import real
import tiny
import torch

import mmn

PROMPTS = [mmn.PROMPT, "Describe the cat.", "Describe the dog next to the image, please, in few words."]
PREFIXES = ["An image of", "An image of a cat and", "A"]
HEAD = "USER: {image}\nDescribe the image in few words. ASSISTANT: An image of"
TURNS = "<|im_start|>user\n{image}Describe the image in few words.<|im_end|>\n<|im_start|>assistant\nAn image of"
PLAIN = "Describe the image in few words. An image of"
IMAGE = "<image>"
# What each model reads, all of it.
READ = {
    "llava": "<s> " + HEAD.format(image=IMAGE * 16),
    "llava_next": "<s> " + HEAD.format(image=IMAGE * 36),
    "instructblip": IMAGE * 4 + "<s> " + PLAIN,
    "blip-2": IMAGE * 4 + "<s> " + PLAIN,
    "paligemma": IMAGE * 16 + "<s>Describe the image in few words.\nAn image of",
    "gemma3": (
        "<s><start_of_turn>user\n\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\nDescribe the image in few "
        "words.<end_of_turn>\n<start_of_turn>model\nAn image of"
    ),
    "mllama": "<s>" + TURNS.format(image="<|image|>"),
    "idefics": f"<s><fake_token_around_image>{IMAGE}<fake_token_around_image>{PLAIN}",
}


@functools.cache
def vlm(family: str) -> mmn.VLM:
    return real.vlm(family)


@pytest.mark.parametrize("family", READ)
def test_what_the_model_reads(family: str) -> None:
    inputs = vlm(family).inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])
    assert vlm(family).tokenizer.decode(inputs["input_ids"][0]) == READ[family]


@pytest.mark.parametrize("family", real.NAMES)
def test_prompt_and_answer_of_a_batch(family: str) -> None:
    """One beginning mark a row; the row ends with the beginning of the answer; the picture comes before both."""
    model = vlm(family)
    inputs = model.inputs(tiny.pictures(3), PROMPTS, PREFIXES)
    for row, prompt, prefix in zip(inputs["input_ids"].tolist(), PROMPTS, PREFIXES, strict=True):
        assert row.count(1) == 1
        text = model.tokenizer.decode(row)
        assert text.endswith(prefix) and text.count(prompt) == 1 and text.index(prompt) < text.rindex(prefix)
        seen = [place for place, token in enumerate(row) if token == 3]
        assert seen and prompt in model.tokenizer.decode(row[seen[-1] :])
    assert "labels" not in inputs


@pytest.mark.parametrize("family", real.NAMES)
def test_a_caption_is_what_the_model_does_without_its_cache(family: str) -> None:
    model = vlm(family)
    trace = model.caption(tiny.pictures(1)[0], max_new_tokens=8)
    with torch.no_grad():
        logits = model.model(**model.replay(trace, len(trace.tokens) - 1), use_cache=False).logits[0, -len(trace.tokens) :]
    assert logits.argmax(-1).tolist() == trace.tokens.tolist()
    torch.testing.assert_close(logits.log_softmax(-1).amax(-1), trace.logprobs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", real.NAMES)
def test_a_batch_is_its_rows(family: str) -> None:
    model, images = vlm(family), tiny.pictures(3)
    together = model.caption(images, PROMPTS, PREFIXES, 6)
    for image, prompt, prefix, trace in zip(images, PROMPTS, PREFIXES, together, strict=True):
        alone = model.caption(image, prompt, prefix, 6)
        assert alone.tokens.tolist() == trace.tokens.tolist()
        for one, other in zip(alone.activations, trace.activations, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", real.NAMES)
def test_ranking_silencing_and_a_heatmap_or_why_there_is_none(family: str) -> None:
    model, image = vlm(family), tiny.pictures(1)[0]
    trace = model.caption(image, max_new_tokens=6)
    noun = mmn.Noun("x", "x", int(trace.tokens[2]), 2, (0, 1))
    ranking = mmn.rank(model, trace, noun, k=3)
    with mmn.zero(model, ranking.neurons):
        assert not torch.equal(model.caption(image, max_new_tokens=6).logprobs, trace.logprobs)
    if family in ("llava", "paligemma", "gemma3", "instructblip", "blip-2"):
        side = 4 if family in ("llava", "paligemma") else 2
        assert mmn.heatmap(model, trace, ranking.neurons).grid.shape == (3, side, side)
    else:
        with pytest.raises(mmn.MmnError) as caught:
            mmn.heatmap(model, trace, ranking.neurons)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("style", tiny.STYLES)
def test_a_nouns_first_sub_token_is_what_the_model_produced(style: str) -> None:
    """At the position before it, by a forward pass of its own, whatever the tokenizer does with spaces."""
    model = mmn.VLM(*tiny.llava_parts(style=style))
    model.lexicon = tiny.every_word
    pieces = model.tokenizer.convert_ids_to_tokens(list(range(model.anatomy.unembedding.out_features)))
    begins = torch.tensor([piece[0] in "\u0120\u2581" for piece in pieces])
    letters = torch.tensor([piece.strip("\u0120\u2581").isalpha() for piece in pieces])
    for ffn in model.anatomy.ffns:
        ffn.projection.weight.data *= 10  # so that its words depend on those before
    # It says nothing but letters, and begins words more often.
    model.anatomy.unembedding.register_forward_hook(lambda _, __, out: out + 100 * letters + 2 * out.std() * begins)
    nouns = 0
    for image in tiny.pictures(4):
        trace = model.caption(image, max_new_tokens=12)
        for noun in trace.nouns:
            nouns += 1
            with torch.no_grad():
                logits = model.model(**model.replay(trace, noun.step)).logits[0, -1]
            piece = pieces[noun.token].strip("\u0120\u2581")
            assert int(logits.argmax()) == noun.token and trace.text[noun.span[0] :].startswith((piece, noun.text))
    assert nouns


def test_the_q_former_reads_words_alone() -> None:
    model = vlm("instructblip")
    inputs = model.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])
    reader = model.processor.qformer_tokenizer
    assert reader.decode(inputs["qformer_input_ids"][0], skip_special_tokens=True).strip() == PLAIN


def test_a_prefilled_answer_is_no_part_of_the_prompt() -> None:
    """PaliGemma's attention runs both ways in the prompt, type 0, and forwards in the answer, type 1, however it was begun."""
    model = vlm("paligemma")
    inputs = model.inputs(tiny.pictures(3), PROMPTS, PREFIXES)
    for row, types, prefix in zip(inputs["input_ids"], inputs["token_type_ids"], PREFIXES, strict=True):
        count = int(types.sum())
        assert types.tolist() == [0] * (len(types) - count) + [1] * count
        assert model.tokenizer.decode(row[len(types) - count :]).strip() == prefix
    # What the model writes is what it reads: the caption's first words, given as its beginning, go on as before.
    image = tiny.pictures(1)[0]
    trace = model.caption(image, prefix="")
    types = model.replay(trace, 5)["token_type_ids"][0]
    assert types.tolist() == [0] * (len(types) - 5) + [1] * 5


def test_without_a_beginning_of_the_answer() -> None:
    for family, end in (("paligemma", "words.\n"), ("gemma3", "<start_of_turn>model\n"), ("llava", "ASSISTANT:")):
        model = vlm(family)
        (ids,) = model.inputs(tiny.pictures(1), [mmn.PROMPT], [""])["input_ids"]
        assert model.tokenizer.decode(ids).endswith(end)


# ------------------------------------------------------------------------------------------------------------- what ends one


@pytest.mark.parametrize(
    ("family", "mark"), [("gemma3", "<end_of_turn>"), ("idefics3", "<end_of_utterance>"), ("mllama", "<|im_end|>")]
)
def test_the_end_of_a_turn_ends_an_answer(family: str, mark: str) -> None:
    """Also where the checkpoint's own settings name the end of a text alone."""
    model = vlm(family)
    end = model.tokenizer.convert_tokens_to_ids(mark)
    assert model.model.generation_config.eos_token_id == 2 and model.end_tokens == {2, end} and model.end_token == end
    said: list[torch.Tensor] = []

    def soon(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
        """The mark is the likeliest fourth token."""
        said.append(out)
        return out + 1e4 * torch.nn.functional.one_hot(torch.tensor(end), out.shape[-1]) if len(said) == 4 else out

    handle = model.anatomy.unembedding.register_forward_hook(soon)
    trace = model.caption(tiny.pictures(1)[0], max_new_tokens=9)
    handle.remove()
    assert trace.ended and len(trace.tokens) == 3 and len(said) == 4 and mark not in trace.text


def test_without_a_template_the_checkpoints_end_mark_ends() -> None:
    model = vlm("blip-2")
    assert model.end_tokens == {2} and model.end_token == 2
    network, words = tiny.llava_parts(template=None)
    words.tokenizer = copy.deepcopy(words.tokenizer)
    other = mmn.VLM(network, words)
    other.model.generation_config.eos_token_id = None
    assert other.end_tokens == {2}, "the tokenizer's"
    other.tokenizer.eos_token = None
    with pytest.raises(mmn.MmnError, match="no token that ends an answer"):
        assert other.end_token


# ------------------------------------------------------------------------------------------------------------------ templates

TEXTS = (  # of before contents had parts
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [TEXTS, TEXTS.replace("'[INST] ' + m['content'] +", "'[INST] ' ~ m['content'] ~")])
def test_a_template_that_takes_texts(template: str) -> None:
    """By its error, or by the list it would print into the prompt."""
    model = mmn.VLM(*tiny.llava_parts(template=template))
    (ids,) = model.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])["input_ids"]
    assert model.tokenizer.decode(ids) == f"<s>[INST] {IMAGE * 16}\n{mmn.PROMPT} [/INST] {mmn.PREFIX}"
    assert model.chat("Describe.", "", False) == "<s>[INST] Describe. [/INST]" and model.end_tokens == {2}


def test_a_template_that_refuses() -> None:
    model = mmn.VLM(*tiny.llava_parts(template="{% if messages[0]['content'] %}{{ raise_exception('no user here') }}{% endif %}"))
    with pytest.raises(mmn.MmnError, match="chat template refuses this conversation: no user here"):
        model.chat(mmn.PROMPT, mmn.PREFIX)


def test_a_template_that_trims() -> None:
    model = mmn.VLM(*tiny.llava_parts(template=tiny.TEMPLATE.replace("part['text']", "part['text'] | trim")))
    assert model.chat("Describe. ", "An image of").endswith("Describe. ASSISTANT: An image of")
