# Environment of every launch, each variable with its reason. Sourced, not run.

# One hardware queue per GPU, so that tensor-parallel communication starts before the product it overlaps with.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# A collective that fails on one rank ends the process instead of leaving the others waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# bf16 on CPUs whose virtual machine claims AMX but traps it dies with SIGILL.
export ONEDNN_MAX_CPU_ISA=${ONEDNN_MAX_CPU_ISA:-AVX512_CORE_BF16}
# Training never looks anything up on a hub.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
