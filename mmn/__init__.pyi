from .anatomy import Anatomy
from .contribution import SCORES, NeuronRanking, contributions, rank, rank_all
from .edit import Edit
from .errors import MmnError
from .ffn import Neuron
from .heatmap import Heatmap, heatmap
from .images import list_images, open_image
from .intervene import mean_ablate, mean_activations, perturb, same_layer_random, scale, shuffle_image_tokens, zero
from .nouns import Noun
from .paths import data_path
from .semantics import top_tokens
from .trace import Trace
from .vlm import PREFIX, PROMPT, VLM, load

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
