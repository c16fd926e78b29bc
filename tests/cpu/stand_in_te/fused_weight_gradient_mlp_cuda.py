"""Stands for Apex's kernel: adds the gradient of a weight to what is there."""


def wgrad_gemm_accum_fp32(rows, grad, main_grad):
    main_grad.add_(grad.T.to(main_grad.dtype) @ rows.to(main_grad.dtype))


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
