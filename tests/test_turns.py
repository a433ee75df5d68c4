"""Work that stands still between two calls, beside others, and ends when it is told to."""

from __future__ import annotations

import threading

import pytest

from edgeport.turns import Turn


def test_turns_run_one_at_a_time_and_to_their_ends() -> None:
    said: list[str] = []

    def work(name: str, turns: dict[str, Turn]) -> None:
        for number in range(2):
            said.append(f"{name}{number}")
            turns[name].stop()
        said.append(f"{name} ends")

    turns: dict[str, Turn] = {}
    for name in "ab":
        turns[name] = Turn(lambda name=name: work(name, turns))  # type: ignore[misc]
    assert not said
    more = [[turn.advance() for turn in turns.values()] for _ in range(3)]
    assert said == ["a0", "b0", "a1", "b1", "a ends", "b ends"] and more == [[True, True], [True, True], [False, False]]


def test_an_error_reaches_whoever_asked() -> None:
    turn = Turn(lambda: [][1])
    with pytest.raises(IndexError):
        turn.advance()
    turn.cancel()


def test_what_is_not_wanted_any_more_ends_where_it_stands() -> None:
    left: list[str] = []

    def work() -> None:
        try:
            turn.stop()
            left.append("went on")
        finally:
            left.append("tidied up")

    turn = Turn(work)
    turn.advance()
    turn.cancel()
    never = Turn(lambda: left.append("began"))
    never.cancel()
    assert left == ["tidied up"] and not {turn.thread, never.thread} & set(threading.enumerate())
