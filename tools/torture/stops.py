"""Sends SIGTERM at moments spread over a whole run. It ends in time, and the repeated command gives equal bits."""

import signal
import time

from tools.torture.trial import Place, TortureError, Trial

MOMENTS = 20
LIMIT = 30.0  # seconds from SIGTERM to the end, in addition to one step and one save, which take below a second here
CODES = (0, 5)  # done, or interrupted and saved


def trials(seconds: float) -> list[Trial]:
    """The trials of this file.

    Args:
        seconds: duration of an undisturbed run.
    """
    return [Trial("SIGTERM", f"after {(number + 0.5) / MOMENTS:.0%} of the run", stop_after,
                  (seconds * (number + 0.5) / MOMENTS,), "long") for number in range(MOMENTS)]


def stop_after(place: Place, seconds: float) -> str:
    """Send SIGTERM a number of seconds after the start. Return the exit code and the seconds to the end."""
    process = place.start()
    time.sleep(seconds)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    duration = time.monotonic() - begin
    place.check_output(code)
    if code not in CODES:
        raise TortureError(f"exit code {code}: {place.sentence()}")
    if duration > LIMIT:
        raise TortureError(f"{duration:.0f} s to the end: {place.sentence()}")
    return f"exit code {code} after {duration:.1f} s; then {place.repeat()}"
