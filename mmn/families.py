"""Does the toolkit hold on every family of vision-language models that the installed transformers builds?

For each family in transformers' own list a tiny model is built from its configuration class, every parameter and scalar buffer
is made random (default initialisation hides errors: gains of 1, biases and gates of 0), and the checks below are run, offline.
Nothing here or in mmn.anatomy asks for a model's class; what is keyed by family is only how its configuration is made small.
What was found is kept in a table, which `mmn families` prints: mmn.family_table.
"""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmn.anatomy import Anatomy, find, is_linear, is_norm
from mmn.errors import MmnError
from mmn.family_table import Row
from mmn.ffn import FFN, Experts, Mixture, Neuron, parts
from mmn.hooks import hooked
from mmn.tree import overlooked
from mmn.vlm import quiet

FAMILIES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
IMAGE, WORDS = 3, 320
MOST = 40  # image tokens tried
LARGEST = 30e6  # parameters of a model that counts as small
# What makes a configuration small, wherever it has the setting.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "word_embed_proj_dim", "projection_dim", "mm_hidden_size"), 32),
    **dict.fromkeys(("encoder_hidden_size", "out_hidden_size", "text_hidden_size", "hidden_dim", "output_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "layers", "n_layers"), 3),
    **dict.fromkeys(("depth", "encoder_layers", "decoder_layers", "num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), WORDS),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "moe_shared_expert_intermediate_size": 16,
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("image_token_id", "image_token_index", "image_patch_id"), IMAGE),
    "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 512, "image_size": 32, "patch_size": 8, "num_query_tokens": 4,
    "n_group": 1, "topk_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "video_token_id": 4,
    "video_token_index": 4, "audio_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7, "image_start_token_id": 6,
    "image_end_token_id": 7, "logit_scale": 0.5, "final_logit_softcapping": 2.0, "block_auto_adjust_ff_dim": False,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "embedding_multiplier": 1.5, "residual_multiplier": 0.7,
    "logits_scaling": 2.0, "attn_logit_softcapping": 2.0, "attention_multiplier": 0.4, "routed_scaling_factor": 1.7,
    "moe_router_scaling_factor": 1.7, "first_k_dense_replace": 1, "top_k_experts": 2, "sliding_window": 6, "index_topk": 64,
    "index_head_dim": 8, "index_n_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
# What a family needs beside that: its own checks of its configuration, and rotary sections that fit small heads.
EXTRA: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config": {"rope_parameters": MROPE}}
        for name in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "qwen2_5_omni_thinker", "hunyuan_vl")
    },
    **{
        name: {"text_config": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}}
        for name in ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga")
    },
    **dict.fromkeys(("gemma4", "gemma4_unified", "diffusion_gemma"), {"vision_config": {"pooling_kernel_size": 2}}),
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4, "vision_config": {"patch_embed_hidden_size": 192}},
    **dict.fromkeys(
        ("unlimited_ocr", "deepseek_ocr2"),
        {
            "vision_config": {
                "sam_config": {
                    "image_size": 32,
                    "patch_size": 4,
                    "output_channels": 32,
                    "mlp_dim": 48,
                    "window_size": 4,
                    "downsample_channels": [32, 32],
                    "global_attn_indexes": [1],
                    "mlp_ratio": 1.5,
                },
                "encoder_config": {"max_position_embeddings": 64, "num_key_value_heads": 4},
            },
            "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
        },
    ),
    "llama4": {
        "vision_config": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128},
        "text_config": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
    },
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}}},
    "mistral4": {"head_dim": 16, "num_key_value_heads": 4},
    "mistral_large4": {"text_config": {"num_key_value_heads": 4}},
    "step3p7": {"text_config": {"num_key_value_heads": 4, "share_expert_dim": 16, "num_sliding_attention_heads": 4}},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}, "moe_intermediate_size": [16, 16]}
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0}},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0], [-2, 1]],
        "spatial_target_layers": [2],
        "image_grid_pinpoints": [[32, 64], [64, 32]],
        "vision_config": {"hidden_size": 64},
        "qformer_config": {"hidden_size": 64},
    },
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 32], "depths": [1, 1, 1, 1]},
        "text_config": {"moe_hidden_size": 16},
        "projector_hidden_size": 32,
        "out_hidden_size": 128,
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2, "max_img_size": 64}, "vision_hidden_size": 32},
    "dots3_note": {
        "text_config": {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "per_layer_config": {},
            "shared_experts_intermediate_size": 16,
            "rope_parameters": None,
        },
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": {}},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "num_key_value_heads": 4, "downsample_hidden_size": 8},
    },
    "chameleon": {
        "vocabulary_map": {"<image>": IMAGE} | {f"IMGIMG{chr(65 + i)}Z": 30 + i for i in range(8)},
        "vq_config": {
            "base_channels": 32,
            "num_embeddings": 8,
            "channel_multiplier": [1, 1],
            "latent_channels": 32,
            "resolution": 32,
        },
    },
    "emu3": {
        "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 29} | {f"<|visual token {i:06}|>": 30 + i for i in range(8)},
        "vq_config": {"base_channels": 32, "codebook_size": 8, "channel_multiplier": [1, 1, 1, 1], "num_attention_heads": 1},
    },
    "janus": {
        "vision_config": {"num_image_tokens": 16},
        "vq_config": {
            "base_channels": 32,
            "num_embeddings": 8,
            "channel_multiplier": [1, 1],
            "latent_channels": 32,
            "image_token_embed_dim": 32,
        },
    },
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [2, 1]},
        "vision_config": {"num_position_embeddings": 16, "image_size": [32, 32], "num_key_value_heads": 4},
    },
    "granite_docling": {"vision_config": {"out_hidden_size": 32}},
    "idefics": {"vision_config": {"embed_dim": 32}, "cross_layer_interval": 1},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
            "num_global_layers": 1,
        },
    },
    **dict.fromkeys(("gemma3", "shieldgemma2"), {"mm_tokens_per_image": 4}),
    "instructblipvideo": {"video_token_index": IMAGE},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "kimi_k25": {"projection_hidden_size": 32, "text_config": {"num_key_value_heads": 4, "head_dim": 8}},
    "idefics2": {"perceiver_config": {"resampler_n_latents": 4}},
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), {"image_grid_pinpoints": [[32, 64], [64, 32]]}),
}
ENCODER_DECODER = "an encoder-decoder: an encoder reads the picture, and no image token stands in the decoder's stream"
LEFT_OUT = {
    "blip": "between stream and unembedding stand one more map and a GELU, so that no neuron adds to the logits",
    "diffusion_gemma": "it writes blocks of text by denoising them, so that no one step produces a token",
    "ernie4_5_vl_moe": (
        "words and picture go through routed experts of their own, which receive their rows without the positions, so that no "
        "activation of theirs can be told by position"
    ),
    "evolla": "it reads proteins, not pictures",
    "git": "it sets the picture in front of the prompt by itself, so that no token of the prompt stands for it",
    "hunyuan_vl": "its positions number the pictures of a whole batch, so that what it reads depends on the batch's other rows",
    "inkling2": "each layer reads a learned mixture of all that earlier ones wrote, so that there is no one stream to add to",
    "muse_spark": "a norm stands behind each routed expert, so that its neurons add to nothing one by one",
    "pi0": "it gives a robot's movements, not text",
    "qwen4_exp": "what runs between its layers is several vectors a position, mixed at each layer",
}


# ------------------------------------------------------------------------------------------------------------- tiny models


def small(config: PreTrainedConfig, extra: dict[str, Any]) -> PreTrainedConfig:
    """The same kind of configuration, a few numbers wide."""
    given: dict[str, Any] = {}
    for key in config.sub_configs or {}:
        part = getattr(config, key, None)
        part = config.sub_configs[key]() if part is None and key in extra else part
        if isinstance(part, PreTrainedConfig):
            given[key] = small(part, extra.get(key, {})).to_dict()
    has = config.to_dict()
    given |= {key: value for key, value in SMALL.items() if key in has and not isinstance(has[key], (list, tuple, dict))}
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(has.get(key), list) and isinstance(has.get("num_hidden_layers"), int):  # every kind of layer once
            kinds = list(dict.fromkeys(has[key]))
            given[key] = [kinds[i % len(kinds)] for i in range(SMALL["num_hidden_layers"])]
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(has.get(key), dict):
            given[key] = _sections(has[key])
    return type(config)(**given | {key: value for key, value in extra.items() if key not in given or key not in config.sub_configs})


def _sections(rope: dict[str, Any]) -> dict[str, Any]:
    found = {key: _sections(value) if isinstance(value, dict) else value for key, value in rope.items()}
    return found | ({"mrope_section": [2, 1, 1]} if "mrope_section" in found else {})


def build(family: str) -> Any:
    """A tiny random model of a family. Raises MmnError if it is left out, an encoder-decoder, or cannot be made small."""
    if family in LEFT_OUT:
        raise MmnError(LEFT_OUT[family])
    config = CONFIG_MAPPING[family]()
    if config.is_encoder_decoder:
        raise MmnError(ENCODER_DECODER)
    try:
        config = small(config, EXTRA.get(family, {}))
        kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        kind = kind[0] if isinstance(kind, tuple) else kind
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
        if size > LARGEST:
            raise MmnError(f"not made small yet: {size / 1e6:.0f} million parameters")
        model = kind._from_config(config)
    except MmnError:
        raise
    except ImportError as error:
        package = re.search(r"requires the (\S+) library", str(error))
        raise MmnError(f"it is built with {package.group(1) if package else 'a package'}, which is not installed") from error
    except Exception as error:
        raise MmnError(f"not built yet: {type(error).__name__}: {_line(error)}") from error
    return randomised(model.eval().requires_grad_(False))


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter and scalar buffer random: gains around 1, the rest around 0."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw) * 0.2
        parameter.data = (noise + 1 if parameter.ndim == 1 and "bias" not in name else noise).to(parameter.dtype)
    for buffer in model.buffers():
        if buffer.numel() == 1 and buffer.is_floating_point():
            buffer.fill_(float(torch.rand((), generator=draw)) + 0.5)
    return model


# ------------------------------------------------------------------------------------------------------------------ inputs


def words(count: int = 1, length: int = 7, seed: int = 0) -> Tensor:
    """Token ids int64 `[count, length]` without special ones."""
    return torch.randint(20, WORDS - 20, (count, length), generator=torch.Generator().manual_seed(seed))


def with_picture(model: Any) -> dict[str, Tensor]:
    """Inputs of a prompt with one picture. Forms of pixels and numbers of image tokens are tried until the model takes them.

    Raises MmnError if none will do."""
    reasons: list[str] = []
    names = tuple(inspect.signature(model.forward).parameters)
    if "pixel_values" not in names and "flattened_patches" not in names:
        raise MmnError("reads no pictures: its forward takes no pixel_values")
    for pixels in _pixels(model, names):
        taken: list[dict[str, Tensor]] = []
        counts, told = list(range(1, MOST)), False
        while counts:
            count = counts.pop(0)
            ids = torch.cat([words(1, 2), torch.full((1, count), IMAGE), words(1, 4, seed=1)], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
            for name in ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask"):
                if name in names:
                    inputs[name] = (ids == IMAGE).long()
            for name, shape in (("cross_attention_mask", (1, 4)), ("image_attention_mask", (1,))):  # every word sees all
                if name in names:
                    inputs[name] = torch.ones(*ids.shape, *shape, dtype=torch.long)
            if "position_ids" in names and "rope_deltas" not in names and "mm_token_type_ids" not in names:
                inputs["position_ids"] = torch.arange(ids.shape[1])[None]
            try:
                logits(model, inputs)
                taken.append(inputs)
                if count == MOST - 1 and not told:
                    counts = list(range(MOST, 5 * MOST))
            except Exception as error:
                if taken:
                    break
                reasons.append(f"{type(error).__name__}: {_line(error)}")
                if not told and (found := re.search(r"features: (\d+)", str(error))):  # the model says how many, or their numbers
                    counts, told = [int(found.group(1)) // 32, int(found.group(1))], True
        if taken:
            # The most that it takes is as many as it fills; a model that takes any number has no such tokens.
            return taken[-1] if len(taken) < 5 * MOST - 1 else taken[0]
    raise MmnError(f"no picture could be given: {'; '.join(dict.fromkeys(reasons))[:160]}")


def _pixels(model: Any, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Forms that processors give pictures: flat patches with a grid, one picture, tiles of one."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    if "image_grid_thw" in names or "image_grid_hws" in names:
        for width, side in itertools.product((3 * 2 * 64, 3 * 64, 3 * 2 * 196, 3 * 2 * 256, 3 * 256), (4,)):
            grid = {"image_grid_thw": torch.tensor([[1, side, side]])}
            yield {"pixel_values": noise(side * side, width), **grid}
            if "image_merge_sizes" in names:
                yield {"pixel_values": noise(side * side, width), **grid, "image_merge_sizes": torch.tensor([1])}
        for patch in (8, 14, 16):
            yield {"pixel_values": noise(1, 16, 3, patch, patch), **grid}
            yield {"pixel_values": noise(16, 3, patch, patch), **grid}
    if "flattened_patches" in names:  # each with its row and column
        places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float()[None]
        yield {"flattened_patches": torch.cat([places, noise(1, 16, 192)], -1)}
        return
    if "image_grid_hw" in names:
        yield {"pixel_values": noise(16, 192), "image_grid_hw": torch.tensor([[4, 4]])}
    beside: list[dict[str, Tensor]] = [{}]
    if "image_sizes" in names:
        beside.append({"image_sizes": torch.tensor([[32, 32]])})
    if "qformer_input_ids" in names:
        beside = [{"qformer_input_ids": words(1, 3)}]
    if "high_res_pixel_values" in names:
        beside = [{"high_res_pixel_values": noise(1, 3, 64, 64)}, {"high_res_pixel_values": noise(1, 3, 32, 32)}]
    if "spatial_shapes" in names:
        beside = [{"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64)}]
    if "aspect_ratio_ids" in names:
        mask = torch.ones(1, 1, 4, dtype=torch.int64)
        beside = [{"aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64), "aspect_ratio_mask": mask}]
    if "target_sizes" in names:
        beside = [{"target_sizes": torch.tensor([[4, 4]])}]
    if "image_position_ids" in names:  # patches with their places
        beside = [{"image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)[None]}]
    if "image_token_pooling" in names:  # patches, and which of them make up each token
        pooled = torch.arange(16).reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
        beside = [
            {"image_token_pooling": pooled, "image_grids": torch.tensor([[2, 2, 0, 0]]), "image_num_crops": torch.tensor([1])}
        ]
    if "tile_fine_mask" in names:
        beside = [{"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}]
    shapes = [(1, 3, 32, 32), (1, 1, 3, 32, 32), *((1, tiles, 3, 32, 32) for tiles in (2, 3, 4, 5)), (1, 1, 4, 3, 32, 32)]
    shapes += [(1, 3, 64, 64), (1, 1, 3, 64, 64), (1, 16, 192), (1, 16, 768), (16, 192), (1, 3, 8, 128), (4, 2, 8, 8, 3)]
    for shape in shapes:
        for more in beside:
            yield {"pixel_values": noise(*shape), **more}


# ------------------------------------------------------------------------------------------------------------------ checks


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree to a ten-thousandth of the largest number."""
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1e-9))


def check(family: str) -> Row:
    """Build a family's tiny model and run every check."""
    row = Row(family)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models that are a few numbers wide
            _check(row)
        failed = [name for name, held in row.checks.items() if not held]
        row.conforms = not failed
        row.reason = f"fails: {', '.join(failed)}" if failed else ""
    except MmnError as error:
        row.reason = str(error)
    except Exception as error:  # a check that cannot be run is one that does not hold
        row.reason = f"{type(error).__name__}: {_line(error)}"
    return row


def _check(row: Row) -> None:
    model = build(row.family)
    anatomy = find(model)
    row.neurons = anatomy.total
    inputs = with_picture(model)
    row.checks["experts"] = not overlooked(anatomy)
    row.checks["ffn"] = reconstructs(model, anatomy, inputs)
    row.checks["sum"] = adds_up(model, anatomy, inputs)
    row.checks["zero"] = zeroes(model, anatomy, inputs)
    row.checks["undo"] = undoes(model, anatomy, inputs)
    row.image_tokens, row.checks["picture"] = sees(model, anatomy, inputs)
    row.checks["batch"] = batches(model, anatomy, inputs)
    row.checks["bf16"] = bool(logits(halved(model), {k: _half(v) for k, v in inputs.items()}).isfinite().all())


def _half(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def halved(model: Any) -> Any:
    """The model in bfloat16 as `from_pretrained` would load it: what the family keeps in float32 stays so."""
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    model.to(torch.bfloat16)
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() and any(re.search(rf"(^|\.){part}($|\.)", name) for part in kept):
            value.data = value.data.float()
    return model


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits `[batch, positions, vocabulary]`."""
    return model(**inputs, use_cache=False).logits


def activations(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Each layer's activations `[batch, positions, neurons]`."""
    seen: list[Tensor] = []
    with hooked(ffn.watch(lambda a: seen.append(a.clone())) for ffn in anatomy.ffns):
        logits(model, inputs)
    return seen


def sides(anatomy: Anatomy) -> list[FFN]:
    """The FFNs that have neurons, those side by side in a layer apart."""
    return [part for ffn in anatomy.ffns if ffn.neurons for part in parts(ffn)]


@contextmanager
def rewritten(ffn: FFN, units: Sequence[int], changes: Tensor) -> Iterator[None]:
    """With `changes` `[units, hidden]` added to the writes of some neurons in the weights themselves."""
    kept = {name: value.clone() for name, value in ffn.projection.state_dict().items()}
    every = [(ffn, range(len(units)), units)]
    for part, places, own in ffn.within(units) if isinstance(ffn, Mixture) else every:
        index, more = torch.tensor(own), changes[list(places)].to(changes.dtype)
        if isinstance(part, Experts):
            part.weight[index // part.width, :, index % part.width] += more
        else:
            part.columns[:, index] += more.T
    try:
        yield
    finally:
        ffn.projection.load_state_dict(kept)


def reconstructs(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor]) -> bool:
    """The sum of the neurons' writes, by `read` and `write`, is what each FFN's last weights give: its output less what it gives
    when they are zero."""
    token = anatomy.words([25])
    held = []
    for part in sides(anatomy):
        seen: list[Tensor] = []
        given: list[Tensor] = []
        watch = part.watch(lambda a, seen=seen: seen.append(a.flatten(0, -2)))  # type: ignore[misc]
        keep = part.projection.register_forward_hook(lambda _, __, out, given=given: given.append(out.flatten(0, -2)))
        every = list(range(part.neurons))
        with hooked([watch, keep]):
            logits(model, inputs)
            with rewritten(part, every, -part.write(every)):
                logits(model, inputs)
        whole = (given[0] - given[-1]).unflatten(0, (-1, len(seen[0]))).sum(0)  # experts given apart are added up later
        held.append(close(seen[0] @ part.write(every), whole))
        held.append(close((seen[0] * part.read(token)[0]).sum(-1), whole @ token[0]))
    return bool(held) and all(held)


def zeroes(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor]) -> bool:
    """Zeroing activations by hook is zeroing columns of weights, and it changes what the model says."""
    plain = logits(model, inputs)
    held = []
    for ffn in anatomy.ffns:
        if not ffn.neurons:
            continue
        units = list(range(0, ffn.neurons, 3))

        def change(a: Tensor, units: list[int] = units) -> Tensor:
            a = a.clone()
            a[..., units] = 0
            return a

        with hooked([ffn.watch(change)]):
            silent = logits(model, inputs)
        with rewritten(ffn, units, -ffn.write(units)):
            weighed = logits(model, inputs)
        held.append(close(silent, weighed) and not torch.equal(silent, plain))
    return bool(held) and all(held) and torch.equal(logits(model, inputs), plain)


def undoes(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor]) -> bool:
    """An edit, in the weights and by hook, does the same, and nothing is left of it."""
    from mmn.edit import Edit
    from mmn.vlm import VLM

    vlm = VLM.__new__(VLM)
    vlm.model, vlm.anatomy, vlm.name, vlm.hash = model, anatomy, "", ""
    layer = next(i for i, ffn in enumerate(anatomy.ffns) if ffn.neurons)
    ffn = anatomy.ffns[layer]
    # Of routed experts, neurons that fire for these words.
    fires = activations(model, anatomy, inputs)[layer].flatten(0, -2).abs().sum(0)
    units = sorted(fires.topk(3).indices.tolist())
    changes = torch.randn(3, anatomy.unembedding.in_features, generator=torch.Generator().manual_seed(0))
    edit = Edit([Neuron(layer, unit) for unit in units], changes, "", "a", "b")
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, logits(model, inputs)
    with edit.applied(vlm, "weights") if ffn.plain else rewritten(ffn, units, changes):
        weighed = logits(model, inputs)
    with edit.applied(vlm, "hook"):
        by_hook = logits(model, inputs)
    same = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return close(by_hook, weighed) and not torch.equal(weighed, plain) and same and torch.equal(logits(model, inputs), plain)


def sees(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor]) -> tuple[int, bool]:
    """The positions whose embeddings change with the picture are those of the image token; without such positions (the model sees
    through cross-attention) the embeddings stay and the logits change."""

    def embedded(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args[0] if args else kwargs["hidden_states"]).clone())

        with hooked([anatomy.layers[0].register_forward_pre_hook(hook, with_kwargs=True)]):
            said = logits(model, given)
        return kept[0], said

    name = next(key for key in inputs if key in ("pixel_values", "flattened_patches"))
    one, first = embedded(inputs)
    if one.ndim != 3 or one.shape[-1] != anatomy.unembedding.in_features:
        raise MmnError(f"what runs between its layers is not one vector a position but {' x '.join(map(str, one.shape[1:]))}")
    if one.shape[:2] != inputs["input_ids"].shape:
        return 0, False
    moved, changed = torch.zeros(one.shape[:2], dtype=torch.bool), False
    # Several, since a model that turns a picture into a few codes may give two of them the same one.
    for picture in (inputs[name].flip(-1) + 0.5, -inputs[name], inputs[name].roll(1, -1), inputs[name] * 2, inputs[name].flip(-2)):
        if name == "flattened_patches":  # which begin with their places
            picture[..., :2] = inputs[name][..., :2]
        other, second = embedded(inputs | {name: picture})
        moved, changed = moved | (one != other).any(-1), changed or not torch.equal(first, second)
    marked = inputs.get("image_embeds_position_mask", anatomy.image_positions(inputs["input_ids"])).bool()
    if not moved.any() or (moved.all() and not marked.any()):  # it attends to the picture from its layers, or before the first
        return 0, changed
    # Around a picture and at the ends of its rows some models put learned marks that no picture changes, under the token's id.
    marks = one[marked & ~moved]
    return int(moved.sum()), len(marks.unique(dim=0)) <= 3 and bool((marked | ~moved).all())


def batches(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor]) -> bool:
    """A left-padded batch of two prompts of other lengths gives each the activations and logits it has alone.

    Where the pictures of a batch are not stacked but laid side by side, which only a family's processor knows how to do, the
    prompts are words alone."""
    try:
        return _batches(model, anatomy, inputs)
    except Exception:
        ids = words(1, 6)
        return _batches(model, anatomy, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _batches(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor]) -> bool:
    ids = inputs["input_ids"]
    longer, rows = {}, {}
    for name, value in inputs.items():
        if value.shape[:2] == ids.shape:
            more = words(1, 3, seed=5) if name == "input_ids" else value[:, -3:]
            more = value[:, -1:] + torch.arange(1, 4) if name == "position_ids" else more
            longer[name] = torch.cat([value, more], 1)
            pad = value[:, :1] * 0
            rows[name] = torch.cat([torch.cat([pad, pad, pad, value], 1), longer[name]])
        else:
            longer[name] = value
            rows[name] = torch.cat([value, value])
    together = logits(model, rows)
    wide = activations(model, anatomy, rows)
    held = []
    for row, alone in enumerate((inputs, longer)):
        held.append(close(together[row, -1], logits(model, alone)[0, -1]))
        pairs = zip(wide, activations(model, anatomy, alone), strict=True)
        held += [close(a[row, -1], b[0, -1]) for a, b in pairs if a.shape[-1]]
    return all(held)


def adds_up(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor]) -> bool:
    """The neurons and everything else that writes to the stream add up to the logits before scaling and capping.

    Every map's output is cut off from what came before, and every norm is replaced by the linear map that it is with its scale
    frozen; what reaches the unembedding is then a sum over the maps' outputs, the embeddings and the norms' biases, each times
    its gradient. A map's output is its neurons' writes and its bias."""
    leaves: dict[nn.Module, Tensor] = {}
    received: dict[nn.Module, tuple[Tensor, ...]] = {}
    constants: list[Tensor] = []
    hidden = anatomy.unembedding.in_features

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return None
        if out.shape[-1] != hidden:  # no writer to the stream but, where it meets one, a gate
            return out.detach()
        received[module] = (*args, *kwargs.values())
        leaves[module] = out.detach().requires_grad_()
        return leaves[module].clone(memory_format=torch.contiguous_format)

    def freeze(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x = args[0]
        zero = module(torch.zeros_like(x)).detach()
        shifted = x + 1
        flat = (module.forward(shifted) - out).abs().max() < 1e-3 * out.abs().max()
        x = x - x.mean(-1, keepdim=True) if flat else x
        base = x.detach()
        ratio = torch.where(base.abs() > 1e-12, (out.detach() - zero) / base, torch.zeros_like(base))
        bias = zero.clone().requires_grad_()
        constants.append(bias)
        return (x * ratio + bias).contiguous()

    handles = []
    for module in model.modules():
        if is_linear(module) or isinstance(module, nn.Embedding) or any(len(shape) == 3 for _, shape in _own(module)):
            handles.append(module.register_forward_hook(cut, with_kwargs=True))
        elif is_norm(module, hidden):
            handles.append(module.register_forward_hook(_once(freeze)))
    target: list[Tensor] = []
    handles.append(anatomy.unembedding.register_forward_pre_hook(lambda _, args: target.append(args[0])))
    entry: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = args[0] if args else kwargs["hidden_states"]
        entry.append(x.detach().requires_grad_())
        fresh = entry[0].clone()
        return ((fresh, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": fresh})

    handles.append(anatomy.layers[0].register_forward_pre_hook(enter, with_kwargs=True))
    with hooked(handles), torch.enable_grad():
        model(**inputs, use_cache=False)
    logit = target[0][0, -1].float() @ anatomy.unembedding.weight[25].float()
    sources = [*leaves.values(), *constants, entry[0]]
    gradients = dict(zip(map(id, sources), torch.autograd.grad(logit, sources, allow_unused=True), strict=True))
    total = torch.zeros(())
    own = {part.projection: part for part in sides(anatomy)}
    for part in sources:
        gradient = gradients[id(part)]
        if gradient is None:
            continue
        module = next((m for m, leaf in leaves.items() if leaf is part), None)
        if module is not None and module in own:
            ffn, given = own[module], [each.detach() for each in received[module]]
            writes = ffn.write(range(ffn.neurons))
            gradient = gradient.flatten(0, -2)
            if isinstance(ffn, Experts):
                a, bias = ffn.activations(*given), ffn.called(0 * ffn.weight[0], *given)
            else:
                a, bias = given[0].flatten(0, -2), ffn.projection.bias if ffn.projection.bias is not None else torch.zeros(hidden)
            total = total + (a * (gradient[: len(a)] @ writes.T)).sum() + (gradient * bias).sum()
        else:
            total = total + (gradient * part.detach()).sum()
    return bool((total - logit).abs() <= 1e-3 * max(1.0, float(logit.detach().abs())))


def _own(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False)]


def _once(hook: Any) -> Any:
    """A hook that does not answer to calls from within itself."""
    inside = [False]

    def guarded(*args: Any) -> Any:
        if inside[0]:
            return None
        inside[0] = True
        try:
            return hook(*args)
        finally:
            inside[0] = False

    return guarded


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
