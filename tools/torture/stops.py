"""Sends SIGTERM at named moments of a run. The run ends in time, and the repeated command gives equal bits."""

import signal

from tests.support.moments import MOMENTS, stop_at
from tools.torture.trial import Place, TortureError, Trial

LIMIT = 30.0  # seconds from SIGTERM to the end, in addition to one step and one save, which take below a second here
CODES = (0, 5)  # done, or interrupted and saved


def trials() -> list[Trial]:
    """The trials of this file."""
    return [Trial("SIGTERM", moment.replace("_", " "), stop_and_repeat, (moment,), "with evaluation")
            for moment in MOMENTS]


def stop_and_repeat(place: Place, moment: str) -> str:
    """Send SIGTERM at a moment of tests/support/moments.py. Return the exit code and the seconds to the end."""
    stopped = stop_at(place.folder, moment, *place.settings, log=place.log)
    place.check_output(stopped.code)
    ended = stopped.code == -signal.SIGTERM and (place.run_dir / "result.json").is_file()  # after the run itself
    if stopped.code not in CODES and not ended:
        raise TortureError(f"exit code {stopped.code}: {place.sentence()}")
    if stopped.seconds > LIMIT:
        raise TortureError(f"{stopped.seconds:.0f} s to the end: {place.sentence()}")
    return f"exit code {stopped.code} after {stopped.seconds:.1f} s; then {place.repeat()}"
