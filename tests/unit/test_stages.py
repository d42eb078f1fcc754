"""The stages of an engine's start, as whoever waits for it sees them."""

import io
import re
import threading

from rich.console import Console

from polar_ray import Scorer
from polar_ray.corpus.progress import LogProgress
from polar_ray.corpus.tracker import JobTracker
from polar_ray.stages import stage, watched


def test_stages_are_shown_as_they_begin_and_timed_as_they_end():
    lines = []
    with watched(lines.append):
        with stage("outer"), stage("inner, 50 % done"):
            assert lines == ["outer", "inner, 50 % done"]
        thread = threading.Thread(target=lambda: stage("elsewhere").__enter__())
        thread.start()
        thread.join()
    with stage("unseen"):
        pass
    assert [re.sub(r"\d+\.\d s$", "N s", line) for line in lines[2:]] == [
        "inner, 50 % done: N s",
        "outer: N s",
        "elsewhere",
    ]


def test_an_engine_loads_and_is_then_held_to_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = []
    with watched(lines.append):
        Scorer.open().close()
    begun = [line for line in lines if not line.endswith(" s")]
    assert begun == [
        "loading torch, 8 MB of weights",
        "holding torch to float32 of the weights",
        "computing float32 rewards of the parity panel, once a node",
    ]


def test_a_log_has_each_stage_once_and_none_when_engines_are_up():
    written, tracker = io.StringIO(), JobTracker()
    with LogProgress(Console(file=written)).scoring(10, 0, 1) as show:
        for text in ("hashing the weights", "hashing the weights", "loading torch"):
            tracker.stage(text)
            show(tracker.snapshot())
        tracker.started()
        tracker.stage("loading another")
        show(tracker.snapshot())
    assert written.getvalue().splitlines() == ["hashing the weights", "loading torch"]
