"""When reductions start: at once, or one behind the other."""

from megatron_dip.runtime.reductions import ReductionQueue


class Noted:
    """A reduction that ends when it is told to."""

    started: list[str]

    def __init__(self, name: str, started: list[str]) -> None:
        self.name, self.started, self.has_ended = name, started, False

    def start(self) -> None:
        self.started.append(self.name)

    def is_ended(self) -> bool:
        return self.has_ended


def test_where_every_stream_has_a_queue_reductions_start_when_they_may() -> None:
    started: list[str] = []
    queue = ReductionQueue(one_at_a_time=False)
    queue.add([Noted("a", started), Noted("b", started)])
    queue.add([Noted("c", started)])
    assert started == ["a", "b", "c"]


def test_with_one_queue_each_waits_until_the_one_before_has_ended_and_none_is_waited_for() -> None:
    started: list[str] = []
    a, b, c, d = (Noted(name, started) for name in "abcd")
    queue = ReductionQueue(one_at_a_time=True)
    queue.add([a, b])
    queue.advance()
    assert started == ["a"]
    queue.add([c])
    assert started == ["a"]
    a.has_ended = True
    queue.advance()
    assert started == ["a", "b"], "one at a time"
    b.has_ended = True
    queue.add([d])
    assert started == ["a", "b", "c"], "in their order, also where another one is added"
    queue.finish()
    assert started == ["a", "b", "c", "d"], "at the end of the plan whatever is left"
