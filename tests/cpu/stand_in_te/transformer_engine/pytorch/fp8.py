"""Whether 8-bit computing is on."""

from contextlib import contextmanager


class FP8GlobalStateManager:
    """The recipe of the innermost context that is entered."""

    recipe = None
    group = None
    reductions = 0
    """Ends of outermost contexts of delayed scaling, at each of which ranks of its group meet."""

    @classmethod
    def is_fp8_enabled(cls):
        return cls.recipe is not None

    @classmethod
    def is_fp8_calibration(cls):
        return False

    @classmethod
    def get_fp8_recipe(cls):
        return cls.recipe

    @classmethod
    def reset(cls):
        cls.recipe = cls.group = None


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    manager = FP8GlobalStateManager
    before = manager.recipe, manager.group
    manager.recipe, manager.group = (fp8_recipe, fp8_group) if enabled else (None, None)
    try:
        yield
    finally:
        manager.recipe, manager.group = before


@contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    yield
