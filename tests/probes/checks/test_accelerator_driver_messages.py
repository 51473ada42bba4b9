"""Wordings of the AMD and Gaudi drivers, as their sources have had them over the versions.

Lines are written after the format strings of Linux (drivers/gpu/drm/amd, drivers/accel/habanalabs).
"""

import pytest

from probes.catalogue import load_catalogue
from probes.checks.driver_events import parse, read_tables
from probes.checks.kernel_log import Line

TABLES = read_tables(load_catalogue().check("accelerator.driver_events").spec.params)


ATHUB = "ncorrectable hardware error(ERREVENT_ATHUB_INTERRUPT) detected!"
TIMED_OUT = "[drm:amdgpu_job_timedout [amdgpu]] *ERROR* ring gfx timeout, "


@pytest.mark.parametrize(
    ("text", "code", "kind"),
    [
        ("amdgpu 0000:83:00.0: u" + ATHUB, "fatal_ras", "restart"),
        ("amdgpu 0000:dd:00.0: {1}u" + ATHUB, "fatal_ras", "restart"),
        ("amdgpu 0000:dd:00.0: {1} U" + ATHUB, "fatal_ras", "restart"),
        ("amdgpu: MES failed to respond to msg=REMOVE_QUEUE", "scheduler_firmware", "reset"),
        ("amdgpu: MES(1) failed to respond to msg=INVALIDATE_TLBS", "scheduler_firmware", "reset"),
        ("amdgpu: Failed to evict process queues", "queues_stuck", "reset"),
        ("amdgpu 0000:c3:00.0: amdgpu: Failed to evict queue 1", "queues_stuck", "reset"),
        (TIMED_OUT + "signaled seq=12, emitted seq=14", "ring_timeout", "reset"),
        (TIMED_OUT + "but soft recovered", "ring_recovered", "warning"),
        ("amdgpu 0000:03:00.0: amdgpu: RAS records:260 exceed threshold:256", "bad_pages_full", "repair"),
        ("habanalabs hl0: Failed to reset! Device is NOT usable", "unusable", "restart"),
        ("accel accel0: Device heartbeat failed! PCI link is healthy", "heartbeat", "reset"),
    ],
)
def test_every_wording_of_a_driver_is_the_event_that_it_means(text: str, code: str, kind: str) -> None:
    assert [(event.code, event.kind) for event in parse([Line(60.0, text)], TABLES)] == [(code, kind)]
