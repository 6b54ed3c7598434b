"""The trace tool's file, in the trace-event format."""

from internvl_megatron.parallel.layout import Layout
from tools.trace_step import chrome_trace

RANKS = [[("encode", 10.0, 10.5), ("decode", 10.5, 12.0)], [("encode", 10.25, 10.5), ("decode", 11.0, 12.0)]]


def test_times_are_microseconds_from_the_first_mark():
    trace = chrome_trace(RANKS, Layout(1, 2, 1))
    phases = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(e["tid"], e["name"], e["ts"], e["dur"]) for e in phases] == [
        (0, "encode", 0.0, 5e5),
        (0, "decode", 5e5, 1.5e6),
        (1, "encode", 2.5e5, 2.5e5),
        (1, "decode", 1e6, 1e6),
    ]
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    assert names == ["rank 0 (stage 0, replica 0)", "rank 1 (stage 1, replica 0)"]
