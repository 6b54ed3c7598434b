"""Tensors of OpenGVLab's layout, written down from its published code: names and shapes, independent of the package."""

from internvl_megatron.config.schema import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def internvl_chat_shapes(model: ModelConfig) -> Shapes:
    """All tensors of an `InternVLChatModel`."""
    return (
        _vision(model)
        | _projector(model)
        | (_internlm2(model) if model.language.family == "internlm" else _qwen2(model))
    )


def _vision(model: ModelConfig) -> Shapes:
    vision = model.vision
    width, ffn, patch = vision.hidden_size, vision.ffn_hidden_size, vision.patch_pixels
    top = "vision_model.embeddings"
    shapes: Shapes = {
        f"{top}.class_embedding": (1, 1, width),
        f"{top}.patch_embedding.weight": (width, 3, patch, patch),
        f"{top}.patch_embedding.bias": (width,),
        f"{top}.position_embedding": (1, 1 + (vision.tile_pixels // patch) ** 2, width),
    }
    for number in range(vision.num_layers):
        layer = f"vision_model.encoder.layers.{number}"
        shapes |= {
            f"{layer}.attn.qkv.weight": (3 * width, width),
            f"{layer}.attn.proj.weight": (width, width),
            f"{layer}.attn.proj.bias": (width,),
            f"{layer}.mlp.fc1.weight": (ffn, width),
            f"{layer}.mlp.fc1.bias": (ffn,),
            f"{layer}.mlp.fc2.weight": (width, ffn),
            f"{layer}.mlp.fc2.bias": (width,),
            f"{layer}.norm1.weight": (width,),
            f"{layer}.norm2.weight": (width,),
            f"{layer}.ls1": (width,),
            f"{layer}.ls2": (width,),
        }
        if vision.norm == "layer_norm":  # the 300M family
            shapes |= {f"{layer}.attn.qkv.bias": (3 * width,)}
            shapes |= {f"{layer}.norm1.bias": (width,), f"{layer}.norm2.bias": (width,)}
        else:
            shapes |= {f"{layer}.attn.q_norm.weight": (width,), f"{layer}.attn.k_norm.weight": (width,)}
    return shapes


def _projector(model: ModelConfig) -> Shapes:
    shuffled, width = 4 * model.vision.hidden_size, model.language.hidden_size
    return {
        "mlp1.0.weight": (shuffled,),
        "mlp1.0.bias": (shuffled,),
        "mlp1.1.weight": (width, shuffled),
        "mlp1.1.bias": (width,),
        "mlp1.3.weight": (width, width),
        "mlp1.3.bias": (width,),
    }


def _qwen2(model: ModelConfig) -> Shapes:
    language = model.language
    width, vocab, ffn = language.hidden_size, language.vocab_size, language.ffn_hidden_size
    heads, groups = language.num_heads * language.head_size, language.num_kv_heads * language.head_size
    top = "language_model.model"
    shapes: Shapes = {
        f"{top}.embed_tokens.weight": (vocab, width),
        f"{top}.norm.weight": (width,),
        "language_model.lm_head.weight": (vocab, width),
    }
    for number in range(language.num_layers):
        layer = f"{top}.layers.{number}"
        for part, rows in (("q", heads), ("k", groups), ("v", groups)):
            shapes |= {
                f"{layer}.self_attn.{part}_proj.weight": (rows, width),
                f"{layer}.self_attn.{part}_proj.bias": (rows,),
            }
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (width, heads),
            f"{layer}.mlp.gate_proj.weight": (ffn, width),
            f"{layer}.mlp.up_proj.weight": (ffn, width),
            f"{layer}.mlp.down_proj.weight": (width, ffn),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return shapes


def _internlm2(model: ModelConfig) -> Shapes:
    language = model.language
    width, vocab, ffn = language.hidden_size, language.vocab_size, language.ffn_hidden_size
    heads, groups = language.num_heads * language.head_size, language.num_kv_heads * language.head_size
    top = "language_model.model"
    shapes: Shapes = {
        f"{top}.tok_embeddings.weight": (vocab, width),
        f"{top}.norm.weight": (width,),
        "language_model.output.weight": (vocab, width),
    }
    for number in range(language.num_layers):
        layer = f"{top}.layers.{number}"
        shapes |= {
            f"{layer}.attention.wqkv.weight": (heads + 2 * groups, width),
            f"{layer}.attention.wo.weight": (width, heads),
            f"{layer}.feed_forward.w1.weight": (ffn, width),
            f"{layer}.feed_forward.w3.weight": (ffn, width),
            f"{layer}.feed_forward.w2.weight": (width, ffn),
            f"{layer}.attention_norm.weight": (width,),
            f"{layer}.ffn_norm.weight": (width,),
        }
    return shapes
