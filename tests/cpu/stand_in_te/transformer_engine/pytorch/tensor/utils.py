"""What changes tensors of 8 bits."""


def replace_raw_data(tensor, new_raw_data):
    raise NotImplementedError


def cast_master_weights_to_fp8(*args, **kwargs):
    raise NotImplementedError
