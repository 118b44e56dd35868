"""However a traced program ends, its run is closed with the right status; the end is its own."""

import errno
import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnprof
from attnprof.capture.endings import status_of
from attnprof.errors import CaptureError
from attnprof.store.writer import RunWriter
from attnprof.vocabulary import Status
from tests.capture.remains import list_remains
from tests.capture.scripts import run_script, start_script, wait_for_line

TOO_MANY_BYTES = 2**50


def end_by(error: BaseException, directory: Path) -> None:
    with attnprof.trace(directory):
        torch.ones(3).exp()
        raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("of the program"), Status.FAILED),
        (KeyboardInterrupt(), Status.INTERRUPTED),
        (SystemExit(), Status.COMPLETED),
        (SystemExit(0), Status.COMPLETED),
        (SystemExit(3), Status.FAILED),
        (SystemExit("no such file"), Status.FAILED),
        (MemoryError(), Status.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), Status.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), Status.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), Status.OUT_OF_MEMORY),
        (RuntimeError("something else"), Status.FAILED),
    ],
    ids=repr,
)
def test_ending_by_exception_gives_status(
    error: BaseException, status: Status, tmp_path: Path
) -> None:
    with pytest.raises(type(error)) as caught:
        end_by(error, tmp_path)
    assert caught.value is error
    assert attnprof.load(tmp_path).status is status


def test_ending_normally_gives_completed(tmp_path: Path) -> None:
    with attnprof.trace(tmp_path) as tracer:
        torch.ones(3).exp()
    assert tracer.run.status is Status.COMPLETED
    assert attnprof.load(tmp_path).status is Status.COMPLETED


def test_ending_out_of_cpu_memory_gives_out_of_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="allocate memory"), attnprof.trace(tmp_path):
        torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)
    assert attnprof.load(tmp_path).status is Status.OUT_OF_MEMORY


def test_ending_out_of_memory_inside_a_model_gives_out_of_memory(tmp_path: Path) -> None:
    class Greedy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.expand(TOO_MANY_BYTES // x.nbytes, *x.shape).clone()

    with pytest.raises(RuntimeError, match="allocate memory"), attnprof.trace(tmp_path):
        Greedy()(torch.ones(4))
    run = attnprof.load(tmp_path)
    assert run.status is Status.OUT_OF_MEMORY
    assert run.peak().total_bytes == 4 * 4


def test_ending_by_exception_is_noted_in_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of the program"):
        end_by(ValueError("of the program"), tmp_path)
    error = attnprof.load(tmp_path).info["error"]
    assert error == {"type": "ValueError", "message": "of the program"}


def test_ending_by_exception_without_text_is_noted(tmp_path: Path) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    with pytest.raises(Mute):
        end_by(Mute(), tmp_path)
    assert "ZeroDivisionError" in attnprof.load(tmp_path).info["error"]["message"]


def fail_plainly() -> None:
    raise ArithmeticError("of the program")


def fail_in_an_op() -> None:
    torch.ones(2, 3) @ torch.ones(4, 5)


def fail_in_forward() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("of the program")

    nn.Sequential(nn.Linear(2, 2), Failing())(torch.ones(1, 2))


def fail_in_backward() -> None:
    def fail(grad: Tensor) -> None:
        raise ArithmeticError("of the program")

    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.register_hook(fail)
    y.sum().backward()


def fail_in_an_optimizer() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ArithmeticError("of the program")

    Failing([torch.ones(1, requires_grad=True)]).step()


def fail_for_a_reason() -> None:
    try:
        fail_plainly()
    except ArithmeticError as reason:
        raise LookupError("of the program") from reason


FAILURES = [
    fail_plainly,
    fail_in_an_op,
    fail_in_forward,
    fail_in_backward,
    fail_in_an_optimizer,
    fail_for_a_reason,
]


@pytest.mark.parametrize("program", FAILURES)
def test_ending_by_exception_keeps_type_message_and_reason(program: Callable[[], None]) -> None:
    def describe(error: BaseException | None) -> list[str]:
        return [] if error is None else [repr(error), *describe(error.__cause__)]

    with pytest.raises(Exception) as untraced:  # noqa: PT011 (whatever it is, it is the same)
        program()
    with pytest.raises(type(untraced.value)) as traced, attnprof.trace():
        program()
    assert describe(traced.value) == describe(untraced.value)


@pytest.mark.parametrize("program", FAILURES)
def test_ending_by_exception_shows_no_frame_of_ours(program: Callable[[], None]) -> None:
    with pytest.raises(Exception) as caught, attnprof.trace():  # noqa: PT011 (see above)
        program()
    frames = traceback.extract_tb(caught.value.__traceback__)
    own = os.path.dirname(attnprof.__file__)
    assert [frame for frame in frames if frame.filename.startswith(own)] == []
    assert program.__name__ in [frame.name for frame in frames]


def test_ending_by_closing_a_generator_gives_completed(tmp_path: Path) -> None:
    def produce() -> Iterator[Tensor]:
        with attnprof.trace(tmp_path):
            yield torch.ones(2)
            yield torch.ones(3)

    generator = produce()
    next(generator)
    generator.close()
    assert attnprof.load(tmp_path).status is Status.COMPLETED


def test_ending_in_another_thread_gives_completed(tmp_path: Path) -> None:
    before = list_remains()

    def work() -> None:
        with attnprof.trace(tmp_path):
            nn.Linear(3, 3)(torch.ones(2, 3)).sum().backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    run = attnprof.load(tmp_path)
    assert run.status is Status.COMPLETED
    assert set(run.allocations["phase"].cast(str)) >= {"forward", "backward"}
    assert list_remains() == before


def run_in_a_thread(work: Callable[[], object]) -> list[BaseException]:
    """Run ``work`` to its end in a thread of its own; return what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    while thread.is_alive():  # ops are under way here when the trace ends
        torch.ones(3).exp()
    thread.join()
    return raised


def test_ending_elsewhere_than_it_began_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    before = list_remains()
    tracer = attnprof.trace(tmp_path)
    tracer.__enter__()
    kept = nn.Linear(3, 3)(torch.ones(2, 3))
    (refused,) = run_in_a_thread(lambda: tracer.__exit__(None, None, None))
    assert isinstance(refused, CaptureError)
    assert "must end in the thread that began it, MainThread, and this is other" in str(refused)
    torch.ones(3).exp()
    assert list_remains() == before
    run = attnprof.load(tmp_path)
    assert run.status is Status.FAILED
    assert kept.nbytes in run.allocations["size_bytes"]
    tracer.__exit__(None, None, None)  # who then ends it where it began does no harm
    with attnprof.trace() as following:
        torch.ones(3)
    assert following.run.status is Status.COMPLETED


def test_ending_by_closing_a_generator_elsewhere_is_refused(tmp_path: Path) -> None:
    def produce() -> Iterator[Tensor]:
        with attnprof.trace(tmp_path):
            yield torch.ones(2)

    before = list_remains()
    generator = produce()
    next(generator)
    (refused,) = run_in_a_thread(generator.close)
    assert isinstance(refused, CaptureError)
    assert list_remains() == before
    assert attnprof.load(tmp_path).peak().total_bytes >= 2 * 4


def test_ending_elsewhere_by_exception_passes_it_on(tmp_path: Path) -> None:
    def produce() -> Iterator[Tensor]:
        with attnprof.trace(tmp_path):
            yield torch.ones(2)
            raise LookupError("of the program")

    before = list_remains()
    generator = produce()
    next(generator)
    (raised,) = run_in_a_thread(lambda: next(generator))
    assert repr(raised) == "LookupError('of the program')"
    assert list_remains() == before
    assert attnprof.load(tmp_path).info["error"]["type"] == "LookupError"


def test_ending_leaves_own_sigterm_handler_of_the_program(tmp_path: Path) -> None:
    heard = []

    def own(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGTERM, own)
    try:
        with attnprof.trace(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert attnprof.load(tmp_path).status is Status.COMPLETED


def test_ending_leaves_sigterm_handler_set_meanwhile() -> None:
    def own(number: int, frame: FrameType | None) -> None: ...

    before = signal.getsignal(signal.SIGTERM)
    try:
        with attnprof.trace():
            signal.signal(signal.SIGTERM, own)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ending_by_sigterm_closes_the_run_and_kills(tmp_path: Path) -> None:
    program = """
    with attnprof.trace(directory) as tracer:
        for number in range(1_000_000):
            step()
            tracer.step()
            if number == 3:
                print("under way", flush=True)
    """
    with start_script(program, tmp_path / "run") as process:
        wait_for_line(process, "under way")
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    run = attnprof.load(tmp_path / "run")
    assert run.status is Status.INTERRUPTED
    assert run.info["status"] == "interrupted"  # said by the program itself, not inferred
    assert len(run.steps) >= 3


def test_ending_by_sigterm_within_a_commit_loses_that_commit_only(tmp_path: Path) -> None:
    program = """
    from attnprof.store.writer import RunWriter

    with attnprof.trace(directory, samples_per_second=0) as tracer:
        for number in range(3):
            step()
            tracer.step()
        RunWriter.commit = lambda *args: signal.raise_signal(signal.SIGTERM)
        step()
        tracer.step()
    """
    finished = run_script(program, tmp_path / "run")
    assert finished.returncode == -signal.SIGTERM, finished.stderr
    run = attnprof.load(tmp_path / "run")
    assert run.info["status"] == "interrupted"
    assert len(run.steps) == 3
    assert run.steps["ops"].n_unique() <= 2  # the first step differs: it makes the gradients


def test_ending_by_sigkill_keeps_finished_steps(tmp_path: Path) -> None:
    program = """
    with attnprof.trace(directory) as tracer:
        for number in range(4):
            step()
            tracer.step()
        model[0].register_forward_hook(lambda *_: print("in a step", flush=True))
        model[0].register_forward_hook(lambda *_: threading.Event().wait())
        step()
    """
    with start_script(program, tmp_path / "run") as process:
        wait_for_line(process, "in a step")
        assert attnprof.load(tmp_path / "run").status is Status.RECORDING
        process.kill()
        process.communicate(timeout=60)
    run = attnprof.load(tmp_path / "run")
    assert run.status is Status.INTERRUPTED
    first, *others = run.steps["ops"].to_list()[:4]
    assert len(set(others)) == 1  # whole steps, all alike after the first, which makes gradients
    assert first > 0
    assert run.peak().total_bytes == sum(run.peak().by_category().values()) > 0


def test_ending_by_os_exit_keeps_finished_steps(tmp_path: Path) -> None:
    finished = run_script(
        """
        with attnprof.trace(directory) as tracer:
            step()
            tracer.step()
            os._exit(5)
        """,
        tmp_path / "run",
    )
    assert finished.returncode == 5, finished.stderr
    run = attnprof.load(tmp_path / "run")
    assert run.status is Status.INTERRUPTED
    assert len(run.steps) == 1


def test_ending_by_sys_exit_keeps_the_exit_code(tmp_path: Path) -> None:
    finished = run_script(
        """
        with attnprof.trace(directory):
            step()
            sys.exit(7)
        """,
        tmp_path / "run",
    )
    assert finished.returncode == 7, finished.stderr
    assert finished.stderr == ""
    assert attnprof.load(tmp_path / "run").status is Status.FAILED


def test_ending_of_an_unfinished_trace_at_interpreter_exit_is_quiet(tmp_path: Path) -> None:
    finished = run_script("attnprof.trace(directory).__enter__(); step()", tmp_path / "run")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert attnprof.load(tmp_path / "run").status is Status.INTERRUPTED


def test_interrupt_within_a_commit_loses_that_commit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list_remains()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    def program() -> None:
        with attnprof.trace(tmp_path) as tracer:
            torch.ones(3).exp()
            tracer.step()
            with monkeypatch.context() as patch:
                patch.setattr(RunWriter, "commit", interrupt)
                torch.ones(5).exp()
                tracer.step()

    with pytest.raises(KeyboardInterrupt):
        program()
    run = attnprof.load(tmp_path)
    assert run.status is Status.INTERRUPTED
    assert run.allocations["size_bytes"].to_list() == [3 * 4, 3 * 4]
    assert list_remains() == before


def test_full_disk_stops_the_recording_and_not_the_program(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = list_remains()
    done = []

    def program() -> None:
        with attnprof.trace(tmp_path, samples_per_second=0) as tracer:
            torch.ones(3).exp()
            tracer.step()
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
            for number in range(200):
                torch.ones(5).exp()
                tracer.step()
                done.append(number)

    try:
        with pytest.warns(RuntimeWarning, match="stopped recording") as warned:
            program()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(done) == 200
    assert len(warned) == 1
    run = attnprof.load(tmp_path)
    assert run.status is Status.COMPLETED
    assert os.strerror(errno.EFBIG) in run.info["recording_stopped"]
    assert 3 * 4 in run.allocations["size_bytes"]
    assert list_remains() == before


def test_failing_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list_remains()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ArithmeticError

    with monkeypatch.context() as patch:
        patch.setattr("attnprof.capture.tracer.watch_backward", fail)
        with pytest.raises(ArithmeticError), attnprof.trace():
            pytest.fail("it must not begin")
    assert list_remains() == before
    with attnprof.trace() as tracer:
        torch.ones(3)
    assert tracer.run.status is Status.COMPLETED


FORKS = """
import time, warnings
from attnprof.capture import devices
from attnprof.store.writer import RunWriter

# Python 3.12 warns of every fork in a process with threads, and the sampler is one.
warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)

def fork(work):
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            sys.stdout.flush()
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def work():
    for _ in range(3):
        step()
        optimizer.step()
    if attnprof.capture.tracer._active is not None:
        print("the child is traced")
    if torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        print("the child has a mode")
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        print("the child has a handler")

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with attnprof.trace(directory) as tracer:
    step()
    tracer.step()
    fork(work)
    fork(lambda: tracer.__exit__(None, None, None))
    fork(lambda: signal.raise_signal(signal.SIGTERM))
    step()
    tracer.step()

with attnprof.trace() as temporary:
    step()
    child = os.fork()
    if not child:
        sys.exit(0)  # the whole way out: the end of 'with', and what runs at exit
    os.waitpid(child, 0)
print("temporary run:", attnprof.load(temporary.run.path).status)

committing = threading.Event()

def commit_slowly(writer, columns):
    committing.set()
    time.sleep(0.2)
    commit(writer, columns)
    committing.clear()

def ask():
    if committing.is_set():
        print("the child was forked in the middle of a commit")

RunWriter.commit, commit = commit_slowly, RunWriter.commit
devices.COMMIT_SECONDS = 0
with attnprof.trace(samples_per_second=100):
    committing.wait()
    fork(ask)
RunWriter.commit = commit

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, item):
        return torch.full((4,), item) * 2.0

with attnprof.trace(sys.argv[1] + "-loader") as tracer:
    loader = torch.utils.data.DataLoader(
        Data(), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    for batch in loader:
        model(batch).sum().backward()
print("batches:", len(tracer.run.steps))
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run a program that forks inside traces; return its run and what it said."""
    directory = tmp_path_factory.mktemp("forks") / "run"
    finished = run_script(FORKS, directory)
    assert finished.returncode == 0, finished.stderr
    return directory, finished.stdout


def test_fork_does_not_write_into_the_run_of_its_parent(forks: tuple[Path, str]) -> None:
    run = attnprof.load(forks[0])
    assert run.status is Status.COMPLETED
    assert len(run.steps) == 2
    assert "optimizer" not in set(run.allocations["phase"].cast(str))


def test_fork_is_not_traced(forks: tuple[Path, str]) -> None:
    assert "the child" not in forks[1]


def test_fork_leaves_the_temporary_run_of_its_parent(forks: tuple[Path, str]) -> None:
    assert "temporary run: completed" in forks[1].splitlines()


def test_data_loader_with_workers_works_inside_a_trace(forks: tuple[Path, str]) -> None:
    assert "batches: 4" in forks[1].splitlines()
    run = attnprof.load(Path(str(forks[0]) + "-loader"))
    assert run.status is Status.COMPLETED
    inputs = run.allocations.filter(run.allocations["category"].cast(str) == "inputs")
    assert inputs["size_bytes"].to_list() == 4 * [2 * 4 * 4]


def test_status_of_no_error_is_completed() -> None:
    assert status_of(None) is Status.COMPLETED
