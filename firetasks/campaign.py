"""Firetasks of the campaign as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.provenance import sha256_file
from nanoos_fw.reports import write_report


class WriteReportParameters(Parameters):
    """Parameters of WriteReportTask."""

    campaign: str
    path: str


class WriteReportTask(NanoTask):
    """Write the HTML report from the stores, whatever has finished by now."""

    _fw_name = "{{nanoos_fw.firetasks.WriteReportTask}}"
    parameters_model = WriteReportParameters
    parameters: WriteReportParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Write the report and record where it is."""
        campaign = self.parameters.campaign
        path = write_report(place.database, campaign, Path(self.parameters.path))
        place.campaigns.record(campaign, report=str(path))
        return {"report": str(path), "sha256": sha256_file(path)}
