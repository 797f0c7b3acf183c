"""What nbval does not compare: progress and warnings on stderr, and HTML, whose text form is compared instead."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "text/html", "application/javascript")
