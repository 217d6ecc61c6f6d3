"""SIGKILL at random moments of real builds and conversions, restarted until done."""

from tests.faults import run_faults

OPERATIONS = ("build", "compact", "hydrate")


def test_killed_operations_end_in_the_bytes_of_undisturbed_ones() -> None:
    chosen = [part for name in OPERATIONS for part in ("--operation", name)]
    told = run_faults("kills", *chosen, "--count", 6)
    assert len(told) == 6
    for name, tally in told.items():
        assert (tally["kills"], tally["failures"]) == (2, []), name
