"""Ways to make a model say another word, side by side: edits of located rows and of others, fine-tuning, a rank-one edit, LoRA, and
two that touch no weight; and how each is judged. All protocols are this project's own; a way "in the manner of" a paper follows its
idea, not its code.

A `Way` is a change that can be switched on in a `with` block. Those of weights are all an `Edit`, so they are undone bit for bit."""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmn import scenes
from mmn.edit import Edit, located
from mmn.errors import MmnError, whole_number
from mmn.ffn import Neuron, by_layer
from mmn.hooks import hooked
from mmn.intervene import same_layer_random
from mmn.lesson import Counts, Moments, Row, batched, captions, lesson, loss_of, plural_of, replaced, says
from mmn.oracle import oracle_everywhere
from mmn.scenes import CONCEPTS, HELD_OUT_PARAPHRASES, HELD_OUT_STYLE, PARAPHRASES, Scene
from mmn.trace import Trace
from mmn.vlm import PREFIX, PROMPT, VLM

FIT_STYLES = ("noto", "fxemoji", "fluent-emoji", "emojione")  # an edit's own pictures; the other two styles are for judging it
NEW_STYLES = ("noto-v1", "fluent-emoji-flat")
# How the better edit is fitted: slowly, all its steps, on several prompts, with much weight on what is to stay.
BETTER: dict[str, Any] = {"steps": 29, "rate": 0.007, "enough": 1.1, "weights": (0.0, 20.0, 10.0)}
BETTER_K = 40  # its rows


# ------------------------------------------------------------------------------------------------------------------ what is fitted


@dataclass(frozen=True)
class Task:
    """A swap to be fitted and judged. fit, keep: scenes that show the source, and that do not; texts: questions without a picture to
    leave alone. prompts: in which the better edit learns. seed: of the scenes."""

    source: str
    target: str
    fit: list[Scene]
    keep: list[Scene]
    texts: list[str]
    prompts: tuple[str, ...] = (PROMPT, *PARAPHRASES)
    seed: int = 0

    @functools.cached_property
    def pictures(self) -> list[Any]:
        """Of the scenes that show the source."""
        return [scene.image for scene in self.fit]

    @functools.cached_property
    def others(self) -> list[Any]:
        """Of the scenes to keep."""
        return [scene.image for scene in self.keep]


def task(source: str, target: str, *, fit: int = 24, keep: int = 24, texts: int = 12, seed: int = 0) -> Task:
    """The swap of one concept of the synthetic world for another, with scenes of `FIT_STYLES` and facts of other concepts.

    Raises MmnError for a concept the world lacks."""
    for word in (source, target):
        if word not in CONCEPTS:
            raise MmnError(f"The world has no concept {word!r}; mmn.scenes.CONCEPTS lists the {len(CONCEPTS)} it has.")
    first = 10**7 + 10**5 * seed
    return Task(
        source, target, showing(source, fit, first, FIT_STYLES), without((source,), keep, first + 5 * 10**4, FIT_STYLES),
        facts((source, target), texts, seed), seed=seed,
    )  # fmt: skip


def showing(concept: str, count: int, first: int, styles: Sequence[str]) -> list[Scene]:
    """Scenes that show a concept, alone or with one or two others, in the styles that have a picture of it. No planted triggers."""
    having = [style for style in styles if concept in scenes.sprites(style)]
    if not having:
        raise MmnError(f"None of the styles {', '.join(styles)} has a picture of {concept!r}: choose another concept.")
    found = []
    for number in range(count):
        rng = np.random.default_rng([9, first + number])
        style = having[number % len(having)]
        names = [name for name in scenes.sprites(style) if name != concept and name not in scenes.PLANTED]
        others = [str(name) for name in rng.choice(names, int(rng.integers(0, 3)), replace=False)]
        found.append(scenes.draw(first + number, style=style, concepts=[concept, *others]))
    return found


def without(concepts: Sequence[str], count: int, first: int, styles: Sequence[str]) -> list[Scene]:
    """Scenes that show none of the concepts and no planted trigger."""
    found: list[Scene] = []
    while len(found) < count:
        scene = scenes.draw(first, style=styles[first % len(styles)])
        first += 1
        if not scene.biased and not set(concepts) & set(scene.names):
            found.append(scene)
    return found


def facts(concepts: Sequence[str], count: int, seed: int) -> list[str]:
    """Questions without a picture on other concepts."""
    asked = [q.text for q in scenes.facts() if not any(f" {name}" in q.text for name in concepts)]
    return [str(text) for text in np.random.default_rng([10, seed]).permutation(asked)[:count]]


# ------------------------------------------------------------------------------------------------------------------------- ways


@dataclass(frozen=True)
class Way:
    """A change that `on()` switches on for a block. edit: where it is one of weights. norm: of the change of weights (Frobenius).
    rows: writes changed. passes: forward-backward passes it took; seconds: to make it."""

    name: str
    on: Callable[[], AbstractContextManager[Any]]
    edit: Edit | None = None
    rows: int = 0
    passes: int = 0
    seconds: float = 0.0

    @property
    def norm(self) -> float:
        """Frobenius norm of the change of weights, 0 where there is none."""
        return self.edit.norm if self.edit else 0.0


def of_edit(vlm: VLM, name: str, edit: Edit) -> Way:
    """An edit as a way."""
    passes = edit.report.get("steps", 0) + (edit.report.get("way") == "gradient")
    return Way(name, functools.partial(edit.applied, vlm), edit, len(edit.neurons), passes, edit.report.get("seconds", 0.0))


def gradient(vlm: VLM, job: Task, neurons: Sequence[Neuron], name: str = "gradient, found", **settings: Any) -> Way:
    """The gradient edit, shaped as FiNE, with its own captions' other words to keep and the scenes of `job.keep`."""
    edit = Edit.fit(vlm, job.pictures, job.source, job.target, neurons, keep=job.others, progress=False, **settings)
    return of_edit(vlm, name, edit)


def better(vlm: VLM, job: Task, neurons: Sequence[Neuron], name: str = "better, found", **settings: Any) -> Way:
    """The better edit [ours]: more rows, several prompts, texts to keep, small steps and all of them, much weight on what is to stay."""
    given = {**BETTER, "texts": job.texts, "prompt": job.prompts, **settings}
    return gradient(vlm, job, neurons, name, **given)


def closed_form(vlm: VLM, job: Task, neurons: Sequence[Neuron], name: str = "closed form, found", **settings: Any) -> Way:
    """`Edit.closed_form`."""
    edit = Edit.closed_form(vlm, job.pictures, job.source, job.target, neurons, keep=job.others, **settings)
    return of_edit(vlm, name, edit)


def fine_tuned(vlm: VLM, job: Task, layer: int, bound: float | None = None, **settings: Any) -> Way:
    """Every row of one layer's projection, taught the new words and nothing else; with `bound` the change's norm stays below it, as
    in constrained fine-tuning."""
    neurons = [Neuron(layer, unit) for unit in range(vlm.anatomy.neurons[layer])]
    given = {"weights": (0.0, 0.0, 0.0), "rate": 1e-3, **settings}
    edit = Edit.fit(vlm, job.pictures, job.source, job.target, neurons, bound=bound, progress=False, **given)
    return of_edit(vlm, "fine-tuned layer" + (", bounded" if bound else ""), edit)


def rank_one(vlm: VLM, job: Task, layer: int, ridge: float = 0.01, **settings: Any) -> Way:
    """One direction of one layer's activations, in the manner of ROME (Meng et al. 2022): the change is `C^-1 k v^T`, k the mean
    activations where the source is said, C the second moments over what is kept; v is learned."""
    neurons = [Neuron(layer, unit) for unit in range(vlm.anatomy.neurons[layer])]
    traces = [t for t in vlm.caption(job.pictures, batch_size=32) if says(t, job.source)]
    if not traces:
        raise MmnError(f"No caption says {job.source!r}: choose other pictures.")
    key = torch.stack([trace.activations[layer][trace.noun(job.source).step] for trace in traces]).mean(0)
    if not key.any():
        raise MmnError(f"No neuron of layer {layer} is active where {job.source!r} is said: choose another layer.")
    kept = vlm.caption(job.others, batch_size=32, record=False)
    batches = lesson(vlm, [], kept, job.source, job.target, 32)
    with torch.no_grad(), Moments(vlm, by_layer(neurons)) as moments:
        for batch in batches:
            moments.weigh(batch)
            batch.logits(vlm)
    root = moments.whitened(layer, ridge)
    direction = root @ (root @ key)
    basis = {layer: (direction / (direction @ key))[:, None]}
    given = {"rate": 0.5, **settings}
    return gradient(vlm, job, neurons, "rank one, as ROME", basis=basis, **given)


def lora(vlm: VLM, job: Task, rank: int = 4, steps: int = 50, rate: float = 3e-3) -> Way:
    """Low-rank adapters on every layer's projection by the peft library, with the same loss; taken off again and kept as an edit.

    Raises MmnError without peft, or where the projections are no modules of their own."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise MmnError("LoRA needs the peft library: pip install peft.") from error
    started = time.perf_counter()
    names = {id(module): name for name, module in vlm.model.named_modules()}
    places = {layer: names[id(ffn.projection)] for layer, ffn in enumerate(vlm.anatomy.ffns) if ffn.neurons}
    if not all(type(vlm.anatomy.ffns[layer].projection) is nn.Linear for layer in places):
        raise MmnError("This model's projections are no plain linear maps, so peft cannot adapt them: leave LoRA out.")
    said, kept = captions(vlm, job.pictures, job.source, job.others, (), vlm.prompt, PREFIX, 50, record=False)
    batches = lesson(vlm, said, kept, job.source, job.target, 32)
    for batch in batches:
        batch.remember(vlm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(places.values()), bias="none")
        tuner = LoraModel(vlm.model, config, "mmn")
    try:
        learned = [p for n, p in vlm.model.named_parameters() if "lora_" in n]
        for parameter in vlm.model.parameters():
            parameter.requires_grad_(False)
        adam = torch.optim.Adam([p.requires_grad_() for p in learned], lr=rate)
        done = 0
        for step in range(steps + 1):
            done, lowest = step, 1.0
            adam.zero_grad()
            with torch.enable_grad():
                for batch in batches:
                    after = [logits.log_softmax(-1) for logits in batch.logits(vlm)]
                    loss, probability = loss_of(batch, after, Counts.of(batches), (0.0, 1.0, 10.0))
                    loss.backward()
                    lowest = min(lowest, probability)
            if lowest >= 0.9 or step == steps:
                break
            adam.step()
        deltas = {n: vlm.model.get_submodule(name).get_delta_weight("mmn").detach().T for n, name in places.items()}
    finally:
        tuner.unload()
        vlm.model.requires_grad_(False)
    neurons = [Neuron(layer, unit) for layer in places for unit in range(vlm.anatomy.neurons[layer])]
    # The last step, too, has a pass that only looks, which `of_edit` counts of gradient edits.
    report = {"way": "gradient", "steps": done, "seconds": round(time.perf_counter() - started, 2)}
    changes = torch.cat([deltas[layer] for layer in places]).float().cpu().contiguous()
    return of_edit(vlm, "LoRA, all layers", Edit(neurons, changes, vlm.hash, job.source, job.target, report))


def logit_bias(vlm: VLM, job: Task, margin: float = 1.0) -> Way:
    """No weight changes: the target's first token gets so much more that it beats the source's in every caption fitted on, and the
    source's gets as much less. At every step, whatever is seen."""
    started = time.perf_counter()
    said, _ = captions(vlm, job.pictures, job.source, (), (), vlm.prompt, PREFIX, 50, record=False)
    # The article stays, as it does under a bias, which comes when it has been said.
    rows = [Row.of(vlm, trace, replaced(trace, job.source, job.target, fitting=False)) for trace in said]
    swaps: set[tuple[int, int]] = set()
    needed = 0.0
    with torch.no_grad():
        for batch in batched(vlm, rows, 32):
            for row, logits in zip(batch.rows, batch.logits(vlm), strict=True):
                (step, new), place = row.swaps[0], row.new[0]  # where the noun is said first
                old = int(row.trace.tokens[step])
                swaps.add((old, new))
                needed = max(needed, float(logits[place, old] - logits[place, new]))
    bias = torch.zeros(vlm.anatomy.unembedding.out_features)
    for old, new in swaps:
        bias[old], bias[new] = -(needed + margin) / 2, (needed + margin) / 2
    return Way("logit bias", functools.partial(biased, vlm, bias), passes=0, seconds=round(time.perf_counter() - started, 2))


@contextmanager
def biased(vlm: VLM, bias: Tensor) -> Iterator[None]:
    """With `bias` float32 `[vocabulary]` added to the logits at every position."""

    def add(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out + bias.to(out.device, out.dtype)

    with hooked([vlm.anatomy.unembedding.register_forward_hook(add)]):
        yield


@contextmanager
def decoding(vlm: VLM, **settings: Any) -> Iterator[None]:
    """With other settings of generation than plain greedy decoding, such as `num_beams=4`, `do_sample=True` or `bad_words_ids`.

    What `vlm.caption` records of probabilities is then that of the likeliest token, not of the one taken; with beams, which take
    `record=False`, there is none (nan)."""
    plain, before = vlm.generation, vars(vlm).get("generation")

    def other(limit: int) -> Any:
        config = plain(limit)
        config.update(**settings)
        return config

    vlm.generation = other  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del vars(vlm)["generation"]
        if before is not None:  # of a block around this one
            vlm.generation = before  # type: ignore[method-assign]


def forms(vlm: VLM, word: str) -> list[list[int]]:
    """The tokens of a noun's forms, with and without a space before them, as a list of banned words takes them."""
    ways = [prefix + form for form in (word, plural_of(word)) for prefix in ("", " ")]
    ways += [way.capitalize() for way in (word, plural_of(word))]
    return [vlm.tokenizer(way, add_special_tokens=False).input_ids for way in dict.fromkeys(ways)]


def banned(vlm: VLM, job: Task) -> Way:
    """No weight changes: the source's forms are on transformers' list of words that decoding may not choose."""
    return Way("banned word", functools.partial(decoding, vlm, bad_words_ids=forms(vlm, job.source)))


# ------------------------------------------------------------------------------------------------------------- choices of rows


def by_gradient(vlm: VLM, traces: Sequence[Trace], source: str, k: int) -> list[Neuron]:
    """The rows of the highest mean gradient score at the generating position, on eight captions at most."""
    return located(vlm, [trace for trace in traces if says(trace, source)][:8], source, k, "gradient")


def by_oracle(vlm: VLM, traces: Sequence[Trace], source: str, k: int, candidates: int = 256, most: int = 2) -> list[Neuron]:
    """The rows whose silencing, one at a time, costs the source most: true effects, of the `candidates` of the highest gradient score,
    on the first `most` captions."""
    some = [trace for trace in traces if says(trace, source)][:most]
    chosen = by_gradient(vlm, some, source, candidates)
    drops = torch.stack([oracle_everywhere(vlm, trace, source, chosen) for trace in some]).sum(0)
    return [chosen[place] for place in drops.topk(min(k, len(chosen))).indices.tolist()]


def of_other_concept(vlm: VLM, job: Task, k: int, own: Sequence[Neuron]) -> list[Neuron]:
    """The rows found for another concept, drawn by the task's seed, less those of the source."""
    names = [name for name in scenes.sprites("noto") if name not in (job.source, job.target) and name not in scenes.PLANTED]
    other = str(np.random.default_rng([11, job.seed]).choice(names))
    traces = vlm.caption([s.image for s in showing(other, 8, 10**7 + 7, FIT_STYLES)], batch_size=8)
    if not any(says(trace, other) for trace in traces):
        return same_layer_random(vlm, own, draws=1, seed=job.seed + 1)[0][:k]
    return [neuron for neuron in located(vlm, traces, other, 3 * k) if neuron not in set(own)][:k]


def firing(traces: Sequence[Trace], concept: str) -> list[Tensor]:
    """How often each neuron is active where a concept is said: for each layer float32 `[neurons]`, the share of the captions that say it
    at whose noun the activation is not 0. A neuron that is silent there can be given any write, and nothing changes.

    Raises MmnError if no caption says it."""
    said = [trace for trace in traces if says(trace, concept)]
    if not said:
        raise MmnError(f"None of these {len(traces)} captions says {concept!r}: choose other pictures.")
    often = torch.cat([trace.at([trace.noun(concept).step]) for trace in said]).ne(0).float().mean(0)
    return list(often.split(said[0].sizes))


def active_random(often: Sequence[Tensor], neurons: Sequence[Neuron], seed: int = 0, least: float = 0.5) -> list[Neuron]:
    """A stricter control than `mmn.same_layer_random`: as many neurons of each layer, drawn among those active (`often`: of `firing`)
    in at least `least` of the captions, none of the given; fewer where a layer has no more.

    Raises MmnError where there are none."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for layer, group in by_layer(neurons).items():
        given = {unit for _, unit in group}
        pool = [unit for unit in (often[layer] >= least).nonzero().flatten().tolist() if unit not in given]
        order = torch.randperm(len(pool), generator=generator)[: len(group)].tolist()
        drawn += [Neuron(layer, pool[place]) for place in order]
    if not drawn:
        raise MmnError(
            f"No other neuron of these layers is active in {least:.0%} of the captions: ask for fewer, or lower `least`."
        )
    return drawn


def in_one_layer(vlm: VLM, traces: Sequence[Trace], source: str, k: int) -> list[Neuron]:
    """The k rows of the highest mean score in the layer where most of the rows found lie: a fit then runs that layer and what follows,
    not the whole model. At most as many as are among the 4 k found."""
    order = located(vlm, traces, source, 4 * k)
    layer = Counter(neuron.layer for neuron in order[:k]).most_common(1)[0][0]
    return [neuron for neuron in order if neuron.layer == layer][:k]


def main_ways(vlm: VLM, job: Task, k: int = 20) -> Iterator[Way]:
    """The gradient edit and the better one on the rows found, and on same-layer random rows of no greater norm."""
    traces = vlm.caption(job.pictures, batch_size=32)
    found = in_one_layer(vlm, traces, job.source, k)
    random = same_layer_random(vlm, found, draws=1, seed=job.seed)[0]
    first = gradient(vlm, job, found)
    yield first
    yield gradient(vlm, job, random, "gradient, random rows", bound=first.norm, steps=20)
    more = in_one_layer(vlm, traces, job.source, BETTER_K)
    second = better(vlm, job, more)
    yield second
    yield better(vlm, job, same_layer_random(vlm, more, draws=1, seed=job.seed)[0], "better, random rows", bound=second.norm)


def other_ways(vlm: VLM, job: Task, k: int = 20) -> Iterator[Way]:
    """Every way of the comparison, one after the other: what each is, the tables of the chapter say."""
    traces = vlm.caption(job.pictures, batch_size=32)
    found = in_one_layer(vlm, traces, job.source, k)
    first = gradient(vlm, job, found)
    yield first
    yield better(vlm, job, in_one_layer(vlm, traces, job.source, BETTER_K))
    yield closed_form(vlm, job, found)
    random = same_layer_random(vlm, found, draws=1, seed=job.seed)[0]
    try:
        yield closed_form(vlm, job, random, "closed form, random rows")
    except MmnError:  # all of them silent: what could be changed changes nothing
        yield Way("closed form, random rows", nullcontext)
    yield gradient(vlm, job, random, "gradient, random rows")
    yield gradient(vlm, job, of_other_concept(vlm, job, k, found), "gradient, other concept's")
    yield gradient(vlm, job, by_gradient(vlm, traces, job.source, k), "gradient, by gradient score")
    yield gradient(vlm, job, by_oracle(vlm, traces, job.source, k, candidates=64, most=1), "gradient, by causal oracle")
    layer = max(by_layer(found).items(), key=lambda group: len(group[1]))[0]
    yield fine_tuned(vlm, job, layer, steps=20)
    yield fine_tuned(vlm, job, layer, bound=first.norm, steps=20)
    yield rank_one(vlm, job, layer, steps=20)
    yield lora(vlm, job, steps=15, rate=1e-2)
    yield logit_bias(vlm, job)
    yield banned(vlm, job)


# -------------------------------------------------------------------------------------------------------------------- judging

MEASURES = {
    "fitted": "share of the scenes fitted on whose caption says the target and no longer the source",
    "reliability": "the same on fresh scenes in the styles fitted on",
    "new_style": "the same on fresh scenes in styles not fitted on",
    "held_out": "the same in the style that the model itself never saw",
    "rephrased": "the same on the scenes of new_style, asked in other words than any fit",
    "rest": "share of fresh captions that said the source (all of the above but the fitted) and are now the same but for it, word by word",
    "rest_content": "share of them that name the objects wanted, the target among them, each with its article and as often, "
    "and the same place, however they are joined",
    "rest_unedited": "control of rest: share of them that the unedited model goes on with as before once the target is in its mouth",
    "image_top1": "pictures without the source: share of steps whose likeliest token stays, the unedited caption being read",
    "image_top10": "the same, with the ten likeliest tokens in order",
    "captions_kept": "pictures without the source: share of captions that stay to the letter",
    "other_image": "the same text with another picture: share of captions kept where another object stands in the source's place",
    "text_top1": "questions on other concepts without a picture: share of steps whose likeliest token stays",
    "text_top10": "the same, with the ten likeliest tokens in order",
    "by_text": "text alone: share of questions about the source whose answer changes",
    "by_image": "image alone: share of swaps where the picture comes without a request",
}
_JOINT = re.compile(r",? (?:and|next to|with|above|below|to the left of|to the right of) |, ")
FRESH = ("reliability", "new_style", "held_out", "rephrased")  # pictures that show the source, not fitted on
SWAPS = ("fitted", *FRESH, "by_image")


class Judge:
    """Measures of a swap on scenes, styles and prompts that no fit has seen; what the unedited model says is asked once.

    count: fresh scenes that show the source, over the styles; half as many that do not.

    Captions are *read* before they are generated: where each token of the wanted caption is the likeliest after those before it, greedy
    decoding says just that caption. Only the others are generated."""

    def __init__(self, vlm: VLM, job: Task, count: int = 100):
        whole_number("count", count, 3)  # of which a third is drawn in a style that the edit has not seen
        self.vlm, self.job = vlm, job
        first = 2 * 10**7 + 10**5 * job.seed
        third = count // 3
        named = {
            "reliability": showing(job.source, third, first, FIT_STYLES),
            "new_style": showing(job.source, count - 2 * third, first + 10**4, NEW_STYLES),
        }
        if job.source in scenes.sprites(HELD_OUT_STYLE):
            named["held_out"] = showing(job.source, third, first + 2 * 10**4, (HELD_OUT_STYLE,))
        elsewhere = without((job.source, job.target), -(-count // 2), first + 3 * 10**4, (*FIT_STYLES, *NEW_STYLES))
        pictures = {name: [scene.image for scene in some] for name, some in named.items()}
        ways = [HELD_OUT_PARAPHRASES[n % len(HELD_OUT_PARAPHRASES)] for n in range(len(pictures["new_style"]))]
        questions = [q.text for q in scenes.facts() if job.source in scenes.mentions(q.text)]
        texts = [text for text in facts((job.source, job.target), count + 60, job.seed) if text not in job.texts][: count // 2]
        self.asked: dict[str, tuple[list[Any], Any]] = {
            "fitted": (job.pictures, vlm.prompt),
            **{name: (some, vlm.prompt) for name, some in pictures.items()},
            "rephrased": (pictures["new_style"], ways),
            "captions_kept": ([scene.image for scene in elsewhere], vlm.prompt),
            "other_image": ([_swapped(scene, job) for scene in named["new_style"]], vlm.prompt),
            "by_image": (pictures["reliability"], ""),
            "by_text": ([None] * len(questions), questions),
            "text": ([None] * len(texts), texts),
        }
        self.before = {name: self._say(*asked) for name, asked in self.asked.items()}
        rows = {name: [self._row(name, trace) for trace in some] for name, some in self.before.items()}
        self.rows = {name: [row for row in some if row is not None] for name, some in rows.items()}
        self.batches = batched(vlm, sum(self.rows.values(), []), 32)
        self.tops = self._tops()

    def _say(self, images: list[Any], prompts: Any) -> list[Trace]:
        asked = {"prefix": ""} if images[0] is None else {}
        return self.vlm.caption(images, prompts, **asked, max_new_tokens=20, batch_size=32, record=False)

    def _row(self, name: str, trace: Trace) -> Row | None:
        """What is to be said in a trace's place; None where the source was not said, so that there is nothing to replace."""
        if name not in SWAPS:
            return Row.of(self.vlm, trace, trace.text)
        return Row.of(self.vlm, trace, replaced(trace, self.job.source, self.job.target)) if says(trace, self.job.source) else None

    @torch.no_grad()
    def _tops(self) -> dict[int, Tensor]:
        """The ten likeliest tokens at each step of each row, by the row's id, `[answer + 1, 10]`."""
        read = ((batch.rows, batch.logits(self.vlm)) for batch in self.batches)
        return {id(row): logits.topk(10).indices.cpu() for rows, some in read for row, logits in zip(rows, some, strict=True)}

    def _texts(self, name: str, tops: dict[int, Tensor]) -> list[str]:
        """What is now said in each row's place: its own text where that is what greedy decoding gives."""
        rows, end = self.rows[name], self.vlm.end_token
        texts = [row.text if tops and tops[id(row)][:, 0].tolist() == [*row.answer, end] else None for row in rows]
        open_ = [row.trace for row, text in zip(rows, texts, strict=True) if text is None]
        said = iter(self._say([t.image for t in open_], [t.prompt for t in open_]) if open_ else [])
        return [next(said).text.lstrip() if text is None else text for text in texts]  # as a row's text is

    def counts(self) -> dict[str, int]:
        """How many captions each share of `MEASURES` rests on; for the measures of steps, how many captions they are of. For `rest` and
        its kin those of all four kinds of fresh scenes."""
        fresh = sum(len(self.rows.get(name, [])) for name in FRESH)
        named = {"image_top1": "captions_kept", "image_top10": "captions_kept", "text_top1": "text", "text_top10": "text"}
        return {name: fresh if name.startswith("rest") else len(self.rows.get(named.get(name, name), [])) for name in MEASURES}

    def of(self, way: Way) -> dict[str, float]:
        """The figures of `MEASURES` for one way, each a share between 0 and 1; nan where no caption could show it."""
        job = self.job
        if way.edit is not None:
            for batch in self.batches:
                batch.begin(self.vlm, min(by_layer(way.edit.neurons)))
        with way.on():
            tops = self._tops()
            # Settings of decoding leave no trace in the logits, so that what is said under them has to be generated.
            texts = {name: self._texts(name, tops if way.edit else {}) for name in self.rows if name != "text"}
        swapped = {
            name: [job.target in said and job.source not in said for said in map(scenes.mentions, texts[name])]
            for name in SWAPS
            if name in texts
        }
        same = {name: [row.text == text for row, text in zip(self.rows[name], texts[name], strict=True)] for name in texts}
        figures = {name: _share(swapped.get(name, [])) for name in SWAPS}
        figures["rest"] = _share(sum((same.get(name, []) for name in FRESH), []))
        said = [pair for name in FRESH if name in texts for pair in zip(self.rows[name], texts[name], strict=True)]
        figures["rest_content"] = _share(content(row.text) == content(text) for row, text in said)
        fresh = [row for name in FRESH for row in self.rows.get(name, [])]
        figures["rest_unedited"] = _share(_goes_on(row, self.tops[id(row)][:, 0].tolist(), self.vlm.end_token) for row in fresh)
        figures |= {name: _share(same[name]) for name in ("captions_kept", "other_image")}
        figures["by_text"] = 1 - _share(same["by_text"])
        for kind, name in (("image", "captions_kept"), ("text", "text")):
            pairs = [(self.tops[id(row)], tops[id(row)]) for row in self.rows[name]]
            figures[f"{kind}_top1"] = float(np.mean([(old[:, 0] == now[:, 0]).float().mean() for old, now in pairs]))
            figures[f"{kind}_top10"] = float(np.mean([(old == now).all(-1).float().mean() for old, now in pairs]))
        return {name: figures[name] for name in MEASURES}


def content(text: str) -> tuple[list[str], list[str]]:
    """What a caption of the synthetic world says, however it joins it: its objects, each with its article or number, in alphabetical
    order, and its places."""
    places = [place.phrase for place in scenes.PLACES.values() if text.endswith(place.phrase)]
    for place in places:
        text = text.removesuffix(place).rstrip()
    return sorted(_JOINT.split(text.removeprefix("An image of "))), places


def _goes_on(row: Row, likeliest: list[int], end: int) -> bool:
    """Whether all that a row's caption keeps is what is likeliest."""
    wanted = [*row.answer, end]
    return all(likeliest[place] == wanted[place] for place in row.stay)


def _swapped(scene: Scene, job: Task) -> Any:
    """The scene's picture with another concept where the source was."""
    names = [n for n in scenes.sprites(scene.style) if n not in (job.source, job.target, *scene.names) and n not in scenes.PLANTED]
    other = str(np.random.default_rng([12, scene.seed]).choice(names))
    return scenes.recompose(scene, [replace(p, concept=other) if p.concept == job.source else p for p in scene.objects]).image


def _share(each: Any) -> float:
    """The mean of some truths; nan for none."""
    values = [float(value) for value in each]
    return float(np.mean(values)) if values else float("nan")
