# shellcheck shell=bash
# Environment of every launch, each variable with its reason. Sourced, not run.
# What is set already stays: a site's own values (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_TOPO_FILE, ...) come first.

# --- communication
# CUDA_DEVICE_MAX_CONNECTIONS is not here: what is right depends on the run, so `train` sets it, however it is started (device.py).
# 1 with tensor or context parallelism, whose messages must start before the product they overlap with; unset with
# parallel.vision_sharding=sharded, for FSDP2's gathers would wait behind other kernels. A site's own value stays.
# A collective that fails on one rank ends the process instead of leaving the others waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# The last collectives of every rank are kept, and written when one times out: who was missing, and in what.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# NCCL says why it fails, and nothing else.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A switch that restarts or a link that flaps must not end a run of days: 4.096 us x 2^22 = 17 s a try (NCCL: 2^20, 4 s), 7 tries.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}

# --- memory
# Rows and tiles differ in size from step to step; segments that grow leave fewer holes than blocks of fixed size.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# --- CPU
# bf16 on CPUs whose virtual machine claims AMX but traps it dies with SIGILL.
export ONEDNN_MAX_CPU_ISA=${ONEDNN_MAX_CPU_ISA:-AVX512_CORE_BF16}
# Ranks of a node share its cores: libraries that take all of them each would only wait for each other. Training sets its own
# number of threads by what it shares the machine with.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# --- what goes wrong is seen
# Lines reach the log when they are written, also those of a rank that is killed next.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
# A crash in compiled code leaves a Python trace.
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
# Training never looks anything up on a hub.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
