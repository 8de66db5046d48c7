"""Live bytes over time, storage by storage."""

import torch

from revnet.profiling import MemoryTimeline


def test_timeline_counts_births_and_deaths():
    x = torch.zeros(1000)
    with MemoryTimeline([x]) as timeline:
        a = x + 1
        b = a * 2
        moment = timeline.now()
        del a
        c = b.view(10, 100)
    assert timeline.peak() == 8000
    assert timeline.live(moment) == 8000
    assert timeline.live() == 4000
    assert timeline.live(without=[c]) == 0
    assert timeline.bytes_over_time() == [4000, 8000, 4000]


def test_a_sparse_tensor_takes_its_indices_and_its_values():
    dense = torch.eye(100)
    with MemoryTimeline([dense]) as timeline:
        sparse = dense.to_sparse()
        moment = timeline.now()
    assert timeline.live(moment) == 100 * (2 * 8 + 4)
    assert timeline.live(moment, without=[sparse]) == 0
    with MemoryTimeline([sparse]) as timeline:
        sparse.coalesce()
    assert timeline.peak() == 0


def test_peaks_between_moments_and_their_parts():
    x = torch.zeros(1000)
    with MemoryTimeline([x]) as timeline:
        kept = x + 1
        gone = x + 1
        between = timeline.now()
        del gone
        low = timeline.now()
        new = [kept * 2 for _ in range(3)]
        high = timeline.now()
        new.clear()
    assert timeline.peak() == 16000
    assert timeline.peak(until=between) == timeline.peak(until=low) == 8000
    assert timeline.peak(since=low, until=low) == 4000
    assert timeline.peak(since=high) == 16000
    assert timeline.peak_parts(between) == (4000, 12000)
    assert timeline.peak_parts(between, until=low) == (8000, 0)
    assert timeline.peak_parts(between, without=[kept]) == (0, 12000)
    assert MemoryTimeline().peak() == MemoryTimeline().live() == 0
