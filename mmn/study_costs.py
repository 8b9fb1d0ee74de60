"""What a run of `mmn replicate` costs at the shapes of large models: `mmn bench --study`, and the tables of the page *Many pictures*.

Models of random weights, with one and with two decoder layers of LLaVA-1.5-7B's and of its 13B's shape and 576 image tokens, do what
`mmn.stages` does: they caption drawn pictures (50 tokens each, the release's limit, since a random model ends no caption), measure the
properties of a noun, and take a step of an edit's fit. Every further layer is taken to cost what the second one did, which gives the row of
all layers, marked `scaled`; on a GPU all layers are there, and nothing is scaled. Beside them stands one plain pass over the same sequence:
a stage's time over it, in `passes`, says what the stage costs on another machine, where a pass is known. The protocol is ours."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import torch

import mmn
from mmn import costs, properties, sources, stages
from mmn.errors import MmnError
from mmn.nouns import Found
from mmn.pieces import csv
from mmn.vlm import PREFIX, VLM

SHAPES = {"7B": costs.SEVEN, "13B": costs.Shape(5120, 13824, 32064, 40)}  # of LLaVA-1.5's language models
PASSES, STEPS = 3, 3  # that are timed together
TOKENS, FIT_STEPS = 50, 50  # of a caption and of an edit's fit, at most


def random_model(size: str, device: str = "cpu", dtype: str = "float32") -> VLM:
    """LLaVA-1.5 of one of `SHAPES` with random weights, all layers, saying whole words."""
    return talking(costs.build(SHAPES[size], device=device, dtype=dtype))


def talking(vlm: VLM) -> VLM:
    """The random model, saying whole words alone, the first of which counts as a noun."""
    words = [i for i in range(len(vlm.tokenizer)) if re.fullmatch(" [a-z]{3,}", vlm.tokenizer.decode([i]))]
    with torch.no_grad():
        silent = torch.ones(len(vlm.anatomy.unembedding.weight), dtype=torch.bool)
        silent[words] = False
        vlm.anatomy.unembedding.weight[silent] = 0
    vlm.lexicon = first_word
    return vlm


def first_word(text: str) -> list[Found]:
    """The first word behind the prefix, as if it were a noun."""
    found = re.compile(r"\w+").search(text, len(PREFIX))
    return [(found.group(), found.group(), found.span())] if found else []


def measure(vlm: VLM, batch: int = 2) -> dict[str, float]:
    """Seconds of one pass over a picture, its prompt and its caption (`pass`), of captioning and ranking a picture in batches (`captions`),
    of the properties of one noun (`properties`), and of one step of an edit's fit, for each picture in it (`step`); the peak MiB of each
    above the loaded model; `positions` of the sequence, and `bytes` of tables that a picture of one noun gives.

    Raises MmnError for a model whose layers have too few neurons for the random controls."""
    vlm = talking(vlm)
    device = vlm.device
    row: dict[str, float] = {}
    pictures = sources.load("scenes", batch)
    found: dict[str, Any] = {}

    def run(name: str, work: Any, shared_by: int = 1) -> None:
        row[f"{name}_mib"] = costs.peak(lambda: row.update({f"{name}_seconds": costs.seconds(work, device) / shared_by}), device)

    vlm.caption(pictures[0].open(), max_new_tokens=2)  # warms up
    run("captions", lambda: found.update(stages.rankings(vlm, pictures, batch_size=batch)), batch)
    said = found["captions"].iloc[:1]
    trace = properties.retrace(vlm, pictures[0].open(), [int(token) for token in said["tokens"].item().split()], vlm.prompt)
    with torch.no_grad():
        properties.reread(vlm, trace)  # warms up
        run("pass", lambda: [properties.reread(vlm, trace) for _ in range(PASSES)], PASSES)
    run("properties", lambda: found.update(stages.properties_of(vlm, pictures[:1], said, every=[])))
    if len(found["problems"]):
        raise MmnError(f"The properties of a noun cannot be measured here: {found['problems']['problem'].iloc[0]}")
    source, neurons = trace.nouns[0].lemma, mmn.rank(vlm, trace, k=20)[trace.nouns[0].lemma].neurons
    spent = {}
    for steps in (0, 0, STEPS):  # the first warms up; captioning and the first look at the loss fall out
        run("step", lambda steps=steps: mmn.Edit.fit(
            vlm, pictures[0].open(), source, "dog", neurons, steps=steps, enough=2, progress=False))  # fmt: skip
        spent[steps] = row["step_seconds"]
    row["step_seconds"] = (spent[STEPS] - spent[0]) / STEPS
    mine = found["rankings"]["picture"].eq(pictures[0].id)
    row["bytes"] = float(sum(len(csv(table)) for table in (said, found["rankings"][mine], found["properties"])))
    row["positions"] = float(vlm.replay(trace, len(trace.tokens) - 1)["input_ids"].shape[1])
    return row


def study(device: str = "cpu", dtype: str = "float32") -> pd.DataFrame:
    """One row a model: size, hidden, neurons, vocabulary, layers, scaled, and the figures of `measure`."""
    rows: list[dict[str, Any]] = []
    for size, shape in SHAPES.items():
        figures = []
        for layers in (shape.layers,) if device == "cuda" else (1, 2):
            vlm = costs.build(shape._replace(layers=layers), device=device, dtype=dtype)
            figures.append(measure(vlm))
            rows.append({"size": size, **shape._replace(layers=layers)._asdict(), "scaled": False, **figures[-1]})
            del vlm
        if len(figures) == 2:
            one, two = figures
            costly = [name for name in one if name.endswith(("_seconds", "_mib"))]
            every = two | {name: one[name] + (shape.layers - 1) * (two[name] - one[name]) for name in costly}
            rows.append({"size": size, **shape._asdict(), "scaled": True, **every})
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """What the page shows of the models of all layers, a column each: parameters, positions, and for captioning a picture, for the
    properties of a noun and for a step of an edit's fit (for each of its pictures) the passes over the sequence that take as long, the
    seconds on the machine of the table, and the GiB held beside the weights."""
    lines = {}
    for row in table[table["layers"] > 2].itertuples():
        shape = costs.Shape(row.hidden, row.neurons, row.vocabulary, row.layers)
        line = {"parameters, billion": parameters(shape) / 1e9, "positions": row.positions}
        for name in ("captions", "properties", "step"):
            seconds = getattr(row, f"{name}_seconds")
            line |= {
                f"{name}: passes": seconds / row.pass_seconds,
                f"{name}: seconds": seconds,
                f"{name}: GiB": getattr(row, f"{name}_mib") / 1024,
            }
        lines[row.size] = line
    return pd.DataFrame(lines)


def told(value: float) -> str:
    """A figure of the tables of this module as the page has it: three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def parameters(shape: costs.Shape) -> int:
    """Weights of a Llama of this shape: attention without grouped heads, gated FFNs, embedding and unembedding."""
    return shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.neurons) + 2 * shape.vocabulary * shape.hidden


def whole_run(
    table: pd.DataFrame, pictures: int, nouns: int, edits: int = 3, compute: float = 150e12, reads: float = 1.5e12, batch: int = 16
) -> pd.DataFrame:
    """What a run of so many pictures with so many nouns each takes, a column a model: hours on the machine of the table and on a card that
    computes `compute` operations and reads `reads` bytes a second, in half precision; GB of weights, MB of tables."""
    steps = edits * 2 * FIT_STEPS * 2 * stages.FIT  # found and random rows; pictures to change and pictures to keep
    lines = {}
    for row in table[table["layers"] > 2].itertuples():
        weights = parameters(costs.Shape(row.hidden, row.neurons, row.vocabulary, row.layers))
        work = pictures * nouns * row.properties_seconds + steps * row.step_seconds
        on_card = work / row.pass_seconds * 2 * weights * row.positions / compute
        captions = pictures * (2 * weights * row.positions / compute + TOKENS * 2 * weights / reads / batch)
        lines[row.size] = {
            "hours": (work + pictures * row.captions_seconds) / 3600,
            "of which edits": steps * row.step_seconds / 3600,
            "hours, estimated for a card": (on_card + captions) / 3600,
            "weights in half precision, GB": 2 * weights / 1e9,
            "tables, MB": pictures * nouns * row.bytes / 1e6,
        }
    return pd.DataFrame(lines)
