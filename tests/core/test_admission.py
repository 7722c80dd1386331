"""Who runs, who waits, who is turned away: a machine beside a model of two lists."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tokenwire.core.admission import Admission, Place
from tokenwire.core.collect import Result
from tokenwire.core.contracts import Reply
from tokenwire.core.delivery import ResultDelivery
from tokenwire.core.events import StreamStart, Terminal
from tokenwire.core.http import ResponseWriter
from tokenwire.core.line import Line
from tokenwire.core.request import GenerationRequest
from tokenwire.core.stream import Stream


def reply(outcome: Result | Terminal) -> Reply:
    del outcome
    return Reply(200)


def line() -> Line:
    delivery = ResultDelivery(reply, ResponseWriter(), reply)
    return Line(Stream(StreamStart("s", "m", 0)), GenerationRequest(model="m", messages=()), delivery)


def test_first_come_first_served() -> None:
    admission = Admission(max_running=1, max_waiting=2)
    lines = [line() for _ in range(4)]
    assert [admission.enter(each) for each in lines] == [Place.RUNNING, Place.WAITING, Place.WAITING, Place.FULL]
    assert admission.leave(lines[0]) is lines[1]
    assert admission.leave(lines[1]) is lines[2]
    assert admission.leave(lines[2]) is None
    assert (admission.running, admission.waiting) == (0, 0)


def test_without_a_queue() -> None:
    admission = Admission(max_running=1, max_waiting=0)
    first = line()
    full = [admission.full]
    assert admission.enter(first) is Place.RUNNING
    full.append(admission.full)
    assert admission.enter(line()) is Place.FULL
    assert admission.leave(first) is None
    full.append(admission.full)
    assert full == [False, True, False]


class AdmissionMachine(RuleBasedStateMachine):
    """Lines come and go."""

    @initialize(max_running=st.integers(0, 3), max_waiting=st.integers(0, 3))
    def begin(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.admission = Admission(max_running=max_running, max_waiting=max_waiting)
        self.running: list[Line] = []
        self.waiting: list[Line] = []

    @rule()
    def enter(self) -> None:
        new, full = line(), self.admission.full
        place = self.admission.enter(new)
        if len(self.running) < self.max_running:
            self.running.append(new)
            assert place is Place.RUNNING
        elif len(self.waiting) < self.max_waiting:
            self.waiting.append(new)
            assert place is Place.WAITING
        else:
            assert place is Place.FULL
        assert full is (place is Place.FULL)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        lines = self.running + self.waiting
        if not lines:
            return
        leaver = data.draw(st.sampled_from(lines))
        successor = self.admission.leave(leaver)
        if leaver in self.waiting:
            self.waiting.remove(leaver)
            assert successor is None
            return
        self.running.remove(leaver)
        if self.waiting:
            assert successor is self.waiting[0]
            self.running.append(self.waiting.pop(0))
        else:
            assert successor is None

    @invariant()
    def the_counts_agree(self) -> None:
        assert self.admission.running == len(self.running)
        assert self.admission.waiting == len(self.waiting)


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=60, stateful_step_count=20)
