"""`mmn anatomy`: what was found of a model as a readable tree, and what is weak about it."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from mmn.anatomy import Anatomy, fused
from mmn.ffn import FFN, Experts, NoFFN, parts


def describe(model: Any, anatomy: Anatomy) -> str:
    """The anatomy as a readable tree, with what is weak about it."""
    names = {module: name for name, module in model.named_modules()}
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index, ffn in enumerate(anatomy.ffns):
        start = len(names[ffn.layer]) + 1
        kinds.setdefault(tuple(_kind(part, {m: name[start:] for m, name in names.items()}) for part in parts(ffn)), []).append(
            index
        )
    tied = anatomy.unembedding.weight is model.get_input_embeddings().weight
    rows = [("decoder", names[anatomy.decoder] or "the model itself")]
    rows.append(("layers", f"{names[anatomy.layers[0]]} ... {names[anatomy.layers[-1]]}"))
    for kind, indices in kinds.items():
        rows += [(f"  {_ranges(indices) if not place else ''}", line) for place, line in enumerate(kind)]
    rows.append(("final norm", names[anatomy.final_norm] if anatomy.final_norm is not None else "none"))
    words = f"{names[anatomy.unembedding]}, {anatomy.unembedding.out_features:,} words" + (
        ", tied to the embedding" if tied else ""
    )
    rows.append(("unembedding", words))
    rows.append(("logits", _logits(anatomy.scale)))
    rows.append(("image token", str(anatomy.image_token) if anatomy.image_token is not None else "none"))
    lines = [f"{type(model).__name__}: {anatomy.total:,} neurons in {len(anatomy.layers)} layers"]
    lines += [f"  {name:<14}{line}" for name, line in rows]
    return "\n".join(lines + [f"  warning: {warning}" for warning in warnings(anatomy)])


def _logits(scale: float | None) -> str:
    """What becomes of the unembedding's products before they are logits."""
    if scale is None:
        return "the products bent, as by a soft cap: scores are in units from before that"
    return "the products as they are" if scale == 1 else f"the products times {scale:.4g}"


def _kind(part: FFN, names: dict[nn.Module, str]) -> str:
    """One line about one FFN of a layer."""
    if isinstance(part, NoFFN):
        return "no neurons"
    if isinstance(part, Experts):
        each = f"{len(part.weight)} experts of {part.width:,}"
        return f"{part.neurons:,} neurons, {each}: the inputs of {names[part.projection]}.{part.last} times routing weights"
    bias = ", which adds a bias" if part.projection.bias is not None else ""
    gate = f"; activation {names[part.gate]}" if part.gate is not None else "; activation no module of its own"
    return f"{part.neurons:,} neurons, the inputs of {names[part.projection]}{bias}{gate}"


def _ranges(indices: list[int]) -> str:
    """Numbers in order, runs as first-last."""
    starts = [i for i in indices if i - 1 not in indices]
    ends = [i for i in indices if i + 1 not in indices]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def warnings(anatomy: Anatomy) -> list[str]:
    """What the anatomy leaves out or takes on trust, one sentence each."""
    found = []
    if bare := [i for i, ffn in enumerate(anatomy.ffns) if not ffn.neurons]:
        found.append(f"{len(bare)} layers have no FFN of a single linear map, so none of their neurons is named: {bare}.")
    if crowded := overlooked(anatomy):
        found.append(
            f"{len(crowded)} layers have routed experts in fused weights, whose units are not among the neurons: {crowded}."
        )
    if anatomy.final_norm is None:
        found.append("there is no final norm, so norm_aware scores are direct ones.")
    if anatomy.image_token is None:
        found.append("the configuration names no image token, so there are no image positions and no heatmaps.")
    return found


def overlooked(anatomy: Anatomy) -> list[int]:
    """Layers with weights that look like routed experts' and are not among the neurons."""
    found = []
    for index, (layer, ffn) in enumerate(zip(anatomy.layers, anatomy.ffns, strict=True)):
        known = [part.projection for part in parts(ffn)]
        if any(fused(module) and module not in known for module in layer.modules()):
            found.append(index)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn anatomy`."""
    parser.add_argument("model", nargs="?", default="tiny-llava", help="a folder or a Hugging Face name (default: %(default)s)")
    parser.add_argument("--device-map", help="where the weights go, e.g. auto or cuda (default: the CPU)")
    parser.add_argument("--dtype", default="float32", help="e.g. bfloat16 (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """`mmn anatomy`."""
    from mmn.vlm import load

    vlm = load(args.model, device_map=args.device_map, dtype=args.dtype)
    print(describe(vlm.model, vlm.anatomy))
    return 0
