"""Names of kernels as profilers of H100s show them, and of operators on a CPU."""

import pytest

from tools.kernel_categories import CATEGORIES, RULES, category_of

NAMES = {
    "communication": [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "c10d::allreduce_",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t>>",
        "void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 128, 8>>",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, pytorch_flash::Flash_bwd_kernel_traits<64>>",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128>",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "gemm": [
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNN",
        "nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_nn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x64",
        "aten::mm",
        "aten::addmm",
        "aten::mkldnn_convolution",
    ],
    "norm": [
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>",
        "void at::native::(anonymous namespace)::cuComputeGradInput<float>GammaBetaBackwardCUDAKernel",
        "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<transformer_engine::normalization::Kernel_traits<>>",
        "void transformer_engine::normalization::ln_bwd_finalize_tuned_kernel<>",
        "aten::native_layer_norm",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>, at::native::FusedAdamMathFunctor<float, 4>>",
        "void transformer_engine::multi_tensor_adam::multi_tensor_apply_kernel<transformer_engine::AdamFunctorMaster<__nv_bfloat16>>",
        "void at::native::lpnorm_cleanup multi_tensor_apply_kernel<LpNormFunctor>",
        "aten::_fused_adamw_",
        "aten::_foreach_mul_",
    ],
    "fp8 casts": [
        "void transformer_engine::detail::cast_transpose_fused_kernel_notaligned<>",
        "transformer_engine::(anonymous namespace)::block_scaled_cast_transpose_kernel<true, float, __nv_bfloat16, __nv_fp8_e4m3>",
        "void transformer_engine::(anonymous namespace)::amax_kernel<8, true, __nv_bfloat16>",
        "void transformer_engine::transpose_kernel<__nv_fp8_e4m3>",
    ],
    "memory": [
        "Memcpy DtoD (Device -> Device)",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 2, 128, 1>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "void at::native::index_elementwise_kernel<128, 4>",
        "aten::copy_",
        "aten::cat",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
        "triton_poi_fused_mul_silu_0",
        "triton_red_fused_add_mul_pow_1",
        "aten::mul",
    ],
    "other": ["autograd::engine::evaluate_function: AccumulateGrad", "LinearWithGradAccumulationBackward"],
}


@pytest.mark.parametrize(("category", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_names(category: str, name: str) -> None:
    assert category_of(name) == category


def test_every_category_has_a_rule_and_an_example() -> None:
    assert [category for category, _ in RULES] == [name for name in CATEGORIES if name != "other"]
    assert set(NAMES) == set(CATEGORIES)
