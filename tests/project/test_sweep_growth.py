"""benchmarks/growth/sweeps.py: its tables. Nothing is measured here."""

from benchmarks.growth.sweeps import describe_overhead, growth_rows


def test_what_one_more_run_costs_is_the_slope_between_numbers_of_runs() -> None:
    rows = list(growth_rows({10: {"compare": (1.0, 2.0)}, 100: {"compare": (1.9, 3.0)},
                                    1000: {"compare": (19.9, 30.0)}}))
    assert rows[2:] == ["| compare | 1.0 (2.0) | 1.9 (3.0) | 19.9 (30.0) | 10.0, then 20.0 |"]


def test_what_a_sweep_adds_is_the_time_of_its_process_that_belongs_to_no_run() -> None:
    rows = list(describe_overhead(4, 21.0, 20.0, [8.0, 2.5, 1.5, 3.5], [0.2, 0.3, 0.25, 0.25], [9.0, 7.0, 8.0]))
    assert rows[2:-2] == [
        "| one run, median without the first | 2.75 |", "| 4 runs | 16.5 |",
        "| what the sweep adds to them | 3.50 (21.2%) |",
        "| of that, composing every configuration before the first run | 1.00 |", "| the whole sweep | 21.0 |",
        "| 4 commands with one run each (3 measured, median 8.0) | 32 |"]
    assert rows[-1] == ("Extrapolated, a sweep of 1,000 such runs takes 3,632 CPU seconds, and 1,000 commands 8,000. "
                        "A sweep adds 1 % or less to runs of 88 CPU seconds or more.")
