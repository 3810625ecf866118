import os
import sys
import textwrap
import venv
from pathlib import Path

import pytest

from benchmarks.speed import turns
from benchmarks.speed.turns import SIDES, AbsentError, Worker, WorkerError, measure, pin_to_cores, start_worker

WORKERS = Path(turns.__file__).parent / "workers"
CASE = {"what": "train", "threads": 1}


@pytest.fixture
def script(tmp_path):
    """Write a worker whose `load(case)` has the given body; return the command that runs it."""

    def write(body: str, name: str = "worker") -> list[str]:
        text = f"import sys\nsys.path.insert(0, {str(WORKERS)!r})\nimport os, protocol\ndef load(case):\n"
        file = tmp_path / f"{name}.py"
        file.write_text(text + textwrap.indent(body, "    ") + "\nprotocol.serve(load)\n")
        return [sys.executable, str(file)]

    return write


def start(command, case=CASE) -> Worker:
    return Worker("torch", command, case, environment=os.environ)


def test_worker_loads_the_case_and_runs_the_steps_asked_for(script):
    command = script("return (lambda n: n * case['scale']), {'scale': case['scale']}")
    with start(command, {"scale": 0.5}) as worker:
        assert worker.about["scale"] == 0.5
        assert worker.about["load_seconds"] >= 0
        assert [worker.run(n) for n in (1, 10)] == [0.5, 5.0]


def test_output_of_libraries_is_not_an_answer(script):
    body = "print('a banner'); os.system('echo another')\nreturn (lambda n: print('step') or 1.5), {}"
    with start(script(body)) as worker:
        assert worker.run(1) == 1.5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import no_such_framework", f"torch: No module named 'no_such_framework' in {sys.executable}"),
        ("raise protocol.UnsupportedError('it has no V5')", "torch: it has no V5"),
    ],
)
def test_an_absent_side_says_why(script, body, message):
    with pytest.raises(AbsentError) as error:
        start(script(body))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('boom')", "torch ended with exit code 1: KeyError: 'boom'"),
        ("os._exit(7)", "torch ended with exit code 7: it said nothing"),
        ("os.kill(os.getpid(), 9)", "torch ended with exit code -9: it said nothing"),
    ],
)
def test_side_that_dies_while_loading_is_one_sentence(script, body, message):
    with pytest.raises(WorkerError) as error:
        start(script(body))
    assert str(error.value) == message


def test_side_that_dies_while_running_is_one_sentence(script):
    worker = start(script("return (lambda n: 1 / (2 - n)), {}"))
    with worker:
        assert worker.run(1) == 1
        message = "^torch ended with exit code 1: ZeroDivisionError: division by zero$"
        for _ in range(2):  # the second time, the process has ended
            with pytest.raises(WorkerError, match=message):
                worker.run(2)


@pytest.mark.parametrize("line", ["Segmentation fault", '{"other": 1}', "12"])
def test_output_that_is_not_an_answer_is_one_sentence(line):
    command = [sys.executable, "-c", f"input(); print({line!r}, flush=True); input()"]
    with pytest.raises(WorkerError) as error:
        start(command)
    assert str(error.value) == f"torch answered {line!r}, where about or absent was expected"


@pytest.fixture
def sides(script, monkeypatch):
    """Install sides that log their turns in a file and return made-up times."""

    def install(log: Path, **bodies: str) -> None:
        note = f"log = open({str(log)!r}, 'a')\nsteps = []\n"
        files = {side: script(note + body, side)[1] for side, body in bodies.items()}
        monkeypatch.setitem(SIDES, "train", files)

    return install


def take(side: str, seconds: str) -> str:
    """Return the body of a worker whose steps take `seconds`, an expression of the number of its turn."""
    return (
        "def run(n):\n"
        f"    print({side!r}, n, file=log, flush=True); steps.append(n); turn = len(steps)\n"
        f"    return n * ({seconds})\n"
        "return run, {}"
    )


def test_sides_take_turns_of_equal_length_in_alternating_order(sides, tmp_path):
    log = tmp_path / "log"
    sides(log, ours=take("ours", "0.5"), torch=take("torch", "turn"))
    result = measure(CASE, ["ours", "torch"], pythons={}, rounds=3, seconds=4)
    order = [line.split() for line in log.read_text().splitlines()]
    # First the warm-up, then a quarter of a turn to count its steps (4 / 0.5, and 4 / 2), then three rounds, each after
    # half as many untimed steps.
    assert order[:5] == [["torch", "1"], ["ours", "1"], ["ours", "1"], ["ours", "2"], ["torch", "1"]]
    order = order[1:]
    assert order[4::2] == [["torch", "1"], ["ours", "4"], ["ours", "4"], ["torch", "1"], ["torch", "1"], ["ours", "4"]]
    assert order[5::2] == [["torch", "2"], ["ours", "8"], ["ours", "8"], ["torch", "2"], ["torch", "2"], ["ours", "8"]]
    assert result["sides"]["ours"]["seconds"] == [0.5] * 3
    assert result["sides"]["torch"]["seconds"] == [4, 6, 8]
    # one ratio for each round: 4 / 0.5, 6 / 0.5, 8 / 0.5
    assert result["ratios"] == {"torch": {"median": 12, "min": 8, "max": 16}}


def test_other_sides_continue_when_a_side_dies_or_is_absent(sides, tmp_path):
    dying = take("torch", "1 / (3 - turn)")
    sides(tmp_path / "log", ours=take("ours", "1"), torch=dying, keras="import no_such_framework")
    result = measure(CASE, ["ours", "torch", "keras"], pythons={}, rounds=2, seconds=1)
    assert list(result["sides"]) == ["ours"]
    assert len(result["sides"]["ours"]["seconds"]) == 2
    assert result["failed"] == {"torch": "torch ended with exit code 1: ZeroDivisionError: division by zero"}
    assert result["absent"] == {"keras": f"keras: No module named 'no_such_framework' in {sys.executable}"}
    assert result["ratios"] == {}


def test_without_rounds_nothing_runs(sides, tmp_path):
    sides(tmp_path / "log", ours=take("ours", "1"))
    result = measure(CASE, ["ours"], pythons={}, rounds=0, seconds=1)
    assert result["sides"]["ours"]["seconds"] == []
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize(
    ("what", "side", "package"),
    [
        ("train", "torch", "torch"),
        ("infer", "torch_compile", "torch"),
        ("infer", "keras", "keras"),
        ("infer", "litert", "ai_edge_litert"),
        ("infer", "onnx", "onnxruntime"),
        ("input", "tfdata", "tensorflow"),
    ],
)
def test_peer_that_is_not_installed_is_named(tmp_path, what, side, package):
    venv.create(tmp_path, symlinks=True)
    python = str(tmp_path / "bin" / "python")
    case = {"what": what, "threads": 1, "name": "mobilenet_v2", "devices": 1, "resolution": 32, "batch_size": 1}
    with pytest.raises(AbsentError, match=f"^{side}: No module named '{package}' in {python}$"):
        start_worker(side, case, python=python)


def test_workers_start_with_the_threads_and_the_cores_they_are_given(script, monkeypatch):
    body = "return (lambda n: 0.0), {'threads': os.environ['OMP_NUM_THREADS'], 'cores': len(os.sched_getaffinity(0))}"
    monkeypatch.setitem(SIDES, "train", {"torch": script(body)[1]})
    before = os.sched_getaffinity(0)
    with pin_to_cores(1), start_worker("torch", CASE, python=sys.executable) as worker:
        assert (worker.about["threads"], worker.about["cores"]) == ("1", 1)
    assert os.sched_getaffinity(0) == before


def test_more_cores_than_the_machine_has_are_refused():
    count = len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match=f"^--threads is {count + 1}; this process may use {count} cores$"):  # noqa: SIM117
        with pin_to_cores(count + 1):
            pass


def test_every_worker_is_a_file():
    files = {name for sides in SIDES.values() for name in sides.values()}
    assert files == {path.name for path in WORKERS.glob("*_worker.py")}
    assert sorted(SIDES) == ["augment", "infer", "input", "memory", "train"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_peak_of_memory_is_that_of_the_steps(script):
    body = """
blob = b'x' * 300_000_000  # before the steps, as a compiler uses it
del blob
def run(steps):
    held = bytearray(100_000_000)
    held[::4096] = b'x' * len(held[::4096])
    return 1.0
before = protocol.measure_peak(lambda steps: 1.0)['peak_bytes']
return run, {'before': before, **protocol.measure_peak(run)}
"""
    with start(script(body)) as worker:
        assert 95e6 < worker.about["peak_bytes"] - worker.about["before"] < 110e6
