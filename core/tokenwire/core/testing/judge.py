"""What a client of a simulation may have heard, given what the backend said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from tokenwire.core.dialects.base import failure_of, status_of
from tokenwire.core.dialects.openai_chat import FINISH_REASONS
from tokenwire.core.errors import MalformedData
from tokenwire.core.events import ChoiceEnd, FinishReason, ProviderData, StreamEnd, StreamError, StreamTruncated
from tokenwire.core.request import GenerationRequest

from .client import Answer, Heard, SimulatedClient, hear
from .ledger import Account, Ledger, Telling, Told, tell

__all__ = ["Judge"]

_HEARTBEAT: Final = b": ka\n"
_DONE: Final = b"data: [DONE]\n\n"
_UNREAD: Final = frozenset({400, 408})
"""What half a request is answered with."""

_OF_THE_CORE: Final = frozenset({"server_shutdown", "backend_error"})


class Judge:
    """Compares answers with the ledger.

    Args:
        ledger: what the backend said.
        complain: takes a sentence about each answer that should not be.
    """

    def __init__(self, ledger: Ledger, complain: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._complain = complain

    def look(self, answer: Answer, who: str, *, sound: bool) -> None:
        """Look at one answer, whole or not.

        Args:
            answer: the answer.
            who: whose it is.
            sound: whether the request had a link that brings all of it.
        """
        if not answer.status or (answer.status in _UNREAD and not sound):
            return
        account = self._ledger.accounts.get(answer.headers.get("x-request-id", ""))
        for fault in self._faults_of(answer, account):
            asked = answer.asked.data[:60]
            stream = account.stream_id if account else "no stream"
            self._complain(f"{who}, {asked!r}, {stream}, status {answer.status}: {fault}")

    def look_for_silence(self, client: SimulatedClient, who: str, *, slow: bool, records: int, drained_at: int) -> None:
        """Look whether a client that stayed and read, on a link that holds, was answered to the end.

        Args:
            client: the client.
            who: its name.
            slow: whether the server gave it up as too slow.
            records: how many answers the server has recorded for it.
            drained_at: from when on a connection might end between two answers.
        """
        cut = [place for place, answer in enumerate(client.answers) if not answer.complete]
        if not cut:
            if records != len(client.answers):
                self._complain(f"{who} has {len(client.answers)} answers, and {records} records were made")
            return
        before = client.answers[cut[0] - 1] if cut[0] else None
        if slow or (before is not None and _ends_connection(before)):
            return
        if client.ended_at >= drained_at and not client.answers[cut[0]].status:
            return
        self._complain(f"{who} stayed, and answer {cut[0]} never came to its end")

    def _faults_of(self, answer: Answer, account: Account | None) -> Sequence[str]:
        if not answer.asked.dialect or answer.status != 200:
            return _refusal_faults(answer, account, self._ledger.honours)
        if account is None:
            account = Account("that still waited", GenerationRequest(model="", messages=()))
        if not answer.asked.stream and not answer.complete:
            return []
        try:
            heard = hear(answer)
        except (MalformedData, msgspec.DecodeError, KeyError, ValueError) as error:
            return [f"the body is malformed: {error!r}"]
        telling = tell(account, self._ledger.honours)
        expected = _as_shown(telling.told, answer)
        clean = isinstance(heard.terminal, StreamEnd) and (answer.complete or _DONE in answer.body)
        if clean:
            return _clean_faults(answer, heard, telling, expected)
        if answer.complete:
            return _failed_faults(answer, heard, telling, expected, account)
        return _beginning_faults(heard.told, expected)


def _ends_connection(answer: Answer) -> bool:
    """Whether an answer is the last of its connection."""
    broke_off = answer.asked.stream and answer.status == 200 and not isinstance(hear(answer).terminal, StreamEnd)
    return answer.asked.last or answer.headers.get("connection") == "close" or broke_off


def _as_shown(told: Told, answer: Answer) -> Told:
    """Leave out what a dialect does not show."""
    if answer.asked.dialect == "chat":
        return told
    return {key: text for key, text in told.items() if key[1] == 0 and key[0] != "logprobs"}


def _clean_faults(answer: Answer, heard: Heard, telling: Telling, expected: Told) -> list[str]:
    faults: list[str] = []
    if not isinstance(telling.terminal, StreamEnd) or telling.broken:
        faults.append(f"a clean end of a stream that ended with {telling.terminal!r}")
    if heard.told != expected:
        faults.append(f"heard {heard.told!r}, but said was {expected!r}")
    if _words(heard.ends, answer) != _words(telling.ends, answer):
        faults.append(f"choices ended with {heard.ends!r}, but the backend's word was {telling.ends!r}")
    if not answer.asked.stream or answer.asked.include_usage:
        faults += _usage_faults(heard, telling)
    return faults


def _words(ends: dict[int, ChoiceEnd], answer: Answer) -> dict[int, object]:
    if answer.asked.dialect == "plain":
        return {choice: (end.reason, end.stop_sequence) for choice, end in ends.items() if choice == 0}
    return {choice: FINISH_REASONS[end.reason or FinishReason.OTHER] for choice, end in ends.items()}


def _usage_faults(heard: Heard, telling: Telling) -> list[str]:
    if heard.usage is None:
        return ["there is no usage"]
    if telling.usage is not None:
        return (
            [] if heard.usage == telling.usage else [f"usage {heard.usage!r}, but the backend's is {telling.usage!r}"]
        )
    if heard.usage.output_tokens != telling.tokens:
        return [f"usage {heard.usage!r}, but {telling.tokens} tokens were let out"]
    return []


def _failed_faults(answer: Answer, heard: Heard, telling: Telling, expected: Told, account: Account) -> list[str]:
    if isinstance(heard.terminal, StreamTruncated) or not isinstance(heard.terminal, StreamError):
        return [f"a whole message with a body that breaks off: {heard.terminal!r}"]
    faults: list[str] = []
    if answer.asked.dialect == "chat" and _DONE in answer.body:
        faults.append("[DONE] after an error")
    if telling.broken:
        # What the offender's own batch said before it is lost with it, and so is what was held back.
        faults += _beginning_faults(heard.told, expected)
    elif heard.told != expected:
        faults.append(f"heard {heard.told!r} before the error, but said was {expected!r}")
    if heard.terminal.code not in _OF_THE_CORE:
        own = telling.terminal
        if own is None or isinstance(own, StreamEnd) or failure_of(own).message != heard.terminal.message:
            faults.append(f"failed with {heard.terminal!r}, but the backend ended with {own!r}")
    elif heard.terminal.code == "backend_error" and not (telling.broken or account.failed_to_start):
        faults.append("the backend is blamed, and broke no rule")
    data = any(isinstance(item, ProviderData) for run in account.runs for item in run)
    if not (heard.told or telling.ends or data or _HEARTBEAT in answer.body):
        faults.append("an error before the first token came as an event")
    return faults


def _beginning_faults(told: Told, expected: Told) -> list[str]:
    return [
        f"heard {text!r} of {key}, but said was {expected.get(key)!r}"
        for key, text in told.items()
        if not expected.get(key, "").startswith(text)
    ]


def _refusal_faults(answer: Answer, account: Account | None, honours: frozenset[str]) -> list[str]:
    """Look at an answer that is no success, or that no stream stands behind."""
    if account is None:
        # Whether there was no room is looked at where it is recorded.
        legal = answer.asked.statuses | {429, 503}
        return [] if answer.status in legal else [f"one of {sorted(legal)} was due"]
    telling = tell(account, honours)
    if answer.asked.stream and _as_shown(telling.told, answer) and not telling.broken:
        return ["an error after the first token came as a status"]
    if account.failed_to_start or telling.broken:
        return [] if answer.status == 500 else ["500 was due"]
    own = telling.terminal
    if own is None:
        return [] if answer.status == 503 else ["503 was due"]
    if isinstance(own, StreamEnd):
        return ["the backend came to a clean end"]
    due = status_of(failure_of(own))
    return [] if answer.status == due else [f"{due} was due"]
