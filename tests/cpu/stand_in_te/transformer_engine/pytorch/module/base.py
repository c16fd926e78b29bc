"""Weight gradients that are put off: ``backward`` stores what they are made of."""

import queue

import torch

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


def get_dummy_wgrad(shape, dtype, zero=False):
    return torch.zeros(shape, dtype=dtype)


class WeightGradStore:
    """First in, first out."""

    def __init__(self, delay_wgrad_compute=False, ub_bulk_wgrad=False):
        self.context = queue.Queue() if delay_wgrad_compute else None
        self.enabled = delay_wgrad_compute

    def delay_wgrad_compute(self):
        return self.enabled

    def put(self, tensors, function):
        self.context.put([tensors, function])

    def pop(self):
        if not self.context.qsize():
            raise RuntimeError("Pop empty queue")
        tensors, function = self.context.get()
        return function(*tensors), tensors


class TransformerEngineBaseModule(torch.nn.Module):
    """What linear layers share: tensor parallelism, weight gradients, fused accumulation."""

    def prepare(self, parallel_mode, tp_group, sequence_parallel, fuse, bias, return_bias, delay):
        self.parallel_mode, self.tp_group = parallel_mode, tp_group
        size = tp_group.size() if tp_group is not None else 1
        self.tp_size = size
        self.sequence_parallel = sequence_parallel and size > 1
        self.fuse_wgrad_accumulation = fuse
        self.use_bias, self.return_bias = bias, return_bias
        self.gemm_bias_unfused_add = bias and not return_bias and parallel_mode == "row"
        self.apply_bias = bias and not return_bias
        self.wgrad_store = WeightGradStore(delay)
        self.weight_names, self.bias_names = ["weight"], ["bias"]
        self.wgrad_accumulation_and_reduce_hooks = []
        return size

    def create(self, num_outputs, num_inputs, dtype, init_method):
        size, mode = self.tp_size, self.parallel_mode
        num_outputs //= size if mode == "column" else 1
        num_inputs //= size if mode == "row" else 1
        self.in_features, self.out_features = num_inputs, num_outputs
        weight = torch.empty(num_outputs, num_inputs, dtype=dtype, device="cpu")
        init_method(weight)
        self.weight = torch.nn.Parameter(weight)
        self.bias = None
        if self.use_bias:
            self.bias = torch.nn.Parameter(torch.zeros(num_outputs, dtype=dtype, device="cpu"))
        dimension = {"column": 0, "row": 1}.get(mode, 0)
        self._mark(self.weight, mode in ("column", "row"), dimension)
        if self.use_bias:
            self._mark(self.bias, mode == "column", 0)
            if mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
        if self.wgrad_store.delay_wgrad_compute():
            for parameter in filter(None.__ne__, (self.weight, self.bias)):
                parameter.skip_backward_post_hook = True

    @staticmethod
    def _mark(parameter, is_parallel, dimension):
        parameter.tensor_model_parallel = is_parallel
        parameter.partition_dim, parameter.partition_stride = dimension, 1

    def multiply(self, rows):
        """``rows`` through the layer, with what tensor parallelism exchanges."""
        # Megatron imports this package first.
        from megatron.core.tensor_parallel import mappings

        _check_for_fp8(rows, self.weight)
        group, mode = self.tp_group, self.parallel_mode
        if self.tp_size > 1 and mode == "column":
            if self.sequence_parallel:
                rows = mappings.gather_from_sequence_parallel_region(rows, group=group)
            else:
                rows = mappings.copy_to_tensor_model_parallel_region(rows, group=group)
        adds_bias = self.apply_bias and not self.gemm_bias_unfused_add
        found = _Multiply.apply(rows, self.weight, self.bias if adds_bias else None, self)
        if self.tp_size > 1 and mode == "row":
            if self.sequence_parallel:
                found = mappings.reduce_scatter_to_sequence_parallel_region(found, group=group)
            else:
                found = mappings.reduce_from_tensor_model_parallel_region(found, group=group)
        if self.gemm_bias_unfused_add:
            found = found + self.bias
        return (found, self.bias) if self.return_bias else found

    def need_backward_dw(self):
        return self.wgrad_store.delay_wgrad_compute()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook):
        self.wgrad_accumulation_and_reduce_hooks.append(hook)

    def backward_dw(self):
        if not self.need_backward_dw():
            return
        (weight_grad, bias_grad), _ = self.wgrad_store.pop()
        if not self.fuse_wgrad_accumulation:
            self.weight.grad = weight_grad
        if bias_grad is not None and self.bias.grad is None:
            self.bias.grad = bias_grad
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()


class _Multiply(torch.autograd.Function):
    """``x w^T + b``; the gradient of ``w`` is returned, added to ``main_grad``, or put off."""

    @staticmethod
    def forward(ctx, rows, weight, bias, layer):
        ctx.save_for_backward(rows, weight)
        ctx.layer, ctx.has_bias = layer, bias is not None
        return torch.nn.functional.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        layer, has_bias = ctx.layer, ctx.has_bias
        fuses = layer.fuse_wgrad_accumulation

        def weight_gradient(rows, grad):
            flat = grad.reshape(-1, grad.shape[-1])
            product = flat.T @ rows.reshape(-1, rows.shape[-1])
            if fuses:
                weight.main_grad.add_(product)
                product = None
            return product, flat.sum(dim=0) if has_bias else None

        row_grad = grad @ weight if ctx.needs_input_grad[0] else None
        found = bias_grad = None
        if ctx.needs_input_grad[1]:
            if layer.wgrad_store.delay_wgrad_compute():
                layer.wgrad_store.put([rows, grad], weight_gradient)
            else:
                found, bias_grad = weight_gradient(rows, grad)
            if fuses:
                weight.grad_added_to_main_grad = True
                found = get_dummy_wgrad(list(weight.shape), weight.dtype)
        return row_grad, found, bias_grad, None


def _check_for_fp8(rows, weight):
    recipe = FP8GlobalStateManager.recipe
    if recipe is None:
        return
    num_rows = rows.shape[:-1].numel()
    if num_rows % recipe.row_multiple or rows.shape[-1] % 16 or weight.shape[0] % 16:
        raise ValueError(
            f"FP8 execution with {type(recipe).__name__} requires rows in multiples of "
            f"{recipe.row_multiple} and widths in multiples of 16, but got {list(rows.shape)} "
            f"times {list(weight.shape)}"
        )
