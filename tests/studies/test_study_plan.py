from mobilenet_jax.studies.plan import estimate_time
from mobilenet_jax.studies.study import RunKey


def test_time_is_estimated_from_finished_runs_if_there_are_any():
    a, b, c = RunKey(0, "a"), RunKey(1, "a"), RunKey(0, "b")
    work = {a: 30e9, b: 30e9, c: 1200e9}
    assert estimate_time(work, [a, b, c], {}) == (
        "time: about 84 seconds, estimated at 15 G multiply-adds of training a second"
    )
    # A finished run of the same variant counts first, otherwise the work and time of all finished runs.
    assert estimate_time(work, [b, c], {a: 60.0}) == "time: about 41 minutes, estimated from 1 finished runs"
    assert estimate_time(work, [], {a: 60.0}) == "nothing is left to do"
