"""mPLUG-Owl2 in miniature, after its paper (arXiv 2311.04257) and its release: what makes it unlike the models of transformers.

A picture is one mark in the prompt, id -200, which the model itself replaces by what the visual abstractor makes of the picture: a
fixed number of learned queries and an end mark. Language and vision share the decoder, but each has norms and key and value
projections of its own (modality-adaptive modules); queries, the attention's output and the FFN are shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv

from .configuration_mplug_owl2 import MPLUGOwl2Config

IMAGE_TOKEN_INDEX = -200


# ------------------------------------------------------------------------------------------------------------- what is seen


class VisionLayer(nn.Module):
    """A pre-norm layer of the vision tower; queries, keys and values come from one map."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.query_key_value(self.input_layernorm(x)).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2)
        x = x + self.dense(scaled_dot_product_attention(*mixed.unbind(-2)).transpose(1, 2).flatten(2))
        inner = self.fc1(self.post_attention_layernorm(x))
        return x + self.fc2(inner * torch.sigmoid(1.702 * inner))


class VisionModel(nn.Module):
    """Patches, positions and layers of a CLIP-like vision tower without a class token."""

    def __init__(self, visual: dict[str, int]):
        super().__init__()
        width, patches = visual["hidden_size"], (visual["image_size"] // visual["patch_size"]) ** 2
        self.patch_embed = nn.Conv2d(3, width, visual["patch_size"], visual["patch_size"], bias=False)
        self.position_embedding = nn.Parameter(torch.randn(patches, width))
        self.pre_layernorm, self.post_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList([VisionLayer(width, visual["heads"]) for _ in range(visual["layers"])])

    def forward(self, images: Tensor) -> Tensor:
        x = self.pre_layernorm(self.patch_embed(images).flatten(2).transpose(1, 2) + self.position_embedding)
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


class AbstractorLayer(nn.Module):
    """The queries read themselves and the picture; then a gated FFN."""

    def __init__(self, width: int, heads: int, queries: int, patches: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.normk, self.norm2, self.ffn_ln = (nn.LayerNorm(width) for _ in range(4))
        self.query, self.key, self.value, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.w1, self.w2, self.w3 = (nn.Linear(width, width) for _ in range(3))
        self.register_buffer("q_pos_embed", positions(queries, width))
        self.register_buffer("k_pos_embed", positions(patches, width))

    def forward(self, queries: Tensor, picture: Tensor) -> Tensor:
        queries = self.norm1(queries)
        both = torch.cat([queries, self.normk(picture)], 1)
        where = torch.cat([self.q_pos_embed, self.k_pos_embed])
        read = self.query(queries + self.q_pos_embed), self.key(both + where), self.value(both)
        heads = [each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in read]
        queries = queries + self.out_proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        inner = self.norm2(queries)
        return queries + self.w2(self.ffn_ln(silu(self.w1(inner)) * self.w3(inner)))


def positions(count: int, width: int) -> Tensor:
    """Sines and cosines of positions, `[count, width]`."""
    angles = torch.arange(count)[:, None] / 10_000 ** (torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


class VisualAbstractor(nn.Module):
    """Any number of patches becomes `queries` vectors of the decoder's width, and an end mark."""

    def __init__(self, visual: dict[str, int], hidden: int):
        super().__init__()
        width, queries = visual["hidden_size"], visual["queries"]
        patches = (visual["image_size"] // visual["patch_size"]) ** 2
        layers = range(visual["layers"])
        self.layers = nn.ModuleList([AbstractorLayer(width, visual["heads"], queries, patches) for _ in layers])
        self.visual_fc = nn.Linear(width, hidden)
        self.query_embeds = nn.Parameter(torch.randn(1, queries, width))
        self.vit_eos = nn.Parameter(torch.randn(1, 1, hidden))

    def forward(self, picture: Tensor) -> Tensor:
        queries = self.query_embeds.expand(len(picture), -1, -1)
        for layer in self.layers:
            queries = layer(queries, picture)
        return torch.cat([self.visual_fc(queries), self.vit_eos.expand(len(picture), -1, -1)], 1)


# ------------------------------------------------------------------------------------------------------------- what is said


class MultiwayNetwork(nn.Module):
    """One module for the positions of words, another for those of pictures."""

    def __init__(self, words: nn.Module, pictures: nn.Module):
        super().__init__()
        self.multiway = nn.ModuleList([words, pictures])

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        words, pictures = (way(x) for way in self.multiway)
        return torch.where(modality[..., None], pictures, words)


class Attention(nn.Module):
    """Llama's, with keys and values of the position's own modality."""

    def __init__(self, config: MPLUGOwl2Config, layer: int):
        super().__init__()
        hidden, self.layer, self.size = config.hidden_size, layer, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        wide, narrow = config.num_attention_heads * self.size, config.num_key_value_heads * self.size
        self.q_proj, self.o_proj = nn.Linear(hidden, wide, bias=False), nn.Linear(wide, hidden, bias=False)
        self.k_proj, self.v_proj = (
            MultiwayNetwork(nn.Linear(hidden, narrow, bias=False), nn.Linear(hidden, narrow, bias=False)) for _ in range(2)
        )

    def forward(self, x: Tensor, modality: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        parts = self.q_proj(x), self.k_proj(x, modality), self.v_proj(x, modality)
        queries, keys, values = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        keys, values = repeat_kv(keys, self.groups), repeat_kv(values, self.groups)
        return self.o_proj(scaled_dot_product_attention(queries, keys, values, mask).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Llama's, with norms of the position's own modality."""

    def __init__(self, config: MPLUGOwl2Config, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), LlamaMLP(config)
        self.input_layernorm, self.post_attention_layernorm = (
            MultiwayNetwork(*(LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))) for _ in range(2)
        )

    def forward(self, hidden_states: Tensor, modality: Tensor, *given: Any) -> Tensor:
        x = hidden_states
        x = x + self.self_attn(self.input_layernorm(x, modality), modality, *given)
        return x + self.mlp(self.post_attention_layernorm(x, modality))


class MPLUGOwl2PreTrainedModel(PreTrainedModel):
    """What transformers asks of a model."""

    config_class = MPLUGOwl2Config
    base_model_prefix = "model"


class MPLUGOwl2LlamaModel(MPLUGOwl2PreTrainedModel):
    """The decoder, and the visual parts that feed it."""

    def __init__(self, config: MPLUGOwl2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.vision_model = VisionModel(config.visual_config)
        self.visual_abstractor = VisualAbstractor(config.visual_config, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        modality_indicators: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> BaseModelOutputWithPast:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = DynamicCache() if past_key_values is None and use_cache else past_key_values
        read = 0 if cache is None else cache.get_seq_length()
        places = read + torch.arange(x.shape[1], device=x.device)
        modality = torch.zeros_like(x[..., 0], dtype=torch.bool) if modality_indicators is None else modality_indicators
        before = torch.arange(read + x.shape[1], device=x.device)
        mask = (before <= places[:, None])[None, None]
        if attention_mask is not None:  # padding reads itself, so that its softmax is over something
            mask = mask & attention_mask.bool()[:, None, None] | (before == places[:, None])
        rotary = self.rotary_emb(x, places[None])
        for layer in self.layers:
            x = layer(x, modality, mask, rotary, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)


class MPLUGOwl2LlamaForCausalLM(MPLUGOwl2PreTrainedModel, GenerationMixin):
    """The decoder, and the unembedding."""

    def __init__(self, config: MPLUGOwl2Config):
        super().__init__(config)
        self.model = MPLUGOwl2LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def encode_images(self, images: Tensor) -> Tensor:
        """What the decoder reads of pictures, `[pictures, queries + 1, hidden]`."""
        return self.model.visual_abstractor(self.model.vision_model(images))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | None = None,
        use_cache: bool = True,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        modality = None
        if inputs_embeds is None and input_ids is not None:
            marks = input_ids == IMAGE_TOKEN_INDEX
            inputs_embeds = self.model.embed_tokens(input_ids.masked_fill(marks, 0))
            if images is not None and marks.any():
                seen = self.encode_images(images)
                times = 1 + marks * (seen.shape[1] - 1)
                modality = spread(marks, times)
                inputs_embeds = spread(inputs_embeds, times).masked_scatter(modality[..., None], seen.to(inputs_embeds.dtype))
                if attention_mask is not None and attention_mask.shape == marks.shape:
                    attention_mask = spread(attention_mask, times)
        out = self.model(
            inputs_embeds=inputs_embeds,
            modality_indicators=modality,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, images: Any = None, **_: Any
    ) -> dict[str, Any]:
        """What one step of generation reads; behind the first, the mask is as long as the stream, not as the prompt."""
        given = {"past_key_values": past_key_values, "use_cache": True}
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            return given | {"input_ids": input_ids, "attention_mask": attention_mask, "images": images}
        if attention_mask is not None:
            queries = self.config.visual_config["queries"]
            attention_mask = spread(attention_mask, 1 + (input_ids == IMAGE_TOKEN_INDEX) * queries)
        return given | {"input_ids": input_ids[:, -1:], "attention_mask": attention_mask}


def spread(rows: Tensor, times: Tensor) -> Tensor:
    """Each entry of each row as many times as it is told to; every row must come out as long."""
    return torch.stack([row.repeat_interleave(count, 0) for row, count in zip(rows, times, strict=True)])
