"""The experiment of the replication report, in the pieces that machines can share out.

    rankings    a shard of pictures -> captions, and for every noun its top neurons
    properties  a shard and its captions -> the three properties, one row a picture, noun and measure; and POPE's questions, where it is
                known what a picture shows
    edits       all captions of a model -> one noun edited into another, for its most frequent nouns
    summary     the tables of one model -> one row a measure, with its control and interval

Each stage is a function of a model, pictures and tables, and returns tables; mmn.workflow runs them on one machine or many. What a
picture cannot give, because it is broken or too large for the memory, becomes a row of the table `problems`; nothing else stops for it.
All measures but CHAIR and POPE (mmn.pope) are this project's own [ours], as in mmn.properties."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image

import mmn
from mmn import properties
from mmn.edit import located
from mmn.errors import MmnError
from mmn.pope import answers, judged, questions
from mmn.properties import Case
from mmn.property_tables import spread
from mmn.vlm import PROMPT, VLM

if TYPE_CHECKING:
    from mmn.sources import Picture

Tables = dict[str, pd.DataFrame]
Row = Callable[..., dict[str, Any]]
Report = Callable[[int, int], object]  # how much of a stage is done, and of how much: pictures, of `edits` nouns

KS = (5, 20, 100)  # neurons that are zeroed
SIGMAS = (1.0, 4.0)  # of noise, in units of the writes' root mean square
DRAWS = 3  # same-layer random sets beside each set of neurons
FIT, JUDGE = 8, 16  # pictures that an edit is fitted on and judged on, at most

COLUMNS = {
    "captions": ("picture", "caption", "tokens", "said", "named", "shown"),
    "rankings": ("picture", "noun", "token", "step", "logp", "place", "layer", "unit", "activation", "contribution"),
    "properties": ("picture", "noun", "property", "measure", "neurons", "k", "value"),
    "edits": ("source", "target", "neurons", "picture", "measure", "value"),
    "problems": ("picture", "stage", "kind", "problem"),
}
UNITS = {
    "tokens": "ids, space between",
    "said": "nouns of the caption, | between",
    "named": "objects that the caption names, by the words of the pictures' source, | between; empty if it knows of none",
    "shown": "objects that are there or that people name, | between; empty if not known",
    "logp": "nats, of the token when it was said",
    "place": "1 is the highest contribution",
    "contribution": "logits, direct score",
    "k": "neurons",
    "kind": "missing: results are missing; note: something to know",
    "value": "in the measure's unit: overlaps, IoU and shares in 0 ... 1, drops in nats, rank from 1",
}


class Notes:
    """The problems of a stage, a row each."""

    def __init__(self, stage: str):
        self.stage = stage
        self.rows: list[dict[str, str]] = []

    def add(self, picture: str, problem: object, kind: str = "missing") -> None:
        """Note what went wrong with a picture, or with the whole stage (picture "")."""
        text = " ".join(str(problem).split())
        self.rows.append({"picture": picture, "stage": self.stage, "kind": kind, "problem": text})

    def once(self, problem: object) -> None:
        """Note what holds for every picture, and is nobody's fault."""
        if str(problem) not in {row["problem"] for row in self.rows}:
            self.add("", problem, "note")


def table(name: str, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows as the table `name` of `COLUMNS`, empty ones too."""
    return pd.DataFrame(list(rows), columns=list(COLUMNS[name]))


def opened(pictures: Sequence[Picture], notes: Notes) -> Iterator[tuple[Picture, Image.Image]]:
    """The pictures that can be opened, one at a time."""
    for picture in pictures:
        try:
            yield picture, picture.open()
        except MmnError as error:
            notes.add(picture.id, error)


T = TypeVar("T")
R = TypeVar("R")


def reason_of(error: Exception) -> str:
    """What a table says of an error. Without enough memory, torch raises one error on a GPU and another on the CPU."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "not enough memory" in text:
        return "out of memory"
    return text if isinstance(error, MmnError) else f"{type(error).__name__}: {text}"


def sparing(work: Callable[[list[T]], list[R]], batch: list[T], failed: Callable[[T, object], None]) -> list[tuple[T, R]]:
    """`work(batch)` item by item of its results, in smaller batches where memory or one item does not allow for the whole. Whatever goes
    wrong with one item is that item's alone."""
    try:
        return list(zip(batch, work(batch), strict=True))
    except Exception as error:  # a shard is hours of work
        reason = reason_of(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) == 1:
        failed(batch[0], reason)
        return []
    half = len(batch) // 2
    return sparing(work, batch[:half], failed) + sparing(work, batch[half:], failed)


# ---------------------------------------------------------------------------------------------------------------- rankings


def unheard(done: int, of: int) -> None:
    """The report of a stage that nobody waits for."""


def rankings(
    vlm: VLM, pictures: Sequence[Picture], *, top_k: int = 10, prompt: str = PROMPT, batch_size: int = 16, report: Report = unheard,
) -> Tables:  # fmt: skip
    """Caption a shard in batches and rank the neurons of every noun: tables captions, rankings, problems. Raises MmnError where no picture
    can be captioned, for one and the same reason: that is the model's fault, and not to be kept as a result."""
    notes, captions, rows = Notes("rankings"), [], []
    failed: list[str] = []
    source = opened(pictures, notes)
    while batch := [item for _, item in zip(range(batch_size), source, strict=False)]:

        def work(some: list[tuple[Picture, Image.Image]]) -> list[tuple[mmn.Trace, dict[str, mmn.NeuronRanking]]]:
            traces = vlm.caption([image for _, image in some], prompt, batch_size=len(some))
            return list(zip(traces, mmn.rank_all(vlm, traces, top_k), strict=True))

        def fail(item: tuple[Picture, Image.Image], why: object) -> None:
            notes.add(item[0].id, why)
            failed.append(str(why))

        for (picture, _), (trace, found) in sparing(work, batch, fail):
            captions.append(
                {
                    "picture": picture.id,
                    "caption": trace.text,
                    "tokens": " ".join(map(str, trace.tokens.tolist())),
                    "said": "|".join(found),
                    "named": "|".join(picture.named(trace.text)),
                    "shown": "|".join(picture.true or ()),
                }
            )
            for lemma, ranking in found.items():
                noun = ranking.noun
                logp = round(float(trace.logprobs[noun.step]), 4)
                each = zip(ranking.neurons, ranking.activations, ranking.scores, strict=True)
                for place, (neuron, activation, contribution) in enumerate(each, 1):
                    values = (picture.id, lemma, noun.token, noun.step, logp, place, *neuron)
                    rows.append(
                        dict(zip(COLUMNS["rankings"], (*values, round(activation, 5), round(contribution, 5)), strict=True))
                    )
        report(len(captions) + len(notes.rows), len(pictures))
    if not captions and len(failed) > 1 and set(failed) == {failed[0]} != {"out of memory"}:
        raise MmnError(f"No picture can be captioned: {failed[0]}")
    return {"captions": table("captions", captions), "rankings": table("rankings", rows), "problems": table("problems", notes.rows)}


# -------------------------------------------------------------------------------------------------------------- properties


def properties_of(
    vlm: VLM, pictures: Sequence[Picture], captions: pd.DataFrame, *, every: Sequence[Picture] | None = None, top_k: int = 10,
    prompt: str = PROMPT, seed: int = 0, batch_size: int = 16, report: Report = unheard,
) -> Tables:  # fmt: skip
    """Sensitivity and causal effect for the nouns of a shard's captions, which are read again and not generated, and the answers to POPE's
    questions: tables properties, problems. every: the pictures of all shards, which say what is frequent, and whose next one is the
    control for answers. Specificity is a matter of all pictures: see `summary`."""
    notes, rows = Notes("properties"), []
    known = captions.set_index("picture")
    poll = _Poll(pictures if every is None else every, seed)
    captioned = [each for each in pictures if each.id in known.index]
    for done, (picture, image) in enumerate(opened(captioned, notes)):
        report(done, len(captioned))
        tokens = [int(each) for each in str(known.at[picture.id, "tokens"]).split()]
        said = str(known.at[picture.id, "said"] or "")
        for measured in (
            _measures(vlm, picture, image, tokens, prompt, top_k, seed, notes) if said else (),
            poll.of(vlm, picture, image, batch_size),
        ):
            try:
                rows += [{"picture": picture.id, **row} for row in measured]
            except Exception as error:  # of this picture alone: a shard is hours of work
                notes.add(picture.id, reason_of(error))
    return {"properties": table("properties", rows), "problems": table("problems", notes.rows)}


def _measures(
    vlm: VLM, picture: Picture, image: Image.Image, tokens: list[int], prompt: str, top_k: int, seed: int, notes: Notes
) -> Iterator[dict[str, Any]]:
    trace = properties.retrace(vlm, image, tokens, prompt)
    sizes = tuple(vlm.anatomy.neurons)
    cases = [Case(0, trace, noun, torch.cat(mmn.contributions(vlm, trace, noun)), sizes, known=picture) for noun in trace.nouns]
    unit = spread(vlm)
    for case in cases:
        top = case.top(top_k)
        random = mmn.same_layer_random(vlm, top, draws=DRAWS, seed=seed)

        def row(kind: str, measure: str, neurons: str, k: int, value: float, noun: str = case.lemma) -> dict[str, Any]:
            values = (noun, kind, measure, neurons, k, round(float(value), 4))
            return dict(zip(COLUMNS["properties"][1:], values, strict=True))

        for name, each in (("found", [top]), ("random", random)):
            ranks = np.array([properties.word_ranks(vlm, some, case.noun.token) for some in each])
            yield row("sensitivity", "best rank of the word", name, top_k, ranks.min(1).mean())
            yield row("sensitivity", "share with the word in their ten", name, top_k, (ranks <= 10).mean())
        try:
            yield from _of_the_picture(vlm, picture, case, cases, top, random, row, seed, notes)
        except MmnError as error:  # such as a model that sees through cross-attention
            notes.once(error)
        yield from _causal(vlm, case, row, unit, seed, notes)


def _of_the_picture(
    vlm: VLM,
    picture: Picture,
    case: Case,
    cases: list[Case],
    top: list[mmn.Neuron],
    random: list[list[mmn.Neuron]],
    row: Row,
    seed: int,
    notes: Notes,
) -> Iterator[dict[str, Any]]:
    """What needs to know where in the stream the picture is."""
    mask, k = case.mask, len(top)
    name = picture.name_at(case.trace.text, case.noun.span[1])
    if mask is None and name and picture.mask(name) is not None:
        notes.add(
            picture.id, "its mask is of another size than the picture, as where EXIF turns it: its heatmap is not judged", "note"
        )
    elif mask is not None and mask.any():
        heat = mmn.heatmap(vlm, case.trace, [*top, *(neuron for draw in random for neuron in draw)])
        maps = replace(heat, grid=heat.grid.unflatten(0, (DRAWS + 1, k)).mean(1)).on_image(per_neuron=True)
        ious = [properties.agreement(each, mask).iou for each in maps]
        yield row("sensitivity", "IoU of the heatmap", "found", k, ious[0])
        yield row("sensitivity", "IoU of the heatmap", "random", k, float(np.mean(ious[1:])))
    shuffle = properties.shuffled(vlm, case, seed)
    other = next((other for other in cases if other.lemma != case.lemma), None)
    for some in sorted({k, min(100, vlm.anatomy.total)}):
        for name, one in (("found", shuffle), ("another noun", other)):
            if one is not None:
                shared = properties.overlap(case.order(some), one.order(some), (some,))[0]
                yield row("sensitivity", "overlap after a shuffle of the image tokens", name, some, shared)


def _causal(vlm: VLM, case: Case, row: Row, unit: float, seed: int, notes: Notes) -> Iterator[dict[str, Any]]:
    base = properties.reread(vlm, case.trace)
    for k in (each for each in KS if each <= vlm.anatomy.total):
        top = case.top(k)
        try:
            lists = {"found": [top], "random": mmn.same_layer_random(vlm, top, draws=DRAWS, seed=seed + k)}
        except MmnError:
            notes.once(f"{k} neurons are too many here for as many random ones of the same layers, so they are not silenced.")
            continue
        means = properties.effects(vlm, case, lists, base=base, rows_at_once=4).groupby("neurons")[["drop", "flip", "rest"]].mean()
        for name, values in means.iterrows():
            for measure, column in (
                ("drop of log p, zeroed", "drop"),
                ("nouns flipped, zeroed", "flip"),
                ("other words kept", "rest"),
            ):
                if not np.isnan(values[column]):
                    yield row("causal effect", measure, str(name), k, values[column])
    top = case.top(min(20, vlm.anatomy.total))
    try:
        random = mmn.same_layer_random(vlm, top, draws=1, seed=seed)[0]
    except MmnError:
        notes.once(f"{len(top)} neurons are too many here for as many random ones of the same layers, so they get no noise.")
        return
    for sigma in SIGMAS:
        for name, neurons in (("found", top), ("random", random)):
            with mmn.perturb(vlm, neurons, sigma * unit, seed=seed):
                drop = base.logp[0, case.noun.step] - properties.reread(vlm, case.trace).logp[0, case.noun.step]
            yield row("causal effect", f"drop of log p, noise of sigma {sigma:g}", name, len(top), float(drop))


class _Poll:
    """POPE on the pictures of a run: the questions for each, and the picture of which they are asked as a control, the next one."""

    def __init__(self, every: Sequence[Picture], seed: int):
        known = [picture for picture in every if picture.objects]
        asked = questions([picture.objects or () for picture in known], seed=seed)
        self.asked = {picture.id: each for picture, each in zip(known, asked, strict=True)}
        self.other = {picture.id: known[(number + 1) % len(known)] for number, picture in enumerate(known)}

    def of(self, vlm: VLM, picture: Picture, image: Image.Image, batch_size: int) -> Iterator[dict[str, Any]]:
        """The answers for a picture, two rows a form and question. There is no control where no other picture can be opened."""
        asked = self.asked.get(picture.id)
        if not asked:
            return
        seen = {"found": image}
        if len(self.asked) > 1:
            with suppress(MmnError):  # which is told where its own turn comes
                seen["another picture"] = self.other[picture.id].open()
        for control, each in seen.items():
            yes = answers(vlm, [each] * len(asked), [question.name for question in asked], batch_size)
            for form, name, there, said in judged(asked, yes):
                values = (name, "hallucination", f"POPE, {form}: right answers", control, 0, float(said == there))
                yield dict(zip(COLUMNS["properties"][1:], values, strict=True))
                values = (name, "hallucination", f"POPE, {form}: answers yes", control, 0, float(said))
                yield dict(zip(COLUMNS["properties"][1:], values, strict=True))


# ------------------------------------------------------------------------------------------------------------------- edits


def edits(
    vlm: VLM, pictures: Sequence[Picture], captions: pd.DataFrame, *, count: int = 3, top_k: int = 20, prompt: str = PROMPT,
    seed: int = 0, batch_size: int = 16, report: Report = unheard,
) -> Tables:  # fmt: skip
    """Edit each of the most frequent nouns into the next one, fitted on some of the pictures that say it and judged on others, on the
    rows of the neurons found and on same-layer random rows: tables edits, problems.

    Measures, 0 or 1 a picture: `says the target` (and the source no longer), `other captions kept` (of pictures that name neither)."""
    notes, rows = Notes("edits"), []
    by_id = {picture.id: picture for picture in pictures}
    said = {row.picture: str(row.said or "").split("|") for row in captions.itertuples()}
    frequent = pd.Series([noun for nouns in said.values() for noun in set(nouns) if noun]).value_counts(sort=False)
    order = sorted(frequent.index, key=lambda noun: (-frequent[noun], noun))
    pairs = []
    for source, target in zip(order, order[1:], strict=False):
        with_source = [by_id[each] for each, nouns in said.items() if source in nouns and target not in nouns]
        if len(with_source) >= 4:
            pairs.append((source, target, with_source))
    if count and not pairs:
        notes.once("No noun is said by four captions that do not also say the next one: none was edited.")
    for done, (source, target, with_source) in enumerate(pairs[:count]):
        report(done, len(pairs[:count]))
        neither = [by_id[each] for each, nouns in said.items() if source not in nouns and target not in nouns]
        half = min(FIT, len(with_source) // 2)
        try:
            for name, picture, measure, value in _edit(
                vlm,
                source,
                target,
                with_source[: half + JUDGE],
                half,
                neither[: FIT + JUDGE],
                top_k,
                prompt,
                seed,
                batch_size,
                notes,
            ):
                rows.append(dict(zip(COLUMNS["edits"], (source, target, name, picture, measure, value), strict=True)))
        except Exception as error:  # of this pair alone
            notes.add("", f"{source} into {target}: {reason_of(error)}")
    return {"edits": table("edits", rows), "problems": table("problems", notes.rows)}


def _edit(
    vlm: VLM, source: str, target: str, with_source: Sequence[Picture], half: int, neither: Sequence[Picture], top_k: int, prompt: str,
    seed: int, batch_size: int, notes: Notes,
) -> Iterator[tuple[str, str, str, int]]:  # fmt: skip
    both = list(opened(with_source, notes))
    fit, judge = both[:half], both[half:]
    others = list(opened(neither, notes))
    keep, stay = others[:FIT], others[FIT:]
    traces = vlm.caption([image for _, image in fit], prompt, batch_size=batch_size)
    found = located(vlm, traces, source, top_k)
    random = mmn.same_layer_random(vlm, found, draws=1, seed=seed)[0]
    asked = [image for _, image in [*judge, *stay]]
    before = vlm.caption(asked, prompt, batch_size=batch_size, record=False)
    for name, neurons in (("found", found), ("random", random)):
        edit = mmn.Edit.fit(
            vlm, [image for _, image in fit], source, target, neurons, keep=[image for _, image in keep], prompt=prompt,
            batch_size=batch_size, progress=False,
        )  # fmt: skip
        with edit.applied(vlm):
            after = vlm.caption(asked, prompt, batch_size=batch_size, record=False)
        for number, (picture, _) in enumerate([*judge, *stay]):
            if number < len(judge):
                nouns = [noun.lemma for noun in after[number].nouns]
                yield name, picture.id, "says the target", int(target in nouns and source not in nouns)
            else:
                yield name, picture.id, "other captions kept", int(after[number].text == before[number].text)


# ----------------------------------------------------------------------------------------------------------------- summary


def summary(tables: Tables, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """One row a property, measure and number of neurons of one model: value, low, high (95 %, pictures resampled) and the same of the
    control, `pictures` how many there were.

    Specificity is counted here, from the rankings: the share of top neurons that two pictures of one noun have in common, beside that of
    two pictures of different nouns; and, where it is known what is true of a picture, CHAIR: see `_chair`."""
    rows = []
    frame = pd.concat(
        [tables["properties"], specificity(tables["rankings"], seed), _edited(tables["edits"]), _chair(tables["captions"])]
    )
    for (kind, measure, k), part in frame.groupby(["property", "measure", "k"], sort=False):
        row: dict[str, Any] = {"property": kind, "measure": measure, "k": k}
        own = part["neurons"].eq("found")
        for prefix, some in (("", part[own]), ("control_", part[~own])):
            if len(some):
                value = properties.clustered(some, "value", draws=draws)
                row |= {prefix + name: round(number, 4) for name, number in value._asdict().items()}
        control = part.loc[~own, "neurons"]
        rows.append(row | {"control": control.iloc[0] if len(control) else "", "pictures": part["picture"].nunique()})
    columns = [
        "property",
        "measure",
        "k",
        "value",
        "low",
        "high",
        "control",
        "control_value",
        "control_low",
        "control_high",
        "pictures",
    ]
    return pd.DataFrame(rows, columns=columns)


def specificity(ranked: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Rows of `properties`: for each picture and noun the overlap of its top neurons with those of another picture of the noun (`found`)
    and of a picture of another noun (`another noun`), both drawn by chance."""
    rng = np.random.default_rng(seed)
    sets = {
        key: set(zip(part["layer"], part["unit"], strict=True)) for key, part in ranked.groupby(["picture", "noun"], sort=False)
    }
    keys = sorted(sets)  # so that partners do not hang on how the pictures were cut into shards
    rows = []
    for picture, noun in keys:
        alike = [key for key in keys if key[1] == noun and key[0] != picture]
        unlike = [key for key in keys if key[1] != noun and key[0] != picture]
        for name, some in (("found", alike), ("another noun", unlike)):
            if some:
                mine, other = sets[picture, noun], sets[some[rng.integers(len(some))]]
                shared = len(mine & other) / len(mine)
                values = (picture, noun, "specificity", "overlap between pictures of one noun", name, len(mine), shared)
                rows.append(dict(zip(COLUMNS["properties"], values, strict=True)))
    return table("properties", rows)


def _edited(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.rename(columns={"source": "noun"}).assign(property="editing", k=0)[list(COLUMNS["properties"])]


def truth(vlm: VLM, pictures: Sequence[Picture], *, prompt: str = PROMPT, seed: int = 0, batch_size: int = 16) -> pd.DataFrame:
    """CHAIR and POPE of some pictures alone, rows of the table properties: what `summary` counts, without neurons. Pictures that cannot be
    opened are left out."""
    some = list(opened([picture for picture in pictures if picture.objects is not None], Notes("truth")))
    traces = vlm.caption([image for _, image in some], prompt, batch_size=batch_size, record=False) if some else []
    captions = [
        {"picture": picture.id, "named": "|".join(picture.named(trace.text)), "shown": "|".join(picture.true or ())}
        for (picture, _), trace in zip(some, traces, strict=True)
    ]
    poll = _Poll([picture for picture, _ in some], seed)
    asked = [{"picture": picture.id, **row} for picture, image in some for row in poll.of(vlm, picture, image, batch_size)]
    return pd.concat([_chair(table("captions", captions)), table("properties", asked)], ignore_index=True)


def _chair(captions: pd.DataFrame) -> pd.DataFrame:
    """Rows of `properties`: CHAIR_i, CHAIR_s and recall of the captions of pictures of which it is known what they show, an object that a
    caption names twice counted once; as a control, of the same captions against what another picture shows, the next one by name."""
    known = captions.query("named != '' or shown != ''").sort_values("picture")
    named, shown = ([set(filter(None, str(each).split("|"))) for each in known[column]] for column in ("named", "shown"))
    rows = []
    for number, picture in enumerate(known["picture"]):
        said = named[number]
        for control, true in {"found": shown[number], "another picture": shown[(number + 1) % len(shown)]}.items():
            if control != "found" and len(shown) == 1:
                continue
            for measure, values in {
                "CHAIR_i, objects named that are not there": [(name, float(name not in true)) for name in sorted(said)],
                "CHAIR_s, captions that name such an object": [("", float(bool(said - true)))],
                "recall, objects there that are named": [(name, float(name in said)) for name in sorted(true)],
            }.items():
                rows += [(picture, name, "hallucination", measure, control, 0, value) for name, value in values]
    return pd.DataFrame(rows, columns=COLUMNS["properties"])
