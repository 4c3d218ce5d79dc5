"""benchmarks/growth/photos.py: its table. Nothing is measured here."""

from benchmarks.growth.photos import KINDS, PHASES, photo_rows


def test_the_last_row_of_a_start_is_what_one_more_photo_costs() -> None:
    def start(count: int) -> dict[str, float]:
        phases = {name: number + 0.002 * count for number, name in enumerate(PHASES)}
        return phases | {"all": 10 + 0.01 * count, "all wall": 30.0, "hash wall": 1.0, "decoded": count,
                         "peak_mib": 500 + count / 64}

    rows = list(photo_rows({count: dict.fromkeys(KINDS, start(count)) for count in (10, 100, 1000)}))
    assert len(rows) == 2 + 4 * len(KINDS)
    assert {row.count("|") for row in rows} == {rows[1].count("|")}
    assert rows[2] == "| first | 10 | 10 | 0.02 | 1.02 | 2.02 | 3.02 | 4.02 | 10.12 | 31.0 | 500 |"
    assert rows[5] == ("| first | each more | | " + "2.00 ms | " * len(PHASES) + "12.00 ms | | 16.0 KiB |")
