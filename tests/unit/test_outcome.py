"""How a run that met a fault ends."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from movieq.errors import InvalidInput, KeyTaken, NetworkFault, OutOfMemory, RunLost, StorageFault
from movieq.queue.store import DEATHS_LIMIT, TRIES_LIMIT, Budget
from movieq.tasks.entities import Task
from movieq.tasks.states import Kind, ProjectId, TaskId, TaskStatus
from workers.faults import FinishFault, HostFault
from workers.outcome import BROKE, UNCOUNTED, UNREADABLE_LIMIT, Failed, Lost, Requeued, Unable, Unreadable, outcome_of
from workers.running import Stop
from workers.supervisor import ChildDied

SPOOL = Path("/spool")


def task(attempt: int = 1) -> Task:
    return Task(
        task_id=TaskId("task"),
        project_id=ProjectId("film"),
        task_type="generate_image",
        kind=Kind.CPU_INTENSIVE,
        engine="animatic",
        model="animatic",
        shape="image",
        status=TaskStatus.PROCESSING,
        priority=2,
        created_at_ms=0,
        estimate_ms=2000,
        max_ms=60_000,
        attempt=attempt,
    )


def requeued(error: Exception, attempt: int = 1) -> Requeued:
    found = outcome_of(error, task(attempt), SPOOL)
    assert isinstance(found, Requeued)
    return found


def test_a_refused_verb_writes_nothing_more() -> None:
    assert outcome_of(RunLost("lost"), task(), SPOOL) == Lost()


def test_a_fault_of_the_task_fails_it_at_once() -> None:
    assert outcome_of(InvalidInput("references[0]: no picture"), task(), SPOOL) == Failed("references[0]: no picture", "invalid_input")


@pytest.mark.parametrize("error", [OutOfMemory("full"), NetworkFault("off"), StorageFault("away"), ValueError("nobody expected this")])
def test_a_fault_that_may_pass_counts_as_a_try_and_waits(error: Exception) -> None:
    found = requeued(error)
    assert (found.budget, found.limit) == (Budget.TRIES, TRIES_LIMIT)
    assert found.delay_ms > 0
    assert "nobody" not in found.error


def test_a_fault_of_ours_after_the_rendering_fails_the_task_at_once() -> None:
    assert outcome_of(FinishFault("a tag cannot be written"), task(), SPOOL) == Failed("a tag cannot be written", "internal")
    assert outcome_of(ValueError("nobody expected this"), task(), SPOOL, rendered=True) == Failed(BROKE, "internal")
    for error in (OutOfMemory("full"), StorageFault("away")):
        assert isinstance(outcome_of(error, task(), SPOOL, rendered=True), Requeued)


def test_the_death_of_a_child_counts_as_a_death_unless_another_run_is_to_blame() -> None:
    found = requeued(ChildDied("it ended with signal SIGSEGV", -11, "denoise"))
    assert (found.budget, found.limit, found.exit_code, found.stage) == (Budget.DEATHS, DEATHS_LIMIT, -11, "denoise")
    found = requeued(ChildDied("it was killed", -9, None, blameless=True))
    assert (found.budget, found.limit, found.delay_ms) == (Budget.DRAIN, 0, 0)


def test_what_this_worker_lacks_is_left_to_others_uncounted() -> None:
    found = requeued(Unable("this worker has no model x", "model_unavailable"))
    assert (found.budget, found.code) == (Budget.DRAIN, "model_unavailable")
    assert found.delay_ms > 0


def test_a_task_that_cannot_be_read_has_a_budget_of_its_own() -> None:
    assert requeued(Unreadable("task_data.x")).limit == UNREADABLE_LIMIT


def test_a_fault_of_the_machine_is_blamed_on_it_and_costs_the_task_nothing_until_it_lasts() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    found = requeued(full)
    assert (found.budget, found.limit, found.delay_ms, found.host_problem) == (Budget.DRAIN, 0, 0, "its disk is full")
    found = requeued(full, UNCOUNTED)
    assert (found.budget, found.limit, found.host_problem) == (Budget.TRIES, TRIES_LIMIT, "its disk is full")


def test_a_fault_of_a_device_is_not_blamed_on_the_machine() -> None:
    assert requeued(HostFault("its GPU does not work", device=True)).host_problem == ""


def test_a_run_whose_folder_is_gone_blames_the_machine(tmp_path: Path) -> None:
    found = outcome_of(ValueError("anything"), task(), tmp_path, tmp_path / "gone")
    assert isinstance(found, Requeued)
    assert found.host_problem == "its working folder is gone"


def test_a_taken_key_and_a_broken_disk_of_the_storage_are_no_faults_of_the_machine() -> None:
    assert requeued(KeyTaken("taken")).host_problem == ""
    fault = StorageFault("cannot store")
    fault.__cause__ = OSError(errno.EIO, "Input/output error", "/media/projects/film/output.png")
    assert requeued(fault).host_problem == ""


def test_a_stopped_run_may_write_only_while_the_task_is_still_its_own() -> None:
    assert {reason for reason in Stop if reason.may_write} == {Stop.DRAIN, Stop.OVERDUE}
