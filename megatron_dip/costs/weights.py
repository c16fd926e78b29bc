"""Weights as built stages hold them: how many there are, and which of them are trained.

Read off the stages of a model once they are built (``megatron_dip.models.facts``) and gathered over
a pipeline, so that neither has to be declared; plain numbers, because planner processes know no
torch.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from megatron_dip.errors import ConfigError
from megatron_dip.forms import Form
from megatron_dip.limits import Weights

__all__ = ["ModuleWeights", "PartWeights", "StageFacts"]


class PartWeights(NamedTuple):
    """Numbers of weights that one rank holds of a layer, or of what sits before or after them."""

    trained: Weights = 0
    frozen: Weights = 0
    trained_experts: Weights = 0
    """Of the routed experts in it; not among ``trained``."""
    frozen_experts: Weights = 0

    @property
    def is_trained(self) -> bool:
        """Whether anything in it is trained."""
        return self.trained + self.trained_experts > 0

    def plus(self, other: "PartWeights") -> "PartWeights":
        """Of both together."""
        return PartWeights(*(a + b for a, b in zip(self, other, strict=True)))

    def met(self, expert_share: float) -> tuple[float, float]:
        """Weights that a token meets, and those of them that are trained.

        Args:
            expert_share: Of the experts that the rank holds, how many a token is worth to it.
        """
        trained = self.trained + expert_share * self.trained_experts
        return trained + self.frozen + expert_share * self.frozen_experts, trained


class StageFacts(NamedTuple):
    """What one built stage holds."""

    module: str
    first_layer: int
    layers: tuple[PartWeights, ...]
    before: PartWeights
    """What sits before the module's first layer; nothing in other stages."""
    after: PartWeights
    """What sits after its last layer."""


class ModuleWeights(Form):
    """A whole module, as ranks hold it."""

    before: PartWeights
    layers: tuple[PartWeights, ...]
    after: PartWeights

    @classmethod
    def of_stages(cls, module: str, num_layers: int, stages: Iterable[StageFacts]) -> Self:
        """The module that ``stages`` are of; stages of other modules are passed over.

        Raises:
            ConfigError: They do not hold each of its layers once.
        """
        own = sorted(
            (stage for stage in stages if stage.module == module),
            key=lambda stage: (stage.first_layer, len(stage.layers)),
        )
        held = [stage.first_layer + n for stage in own for n in range(len(stage.layers))]
        if held != list(range(num_layers)):
            raise ConfigError(
                f"the stages of {module} hold the layers {held} (expected each of its "
                f"{num_layers} layers once)"
            )
        before = after = PartWeights()
        for stage in own:
            before, after = before.plus(stage.before), after.plus(stage.after)
        layers = tuple(layer for stage in own for layer in stage.layers)
        return cls(before=before, layers=layers, after=after)

    def trained_layers(self) -> tuple[range, ...]:
        """Runs of layers with something trained in them, ascending."""
        runs: list[range] = []
        for number, layer in enumerate(self.layers):
            if not layer.is_trained:
                continue
            if runs and runs[-1].stop == number:
                runs[-1] = range(runs[-1].start, number + 1)
            else:
                runs.append(range(number, number + 1))
        return tuple(runs)

    def layers_like(self, *, trained: bool) -> Sequence[PartWeights]:
        """The layers that are trained, or those that are not; all of them if there are none."""
        return [layer for layer in self.layers if layer.is_trained == trained] or self.layers
