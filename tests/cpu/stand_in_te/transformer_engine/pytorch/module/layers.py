"""Linear layers and norms."""

import torch

from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class Linear(TransformerEngineBaseModule):
    """A linear layer."""

    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        flags = (fuse_wgrad_accumulation, bias, return_bias, delay_wgrad_compute)
        self.prepare(parallel_mode, tp_group, sequence_parallel, *flags)
        self.create(out_features, in_features, params_dtype, init_method)
        self.save_original_input = save_original_input

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        return self.multiply(inp)


class LayerNormLinear(TransformerEngineBaseModule):
    """A norm and a linear layer."""

    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        parameters_split=None,
        zero_centered_gamma=False,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_wgrad=False,
        ub_bulk_dgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        name=None,
    ):
        super().__init__()
        assert not zero_centered_gamma and not return_layernorm_output
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = _norm_weight(in_features, params_dtype, sequence_parallel, 1.0)
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = _norm_weight(in_features, params_dtype, sequence_parallel, 0.0)
        flags = (fuse_wgrad_accumulation, bias, return_bias, delay_wgrad_compute)
        self.prepare(parallel_mode, tp_group, sequence_parallel, *flags)
        self.create(out_features, in_features, params_dtype, init_method)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        return self.multiply(
            _normalize(inp, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        )


class LayerNorm(torch.nn.Module):
    """A norm with mean and bias."""

    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        **kwargs,
    ):
        super().__init__()
        assert not zero_centered_gamma and set(kwargs) <= {"device"}
        self.eps = eps
        self.weight = _norm_weight(normalized_shape, params_dtype, sequence_parallel, 1.0)
        self.bias = self._bias(normalized_shape, params_dtype, sequence_parallel)

    def _bias(self, size, dtype, sequence_parallel):
        return _norm_weight(size, dtype, sequence_parallel, 0.0)

    def forward(self, x):
        return _normalize(x, self.weight, self.bias, self.eps)


class RMSNorm(LayerNorm):
    """A norm without them."""

    def _bias(self, size, dtype, sequence_parallel):
        return None


class GroupedLinear(TransformerEngineBaseModule):
    """Refused here; it has to be importable."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("no grouped layers in the stand-in")


def _norm_weight(size, dtype, sequence_parallel, value):
    weight = torch.nn.Parameter(torch.full((size,), value, dtype=dtype, device="cpu"))
    weight.sequence_parallel = sequence_parallel
    return weight


def _normalize(rows, weight, bias, eps):
    """In 32 bits at least."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    size = (rows.shape[-1],)
    if bias is not None:
        parts = (rows.to(wide), size, weight.to(wide), bias.to(wide), eps)
        return torch.nn.functional.layer_norm(*parts).to(rows.dtype)
    return torch.nn.functional.rms_norm(rows.to(wide), size, weight.to(wide), eps).to(rows.dtype)
