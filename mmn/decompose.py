"""One logit taken apart, exactly: what the embedding, each layer's attention and each layer's FFN bring to it.

The stream before the final norm is a sum: the embedding, and what each layer's two halves add. With the norm's scale as it is at the
position, a token's logit is linear in that sum (`contribution.through_norm`), so that the parts add up to the model's own logit, but for
the biases of the norm and the unembedding, which are a part of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from mmn.contribution import read_out, through_norm
from mmn.ffn import FFN
from mmn.hooks import Removable, hooked
from mmn.nouns import Noun
from mmn.trace import Trace
from mmn.vlm import VLM


@torch.no_grad()
def streams(vlm: VLM, trace: Trace, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stream before each layer and after the last `[layers + 1, positions, hidden]`, what each FFN's last map gives at the step
    `[layers, hidden]`, and the logits there `[vocabulary]`; float32. The last position is the one that produces the step's token."""
    layers: list[Tensor] = []
    ffns: list[Tensor] = []
    norm = vlm.anatomy.final_norm or vlm.anatomy.unembedding

    def handles() -> Iterator[Removable]:
        for layer, ffn in zip(vlm.anatomy.layers, vlm.anatomy.ffns, strict=True):
            yield layer.register_forward_pre_hook(
                lambda _, args, kwargs: layers.append((args[0] if args else kwargs["hidden_states"])[0].float().cpu()),
                with_kwargs=True,
            )
            yield _output(ffn, ffns)
        yield norm.register_forward_pre_hook(lambda _, args: layers.append(args[0][0].float().cpu()))

    with hooked(handles()):
        logits = vlm.model(**vlm.replay(trace, step), use_cache=False).logits[0, -1].float().cpu()
    return torch.stack(layers), torch.stack(ffns), logits


def _output(ffn: FFN, kept: list[Tensor]) -> Removable:
    """A hook that keeps what an FFN adds at the last position, `[hidden]`: its last map's output; of experts, which have no such map, the
    sum of the writes."""
    if type(ffn) is FFN:
        return ffn.projection.register_forward_hook(
            lambda _, __, out: kept.append(out.reshape(-1, out.shape[-1])[-1].float().cpu())
        )

    def add(activations: Tensor) -> None:
        last = activations[0, -1].float()
        used = last.nonzero()[:, 0]
        kept.append((last[used] @ ffn.write(used.tolist()).to(last.device)).cpu())

    return ffn.watch(add)


@torch.no_grad()
def decompose(vlm: VLM, trace: Trace, noun: str | Noun) -> pd.DataFrame:
    """The noun's logit in parts: one row each for the embedding, the attention and the FFN of every layer, and the biases, with `part`,
    `layer` (-1 where there is none) and `logit`. What a layer adds beside its FFN's output counts as attention's, so that the
    sum is the stream's, whatever the layer's code; with a norm or a factor behind the FFN that share holds the difference."""
    chosen = trace.noun(noun)
    stream, ffns, logits = streams(vlm, trace, chosen.step)
    at = stream[:, -1]
    word = vlm.anatomy.words([chosen.token])
    towards = through_norm(vlm, word, at[-1:].to(word.device)).cpu()[0]
    rows: list[tuple[str, int, float]] = [("embedding", -1, float(at[0] @ towards))]
    for layer, (before, after, ffn) in enumerate(zip(at[:-1], at[1:], ffns, strict=True)):
        rows.append(("attention", layer, float((after - before - ffn) @ towards)))
        rows.append(("FFN", layer, float(ffn @ towards)))
    rows.append(("biases", -1, float(read_out(vlm, torch.zeros(1, vlm.hidden))[0, chosen.token])))  # of a stream of zeros
    return pd.DataFrame(rows, columns=["part", "layer", "logit"])


def lens(vlm: VLM, trace: Trace, step: int, positions: Tensor | None = None, tokens: Sequence[int] | None = None) -> Tensor:
    """The logit lens (nostalgebraist 2020): final norm and unembedding applied to the stream before each layer and after the last, as log
    probabilities `[layers + 1, positions, vocabulary]`, at some positions (an index; default: the last alone) and of some tokens
    (`[layers + 1, positions, tokens]`; default: all)."""
    chosen = slice(None) if tokens is None else list(tokens)
    return torch.stack([logp[:, chosen] for logp in _lenses(vlm, trace, step, positions)])


def likeliest(vlm: VLM, trace: Trace, step: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `lens` reads as the likeliest token: its id and its probability, `[layers + 1, positions]` each."""
    best = [logp.max(-1) for logp in _lenses(vlm, trace, step, positions)]
    return torch.stack([each.indices for each in best]), torch.stack([each.values for each in best]).exp()


def _lenses(vlm: VLM, trace: Trace, step: int, positions: Tensor | None) -> Iterator[Tensor]:
    """Log probabilities `[positions, vocabulary]` before each layer and after the last; one after the other, since all are large."""
    stream, _, _ = streams(vlm, trace, step)
    for layer in stream:
        yield read_out(vlm, layer[-1:] if positions is None else layer[positions]).log_softmax(-1).cpu()
