"""Published sizes of InternVL3 and its parts.

Sources: InternVL3 paper, Tab. 1; InternVL2.5 paper, Tab. 1 (encoders); config.json of the released checkpoints and of
the Qwen2.5 and InternLM3 base models. Head and embedding are not tied in any size, also where the Qwen base ties them.
"""

from internvl_megatron.config.schema import LanguageConfig, ModelConfig, VisionConfig

INTERNVIT_300M = VisionConfig(hidden_size=1024, num_layers=24, num_heads=16, ffn_hidden_size=4096)
"""InternViT-300M-448px-V2.5, the encoder of InternVL3 1B to 14B."""

INTERNVIT_6B = VisionConfig(
    hidden_size=3200,
    num_layers=45,
    num_heads=25,
    ffn_hidden_size=12800,
    norm="rms_norm",
    qkv_bias=False,
    qk_norm=True,
)
"""InternViT-6B-448px-V2.5, the encoder of InternVL3 38B and 78B."""

INTERNVL_VOCAB_SIZE = 151674
"""Qwen2.5's tokenizer has 151665 tokens; InternVL adds nine and cuts the table to them."""


def _qwen(
    num_layers: int, hidden: int, num_heads: int, num_kv_heads: int, ffn: int, head_size: int = 128
) -> LanguageConfig:
    return LanguageConfig(
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        ffn_hidden_size=ffn,
        vocab_size=INTERNVL_VOCAB_SIZE,
    )


QWEN2_5_0_5B = _qwen(24, 896, 14, 2, 4864, head_size=64)
QWEN2_5_1_5B = _qwen(28, 1536, 12, 2, 8960)
QWEN2_5_7B = _qwen(28, 3584, 28, 4, 18944)
QWEN2_5_14B = _qwen(48, 5120, 40, 8, 13824)
QWEN2_5_32B = _qwen(64, 5120, 40, 8, 27648)
QWEN2_5_72B = _qwen(80, 8192, 64, 8, 29568)

INTERNLM3_8B = LanguageConfig(
    family="internlm",
    hidden_size=4096,
    num_layers=48,
    num_heads=32,
    num_kv_heads=2,
    head_size=128,
    ffn_hidden_size=10240,
    vocab_size=128512,
    rope_theta=5e7,
    norm_eps=1e-5,
    qkv_bias=False,
)
"""InternLM3-8B. The vocabulary is that of the base model: what the released InternVL3-9B has was never published, and
is read from its config.json when it is converted; a run that starts from it says `model.language.vocab_size=...`."""

INTERNVL3: dict[str, ModelConfig] = {
    "1B": ModelConfig(vision=INTERNVIT_300M, language=QWEN2_5_0_5B),
    "2B": ModelConfig(vision=INTERNVIT_300M, language=QWEN2_5_1_5B),
    "8B": ModelConfig(vision=INTERNVIT_300M, language=QWEN2_5_7B),
    "9B": ModelConfig(vision=INTERNVIT_300M, language=INTERNLM3_8B),
    "14B": ModelConfig(vision=INTERNVIT_300M, language=QWEN2_5_14B),
    "38B": ModelConfig(vision=INTERNVIT_6B, language=QWEN2_5_32B),
    "78B": ModelConfig(vision=INTERNVIT_6B, language=QWEN2_5_72B),
}
"""InternVL3 by its published size."""
