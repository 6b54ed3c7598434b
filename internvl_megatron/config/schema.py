"""Every setting of a run, once. Frozen: what a run was started with is what it uses; derived numbers live in `RunPlan`.

Names carry their units (`_tokens`, `_pixels`, `_steps`); `num_` counts things; `None` means off.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """InternViT (spec: InternVL `configuration_intern_vit.py`; InternVL2.5 paper, Tab. 1)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_hidden_size: int
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """`layer_norm` (with bias) in the 300M family, `rms_norm` in the 6B family."""
    qkv_bias: bool = True
    qk_norm: bool = False
    """RMSNorm over the whole query and key vectors, before the split into heads (6B family)."""
    norm_eps: float = 1e-6
    tile_pixels: int = 448
    """Side of the square tile the encoder reads."""
    patch_pixels: int = 14
    shuffle_factor: int = 2
    """Pixel (un)shuffle: `shuffle_factor`^2 neighbouring patches become one token of the language model."""
    layer_scale_init: float = 0.1
    drop_path_rate: float = 0.0
    """Stochastic depth of the last layer; grows linearly from 0 over the layers."""

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_pixels // self.patch_pixels

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens one tile gives to the language model (256 for every released InternVL3)."""
        return (self.patches_per_side // self.shuffle_factor) ** 2


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Qwen2-style decoder. `vocab_size` is the tokenizer's length; the padded table size is derived in `plan`."""

    family: Literal["qwen2", "internlm"] = "qwen2"
    """Whose model it is: decides the names and files of a converted checkpoint, nothing that is computed. InternVL3-9B is
    `internlm`: InternLM3, stored by InternVL under InternLM2's names."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_hidden_size: int
    vocab_size: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = True


VOCAB_MULTIPLE = 512
"""The embedding table is padded to this multiple whatever the tensor-parallel size, so checkpoints fit every layout."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding table and of the output layer."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The three parts of InternVL3: vision encoder, projector (two-layer MLP) and language model."""

    vision: VisionConfig
    language: LanguageConfig
    projector_norm_eps: float = 1e-5
    """1e-5, unlike every other norm of the model (`mlp1` uses torch's LayerNorm default)."""
    init_std: float = 0.02
    """Standard deviation of freshly initialised weight matrices."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the language model is sharded, and how the vision encoder uses the same ranks. Data parallelism is what is left."""

    tensor_size: int = 1
    pipeline_size: int = 1
    virtual_size: int = 1
    """Model chunks a pipeline rank holds (interleaved schedule): 1 = one run of layers per rank. With more, the stages a
    row passes are `virtual_size` times as many and the bubble shrinks; micro-batches come in multiples of
    `pipeline_size`."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of every stage in the order rows pass them, `pipeline_size` x `virtual_size` numbers; None = the same number in
    each. Fewer in the last make room for the output layer."""
    context_size: int = 1
    """Split every row into this many parts along the sequence (context parallelism). Attention trades parts for heads by
    all-to-all (Ulysses), so the heads of a tensor-parallel rank must divide; key/value heads are repeated where they are
    fewer."""
    context_ring_size: int = 1
    """Of the `context_size` ranks, those over which every sample is divided by itself and which gather each other's keys and
    values, instead of trading parts for heads; the others still trade. For more ranks than heads go around. Samples are
    padded to `data.sample_multiple_tokens`, a multiple of twice this number."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel blocks along the sequence (Megatron SP); needs `tensor_size` > 1."""
    pad_rows: bool = True
    """Compute every row at its full token budget. False cuts the padding off, at the price of a message about the length
    between pipeline stages before every row."""
    vision_placement: Literal["all_ranks", "first_stage", "colocated"] = "all_ranks"
    """Who encodes tiles: all ranks, ahead of the language model (the decoupled schedule). The others are what other trainers
    do, for comparison: the ranks of the first pipeline stage, row by row inside the pipeline; or the ranks of the language
    model's tensor-parallel groups together, each replica its own tiles (no pipeline, no context parallelism)."""
    vision_tensor_size: int = 1
    """Ranks that encode a tile together (tensor parallelism of the vision encoder). Tiles cost the same and never see each
    other, so sharing tiles out is always better; this is here to compare with."""
    vision_sharding: Literal["replicated", "sharded"] = "replicated"
    """`replicated`: every rank has all parameters of the vision side and a part of its optimizer state (ZeRO-1), right for the
    300M encoder. `sharded`: every rank has a part of the parameters too and gathers them layer by layer (ZeRO-3 by
    torch's FSDP2), right for the 6B encoder."""
    vision_shard_ranks: int | None = None
    """Ranks over which `sharded` splits the vision side, copies of it beyond them; None = over all."""
    vision_exchange_replicas: int | None = None
    """Replicas between which tiles travel so that all their ranks encode equally many: 1 = tiles stay in their replica; None =
    the fewest with which the busiest ranks are predicted to have at most 3 % more than the mean."""
    overlap_gradients: bool = True
    """Begin to sum gradients over the copies of a module while its last backward pass goes on."""
    overlap_parameters: bool = True
    """Gather updated parameters when the next forward pass needs them, bucket by bucket, instead of at the end of the update
    (AdamW, whose state is sharded)."""
    prepare_ahead: bool = True
    """Plan the next window and send its tiles to their encoders while the language model computes."""
    vision_in_bubbles: bool = True
    """Encode in the pauses of the pipeline, where it has some that can be filled: several stages without virtual ones, more
    rows of a replica in a step than stages, padded rows, one window a step, a replicated vision side."""
    vision_window_rows: int | None = None
    """Micro-batches whose images are encoded together; None = all micro-batches of a step. Fewer hold fewer tiles and embeddings
    at a time. Each window is a pipeline schedule of its own that fills and empties the stages: with P of them, windows of W
    micro-batches leave ranks idle for (P - 1) / (W + P - 1) of it."""
    vision_chunk_tiles: int = 16
    """Tiles one rank runs through the vision encoder at a time; bounds activation memory."""
    vision_recompute: Literal["none", "layer", "full"] = "none"
    """What of the vision encoder is computed again in backward instead of kept: nothing; every layer from its input; or
    everything from the uint8 tiles, chunk by chunk."""
    language_recompute: Literal["none", "selective", "full"] = "none"
    """What of the language model is computed again in backward: nothing; attention inside every layer; or every layer from
    its input."""
    vision_offload: bool = False
    """Keep what the vision encoder's backward pass needs in host memory until then. Activations that are computed again are not
    kept at all, and parameters stay."""
    language_offload: bool = False
    """The same for the language model; with `language_recompute=full` it moves the inputs of the layers."""
    collective_timeout_seconds: int = 600


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Matrix products of the linear layers in 8-bit floating point, by part of the model; off by default.

    How values are scaled before they are rounded: `delayed` by the largest of earlier steps, `current` by the largest of the
    tensor, `blockwise` by that of every 128 (activations, gradients) or 128 x 128 values (weights; Hopper), `mxfp8` by that of
    every 32 (Blackwell). `delayed` and `current` take e4m3 forward and e5m2 for gradients, the others e4m3 for all. Weights,
    optimizer state, attention, norms, the vocabulary's two tables and everything sent between ranks stay as without.
    """

    language: Literal["none", "delayed", "current", "blockwise", "mxfp8"] = "none"
    """Recipe of the language model's layers."""
    vision: Literal["none", "current", "blockwise", "mxfp8"] = "none"
    """Recipe of the vision encoder's layers. Not `delayed`: its scales are agreed on between the ranks of the language model, and
    a forward pass that is run again for backward would use later ones."""
    projector: Literal["none", "current", "blockwise", "mxfp8"] = "none"
    """Recipe of the projector's two linear layers."""
    backend: Literal["auto", "transformer_engine", "emulated"] = "auto"
    """`transformer_engine` multiplies in FP8, on GPUs that can. `emulated` rounds to FP8 by the same rules and multiplies in the
    run's `dtype`, on every device and slower than without: to study recipes. `auto` is the first on a GPU, else the second."""
    first_bf16_layers: int = 0
    """Layers at the beginning of the language model that are left out."""
    last_bf16_layers: int = 0
    """Layers at the end of the language model that are left out."""
    history_steps: int = 16
    """Steps whose largest values decide the scale (delayed)."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside the linear layers of transformer layers (LoRA, arXiv 2106.09685); off by default.

    A part with adapters is frozen but for them; its `optimizer` section (rate, decay) is theirs. The projector has none and is
    trained, or not, as `optimizer.projector` says.
    """

    language_rank: int | None = None
    """Rank of the adapters in the language model; None = none. InternVL's fine-tuning scripts have 16."""
    vision_rank: int | None = None
    """Rank of the adapters in the vision encoder; None = none."""
    scale: float = 2.0
    """Factor on what an adapter adds: alpha / rank. InternVL has alpha = 2 x rank."""
    layers: Literal["all", "attention", "mlp"] = "all"
    """Linear layers that get one: q, k, v and the output projection (`attention`), both of the MLP (`mlp`), or all, as in
    InternVL."""


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """What computes the layers. Results are the same up to rounding."""

    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Linear layers and norms: Transformer Engine's fused ones, or torch's. `auto`: Transformer Engine in bf16 on a GPU where
    it is installed (in fp32 it multiplies in TF32), but for a sharded vision side."""
    attention: Literal["auto", "transformer_engine", "flash_attn", "torch_varlen", "sdpa"] = "auto"
    """Packed attention of the language model; `auto`: the first of the list that is installed. In fp32 it is always `sdpa`; and
    so is a ring (`parallel.context_ring_size`), but for Transformer Engine's."""
    vision_attention: Literal["auto", "cudnn", "sdpa"] = "auto"
    """Attention of the vision encoder inside a tile: cuDNN's, or what torch's scaled-dot-product attention chooses; `auto`:
    cuDNN's in bf16 on GPUs from Hopper on, where it is the faster one."""
    fuse_swiglu: Literal["auto", "on", "off"] = "auto"
    """Gate and activation of the language model's MLP as one compiled kernel, which keeps its input alone for backward;
    `auto`: on a GPU. On a CPU `on` needs a C++ compiler."""
    fuse_rotary: Literal["auto", "on", "off"] = "auto"
    """Rotary embedding of queries and keys by Transformer Engine's kernel; `auto`: on a GPU where it is installed."""
    fuse_gradient_accumulation: bool = True
    """Add weight gradients to the gradient buffer inside the matrix product that makes them; Transformer Engine's layers
    can, it is without effect for others."""
    loss_chunk_tokens: int | None = 1024
    """Positions whose logits exist at the same time, in forward and backward; None = all of a row's supervised ones. Logits of
    32K positions over the real vocabulary are 20 GB in fp32."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become packed rows."""

    meta: str = ""
    """InternVL meta JSON: {name: {root, annotation, repeat_time, data_augment, length, [max_dynamic_patch], [group]}}."""
    eval_meta: str | None = None
    """Meta JSON of held-out data for the evaluation loss during training, every `eval_every_steps`; None = no evaluation."""
    index_folder: str | None = None
    """Where indices of annotation files go that cannot be written beside them; None = `index` in the run's folder. All
    ranks should see it."""
    group_weights: tuple[str, ...] | None = None
    """Shares of the groups of data sets (`group` in the meta file) in the tokens of the run, like `language=1,multimodal=3`;
    None = every data set in proportion to its samples, repeats counted."""
    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer that already has InternVL's nine tokens."""
    tokens_per_row: int = 4096
    """Token budget of one packed row (= one micro-batch); rows are padded to it."""
    tiles_per_row: int = 16
    """Tile budget of one packed row (upstream: `num_images_expected`)."""
    sample_multiple_tokens: int = 1
    """Pad every sample to a multiple of so many tokens (which carry no loss); `parallel.context_ring_size` asks for it."""
    packing: Literal["best_fit", "first_fit"] = "best_fit"
    """How a stream's samples become rows: rows that are full to 99 % and more, or InternVL's algorithm."""
    packing_pool_samples: int = 64
    """Samples that wait for a row they fit (best_fit); a sample waits for as many rows at most, a tenth on average."""
    packing_window_rows: int = 4
    """Rows of each stream that go out in an order of cost that is the same in all streams, so that those of a step cost
    about the same; 1 = rows go out as they are finished (upstream)."""
    packing_buffer_rows: int = 20
    """Unfinished rows that may wait (first_fit; upstream: `max_buffer_size`)."""
    min_tiles: int = 1
    max_tiles: int = 12
    """Tiles an image may be cut into, thumbnail not counted; shared by the images of one sample."""
    use_thumbnail: bool = True
    min_video_frames: int = 8
    max_video_frames: int = 32
    """Frames a sample takes of a video, drawn evenly between the two; each is one tile."""
    system_prompt: str | None = None
    """System turn for records without one; None = InternVL's own, '' = no system turn."""
    v2pe: Literal["random", "fixed"] = "fixed"
    """Position step of image tokens: drawn per image from {1, 2, 4 .. 256} / 256, or `v2pe_numerator` / 256 for all."""
    v2pe_numerator: int = 256
    """Position step of image tokens in units of 1/256; 256 (delta = 1) gives ordinary positions."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What a broken record or image does to the run: stop it, or leave the sample out and count it."""
    max_skipped_share: float | None = 0.1
    """Share of the samples that may be left out for being bad; when clearly more are, the run stops. None = any."""
    allow_outside_root: bool = False
    """Follow absolute paths, URLs, `..` and symbolic links that lead outside a data set's `root`: whoever wrote the data can
    then have any file read that this user may read."""
    read_timeout_seconds: float = 120.0
    """A sample whose files take longer to read, or one of whose images takes longer to decode, is a bad sample."""
    special_tokens_in_text: Literal["as_text", "as_tokens"] = "as_text"
    """What names of special tokens (`<|im_end|>`, `<img>`, ...) typed in a text become: ordinary text, or, as in InternVL's
    trainer, the tokens. Grounding tokens (`<ref>`, `<box>`, `<quad>`) are tokens in both."""
    on_long_sample: Literal["stop", "skip", "truncate"] = "truncate"
    """What a sample over `tokens_per_row` does; a sample whose images do not survive truncation is a bad sample."""
    num_workers: int = 2
    """Processes per rank that decode and cut images; the batches do not depend on it. 0 = the rank does it itself."""
    prefetch_steps: int = 2
    """Steps whose rows are prepared ahead of the step that trains on them."""
    balance_rows: bool = True
    """Share out the rows of a step so that the language models of all replicas have about the same work. The rows of a
    step and its loss stay the same. Without effect with one replica, and with `loss.normalize=micro_batch`, where it
    matters which rows meet in a micro-step."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is learned: next-token cross entropy on text tokens, weighted per sample (InternVL3 paper, sec. 2.2), or MPO."""

    kind: Literal["next_token", "mpo"] = "next_token"
    """`mpo`: Mixed Preference Optimization on pairs of answers, see `MpoConfig`; `weighting` is without effect then."""
    weighting: Literal["token", "square", "sample"] = "square"
    """Weight of a token in a sample with l supervised tokens: 1, 1/sqrt(l) (used by InternVL3), 1/l."""
    normalize: Literal["step", "micro_batch"] = "step"
    """Divide by the weight of the whole global batch, or (upstream) give every micro-step the same share. In MPO this is about
    the cross entropy of chosen answers: mean over all their tokens in the global batch, or (upstream, one pair a GPU) mean
    over the pairs of each answer's mean."""


@dataclass(frozen=True, kw_only=True)
class MpoConfig:
    """Mixed Preference Optimization (`loss.kind=mpo`; arXiv 2411.10442, InternVL3 paper sec. 2.3): see docs/mpo.md."""

    preference_factor: float = 0.8
    """Of DPO's sigmoid loss."""
    quality_factor: float = 0.2
    """Of BCO's loss."""
    generation_factor: float = 1.0
    """Of the cross entropy of the chosen answer."""
    beta: float = 0.1
    """DPO's beta: a reward is this times the log-probability ratio of policy and reference (trl's default)."""
    shift: Literal["with_step", "before_step"] = "with_step"
    """What rewards are compared with in BCO's loss: the mean over all steps so far, with this one, as upstream, which takes a
    forward pass of the policy more; or without this one."""
    reference_file: str | None = None
    """Log-probabilities of the reference model, as `tools.reference_logprobs` writes them; None = the weights the run starts
    from (`checkpoint.load`), kept in host memory, are asked in every step."""


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """How one part of the model (vision encoder, projector, language model) is trained."""

    trainable: bool = True
    """False freezes it: no gradients, no optimizer state. A frozen vision encoder keeps its drop path, as in InternVL."""
    learning_rate_scale: float = 1.0
    """Factor on the learning rate."""
    decay: Literal["all", "matrices"] = "all"
    """What weight decay applies to: every parameter, norms and biases too, as InternVL's DeepSpeed runs have it, or only
    those with more than one dimension, as Megatron has it."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule of the whole model, and what differs between its parts."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 2e-5
    min_learning_rate: float = 0.0
    warmup_ratio: float | None = 0.03
    """Share of the schedule's steps over which the learning rate rises linearly; or say it in steps."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly, instead of `warmup_ratio`, which is then null."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After warm-up: `cosine` falls to the minimum over all that is left of the schedule; `constant` stays; `wsd` (warm-up, stable,
    decay) stays and falls linearly over the last `final_decay_ratio` of the schedule."""
    schedule_steps: int | None = None
    """Steps of the schedule, where it is not as long as the run; None = `num_steps`. A run that is shorter ends before its rate is at
    the minimum; in one that is longer the rate stays there (Megatron: `--lr-decay-iters` beside `--train-iters`)."""
    final_decay_ratio: float = 0.1
    """Share of the schedule's steps over which the learning rate falls at the end (wsd)."""
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad_norm: float | None = 1.0
    moments: Literal["fp32", "bf16"] = "fp32"
    """What AdamW's two moments are kept in. bf16 saves 4 bytes of 18 a parameter; needs Transformer Engine's AdamW, on a GPU,
    and a run in bf16. Weights and gradients stay in fp32."""
    vision: PartConfig = field(default_factory=PartConfig)
    projector: PartConfig = field(default_factory=PartConfig)
    language: PartConfig = field(default_factory=PartConfig)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, how many to keep, what to start from."""

    save_every_steps: int | None = None
    """None = only at the end of the run."""
    keep_last: int = 2
    """Of the finished checkpoints; milestones are kept besides."""
    milestone_every_steps: int | None = None
    """Checkpoints of these steps are kept for ever, and any layout can go on from them. None = no milestones."""
    optimizer_format: Literal["same_layout", "layout_free"] = "same_layout"
    """Of checkpoints that are neither milestones nor the run's last. Same layout: every rank writes what it has, and only the same
    tensor and pipeline layout can go on from it. Layout-free: any can; before, optimizer state is gathered in host memory."""
    asynchronous: bool = True
    """Training goes on while files are written; False = it waits for them."""
    max_wait_seconds: int = 600
    """How long training waits for a checkpoint that is still being written, when the next is due or the run ends."""
    verify: Literal["contents", "sizes"] = "contents"
    """What is compared of a run's own checkpoint before it continues: checksums of all files, or their lengths alone."""
    mirror: str | None = None
    """URL of a folder in an object store (`s3://bucket/run`) that gets a copy of every finished checkpoint; a run whose own folder has
    none goes on from there. None = no copies."""
    load: str | None = None
    """Where to take the weights from when the run folder holds no checkpoint of its own: converted weights, a run (its
    newest checkpoint), or one checkpoint of a run."""


@dataclass(frozen=True, kw_only=True)
class BadStepConfig:
    """Steps whose loss or gradient is not finite, or whose loss is far above those before. None of them changes a parameter."""

    on_nonfinite: Literal["skip", "rewind", "stop"] = "skip"
    """Skip: go on with the next step's data. Rewind: go back to the newest checkpoint, and on with data that were not seen yet.
    Stop: end the run, with an error."""
    on_spike: Literal["ignore", "skip", "rewind", "stop"] = "ignore"
    spike_factor: float = 6.0
    """A loss so many standard deviations above the mean of the steps before is a spike."""
    spike_window_steps: int = 50
    """Good steps in that mean; nothing is a spike before there are so many."""
    num_bad_steps: int = 20
    """So many in a row end the run."""
    num_rewinds: int = 3
    """A run that has to rewind once more ends."""
    recheck_every_steps: int | None = None
    """Compute the gradients of every so many steps twice and compare all bits; a difference ends the run and names the ranks. None =
    never. For ranks that compute the same from the same: on GPUs some kernels do not, and some only if asked (docs/checkpoints.md)."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run that gets nowhere is ended, with the stacks of all ranks (docs/faults.md)."""

    stall_seconds: float | None = 540.0
    """A rank that gets nowhere for so long ends the run: a micro-batch, an encoder's pass, an update and rows that are waited for
    count as progress. Below `parallel.collective_timeout_seconds`, whose error says nothing of the others. None = never."""
    start_seconds: float = 3600.0
    """Longer by so much until the first step is over: data are indexed, weights loaded and kernels compiled before."""
    straggler_factor: float | None = 1.5
    """A rank that computes so many times as long as the median of its peers is named in the log and the metrics. None = nobody looks."""


@dataclass(frozen=True, kw_only=True)
class RampConfig:
    """A global batch that grows at the beginning of a run; off by default. What each step has follows from its number alone
    (`config/ramp.py`)."""

    start_rows: int | None = None
    """Rows of the first step; None = `rows_per_step` from the start."""
    increment_rows: int | None = None
    """Rows by which a step grows at a time, at equal distances. `rows_per_step` - `start_rows` is a multiple of it."""
    ramp_steps: int | None = None
    """Steps with fewer than `rows_per_step` rows."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Public benchmarks that the model is scored on while it is trained (docs/evaluation.md)."""

    every_steps: int | None = None
    """Score it after so many steps and after the last; None = never."""
    names: tuple[str, ...] = ()
    """Which ones, like mmstar,ai2d."""
    data: str | None = None
    """Folder with a folder of each benchmark's name."""
    options: tuple[str, ...] = ()
    """Named options of theirs, like ai2d.mask=no."""
    limit_samples: int | None = 500
    """Questions of each that are asked, the first ones; None = all."""
    limit_answer_tokens: int | None = 64
    """Longest answer; None = each benchmark's own."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: the root of the configuration."""

    name: str
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mpo: MpoConfig = field(default_factory=MpoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    bad_steps: BadStepConfig = field(default_factory=BadStepConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    benchmarks: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    folder: str = "runs/default"
    """Everything the run writes: resolved config, metrics, checkpoints."""
    num_steps: int = 1000
    rows_per_step: int = 8
    """Packed rows of one optimizer step over all replicas (the global batch), at the end of `ramp` if there is one."""
    ramp: RampConfig = field(default_factory=RampConfig)
    dtype: Literal["fp32", "bf16"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 42
    log_every_steps: int = 1
    """Steps from one line of `metrics.jsonl` (and of the log, where there is no terminal) to the next."""
    sample_every_steps: int | None = None
    """Show the first samples of a row, text and pictures, beside the figures; None = never."""
    wandb_project: str | None = None
    """Show the run in this project of Weights & Biases too; None = in TensorBoard alone."""
    eval_every_steps: int | None = None
    """Steps from one evaluation on `data.eval_meta` to the next, and after the last; None = no evaluation."""
    eval_rows: int = 8
    """Packed held-out rows of one evaluation."""
