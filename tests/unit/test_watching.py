from __future__ import annotations

import io

import pytest
from rich.console import Console

from nanoos_fw.cli.watching import watch_campaign
from nanoos_fw.operations.status import CampaignStatus

STEPS = [
    CampaignStatus("c", stages={"label": {"READY": 2}, "train": {"WAITING": 1}}),
    CampaignStatus("c", stages={"label": {"RUNNING": 2}, "train": {"WAITING": 1}}),
    CampaignStatus("c", stages={"label": {"RUNNING": 2}, "train": {"WAITING": 1}}),
    CampaignStatus(
        "c",
        stages={"label": {"COMPLETED": 999, "FIZZLED": 1}, "train": {"WAITING": 1}},
        causes={"label": {"oom": 1}},
        per_hour=12.0,
    ),
]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_campaign_is_watched_until_nothing_goes_on(terminal: bool) -> None:
    asked, slept = iter(STEPS), []
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, color_system=None)
    last = watch_campaign(console, lambda: next(asked), every_s=3, sleep=slept.append)
    assert last is STEPS[-1]  # what waits for a failed parent is not waited for
    assert slept == [3, 3, 3]
    shown = text.getvalue()
    if terminal:
        assert "999/1000" in shown
        assert "1 oom" in shown
        # One failure in a thousand is seen: 29 cells for the rest, one for it.
        assert "█" * 30 in shown
        assert "12.0 fireworks an hour" in shown
    else:
        assert shown.splitlines() == [
            "c: 2 ready, 1 waiting",
            "c: 2 running, 1 waiting",
            "c: 999 completed, 1 fizzled, 1 waiting",
        ]
