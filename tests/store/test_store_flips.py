from tests.faults import run_faults


def test_no_damage_to_a_real_store_is_read_as_sound() -> None:
    """Every file of a store with raw, q8, compact and edge arrays, one damage each."""
    told = run_faults("flips", "--count", 1)
    assert {"shards, raw", "shards, q8", "shards, compact"} < told.keys()
    assert {"metadata", "index", "digests", "shards of edges"} < told.keys()
    for kind, tally in told.items():
        assert tally["found"] == len(tally["files"]), kind
        assert tally["failures"] == [], kind
        # Nothing that is read needs the records, or chunks that belong to no sample.
        assert (tally["refused"] > 0) is (kind != "commit records"), kind
