"""Work of one batch goes on while the next is made, in order, and its errors are raised."""

import threading

import pytest

from ldm.threads import ahead


def test_a_batch_is_worked_on_while_the_next_is_made():
    began = threading.Event()

    def batches():
        yield [1, 2]
        assert began.wait(60)  # would not come, were the work done after the next batch
        yield [3]
        yield []
        yield range(4, 30)

    def work(item: int) -> int:
        began.set()
        return item * item

    assert list(ahead(work, batches())) == [number * number for number in range(1, 30)]


def test_what_work_raises_is_raised():
    made = []

    def batches():
        for number in range(10):
            made.append(number)
            yield [number]

    def work(item: int) -> float:
        return 1 / (item - 1)

    with pytest.raises(ZeroDivisionError):
        list(ahead(work, batches()))
    assert made == [0, 1, 2]  # nothing more is drawn
