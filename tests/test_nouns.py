"""Every noun keeps the token it was said with; two lists of which one was filtered do not."""

import pytest

import mmn
from mmn import nouns, properties, scenes


def test_a_nouns_token_is_the_one_the_model_said_there():
    vlm = mmn.load("tiny-llava")
    traces = vlm.caption([scene.image for scene in scenes.sample(24)], batch_size=12)
    for trace in traces:
        for noun in trace.nouns:
            assert int(trace.tokens[noun.step]) == noun.token
            piece = vlm.tokenizer.decode([noun.token]).strip()
            assert piece and noun.text.startswith(piece)
    assert sum(len(trace.nouns) for trace in traces) > 24


def test_zipping_nouns_and_tokens_after_filtering_one_list_gives_nouns_other_nouns_tokens():
    """What the release does, on a caption that says a noun twice: the nouns lose their double, the tokens keep it."""
    vlm = mmn.load("tiny-llava")
    trace = properties.say(vlm, scenes.draw(0).image, "An image of a crown, a crown and a bear")
    found = trace.lexicon(trace.text)
    said = [text for text, _, _ in found]
    tokens = [vlm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"][0] for text in said]
    zipped = dict(zip(dict.fromkeys(said), tokens, strict=False))
    ours = {noun.text: noun.token for noun in trace.nouns}
    names = {text: vlm.tokenizer.decode([token]).strip() for text, token in zipped.items()}
    assert names == {"crown": "crown", "bear": "crown"}, "the bear got the crown's token"
    assert {text: vlm.tokenizer.decode([token]).strip() for text, token in ours.items()} == {"crown": "crown", "bear": "bear"}


def test_the_rule_of_thumb_on_a_real_caption():
    found = nouns.guessed_nouns("An image of two brown dogs and a small kitchen table next to the window.")
    assert found == [("dogs", "dog", (22, 26)), ("table", "table", (47, 52)), ("window", "window", (65, 71))]
    assert [lemma for _, lemma, _ in nouns.guessed_nouns("a café with a jalapeño")] == ["café", "jalapeño"]


def test_spacys_tags_where_it_is_installed(monkeypatch):
    """An optional part (pip install '.[nouns]'): a pipeline whose tags are known, in the place of the trained one."""
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    rules = pipeline.add_pipe("attribute_ruler")
    for words, tag, lemma in ((["dogs"], "NOUN", "Dog"), (["kitchen"], "NOUN", "kitchen"), (["brown"], "ADJ", "brown")):
        rules.add([[{"LOWER": {"IN": words}}]], {"POS": tag, "LEMMA": lemma})
    nouns._tagger.cache_clear()
    monkeypatch.setattr(spacy, "load", lambda name: {"en_core_web_sm": pipeline}[name])
    try:
        text = "Two brown Dogs in a kitchen"
        assert nouns.lexicon(False)(text) == [("Dogs", "dog", (10, 14)), ("kitchen", "kitchen", (20, 27))]
        assert nouns.lexicon(True) is nouns.scene_nouns
    finally:
        nouns._tagger.cache_clear()


def test_without_spacy_the_rule_of_thumb_is_taken(monkeypatch):
    monkeypatch.setattr(nouns, "_tagger", lambda: None)
    assert nouns.lexicon(False) is nouns.guessed_nouns
