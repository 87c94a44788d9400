"""Side-by-side runs of a serving framework with and without llmir."""

from llmir.compare.comparison import Comparison
from llmir.compare.options import CompareOptions
from llmir.compare.orchestration import ProgressEvent, run
from llmir.compare.report import print_report
from llmir.compare.workloads import WORKLOADS

__all__ = ["WORKLOADS", "CompareOptions", "Comparison", "ProgressEvent", "print_report", "run"]
