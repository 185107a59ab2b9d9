"""The slots of a device: which group is on it, which comes next, and when further tasks may be claimed."""

from __future__ import annotations

import pytest

from movieq.tasks.states import TaskId
from workers.slots import LENT_MOST, Group, Slots


@pytest.fixture
def sent() -> list[bytes]:
    return []


@pytest.fixture
def slots(sent: list[bytes]) -> Slots:
    found = Slots(sent.append)
    found.open()
    return found


def reserved(slots: Slots, *task_ids: str) -> Group:
    return slots.reserve([TaskId(task_id) for task_id in task_ids])


def test_a_group_that_fetches_holds_its_slot_until_it_lends_it(slots: Slots) -> None:
    group = reserved(slots, "a")
    assert not slots.free
    assert slots.lend(group)
    assert slots.free
    slots.add(group, "run-a", b"a")
    assert slots.on_device is group
    assert not slots.free


def test_a_group_that_lends_its_slot_wakes_the_worker(slots: Slots) -> None:
    woken: list[bool] = []
    group = reserved(slots, "a")
    slots.on_room = lambda: woken.append(slots.free)
    slots.lend(group)
    assert woken == [True]


def test_a_group_that_has_its_inputs_is_next_on_the_device_and_nothing_is_claimed_before_it(slots: Slots) -> None:
    first = reserved(slots, "a")
    slots.lend(first)
    second = reserved(slots, "b")
    slots.add(second, "run-b", b"b")
    assert slots.on_device is second
    second.remaining_s = lambda: 0.0
    assert slots.soon
    slots.add(first, "run-a", b"a")
    assert (slots.on_device, slots.soon) == (second, False)
    slots.leave(second, "run-b")
    assert slots.on_device is first


def test_only_a_few_groups_lend_their_slot(slots: Slots) -> None:
    for number in range(LENT_MOST):
        assert slots.lend(reserved(slots, str(number)))
    last = reserved(slots, "last")
    assert not slots.lend(last)
    assert not slots.free
    slots.leave(slots.groups[0], "run-0")
    assert slots.lend(last)


def test_a_group_on_the_device_lends_nothing_and_one_that_was_cancelled_neither(slots: Slots) -> None:
    group = reserved(slots, "a")
    slots.add(group, "run-a", b"a")
    assert not slots.lend(group)
    slots.leave(group, "run-a")
    assert not slots.lend(group)


def test_a_batch_lends_its_slot_until_its_last_run_is_ready(slots: Slots, sent: list[bytes]) -> None:
    group = reserved(slots, "a", "b")
    slots.add(group, "run-a", b"a")
    assert slots.lend(group)
    slots.leave(group, "run-b")
    assert slots.on_device is group
    assert len(sent) == 1


def test_a_group_is_late_only_once_it_is_ready_and_the_device_is_busy(slots: Slots) -> None:
    fetching = reserved(slots, "a")
    fetching.patience_s = 0.0
    assert slots.late() is None
    busy = reserved(slots, "b")
    slots.add(busy, "run-b", b"b")
    assert slots.late() is None
    slots.add(fetching, "run-a", b"a")
    assert slots.late() is fetching
    assert busy.overdue


def test_the_time_for_which_a_slot_was_lent_is_known(slots: Slots) -> None:
    held, lent = reserved(slots, "a"), reserved(slots, "b")
    slots.lend(lent)
    for group in (held, lent):
        slots.add(group, "run", b"")
        slots.leave(group, "run")
    assert held.lent_s == 0.0
    assert lent.lent_s > 0.0
