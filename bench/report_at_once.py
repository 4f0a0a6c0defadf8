"""A pytest plugin: says what failed when it fails, so that it is known also if the run is stopped."""

import faulthandler


def pytest_configure(config) -> None:
    faulthandler.enable()


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        print(f"\n--- {report.nodeid}, {report.when}\n{report.longreprtext}", flush=True)
