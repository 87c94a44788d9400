"""Side-by-side runs of serving frameworks with and without llmir."""

from llmir.compare.comparison import Comparison
from llmir.compare.frameworks import FRAMEWORKS
from llmir.compare.options import CompareOptions
from llmir.compare.orchestration import ProgressEvent, ReportFiles, run
from llmir.compare.quality import BRIEF_TASK, QualityTask
from llmir.compare.report import print_report
from llmir.compare.workloads import WORKLOADS

__all__ = [
    "BRIEF_TASK",
    "FRAMEWORKS",
    "WORKLOADS",
    "CompareOptions",
    "Comparison",
    "ProgressEvent",
    "QualityTask",
    "ReportFiles",
    "print_report",
    "run",
]
