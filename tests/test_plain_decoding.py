"""Captions are decoded greedily, whatever a checkpoint's generation_config.json sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import real
import tiny
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, WatermarkingConfig

import mmn
from mmn import editors

STEPS = 8
WORDS = list(range(9, 300))  # most of the vocabulary
SETTINGS: dict[str, Any] = {
    "max_length": 3, "max_new_tokens": 2, "min_length": 200, "min_new_tokens": STEPS, "early_stopping": True,
    "max_time": 1e-9, "stop_strings": ["a", "e"], "do_sample": True, "num_beams": 3, "use_mtp": True,
    "use_cache": False, "cache_implementation": "static", "cache_config": {"batch_size": 1}, "max_cache_len": 4,
    "temperature": 5.0, "top_k": 5, "top_p": 0.5, "min_p": 0.5, "top_h": 0.5, "typical_p": 0.5,
    "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0,
    "length_penalty": 5.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[word] for word in WORDS],
    "renormalize_logits": True, "forced_bos_token_id": 9, "forced_eos_token_id": 9, "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 99.0), "suppress_tokens": WORDS, "begin_suppress_tokens": WORDS,
    "sequence_bias": [[[word], -99.0] for word in WORDS], "token_healing": True, "guidance_scale": 9.0,
    "watermarking_config": WatermarkingConfig(bias=99.0), "num_return_sequences": 2, "output_attentions": True,
    "output_hidden_states": True, "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
    "pad_token_id": 7, "bos_token_id": 7, "encoder_no_repeat_ngram_size": 1, "decoder_start_token_id": 7,
    "is_assistant": True, "num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2,
    "assistant_early_exit": 1, "assistant_lookbehind": 3, "target_lookbehind": 3, "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash", "compile_config": CompileConfig(), "disable_compile": True,
    "continuous_batching_config": ContinuousBatchingConfig(), "low_memory": True, "penalty_alpha": 0.6,
    "dola_layers": "high", "diversity_penalty": 9.0, "num_beam_groups": 3, "constraints": [9],
    "force_words_ids": [[9]], "prefill_chunk_size": 4, "an_entry_of_its_own": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def vlm() -> mmn.VLM:
    """A model that ends some captions early, so that settings of length show."""
    model, processor = tiny.llava_parts()
    tiny.randomise(model, 4)
    said = mmn.VLM(model, processor).caption(tiny.pictures(1)[0], max_new_tokens=STEPS).tokens
    model.lm_head.weight.data[2] = model.lm_head.weight.data[said[3]] * 1.01
    return mmn.VLM(model, processor, lexicon=tiny.every_letter)


def by_hand(vlm: mmn.VLM, image: Any, ends: set[int]) -> tuple[list[int], list[float]]:
    """The likeliest tokens one by one and their log probabilities, each from a forward pass of its own."""
    inputs = vlm.inputs([image], [mmn.PROMPT], [mmn.PREFIX])
    tokens: list[int] = []
    logprobs: list[float] = []
    with torch.no_grad():
        for _ in range(STEPS):
            found = vlm.model(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)
            token = int(found.argmax())
            if token in ends:
                break
            tokens.append(token)
            logprobs.append(float(found[token]))
            for name, more in (("input_ids", token), ("attention_mask", 1)):
                inputs[name] = torch.cat([inputs[name], torch.tensor([[more]])], 1)
    return tokens, logprobs


@pytest.fixture(scope="module")
def right(vlm: mmn.VLM) -> list[tuple[list[int], list[float]]]:
    found = [by_hand(vlm, image, {2}) for image in tiny.pictures(3)]
    assert len(found[0][0]) == 3 and len({len(tokens) for tokens, _ in found}) > 1
    return found


def test_every_setting_is_tried() -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - set(SETTINGS) == {"eos_token_id", "transformers_version"}, "give each new setting a value above"


@pytest.mark.parametrize("name", [*SETTINGS, ""])
def test_captions_are_plain_whatever_the_checkpoint_sets(
    vlm: mmn.VLM, right: list[tuple[list[int], list[float]]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = vlm.model.generation_config
    if name:
        monkeypatch.setattr(own, name, SETTINGS[name], raising=False)
    traces = vlm.caption(tiny.pictures(3), max_new_tokens=STEPS)
    for trace, (tokens, logprobs) in zip(traces, right, strict=True):
        assert trace.tokens.tolist() == tokens and trace.ended == (len(tokens) < STEPS)
        torch.testing.assert_close(trace.logprobs, torch.tensor(logprobs), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            again = vlm.model(**vlm.replay(trace, len(tokens) - 1)).logits[0, -len(tokens) :].log_softmax(-1)
        torch.testing.assert_close(trace.logprobs, again.max(-1).values, rtol=1e-4, atol=1e-5)
        assert len(trace.record or []) == len(tokens) == len(trace.logprobs)
    assert vlm.model.generation_config is own, "and the model keeps its settings"
    assert not name or getattr(own, name) is SETTINGS[name]


def test_the_token_that_ends_an_answer_is_the_checkpoints(vlm: mmn.VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tiny.pictures(3)[2]
    last = by_hand(vlm, image, {2})[0][3]
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [2, last])
    trace = vlm.caption(image, max_new_tokens=STEPS)
    assert trace.ended and trace.tokens.tolist() == by_hand(vlm, image, {2, last})[0]


@pytest.mark.parametrize("name", ["length_penalty", "early_stopping", "bad_words_ids", "repetition_penalty", "num_beams"])
def test_other_decoding_is_what_is_asked_for_and_no_more(vlm: mmn.VLM, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> list[list[int]]:
        with editors.decoding(vlm, num_beams=2):
            traces = vlm.caption(tiny.pictures(3), max_new_tokens=STEPS, record=False)
        return [trace.tokens.tolist() for trace in traces]

    before = said()
    monkeypatch.setattr(vlm.model.generation_config, name, SETTINGS[name])
    assert said() == before
    with editors.decoding(vlm, suppress_tokens=before[0][:1]):
        assert before[0][0] not in vlm.caption(tiny.pictures(1)[0], max_new_tokens=STEPS).tokens.tolist()


def test_settings_of_a_model_within_the_model_do_not_count_either() -> None:
    """BLIP-2 hands decoding on to its language model, which has settings of its own."""
    vlm = real.vlm("blip-2")
    plain = vlm.caption(tiny.pictures(1)[0], max_new_tokens=4)
    vlm.model.language_model.generation_config.suppress_tokens = plain.tokens[:1].tolist()
    assert vlm.caption(tiny.pictures(1)[0], max_new_tokens=4).tokens.tolist() == plain.tokens.tolist()


def test_settings_on_disk(vlm: mmn.VLM, right: list[tuple[list[int], list[float]]], tmp_path: Path) -> None:
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    settings = {name: SETTINGS[name] for name in ("suppress_tokens", "sequence_bias", "stop_strings", "penalty_alpha")}
    GenerationConfig(eos_token_id=2, **settings).save_pretrained(tmp_path)
    loaded = mmn.load(tmp_path, lexicon=tiny.every_letter)
    assert loaded.model.generation_config.suppress_tokens == WORDS
    assert loaded.caption(tiny.pictures(1)[0], max_new_tokens=STEPS).tokens.tolist() == right[0][0]


def test_an_interrupted_caption_leaves_the_settings_there(vlm: mmn.VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    own = vlm.model.generation_config
    monkeypatch.setattr(vlm.model.lm_head, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        vlm.caption(tiny.pictures(1)[0])
    assert vlm.model.generation_config is own
