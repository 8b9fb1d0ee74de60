"""Loading, captioning and recording."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import mplug_owl2
import numpy as np
import pytest
import real
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import mmn
from mmn import editors, properties, scenes
from mmn.trace import Trace
from mmn.vlm import hash_files


def refusal(call, *args, **options) -> str:  # noqa: ANN001
    with pytest.raises(mmn.MmnError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400, text
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("checkpoint")
    model, processor = tiny.llava_parts()
    model.to(torch.float16).save_pretrained(where)
    processor.save_pretrained(where)
    return where


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------------------------- loading


def test_load_a_folder(folder: Path, capfd: pytest.CaptureFixture) -> None:
    vlm = mmn.load(folder)
    assert vlm.model.dtype == torch.float32 and vlm.tokenizer.padding_side == "left" and not vlm.model.training
    assert type(vlm.processor.image_processor).__name__.endswith("Pil")
    vlm.caption(tiny.pictures(1)[0])
    assert capfd.readouterr() == ("", ""), "nothing is printed"
    assert mmn.load(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    assert mmn.load(folder, dtype="auto").model.dtype == torch.float16
    assert mmn.load(folder, device_map="cpu").device.type == "cpu"


def test_hash_tells_weights_apart(folder: Path, copy: Path) -> None:
    assert mmn.load(folder).hash == mmn.load(copy).hash == mmn.load(copy, dtype="bfloat16").hash
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    weights[name].view(-1)[7] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert mmn.load(folder).hash != mmn.load(copy).hash
    one, other = tiny.llava_parts(), tiny.llava_parts()
    assert mmn.VLM(*one).hash == mmn.VLM(*other).hash
    other[0].lm_head.weight.data[3, 3] += 1e-3
    assert mmn.VLM(*one).hash != mmn.VLM(*other).hash


def test_each_column_of_a_large_file_is_read_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a power of two bytes, as of a down projection of 16,384 neurons in half precision: a column lies at the same place of every
    MiB, so that blocks at the same place of every MiB would miss it in all of them."""
    monkeypatch.setattr("mmn.vlm.WHOLE", 1 << 20)
    table = np.zeros((128, 1 << 15), np.uint8)  # 4 MiB
    hashes = set()
    for column in range(0, 1 << 15, 1 << 12):
        table[:, column] = 1
        table.tofile(tmp_path / "weights")
        hashes.add(hash_files([tmp_path / "weights"]))
    assert len(hashes) == 8


def test_a_tokenizer_without_a_token_to_pad_with() -> None:
    vlm, (model, processor) = tiny.vlm(), tiny.llava_parts()
    processor.tokenizer.pad_token = None
    prompts = ["Describe the image", "Describe the image in few words."]
    both = [one.caption(tiny.pictures(2), prompts, max_new_tokens=3) for one in (vlm, mmn.VLM(model, processor, "no pad"))]
    assert [t.text for t in both[0]] == [t.text for t in both[1]]


def test_a_template_that_only_the_tokenizer_has_is_used_where_it_keeps_the_picture() -> None:
    model, processor = tiny.llava_parts(template=None)
    processor.tokenizer.chat_template = tiny.TEMPLATE
    assert mmn.VLM(model, processor).chat("What?", "A") == tiny.vlm().chat("What?", "A")
    model, processor = tiny.llava_parts(template=None)
    plain = mmn.VLM(model, processor).chat("What?", "A")
    processor.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}{% endfor %}"
    assert mmn.VLM(model, processor).chat("What?", "A") == plain and processor.chat_template is None


def test_pictures_of_a_size_that_the_model_does_not_take() -> None:
    model, processor = tiny.llava_parts()
    processor.image_processor.size = processor.image_processor.crop_size = {"height": 48, "width": 48}
    assert "does not read pictures as its processor gives them" in refusal(mmn.VLM(model, processor).caption, tiny.pictures(1)[0])


def test_load_refuses(folder: Path, copy: Path, tmp_path: Path) -> None:
    assert "There is no model 'no-such'" in refusal(mmn.load, "no-such")
    assert "There is no model" in refusal(mmn.load, "/no/such/folder")
    assert "holds no checkpoint" in refusal(mmn.load, tmp_path)
    assert "is a file" in refusal(mmn.load, folder / "config.json")
    assert "no dtype" in refusal(mmn.load, folder, dtype="float31")
    assert "no dtype" in refusal(mmn.load, folder, dtype="nn")
    assert "no dtype" in refusal(mmn.load, folder, dtype=torch.float8_e4m3fn)
    assert "'meta' cannot be used (it holds no numbers)" in refusal(mmn.load, folder, device_map="meta")
    assert "There is no model 'aaa" in refusal(mmn.load, "a" * 280)
    if not torch.cuda.is_available():
        assert "cannot be used" in refusal(mmn.load, folder, device_map="cuda")
    (copy / "model.safetensors").rename(copy / "elsewhere")
    assert "no weights in safetensors" in refusal(mmn.load, copy)
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    assert "no weights in safetensors" in refusal(mmn.load, copy), "nothing is unpickled"
    (copy / "elsewhere").rename(copy / "model.safetensors")
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    assert "could not be loaded" in refusal(mmn.load, copy)


def test_load_refuses_a_part_of_a_model(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    gone = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    save_file({name: value for name, value in weights.items() if name != gone}, copy / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights" in refusal(mmn.load, copy)


def test_load_refuses_models_of_other_kinds(tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "words")
    assert "does not write text about pictures" in refusal(mmn.load, tmp_path / "words")
    T5Config().save_pretrained(tmp_path / "t5")
    assert "does not write text about pictures" in refusal(mmn.load, tmp_path / "t5")
    (tmp_path / "nonsense").mkdir()
    (tmp_path / "nonsense" / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    assert "could not be loaded" in refusal(mmn.load, tmp_path / "nonsense")
    from transformers import Florence2Config

    Florence2Config().save_pretrained(tmp_path / "both")
    assert "encoder-decoder" in refusal(mmn.load, tmp_path / "both")


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"])
def test_load_a_model_with_code_of_its_own(name: str, tmp_path: Path) -> None:
    """By whichever of transformers' names its checkpoint goes; nothing of it runs unless the reader says so."""
    folder = mplug_owl2.write(tmp_path / "own", tiny.tokenizer())
    config = json.loads((folder / "config.json").read_text())
    code = config["auto_map"].pop("AutoModelForCausalLM")
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": config["auto_map"] | {name: code}}))
    assert "contains custom code" in refusal(mmn.load, folder)
    assert "no processor of pictures and words together" in refusal(mmn.load, folder, trust_remote_code=True)
    processor = tiny.llava_parts()[1]
    processor.save_pretrained(folder)
    vlm = mmn.load(folder, trust_remote_code=True)
    assert type(vlm.model).__name__ == code.rpartition(".")[2] and vlm.anatomy.neurons == [24] * 3


def test_what_a_checkpoint_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found\nin your environment.")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", missing)
    assert "it needs torchvision, which is not installed" in refusal(mmn.load, folder)


def test_a_checkpoint_without_a_processor(copy: Path) -> None:
    (copy / "processor_config.json").unlink()
    assert "no processor of pictures and words together" in refusal(mmn.load, copy)


def test_models_of_other_kinds() -> None:
    processor = tiny.llava_parts()[1]
    both = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert "T5ForConditionalGeneration is an encoder-decoder" in refusal(mmn.VLM, both, processor)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    words = mmn.VLM(tiny.randomise(LlamaForCausalLM(LlamaConfig(vocab_size=len(processor.tokenizer), **size))), processor)
    assert "does not read pictures" in refusal(words.caption, tiny.pictures(1)[0], "hi")
    assert isinstance(words.answer("hi", max_new_tokens=2), str)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(value: float) -> None:
    model, processor = tiny.llava_parts()
    model.model.language_model.layers[1].mlp.down_proj.weight.data *= value
    assert "no finite numbers" in refusal(mmn.VLM, model, processor)


def test_no_tokenizer() -> None:
    model, processor = tiny.llava_parts()
    assert "no tokenizer" in refusal(mmn.VLM, model, processor.image_processor)


# ---------------------------------------------------------------------------------------------------------------- captioning


def same(one: Trace, other: Trace, bits: bool) -> None:
    """Two traces of one picture: bit-identical, or up to rounding."""
    assert one.text == other.text and one.tokens.tolist() == other.tokens.tolist()
    assert one.stream is not None and other.stream is not None
    pairs = [(one.logprobs, other.logprobs), (one.stream, other.stream), *zip(one.activations, other.activations, strict=True)]
    for a, b in pairs:
        if bits:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["bytes", "pieces"])
def test_the_same_call_twice_is_bit_identical(style: str) -> None:
    vlm = tiny.llava(style=style)
    image = tiny.pictures(1)[0]
    same(vlm.caption(image), vlm.caption(image), bits=True)
    for one, other in zip(vlm.caption([image] * 3), vlm.caption([image] * 3), strict=True):
        same(one, other, bits=True)


def test_batch_size_changes_nothing() -> None:
    vlm, images = tiny.vlm(), tiny.pictures(8)
    prompts = ["Describe the image in few words. " * (n % 3 + 1) for n in range(8)]  # rows of other lengths: padding
    alone = vlm.caption(images, prompts, batch_size=1)
    together = vlm.caption(images, prompts, batch_size=8)
    for one, other in zip(alone, together, strict=True):
        same(one, other, bits=False)
        for noun in one.nouns:
            first, second = (torch.cat(mmn.contributions(vlm, trace, noun)) for trace in (one, other))
            assert (first - second).abs().max() <= 1e-4 * first.abs().max()
            ranks = [mmn.rank(vlm, trace, noun, k=10) for trace in (one, other)]
            for a, b, x, y in zip(ranks[0].neurons, ranks[1].neurons, ranks[0].scores, ranks[1].scores, strict=True):
                assert a == b or abs(x - y) <= 1e-4 * first.abs().max()


def test_a_trace_is_what_the_model_does() -> None:
    """Tokens, probabilities and activations against a plain forward pass over prompt and caption at once."""
    vlm = tiny.vlm()
    for image in tiny.pictures(3):
        trace = vlm.caption(image, max_new_tokens=12)
        seen: dict[int, torch.Tensor] = {}
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i, seen=seen: seen.__setitem__(i, args[0][0]))
            for i, layer in enumerate(vlm.model.model.language_model.layers)
        ]
        with torch.no_grad():
            steps = len(trace.tokens)
            out = vlm.model(**vlm.replay(trace, steps - 1))
        for handle in handles:
            handle.remove()
        logprobs = out.logits[0, -steps:].log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == trace.tokens.tolist()
        torch.testing.assert_close(logprobs.max(-1).values, trace.logprobs, rtol=1e-4, atol=1e-5)
        assert len(trace.activations) == 3
        for i, activations in enumerate(trace.activations):
            assert activations.shape == (steps, 24) and activations.dtype == torch.float32
            torch.testing.assert_close(seen[i][-steps:], activations, rtol=1e-4, atol=1e-5)


def test_a_kept_trace_keeps_nothing_of_its_batch() -> None:
    """Each tensor has memory of its own, and a pickle gives the same activations."""
    vlm = tiny.vlm()
    images = tiny.pictures(8)
    alone, together = vlm.caption(images[:1], max_new_tokens=12)[0], vlm.caption(images, max_new_tokens=12)[0]
    again = properties.reread(vlm, alone, images, record=True).trace(0)
    assert again.logprobs.untyped_storage().nbytes() == again.logprobs.nbytes
    tensors = [together.tokens, together.logprobs, together.stream, *together.record]
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in tensors)
    for trace in (alone, together, again):
        bare = replace(trace, tokenizer=None, lexicon=None, image=None)
        assert all(map(torch.equal, pickle.loads(pickle.dumps(bare)).activations, bare.activations))


def hooks(vlm: mmn.VLM) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in vlm.model.modules()]


def test_recording_leaves_nothing_behind() -> None:
    vlm = tiny.vlm()
    image = tiny.pictures(1)[0]
    quiet = vlm.caption(image, record=False)
    before = hooks(vlm)  # transformers leaves some of its own at the first use
    loud = vlm.caption(image)
    assert quiet.text == loud.text and quiet.activations == [] and quiet.stream is None
    with pytest.raises(mmn.MmnError, match="record=False"):
        quiet.at([0])
    assert hooks(vlm) == before
    kept = sum(each.numel() for each in loud.activations)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in (*loud.activations, *loud.record)}
    assert sum(storages.values()) == kept * 4, "no more is kept than what was asked"


def test_layers_that_words_alone_do_not_run_are_silent() -> None:
    """Mllama leaves out its layers of cross-attention where there is no picture, at every step or none."""
    vlm = real.vlm("mllama")
    pictured, trace = vlm.caption(tiny.pictures(1)[0], max_new_tokens=3), vlm.caption(None, max_new_tokens=3)
    seen: dict[int, torch.Tensor] = {}
    handles = [
        ffn.projection.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0][0]}))
        for layer, ffn in enumerate(vlm.anatomy.ffns)
    ]
    vlm.model(**vlm.replay(trace, len(trace.tokens) - 1))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(trace.activations) - 1
    for layer, activations in enumerate(trace.activations):
        if layer in seen:
            torch.testing.assert_close(activations, seen[layer][-len(activations) :], rtol=1e-4, atol=1e-5)
        else:
            assert not activations.any() and pictured.activations[layer].any()


def test_ends_at_the_end_mark() -> None:
    model, processor = tiny.llava_parts()
    model.lm_head.weight.data[2] = 10 * model.lm_head.weight.data.mean(0)  # the end mark, likely or not
    vlm = mmn.VLM(model, processor, lexicon=tiny.every_word)
    for trace in vlm.caption(tiny.pictures(4), max_new_tokens=6):
        assert 2 not in trace.tokens.tolist() and (trace.ended or len(trace.tokens) == 6)
        assert "</s>" not in trace.text


def test_ends_at_once() -> None:
    """A model that says nothing gives a caption of the prefix alone."""
    model, processor = tiny.llava_parts()
    model.model.language_model.norm.weight.data[:] = 0
    model.lm_head.weight.data[:] = 0
    model.lm_head = torch.nn.Linear(16, model.lm_head.out_features, bias=True)
    model.lm_head.weight.data[:] = 0
    model.lm_head.bias.data[:] = torch.eye(model.lm_head.out_features)[2]
    trace = mmn.VLM(model, processor).caption(tiny.pictures(1)[0])
    assert trace.ended and trace.text == mmn.PREFIX and trace.nouns == [] and trace.tokens.shape == (0,)
    assert mmn.rank(mmn.VLM(model, processor), trace, k=1) == {}
    assert trace.recorded and [each.shape for each in trace.activations] == [(0, 24)] * 3
    assert not mmn.VLM(model, processor).caption(tiny.pictures(1)[0], record=False).recorded


def test_text_without_a_picture() -> None:
    vlm = tiny.vlm()
    trace = vlm.caption(None, "Describe", "")
    assert trace.image is None and isinstance(vlm.answer("Describe"), str)
    assert len(vlm.caption([None, None], ["a", "b c d"], "", batch_size=2)) == 2
    assert "no picture" in refusal(mmn.heatmap, vlm, trace, [mmn.Neuron(0, 0)])
    assert "Either every item" in refusal(vlm.caption, [None, tiny.pictures(1)[0]])


def test_caption_refuses() -> None:
    vlm, image = tiny.vlm(), tiny.pictures(1)[0]
    assert "no pictures" in refusal(vlm.caption, [])
    assert "PIL image, not str" in refusal(vlm.caption, ["dog.jpg"])
    assert "PIL image, not int" in refusal(vlm.caption, 5)
    assert "PIL image, not PosixPath" in refusal(vlm.caption, Path("dog.jpg"))
    assert "prompt is text, not 5" in refusal(vlm.caption, image, 5)
    assert "prefix is text, not None" in refusal(vlm.caption, image, prefix=None)
    for option in ("max_new_tokens", "batch_size"):
        for value in (0, -1, 1.5, True):
            assert option in refusal(vlm.caption, image, **{option: value})
    assert "2 pictures and 3 of prompt" in refusal(vlm.caption, [image] * 2, ["a", "b", "c"])
    assert "prompt is text" in refusal(vlm.caption, [image], [1])
    assert "at most 256" in refusal(vlm.caption, image, "a " * 400)
    assert "refuses" in refusal(vlm.caption, image, "<image> twice")


def test_pictures_are_taken_as_open_image_gives_them(tmp_path: Path) -> None:
    """16 bits, an alpha channel, a palette, and a photo that its EXIF data turns."""
    noise = np.random.default_rng(0).integers(0, 65536, (40, 30))
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = [
        Image.fromarray(noise.astype(np.uint16)), Image.fromarray(np.dstack([noise % 256] * 4).astype(np.uint8), "RGBA"),
        tiny.pictures(1)[0].convert("P"), tiny.pictures(1, size=(40, 30))[0],
    ]  # fmt: skip
    for number, picture in enumerate(pictures):
        file = tmp_path / f"{number}.png"
        picture.save(file, exif=turned if number == 3 else None)
        opened, trace = mmn.open_image(file), tiny.vlm().caption(Image.open(file), max_new_tokens=2)
        assert trace.image is not None and trace.image.size == opened.size
        assert trace.image.tobytes() == opened.tobytes(), file
        same(trace, tiny.vlm().caption(opened, max_new_tokens=2), bits=True)


def test_pictures_without_pixels_are_refused(tmp_path: Path) -> None:
    tiny.pictures(1)[0].save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    assert "damaged or cut short" in refusal(tiny.vlm().caption, Image.open(tmp_path / "cut.jpg"))
    assert "0 x 5 pixels" in refusal(tiny.vlm().caption, Image.new("RGB", (0, 5)))


def test_without_a_chat_template() -> None:
    vlm = mmn.VLM(*tiny.llava_parts(template=None), lexicon=tiny.every_word)
    assert vlm.chat("Describe.", "An image of").endswith("Describe. An image of")
    assert vlm.caption(tiny.pictures(1)[0], max_new_tokens=3).text.startswith("An image of")


OWN = "{{ raise_exception('Only Latin is spoken here') }}"
PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}</s>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (OWN, "Only Latin is spoken here"),
        ("{% for m in messages %}{% if m['content'] is string %}{{ m['content'] + 1 }}{% endif %}{% endfor %}" + OWN, "Only Latin"),
        ("{% for m in messages %}{{ m['content'] + '' }}{% endfor %}" + OWN, "Only Latin is spoken here"),
        ("{{ messages[0].content.no.such }}", "has no attribute 'no'"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_refuses_is_quoted(template: str, reason: str) -> None:
    """And not what goes wrong when the conversation is then put another way."""
    told = refusal(mmn.VLM(*tiny.llava_parts(template=template)).caption, tiny.pictures(1)[0])
    assert "chat template refuses this conversation" in told and reason in told


def test_a_template_that_wants_a_picture() -> None:
    """A caption has one: the end of an answer, looked up in words alone, must not say that there is none."""
    wants = "{% if messages[0]['content'][0]['type'] != 'image' %}{{ raise_exception('Show a picture') }}{% endif %}"
    one, other = (mmn.VLM(*tiny.llava_parts(template=more + PARTS)) for more in (wants, ""))
    image = tiny.pictures(1)[0]
    assert one.caption(image, max_new_tokens=3).text == other.caption(image, max_new_tokens=3).text
    assert one.end_tokens == other.end_tokens == {2}
    assert "Show a picture" in refusal(one.answer, "hello")


def test_beginning_mark_once() -> None:
    """The tokenizer adds the mark, or the template does, but never both."""
    for template in (tiny.TEMPLATE, "<s>" + tiny.TEMPLATE):
        vlm = mmn.VLM(*tiny.llava_parts(template=template))
        ids = vlm.inputs(tiny.pictures(1), [mmn.PROMPT], [mmn.PREFIX])["input_ids"][0].tolist()
        assert ids[0] == 1 and ids.count(1) == 1


def test_beams_are_not_recorded() -> None:
    """Rows of a batch are then beams, not pictures."""
    vlm = tiny.vlm()
    with editors.decoding(vlm, num_beams=3):
        with pytest.raises(mmn.MmnError, match="record=False"):
            vlm.caption(tiny.pictures(2), max_new_tokens=3)
        traces = vlm.caption(tiny.pictures(2), max_new_tokens=3, record=False)
        assert traces[1].text == vlm.caption(tiny.pictures(2)[1], max_new_tokens=3, record=False).text
    assert all(trace.logprobs.isnan().all() and len(trace.logprobs) == len(trace.tokens) for trace in traces)


def test_a_models_own_prompt_is_asked_unless_another_is_given() -> None:
    vlm = mmn.load("tiny-llava", prompt="Describe the picture.")
    image = scenes.draw(0).image
    assert vlm.caption(image).prompt == "Describe the picture."
    other = vlm.caption(image, mmn.PROMPT)
    assert other.prompt == mmn.PROMPT and other.text == mmn.load("tiny-llava").caption(image).text
    with pytest.raises(mmn.MmnError, match="prompt is text, not 3"):
        mmn.load("tiny-llava", prompt=3)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmn.vlm.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(mmn.MmnError, match="The device 'cuda' cannot be used"):
        mmn.load("tiny-llava", device_map="cuda")
