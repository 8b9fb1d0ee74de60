"""Every noun keeps the token it was said with; two lists of which one was filtered do not."""

import mmn
from mmn import properties, scenes


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
