"""A plugin of pytest: run one of several shares of the tests, and write down each result at once.

    PTQ4ADM_SHARD=0/12 PTQ4ADM_SHARD_LOG=FILE PYTHONPATH=benchmarks pytest -p gpu_shard -m gpu tests

Cases are dealt out in turns, so that the long ones of a file meet in no share. A line of the log is
"outcome seconds name"; it is there even if the process is killed at the next test.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARD, LOG = "PTQ4ADM_SHARD", "PTQ4ADM_SHARD_LOG"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every count-th test that the other options left."""
    index, count = (int(part) for part in os.environ[SHARD].split("/"))
    others = [item for i, item in enumerate(items) if i % count != index]
    items[:] = [item for i, item in enumerate(items) if i % count == index]
    config.hook.pytest_deselected(items=others)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down the result of a test; of its setup and end only what is no success."""
    if report.when == "call" or report.outcome != "passed":
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{report.outcome} {report.duration:.2f} {report.nodeid}\n")
