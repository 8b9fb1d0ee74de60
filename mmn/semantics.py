"""What a neuron says: the tokens its write raises most. [code] of the paper: the 10 largest entries of `w_i . W_U`."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from mmn.anatomy import Neuron
from mmn.errors import MmnError
from mmn.vlm import VLM


@torch.inference_mode()
def top_tokens(vlm: VLM, neurons: Sequence[Neuron], k: int = 10) -> pd.DataFrame:
    """The `k` tokens that each neuron's write raises most when the neuron is active with a positive sign.

    One row a neuron, indexed by it: layer, unit, tokens (a list of `k` strings, best first), weights (their `<w_i, u_t>`).
    Raises MmnError for neurons that are not in the model."""
    neurons = [Neuron(*neuron) for neuron in neurons]
    vlm.anatomy.check(neurons)
    unembedding = vlm.anatomy.unembedding.weight
    if not 1 <= k <= len(unembedding):
        raise MmnError(f"k is {k}; it must be between 1 and the vocabulary's {len(unembedding)} tokens.")
    rows = []
    for layer, unit in neurons:
        write = vlm.anatomy.write(layer, [unit])[0].to(unembedding.device)
        weights, tokens = (unembedding.float() @ write).topk(k)
        words = [vlm.tokenizer.decode([token]) for token in tokens.tolist()]
        rows.append({"layer": layer, "unit": unit, "tokens": words, "weights": weights.tolist()})
    index = pd.Index([str(neuron) for neuron in neurons], name="neuron")
    return pd.DataFrame(rows, index=index, columns=["layer", "unit", "tokens", "weights"])
