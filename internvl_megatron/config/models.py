"""Published sizes of the model parts."""

from internvl_megatron.config.schema import LanguageConfig, ModelConfig, VisionConfig

INTERNVIT_300M = VisionConfig(hidden_size=1024, num_layers=24, num_heads=16, ffn_hidden_size=4096)
"""InternViT-300M-448px-V2.5, the encoder of InternVL3 1B to 14B (InternVL2.5 paper, Tab. 1)."""

QWEN2_5_0_5B = LanguageConfig(
    hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, head_size=64, ffn_hidden_size=4864, vocab_size=151674
)
"""Qwen2.5-0.5B with InternVL's vocabulary: 151665 tokens of the tokenizer and nine of InternVL's."""

INTERNVL3_1B = ModelConfig(vision=INTERNVIT_300M, language=QWEN2_5_0_5B)
"""InternVL3-1B (InternVL3 paper, Tab. 1); head and embedding are not tied in any size."""
