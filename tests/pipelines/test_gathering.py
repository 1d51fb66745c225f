"""Who is answered with whom. No Ray."""

import asyncio

import pytest

from pipelines.gathering import Gathering

PASS_S = 0.2


class Passes:
    """Notes who is answered together; an answer is ten times the question."""

    def __init__(self):
        self.together = []
        self.running = 0

    async def __call__(self, questions):
        self.together.append(questions)
        self.running += 1
        assert self.running == 1
        await asyncio.sleep(PASS_S)
        self.running -= 1
        if 13 in questions:
            raise RuntimeError("unlucky")
        return [10 * question for question in questions]


def played(play, **limits):
    """The passes of a play that gets the gathering."""
    passes = Passes()

    async def whole():
        return await play(Gathering(passes, **({"most": 8, "wait_s": 0.01} | limits)))

    return asyncio.run(whole()), passes.together


async def asked_in_turn(gathering, questions, *, every_s):
    tasks = []
    for question in questions:
        tasks.append(asyncio.create_task(gathering.answer(question)))
        await asyncio.sleep(every_s)
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_those_that_come_during_a_pass_share_the_next_one():
    """Whatever lies between them, and longer than a question waits for others."""
    answers, together = played(lambda g: asked_in_turn(g, range(6), every_s=0.03))
    assert answers == [0, 10, 20, 30, 40, 50]
    assert together == [[0], [1, 2, 3, 4, 5]]


def test_the_first_one_waits_for_others_as_long_as_it_may():
    _, together = played(lambda g: asked_in_turn(g, range(3), every_s=0.02), wait_s=0.15)
    assert together == [[0, 1, 2]]


def test_no_more_share_a_pass_than_may_and_nobody_waits_once_there_are_as_many():
    answers, together = played(lambda g: asked_in_turn(g, range(7), every_s=0), most=3, wait_s=0.05)
    assert answers == [10 * question for question in range(7)]
    assert together == [[0, 1, 2], [3, 4, 5], [6]]

    async def quickly(gathering):
        async with asyncio.timeout(PASS_S + 5):
            return await asked_in_turn(gathering, range(3), every_s=0)

    assert played(quickly, most=3, wait_s=60)[0] == [0, 10, 20]


def test_an_error_is_for_those_of_its_pass_alone():
    (first, *second, third), together = played(
        lambda g: asked_in_turn(g, [1, 13, 2, 3], every_s=0), most=1, wait_s=0
    )
    assert together == [[1], [13], [2], [3]]
    assert (first, second[1], third) == (10, 20, 30)
    with pytest.raises(RuntimeError, match="unlucky"):
        raise second[0]


def test_who_has_gone_is_not_answered_and_others_are():
    async def play(gathering):
        first = asyncio.create_task(gathering.answer(1))
        await asyncio.sleep(PASS_S / 2)
        gone, stays = (asyncio.create_task(gathering.answer(question)) for question in (2, 3))
        await asyncio.sleep(0)
        gone.cancel()
        return await first, await stays

    assert played(play) == ((10, 30), [[1], [3]])


def test_it_answers_again_after_nobody_asked_for_a_while():
    async def play(gathering):
        first = await gathering.answer(1)
        await asyncio.sleep(0.05)
        return first, await gathering.answer(2)

    assert played(play) == ((10, 20), [[1], [2]])


def test_too_few_answers_are_an_error_for_all_who_asked():
    async def none(_questions):
        return []

    async def play():
        async with asyncio.timeout(5):
            return await asked_in_turn(Gathering(none, most=2, wait_s=0.05), [1, 2], every_s=0)

    for error in asyncio.run(play()):
        with pytest.raises(RuntimeError, match="0 answers to 2 questions"):
            raise error
