"""When a trace records every op of a training loop, and when it only reads counters.

Steps of training repeat each other. Where CUDA's allocator counts, the first ones are recorded in
full. After that the dispatch mode leaves the program alone, and at the end of each step the
allocator's counters are read; when the peak has risen, the steps that follow are recorded in full.

Known limitations:
    The allocator's counter of peaks never falls by itself, and it is not ours to reset. What a
    step needed is known where the counter rose in it; else only that it did not need more.
    The step in which the counter rose has passed by then: what is recorded are those after it.
    A program that enters a dispatch mode of its own inside the trace is recorded in full meanwhile.
"""

import threading
import time

import torch

from attnprof.capture.cuda import AllocatorHistory
from attnprof.capture.cuda_counters import Counters
from attnprof.capture.recorder import Recorder
from attnprof.capture.threads import ThreadModes

FIRST_STEPS = 3
"""Steps recorded in full: one that makes the optimizer's state, one like all others, and one more
that shows it."""
MORE_STEPS = 2
"""Steps recorded in full after a peak has risen."""
RISE = 1.01
"""How much higher a peak must be for steps to be recorded again."""
COMMIT_SECONDS = 1.0
"""After this long what was counted is written down, for those who follow the run."""


class DetailSwitch:
    """Whether ops are recorded now; decided between the steps of a training loop."""

    def __init__(
        self, recorder: Recorder, modes: ThreadModes, history: AllocatorHistory | None
    ) -> None:
        """Decide for a trace.

        Args:
            recorder: Receives a row per step that is only counted.
            modes: What records ops, left and entered again.
            history: Whose counters decide; without it every step is recorded in full.
        """
        self.is_on = True
        """Whether ops are recorded. While it is off no module call is open."""
        self.awaits_forward = False
        """An optimizer has stepped: the next forward begins another step."""
        self._recorder = recorder
        self._modes = modes
        self._history = history
        self._thread = threading.get_ident()
        self._has_marks = False
        self._has_update = False
        self._left = FIRST_STEPS
        self._reached: dict[int, int] = {}
        """Per device, the highest peak by the end of a step that was recorded in full."""
        self._counters: dict[int, Counters] = {}
        """What they were when the step that is being counted began."""
        self._begin_ns = 0
        self._counted = 0
        self._committed_ns = 0

    def note_update(self) -> None:
        """An optimizer has stepped."""
        self._has_update = self._history is not None
        self.awaits_forward = self._has_update and not self._has_marks

    def note_mark(self) -> None:
        """The program said that a step ends; only what it says counts from now on."""
        self._has_marks = True
        self.awaits_forward = False
        if self._has_update:
            self.begin_step()

    def begin_step(self) -> None:
        """A step has ended and another one begins: decide how much of it is recorded."""
        if threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1:
            return
        self.awaits_forward = self._has_update = False
        counters = self._history.count() if self._history is not None else {}
        if not counters:
            return
        if not self.is_on:
            self._end_counted(counters)
            return
        for device, now in counters.items():
            self._reached[device] = max(self._reached.get(device, 0), now.peak_bytes)
        self._left -= 1
        if self._left <= 0:
            self._switch_off(counters)

    def finish(self) -> None:
        """The trace ends: note the step that was being counted, and what is live now."""
        if self.is_on or self._history is None:
            return
        if self._has_update or not self._has_marks:
            self._note_step(self._history.count())
        self._history.resume()

    def _switch_off(self, counters: dict[int, Counters]) -> None:
        assert self._history is not None
        self._recorder.commit()
        if self._modes.pause():
            self._history.pause()
            self.is_on = False
            self._begin(counters)

    def _end_counted(self, counters: dict[int, Counters]) -> None:
        assert self._history is not None
        self._note_step(counters)
        has_risen = any(
            now.peak_bytes > RISE * self._reached.get(device, 0) for device, now in counters.items()
        )
        if has_risen and self._modes.resume():
            self._history.resume()
            self.is_on = True
            self._left = MORE_STEPS
        self._begin(counters)

    def _begin(self, counters: dict[int, Counters]) -> None:
        self._counters = counters
        self._begin_ns = time.perf_counter_ns()

    def _note_step(self, counters: dict[int, Counters]) -> None:
        now_ns = time.perf_counter_ns()
        nothing = Counters(0, 0, 0, 0)
        for device, now in counters.items():
            before = self._counters.get(device, nothing)
            has_risen = now.peak_bytes > before.peak_bytes
            reserved_rose = now.reserved_peak_bytes > before.reserved_peak_bytes
            self._recorder.counted_steps.append(
                (
                    self._recorder.count_ops(),
                    self._counted,
                    self._recorder.find_device(torch.device("cuda", device)),
                    self._begin_ns,
                    now_ns,
                    now.allocated_bytes,
                    now.peak_bytes if has_risen else -1,
                    now.reserved_peak_bytes
                    if reserved_rose
                    else max(before.reserved_bytes, now.reserved_bytes),
                )
            )
        self._counted += 1
        if now_ns - self._committed_ns > COMMIT_SECONDS * 1e9:
            self._committed_ns = now_ns
            self._recorder.commit()
