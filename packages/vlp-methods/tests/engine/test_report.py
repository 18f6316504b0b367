import io
import json
import logging

import pytest
from vlp_methods.engine.report import Logging, Meter, Reporter, Screen, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def talk(stream, tmp_path):
    """Two reports with a log line between them."""
    with Logging(Screen(stream)) as screen:
        screen.to_file(tmp_path / "log.txt")
        reporter = Reporter(tmp_path / "metrics.jsonl", [], steps=20)
        reporter.start(0, 0)
        for step in (10, 20):
            reporter.losses(step, {"itc": step / 3}, 1e-4, {"images": step * 8})
            if step == 10:
                logging.getLogger("vlp_data.loader").warning("skipped cat.jpg")
        reporter.close()
    return stream.getvalue()


def test_terminal_shows_one_rewritten_line_below_the_log(tmp_path):
    first, above, second = talk(Terminal(), tmp_path).split("\r\x1b[K")[1:]
    assert first.startswith("step 10/20  itc 3.333  lr 0.0001  ")
    assert "samples/s  ETA 0:00" in first
    assert above == f"skipped cat.jpg\n{first}"  # the progress line is drawn again under it
    assert second.startswith("step 20/20")
    assert second.endswith("\n")


def test_file_gets_one_line_per_report(tmp_path):
    lines = talk(io.StringIO(), tmp_path).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 10/20", "skipped cat.jpg", "step 20/20"]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


def test_metrics_hold_the_exact_numbers(tmp_path):
    talk(io.StringIO(), tmp_path)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["losses"]["itc"] == 10 / 3
    assert (second["step"], second["samples"], second["lr"]) == (20, {"images": 160}, 1e-4)


def test_rates_leave_out_what_was_skipped(tmp_path, monkeypatch):
    now = iter([0.0, 0.0, 2.0, 52.0, 54.0, 54.0])  # made, start, pause, skip, losses, start
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    reporter = Reporter(tmp_path / "metrics.jsonl", [], steps=20)
    reporter.start(0, 0)
    paused = reporter.pause()
    reporter.skip(paused)  # 50 s of evaluation
    reporter.losses(10, {}, 0.1, {"images": 80})
    reporter.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["samples_per_second"], line["seconds_per_step"]) == (20.0, 0.4)


def test_meter_survives_json_and_leaves_out_what_is_not_finite():
    meter, other = Meter(), Meter()
    for value in (0.1, 0.2, float("inf")):
        meter.add({"a": value})
    other.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert other.take() == meter.take() == {"a": pytest.approx(0.15)}
    assert other.take() == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (400000, "111:06:40")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
