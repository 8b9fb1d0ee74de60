"""Find, see and edit multi-modal neurons in vision-language models.

import mmn
vlm = mmn.load("tiny-llava")                      # or any Hugging Face vision-language model
trace = vlm.caption(mmn.open_image("dog.jpg"))    # the caption, and every neuron's activation at each step
ranking = mmn.rank(vlm, trace, "dog")             # the neurons that voted for the word
mmn.top_tokens(vlm, ranking.neurons)              # the words these neurons write
mmn.heatmap(vlm, trace, ranking.neurons)          # where in the picture they fire
with mmn.zero(vlm, ranking.neurons):              # what happens without them
    vlm.caption(trace.image)
"""

from mmn.anatomy import Anatomy
from mmn.contribution import SCORES, NeuronRanking, contributions, rank, rank_all
from mmn.edit import Edit
from mmn.errors import MmnError
from mmn.ffn import Neuron
from mmn.heatmap import Heatmap, heatmap
from mmn.images import list_images, open_image
from mmn.intervene import mean_ablate, mean_activations, perturb, same_layer_random, scale, shuffle_image_tokens, zero
from mmn.nouns import Noun
from mmn.paths import data_path
from mmn.semantics import top_tokens
from mmn.trace import Trace
from mmn.vlm import PREFIX, PROMPT, VLM, load

__all__ = [
    "PREFIX",
    "PROMPT",
    "SCORES",
    "VLM",
    "Anatomy",
    "Edit",
    "Heatmap",
    "MmnError",
    "Neuron",
    "NeuronRanking",
    "Noun",
    "Trace",
    "contributions",
    "data_path",
    "heatmap",
    "load",
    "mean_ablate",
    "mean_activations",
    "list_images",
    "open_image",
    "perturb",
    "rank",
    "rank_all",
    "same_layer_random",
    "scale",
    "shuffle_image_tokens",
    "top_tokens",
    "zero",
]
