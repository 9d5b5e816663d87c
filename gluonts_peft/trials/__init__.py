"""Trials: one fine-tuning and its backtest, many of them from a grid or chosen by a search, and the report on them.

    study = load_study("examples/demo.yaml", {"seed": [0]})
    results = run_study(study, "out", jobs=2)
    print_table(results)
    write_report("out")

    print_ranking(search(load_search("ray_configs/searches/quick.yaml"), "/shared/runs/quick"))

Names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..moved import loaded_on_use

if TYPE_CHECKING:
    from .cluster import ClusterError, on_ray
    from .data import load_data
    from .dataspec import DataSpec
    from .grid import estimate, expand, run_study
    from .leaderboards import export_fev, fev_summaries, leaderboard
    from .records import print_ranking, ranking
    from .report import load_results, print_table, table, write_report
    from .run import run_trial
    from .searching import search
    from .searchspec import SearchSpec, load_search, search_schema
    from .spec import TrainingSpec, TrialResult, TrialSpec
    from .strict import SpecError
    from .studyspec import StudySpec, load_study

_HOME = {
    "ClusterError": "cluster",
    "SearchSpec": "searchspec",
    "load_search": "searchspec",
    "on_ray": "cluster",
    "print_ranking": "records",
    "ranking": "records",
    "search": "searching",
    "search_schema": "searchspec",
    "DataSpec": "dataspec",
    "SpecError": "strict",
    "StudySpec": "studyspec",
    "TrainingSpec": "spec",
    "TrialResult": "spec",
    "TrialSpec": "spec",
    "estimate": "grid",
    "expand": "grid",
    "export_fev": "leaderboards",
    "fev_summaries": "leaderboards",
    "leaderboard": "leaderboards",
    "load_data": "data",
    "load_results": "report",
    "load_study": "studyspec",
    "print_table": "report",
    "run_study": "grid",
    "run_trial": "run",
    "table": "report",
    "write_report": "report",
}

__all__ = [
    "ClusterError",
    "DataSpec",
    "SearchSpec",
    "SpecError",
    "StudySpec",
    "TrainingSpec",
    "TrialResult",
    "TrialSpec",
    "estimate",
    "expand",
    "export_fev",
    "fev_summaries",
    "leaderboard",
    "load_data",
    "load_results",
    "load_search",
    "load_study",
    "on_ray",
    "print_ranking",
    "print_table",
    "ranking",
    "run_study",
    "run_trial",
    "search",
    "search_schema",
    "table",
    "write_report",
]


__getattr__ = loaded_on_use(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
