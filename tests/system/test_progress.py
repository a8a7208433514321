"""One bar on a terminal, plain lines elsewhere; one count of cores."""

import io
import logging
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest

from lab.system import cores, distributed, progress

LINE = "{text}: {done} of {total}, {left:.0f} s left"
log = logging.getLogger("spurious.test")


@pytest.fixture
def console(monkeypatch, caplog):
    """console(live) -> standard error, a terminal or not; steps of the clock last a second."""
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    caplog.set_level("DEBUG", "spurious.test")

    def make(live):
        stream = io.StringIO()
        stream.isatty = lambda: live
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return make


def shown(total=10, **options):
    with progress.Progress(log, LINE, total, **options) as bar:
        for done in range(max(options.get("start", 0), 0) + 1, total + 1):
            bar.show(done, f"step {done}")


def test_lines_without_a_terminal(console, caplog):
    stream = console(live=False)
    shown(every_steps=4)
    assert caplog.messages == [
        "step 4: 4 of 10, 6 s left", "step 8: 8 of 10, 2 s left", "step 10: 10 of 10, 0 s left",
    ]  # fmt: skip
    assert stream.getvalue() == ""
    assert {record.levelname for record in caplog.records} == {"INFO"}
    caplog.clear()
    shown(every_seconds=4)
    assert [message.split(":")[0] for message in caplog.messages] == ["step 4", "step 8", "step 10"]


def test_steps_of_an_earlier_process_do_not_count_for_the_time_left(console, caplog):
    console(live=False)
    shown(start=8)
    assert caplog.messages == ["step 9: 9 of 10, 1 s left", "step 10: 10 of 10, 0 s left"]


def test_a_bar_on_a_terminal_and_every_line_in_the_log(console, caplog, monkeypatch):
    monkeypatch.setattr(progress.time, "perf_counter", time.perf_counter)
    stream = console(live=True)
    shown(every_steps=4, bar="{n_fmt}/{total_fmt} {desc}")
    assert "10/10 step 10" in stream.getvalue()
    assert len(caplog.records) == 10
    assert {record.levelname for record in caplog.records} == {"DEBUG"}  # not above the bar
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    stream = console(live=True)
    shown()
    assert stream.getvalue() == ""


def test_the_cores_are_divided_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 7)
    assert cores.available() == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cores.available() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores.available() == 1


def test_the_foundations_import_no_torch():
    names = ("command", "cores", "errors", "files", "memory", "progress")
    imports = ", ".join(f"lab.system.{name}" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {imports}; print('torch' in sys.modules)"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"
