"""What a neuron says: the tokens its write raises most, `w_i W_U` (Pan et al., the released code; no final norm)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from mmn.errors import MmnError
from mmn.ffn import Neuron
from mmn.vlm import VLM
from mmn.weights import matrix

BLOCK = 256  # neurons whose products with the whole vocabulary are held at once


def top_tokens(vlm: VLM, neurons: Sequence[Neuron], k: int = 10) -> pd.DataFrame:
    """The k tokens each neuron writes most when its activation is positive.

    One row a neuron, by its name: layer, unit, tokens (k strings, best first), weights (their `<w_i, u_t>`, logits for an
    activation of 1). Raises MmnError for a neuron that is not there or a k outside 1 ... vocabulary."""
    ids, weights = top_token_ids(vlm, neurons, k)
    names = {token: token_text(vlm, token) for token in set(ids.flatten().tolist())}
    return pd.DataFrame(
        {
            "layer": [layer for layer, _ in neurons],
            "unit": [unit for _, unit in neurons],
            "tokens": [[names[token] for token in row] for row in ids.tolist()],
            "weights": weights.tolist(),
        },
        index=pd.Index([f"L{layer}.{unit}" for layer, unit in neurons], name="neuron"),
    )


@torch.no_grad()
def top_token_ids(vlm: VLM, neurons: Sequence[Neuron], k: int = 10) -> tuple[Tensor, Tensor]:
    """Token ids int64 `[neurons, k]` and weights float32 `[neurons, k]`, in blocks, so that memory does not grow with the
    neurons."""
    unembedding = matrix(vlm.anatomy.unembedding)
    words = min(unembedding.shape[0], len(vlm.tokenizer))  # some models pad their vocabulary with rows that mean nothing
    if type(k) is not int or not 1 <= k <= words:
        raise MmnError(f"k is a number of tokens between 1 and {words}, not {k!r}.")
    vlm.anatomy.check(neurons)
    ids, weights = [torch.empty(0, k, dtype=torch.int64)], [torch.empty(0, k)]
    table = unembedding[:words].float()
    for start in range(0, len(neurons), BLOCK):
        top = (vlm.anatomy.writes(neurons[start : start + BLOCK]) @ table.T).topk(k, -1)
        ids.append(top.indices.cpu())
        weights.append(top.values.cpu())
    return torch.cat(ids), torch.cat(weights)


def token_text(vlm: VLM, token: int) -> str:
    """A token as a reader writes it: its leading space kept where the tokenizer marks words by one."""
    raw = vlm.tokenizer.convert_ids_to_tokens(token)
    if raw is None:
        return f"<{token}>"
    text = vlm.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return f" {text}" if raw.startswith("\u2581") and not text.startswith(" ") else text
