"""The firetasks: thin adapters from a FireWorks spec to the library.

FireWorks stores the names below (``{{nanoos_fw.firetasks.TrainModelTask}}``) and takes
the classes from this package, so a class may move between modules without orphaning
workflows in databases.
"""

from nanoos_fw.firetasks.active import (
    ExportBatchTask,
    ExtendDatasetTask,
    RetrainTask,
    ScreenPoolTask,
)
from nanoos_fw.firetasks.active_selection import SelectBatchTask
from nanoos_fw.firetasks.campaign import WriteReportTask
from nanoos_fw.firetasks.featurization import FeaturizeStructuresTask
from nanoos_fw.firetasks.md import AnalyzeTrajectoryTask, RunMDTask
from nanoos_fw.firetasks.ml import (
    BuildDatasetTask,
    RankCandidatesTask,
    ScreenCandidatesTask,
    TrainModelTask,
)
from nanoos_fw.firetasks.relaxation import RelaxStructuresTask
from nanoos_fw.firetasks.screening import ScreenWindowTask
from nanoos_fw.firetasks.search import SearchTask
from nanoos_fw.firetasks.streams import RankStreamTask, ScreenStreamTask

__all__ = [
    "AnalyzeTrajectoryTask",
    "BuildDatasetTask",
    "ExportBatchTask",
    "ExtendDatasetTask",
    "FeaturizeStructuresTask",
    "RankCandidatesTask",
    "RankStreamTask",
    "RelaxStructuresTask",
    "RetrainTask",
    "RunMDTask",
    "ScreenCandidatesTask",
    "ScreenPoolTask",
    "ScreenStreamTask",
    "ScreenWindowTask",
    "SearchTask",
    "SelectBatchTask",
    "TrainModelTask",
    "WriteReportTask",
]
