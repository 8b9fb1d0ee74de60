"""The command that makes the shipped model, run tiny: it trains, stops, goes on where it was, and leaves an ordinary checkpoint."""

import argparse
import contextlib
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import mmn
from mmn import families, scenes, train
from mmn.errors import MmnError

TINY = train.Recipe(scenes=(8,) * 4, batches=(4,) * 4)


@pytest.fixture(scope="module")
def tokenizer():
    return train.make_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    train.train(folder / "model", folder / "work", recipe=TINY, device="cpu")
    return folder


def test_the_checkpoint_is_an_ordinary_one(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(checkpoint / "model", backend="pil")
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": scenes.PROMPT}]},
        {"role": "assistant", "content": [{"type": "text", "text": scenes.PREFIX}]},
    ]
    text = processor.apply_chat_template(talk, continue_final_message=True)
    assert text == f"<s>USER: <image>\n{scenes.PROMPT} ASSISTANT: {scenes.PREFIX}"
    inputs = processor(images=scenes.draw(0).image, text=text, add_special_tokens=False, return_tensors="pt")
    assert (inputs.input_ids == model.config.image_token_id).sum() == scenes.GRID**2
    assert inputs.pixel_values.shape == (1, 3, scenes.SIZE, scenes.SIZE)
    np.testing.assert_allclose(inputs.pixel_values, train.pixels([scenes.draw(0).image]), atol=1e-6)
    ids = model.generate(**inputs, max_new_tokens=3)
    assert ids.shape[1] <= inputs.input_ids.shape[1] + 3
    assert not model.config.text_config.tie_word_embeddings
    layers = model.model.language_model.layers
    assert len(layers) >= 6 and sum(layer.mlp.down_proj.in_features for layer in layers) >= 4000


def test_training_speaks_exactly_the_chat_template(checkpoint, tokenizer):
    processor = AutoProcessor.from_pretrained(checkpoint / "model", backend="pil")
    scene = scenes.draw(5, split="train")
    blank = [tokenizer.convert_tokens_to_ids("<image>")] * scenes.GRID**2
    ids, kinds, _ = train.dialogue(scene, np.random.default_rng(0), tokenizer, blank, blank)
    assert len(ids) == len(kinds)
    text = tokenizer.decode([i for i in ids if i != blank[0]])
    turns = [turn.split(" ASSISTANT: ") for turn in text.removeprefix("<s>").split("USER: ")[1:]]
    talk = []
    for number, (asks, says) in enumerate(turns):
        content = [{"type": "image"}] if number == 0 else []
        talk.append({"role": "user", "content": [*content, {"type": "text", "text": asks.strip()}]})
        talk.append({"role": "assistant", "content": [{"type": "text", "text": says.removesuffix("</s>")}]})
    rendered = processor(images=scene.image, text=processor.apply_chat_template(talk), add_special_tokens=False)
    assert list(rendered.input_ids[0]) == ids
    answers = tokenizer.decode([i for i, kind in zip(ids, kinds, strict=True) if kind == train.ANSWER])
    assert f"An image of {scene.caption}</s>" in answers


def test_a_stopped_run_goes_on_where_it_was(tmp_path, checkpoint, monkeypatch):
    calls = []
    patch_loss = train.Trainer.patch_loss

    def breaks(self, step, steps, read):
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return patch_loss(self, step, steps, read)

    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train.Trainer, "patch_loss", breaks)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "model", tmp_path / "work", recipe=TINY, device="cpu")
    assert not (tmp_path / "model").exists()
    train.train(tmp_path / "model", tmp_path / "work", recipe=TINY, device="cpu")
    assert calls == [0, 1, 1], "step 0 was not done again"
    one = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    other = AutoModelForImageTextToText.from_pretrained(checkpoint / "model")
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), f"{name} differs from the undisturbed run"


class Blank(train.Steps):
    """Steps that read nothing."""

    def __init__(self):
        pass

    def __getitem__(self, step):
        return None


class Line:
    """A trainer of one linear layer, whose loss at a step can be told to fail; it keeps the weights it saw."""

    def __init__(self, fails_at: int | None = None):
        torch.manual_seed(0)
        self.model, self.device, self.fails_at, self.seen = torch.nn.Linear(3, 1), torch.device("cpu"), fails_at, []
        self.recipe = train.Recipe()

    def trained(self, stage):
        return torch.nn.ModuleList([self.model])

    def steps(self, stage):
        return Blank()

    def loss(self, stage, step, steps, read):
        if step == self.fails_at:
            raise KeyboardInterrupt
        self.seen.append(self.model.weight.detach().clone())
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean()


@pytest.mark.parametrize("stop", [2, 5, 8, 9])
def test_a_stage_of_several_cycles_ends_with_the_mean_of_their_ends(tmp_path, monkeypatch, stop):
    line = Line()
    (tmp_path / "whole").mkdir()
    train.run_stage(line, "tuning", 10, 0.1, tmp_path / "whole", cycles=3)
    last = Line()  # the same run without the mean: its end is the end of the last cycle
    monkeypatch.setattr(train.AveragedModel, "update_parameters", lambda *_: None)
    train.run_stage(last, "tuning", 10, 0.1, tmp_path, cycles=3)
    monkeypatch.undo()
    ends = torch.stack([line.seen[8], last.model.weight.detach()])  # cycles of 4, 4 and 2 steps
    torch.testing.assert_close(line.model.weight.detach(), ends.mean(0))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    (tmp_path / "broken").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train.run_stage(Line(fails_at=stop), "tuning", 10, 0.1, tmp_path / "broken", cycles=3)
    again = Line()
    train.run_stage(again, "tuning", 10, 0.1, tmp_path / "broken", cycles=3)
    assert len(again.seen) == 10 - stop
    torch.testing.assert_close(again.model.weight, line.model.weight, rtol=0, atol=0)


def test_a_work_folder_of_another_run_is_refused(checkpoint):
    with pytest.raises(MmnError, match="another"):
        train.train(
            checkpoint / "x", checkpoint / "work", recipe=train.Recipe(scenes=(16, 8, 8, 8), batches=(4,) * 4), device="cpu"
        )


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"kind": "end-to-end"}, *({dose: 0.25} for dose in train.DOSES), {"gate": "silu"}],
    ids=str,
)
def test_a_state_of_another_recipe_is_not_taken_over(tmp_path, other):
    train.run_stage(Line(), "tuning", 2, 0.1, tmp_path)
    line = Line()
    line.recipe = replace(line.recipe, **other)
    with pytest.raises(MmnError, match="choose another --work"):
        train.run_stage(line, "tuning", 2, 0.1, tmp_path)
    with pytest.raises(MmnError, match="run the stage words first"):
        train.saved_state(tmp_path, "words", line.recipe, line.device)


def test_only_the_named_modules_of_a_stage_change(checkpoint):
    trainer = train.Trainer(TINY, torch.device("cpu"))
    saved = torch.load(checkpoint / "work" / "projector.pt", weights_only=True)["module"]
    assert {name.split(".")[0] for name in saved} == {"0"} and all("linear" in name for name in saved)
    fresh = dict(trainer.trained("projector").named_parameters())
    assert any(not torch.equal(fresh[name], value) for name, value in saved.items())
    assert trainer.loss("tuning", 0, 2, trainer.steps("tuning")[0]).requires_grad


def test_rasters_show_the_scene(tokenizer):
    rng = np.random.default_rng(0)
    wrong = 0
    for seed in range(30):
        scene = scenes.draw(seed, split="train")
        words = tokenizer.batch_decode([[i] for i in train.raster(scene, rng, tokenizer)])
        assert len(words) == scenes.GRID**2
        for label, word in zip(scene.labels().ravel(), words, strict=True):
            name = scenes.PATCH_WORDS[label]
            allowed = {name, *(scenes.CONCEPTS[name].parts if name in scenes.CONCEPTS else ())}
            pieces = {piece for w in allowed for piece in tokenizer.batch_decode([[i] for i in train._word_ids(tokenizer, w)])}
            wrong += word not in pieces
    assert 0.02 < wrong / 3000 < 0.08, "three patches in a hundred are wrong, and some of a few objects, the others true"


def test_the_end_to_end_contrast_is_made_by_the_same_command(tmp_path):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(["--out", str(tmp_path / "m"), "--work", str(tmp_path / "w"), "--recipe", "end-to-end"])
    assert args.recipe == "end-to-end"
    recipe = train.Recipe(kind="end-to-end", scenes=(8,) * 4, batches=(4,) * 4)
    train.train(args.out, args.work, recipe=recipe, device="cpu")
    assert sorted(p.stem for p in args.work.glob("*.pt")) == ["tuning", "vision"] and (args.out / "config.json").exists()


def gradient(trainer, dialogues, price, **doses):
    """Of the loss on two dialogues, of which the first reads a picture: of all weights behind the vision tower, in one piece."""
    trainer.recipe = replace(TINY, **(dict.fromkeys(train.DOSES, 0) | doses))
    return flat_gradient(trainer, trainer.text_loss(*dialogues, price))


def flat_gradient(trainer, loss):
    weights = list(trainer.trained("tuning").parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def same(one, other):
    return torch.linalg.norm(one - other) <= 1e-5 * torch.linalg.norm(other)


@pytest.fixture(scope="module")
def untrained():
    trainer = train.Trainer(TINY, torch.device("cpu"))
    read = trainer.steps("tuning")[0]
    return trainer, (read.rows[:2], [read.scenes[0].image])


def said(trainer, dialogues, monkeypatch):
    """The mean losses on answers and on image positions, and the three penalties on each, by hand."""
    ids, targets, kinds = train.pad(dialogues[0], trainer.device)
    seen = []
    model, penalties = trainer.llava.language_model, train.Watch.penalties
    handle = model.norm.register_forward_hook(lambda _, __, out: seen.append(out))
    monkeypatch.setattr(train.Watch, "penalties", lambda *args: seen.append(penalties(*args)) or seen[-1])
    trainer.recipe = TINY
    total = trainer.text_loss(*dialogues, 0.5)
    handle.remove()
    logp = trainer.model.lm_head(seen[0]).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return total, *(-logp[kinds == kind].mean() for kind in (train.ANSWER, train.RASTER)), *seen[1:]


def test_without_settings_the_loss_is_that_of_the_shipped_model(untrained, monkeypatch):
    total, answer, raster, at_answers, at_rasters = said(*untrained, monkeypatch)
    prices = 0.5 * (0.3 * at_answers[0] + 0.05 * at_answers[1]) + 0.1 * at_answers[2]
    prices += 0.5 * (0.09 * at_rasters[0] + 0.05 * at_rasters[1]) + 0.1 * at_rasters[2]
    torch.testing.assert_close(total, answer + 0.5 * raster + prices)
    assert train.Recipe(word_price=1, activity_price=1, negative_price=1, patch_words=1, gate="relu") == train.Recipe()
    assert untrained[0].model.config.text_config.hidden_act == "relu"


def test_without_its_terms_the_loss_is_that_of_the_answers(untrained, monkeypatch):
    trainer, dialogues = untrained
    answer = said(trainer, dialogues, monkeypatch)[1]
    assert same(gradient(trainer, dialogues, 0.5), flat_gradient(trainer, answer))


@pytest.mark.parametrize("dose", train.DOSES)
def test_a_dose_multiplies_its_term(untrained, dose):
    none, quarter, one = (gradient(*untrained, 0.5, **{dose: value}) for value in (0, 0.25, 1))
    assert torch.linalg.norm(one - none) > 1e-3 * torch.linalg.norm(none)
    assert torch.linalg.norm(quarter - none - (one - none) / 4) < 1e-3 * torch.linalg.norm(one - none)
    others = {name: 1 for name in train.DOSES if name != dose}
    assert torch.linalg.norm(
        gradient(*untrained, 0.5, **others, **{dose: 1}) - gradient(*untrained, 0.5, **others) - one + none
    ) < (1e-3 * torch.linalg.norm(one - none))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"word_price": -1}, "dose of the word price is a finite number of at least 0, not -1"),
        ({"patch_words": float("nan")}, "dose of the patch words is a finite number"),
        ({"activity_price": "1"}, "dose of the activity price is a finite number"),
        ({"kind": "end-to-end", "negative_price": 0}, "end to end has no negative price"),
        ({"gate": "gelu"}, "one of relu, silu, not 'gelu'"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(MmnError, match=message):
        train.Recipe(**settings)


def test_the_command_line_sets_what_shapes_the_neurons(monkeypatch):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    given = []
    monkeypatch.setattr(train, "train", lambda *_, **options: given.append(options["recipe"]))
    plain = ["--out", "m", "--work", "w"]
    doses = ["--word-price", "0.25", "--activity-price", "0", "--negative-price", "0.5", "--patch-words", "2", "--gate", "silu"]
    for words in (plain, plain + doses):
        train.run(parser.parse_args(words))
    shaped = train.Recipe(word_price=0.25, activity_price=0, negative_price=0.5, patch_words=2, gate="silu")
    assert given == [train.Recipe(), shaped]


def test_a_checkpoint_says_what_shaped_it(tmp_path):
    recipe = replace(TINY, gate="silu", word_price=0.25, patch_words=0)
    train.train(tmp_path / "m", tmp_path / "w", recipe=recipe, vision="tiny-llava", scale=0, device="cpu")
    train.train(tmp_path / "e", tmp_path / "v", recipe=train.Recipe(kind="end-to-end"), scale=0, device="cpu")
    vlm, shipped, other = mmn.load(tmp_path / "m"), mmn.load("tiny-llava"), AutoConfig.from_pretrained(tmp_path / "e")
    told = vlm.model.config.mmn_recipe
    expected = {"kind": "llava", "seed": 0, "gate": "silu", "scale": 0, "vision": shipped.hash, "batches": [4] * 4}
    expected |= {"word_price": 0.25, "activity_price": 1, "negative_price": 1, "patch_words": 0}
    assert expected.items() <= told.items()
    assert other.mmn_recipe["vision"] is None and not any(other.mmn_recipe[dose] for dose in train.DOSES)


def test_a_model_of_silu_gates_is_one_of_gated_neurons(tmp_path):
    train.train(tmp_path / "m", tmp_path / "w", recipe=replace(TINY, gate="silu"), scale=0, device="cpu")
    vlm = mmn.load(tmp_path / "m")
    inputs = vlm.inputs([scenes.draw(0).image], [scenes.PROMPT], [scenes.PREFIX])
    assert families.reconstructs(vlm.model, vlm.anatomy, inputs)
    layer, seen = vlm.model.model.language_model.layers[0].mlp, []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        layer.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        vlm.model(**inputs)
        gate = layer.gate_proj(seen[0])
        torch.testing.assert_close(seen[1], gate * gate.sigmoid() * layer.up_proj(seen[0]))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("vision", "message"), [("nobody", "There is no model 'nobody'"), ("another", "has no vision tower of the form")]
)
def test_a_vision_tower_that_does_not_fit_is_refused(tmp_path, monkeypatch, vision, message):
    if vision == "another":
        monkeypatch.setattr(train, "load", lambda _: tiny.vlm())
    with pytest.raises(MmnError, match=message):
        train.train(tmp_path / "m", tmp_path / "w", recipe=TINY, vision=vision, device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_finished_vision_tower_can_be_taken_over(checkpoint, tmp_path):
    recipe = train.Recipe(seed=1, scenes=(8,) * 4, batches=(4,) * 4)
    train.train(tmp_path / "m", tmp_path / "w", recipe=recipe, vision=checkpoint / "model", device="cpu")
    first, second = (AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (checkpoint / "model", tmp_path / "m"))
    same = {name.split(".")[1] for name in first if torch.equal(first[name], second[name])}
    assert "vision_tower" in same and all(torch.equal(v, second[n]) for n, v in first.items() if "vision_tower" in n)
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


@pytest.mark.parametrize("stage", train.STAGES)
def test_processes_beside_prepare_what_one_would_read(stage):
    steps = train.Trainer(TINY, torch.device("cpu")).steps(stage)
    alone, ahead = list(steps.ahead(1, 4, 0)), list(steps.ahead(1, 4, 2))
    assert len(alone) == len(ahead) == 3
    for one, other in zip(alone, ahead, strict=True):
        assert (one.rows, one.facts) == (other.rows, other.facts)
        assert one.rng.integers(1 << 30) == other.rng.integers(1 << 30)
        for a, b in zip(one.scenes, other.scenes, strict=True):
            assert a.names == b.names and np.array_equal(a.image, b.image)


def test_muon_in_float32_takes_the_step_of_muon():
    """Where the processor has no bfloat16: the same step to the few digits that bfloat16 has, and a gradient left as it was."""
    torch.manual_seed(0)
    start, gradient = torch.randn(24, 40), torch.randn(24, 40)
    moved = []
    for mode in (contextlib.nullcontext(), train._Float32()):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        with mode:
            torch.optim.Muon([weight], lr=0.1, weight_decay=0.0).step()
        assert torch.equal(weight.grad, gradient)
        moved.append(weight.detach() - start)
    assert not torch.equal(*moved)
    assert torch.linalg.norm(moved[0] - moved[1]) < 0.02 * torch.linalg.norm(moved[1])


@pytest.mark.parametrize("occupied", ["m/mine.txt", "m"])
def test_what_is_no_checkpoint_is_not_replaced_by_one(occupied, tmp_path):
    mine = tmp_path / occupied
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("keep")
    with pytest.raises(MmnError, match="holds no checkpoint"):
        train.train(tmp_path / "m", tmp_path / "w", scale=0, device="cpu")
    assert mine.read_text() == "keep" and not (tmp_path / "w").exists()


def test_a_checkpoint_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "README.md").write_text("mine")
    trainer = train.Trainer(TINY, torch.device("cpu"))
    with monkeypatch.context() as broken:
        broken.setattr(train.shutil, "copy2", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.export(trainer, tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_text() == "{}"
    train.export(trainer, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "README.md").read_text() == "mine" and (tmp_path / "m" / "model.safetensors").exists()


def test_scale_0_leaves_the_model_untrained(tmp_path):
    (tmp_path / "m").mkdir()
    train.train(tmp_path / "m", tmp_path / "w", scale=0, device="cpu")
    made = AutoModelForImageTextToText.from_pretrained(tmp_path / "m", dtype=torch.float32).state_dict()
    fresh = train.Trainer(train.Recipe(), torch.device("cpu")).model.state_dict()
    assert all(torch.equal(made[name], value.half().float()) for name, value in fresh.items())
