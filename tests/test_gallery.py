"""Many pictures through a few neurons: against the heatmap, a plain hook, and scikit-learn."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import mmn
from mmn import gallery
from mmn.errors import MmnError


def test_peaks_are_the_heatmaps_highest_values():
    vlm = tiny.llava()
    images = tiny.pictures(5)
    neurons = [mmn.Neuron(0, 3), mmn.Neuron(1, 0), mmn.Neuron(0, 1)]
    found = gallery.peaks(vlm, images, neurons, batch_size=2)
    for row, image in zip(found, images, strict=True):
        trace = vlm.caption(image, max_new_tokens=1)
        torch.testing.assert_close(row, mmn.heatmap(vlm, trace, neurons).grid.flatten(1).amax(1), rtol=1e-4, atol=1e-5)


def test_a_word_is_read_where_it_stands():
    vlm = mmn.load("tiny-llava")
    neuron = mmn.Neuron(7, 5)
    text = "Is an elephant in the image?"
    ids = vlm.inputs([None], [text], [""])["input_ids"][0].tolist()
    places = gallery.word_places(vlm, ids, "elephant")
    assert len(places) == 2 and vlm.tokenizer.decode([ids[p] for p in places]).strip() == "elephant"
    seen = []
    handle = vlm.model.model.language_model.layers[7].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        vlm.model(input_ids=torch.tensor([ids]))
    handle.remove()
    expected = seen[0][0, places, 5].max()
    torch.testing.assert_close(gallery.at_word(vlm, text, "elephant", [neuron])[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(MmnError, match="does not hold the tokens of 'zebra'"):
        gallery.at_word(vlm, text, "zebra", [neuron])


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_scikit_learns(samples):
    values, positive = zip(*samples, strict=True)
    table = torch.tensor(values)[:, None].float()
    if len(set(positive)) == 1:
        with pytest.raises(MmnError, match="two kinds"):
            gallery.auroc(table, positive)
    else:
        np.testing.assert_allclose(gallery.auroc(table, positive), roc_auc_score(positive, values))
