"""A policy in closed loop, in an environment of ours: every episode is what its seed says."""

import functools
import io
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from runs import new_run, toy_policy_and_reader
from toy_environment import GOAL_STEPS, ToyEnvironment

from pipelines.environments import check_tasks, drawn_cameras, environment_class
from pipelines.environments.metaworld import GROUPS, SENTENCES
from pipelines.rollouts import Play, Played, Rollouts, Theatre, film, of_groups, successes, wilson

TOY = "toy_environment:ToyEnvironment"
ROLLOUTS = Rollouts(
    env=TOY,
    tasks=("wave", "open"),
    episodes=4,
    n_action_steps=(3, 10),
    num_environments=3,
    size_px=40,
    cameras=("observation.images.top", "observation.images.wrist"),
)


@pytest.fixture(scope="module")
def played(ray_session, episodes, tmp_path_factory):
    """All episodes with a policy of random weights, twice, and with black pictures; and two films."""
    run = new_run(tmp_path_factory.mktemp("policy") / "run", toy_policy_and_reader(episodes))
    fetch = functools.partial(Path, run.folder / "start")
    found = {}
    for name, blank in (("first", False), ("again", False), ("blind", True)):
        theatre = Theatre(replace(ROLLOUTS, blank_images=blank), fetch)
        theatre.check()
        found[name] = list(theatre.play())
        films = list(theatre.films(found[name][:2], fps=ToyEnvironment.FPS))
        theatre.close()
    return found, films, theatre.latencies_s


def by_play(played):
    return {(one.play.task, one.play.n_action_steps, one.play.number): one for one in played}


def test_every_episode_is_played_once_and_ends_as_its_seed_says(played):
    found = by_play(played[0]["first"])
    assert len(found) == len(played[0]["first"]) == 2 * 2 * 4
    for (task, steps, number), one in found.items():
        seed = ROLLOUTS.environment_seed(Play(task=task, n_action_steps=steps, number=number))
        goal = seed % GOAL_STEPS + 12
        assert one.seed == seed
        assert (one.success, one.steps) == (goal <= 20, min(goal, 20))
        assert one.actions.shape == (one.steps, 4)
        assert one.instruction == f"{task} it"
    assert {one.success for one in found.values()} == {True, False}


def test_the_same_flags_give_the_same_actions_and_a_blind_policy_others(played):
    first, again, blind = (by_play(played[0][name]) for name in ("first", "again", "blind"))
    for key, one in first.items():
        np.testing.assert_array_equal(one.actions, again[key].actions)
        assert one.steps == blind[key].steps
    assert all(not np.array_equal(one.actions, blind[key].actions) for key, one in first.items())


def test_worlds_are_the_same_for_every_number_of_steps_and_noise_is_not(played):
    first = by_play(played[0]["first"])
    for task in ROLLOUTS.tasks:
        for number in range(4):
            few, many = first[task, 3, number], first[task, 10, number]
            assert few.seed == many.seed
            assert not np.array_equal(few.actions[:3], many.actions[:3])
    assert len({one.seed for one in first.values()}) == 8


def test_all_environments_that_play_are_answered_in_one_pass(played):
    counts = [count for count, _ in played[2]]
    assert max(counts) == 3
    assert all(seconds > 0 for _, seconds in played[2])


def test_a_film_shows_the_episode_to_its_end_in_a_size_that_people_see(played):
    for one, content in played[1]:
        with av.open(io.BytesIO(content), "r") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == one.steps + 1  # 10 frames a second are all shown
        assert frames[0].shape == (280, 280, 3)
        assert abs(int(frames[-1].mean()) - 10 * one.steps) < 6


def test_more_steps_than_a_chunk_has_are_refused(ray_session, episodes, tmp_path):
    run = new_run(tmp_path / "run", toy_policy_and_reader(episodes))
    theatre = Theatre(replace(ROLLOUTS, n_action_steps=(11,)), functools.partial(Path, run.folder / "start"))
    with pytest.raises(ValueError, match=r"n_action_steps 11 is not within 1\.\.10"):
        theatre.check()
    theatre.close()


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # R: binom::binom.wilson, and Wilson's formula by hand for the ends
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (45, 50, 0.7864, 0.9565)],
)
def test_wilsons_interval(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_groups_are_the_episodes_of_their_tasks():
    plays = [("a", True), ("a", False), ("b", True), ("b", True), ("c", False), ("c", False)]
    played = [
        Played(
            play=Play(task=task, n_action_steps=1, number=number),
            instruction="",
            seed=0,
            success=success,
            steps=7 + number,
            actions=np.zeros((7, 1), np.float32),
        )
        for number, (task, success) in enumerate(plays)
    ]
    rows = successes(played)
    assert [(row.task, row.successes, row.episodes) for row in rows] == [
        ("a", 1, 2),
        ("b", 2, 2),
        ("c", 0, 2),
    ]
    groups = {row.task: row for row in of_groups(rows, {"a": "easy", "b": "easy", "c": "hard"})}
    assert {name: row.rate for name, row in groups.items()} == {"easy": 0.75, "all": 0.5, "hard": 0.0}
    assert groups["easy"].interval == wilson(3, 4)
    assert groups["all"].steps == pytest.approx((7 + 9 + 10) / 3)
    assert np.isnan(groups["hard"].steps)


def test_metaworlds_groups_have_the_papers_sizes():
    sizes = {group: list(GROUPS.values()).count(group) for group in GROUPS.values()}
    assert sizes == {"easy": 28, "medium": 11, "hard": 6, "very hard": 5}
    assert GROUPS.keys() == SENTENCES.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metawrld", "env 'metawrld' is none of"),
        ("nowhere.at_all:World", "env 'nowhere.at_all:World': No module named 'nowhere'"),
        ("toy_environment:GOAL_STEPS", "has no reset, step, observe, render, close"),
    ],
)
def test_an_environment_that_is_none_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        environment_class(name)


def test_a_task_that_is_none_is_refused():
    with pytest.raises(ValueError, match="tasks: 'fly' is no toy"):
        check_tasks(environment_class(TOY), ("wave", "fly"))
    with pytest.raises(ValueError, match="tasks is empty"):
        check_tasks(environment_class(TOY), ())
    with pytest.raises(ValueError, match="names one twice"):
        check_tasks(environment_class(TOY), ("wave", "wave"))


def test_an_environment_draws_what_it_has_of_the_policys_cameras():
    both = ("observation.images.top", "observation.images.left")
    assert drawn_cameras(environment_class(TOY), both) == both  # it does not say what it has
    assert drawn_cameras(environment_class("gymnasium"), both) == both[:1]
    with pytest.raises(ValueError, match=r"sees observation\.images\.top, .*\.left; there are .*\.corner2, "):
        drawn_cameras(environment_class("metaworld"), both)


def test_a_small_picture_becomes_a_film_that_can_be_seen():
    frames = [np.full((10, 12, 3), level, np.uint8) for level in (0, 100, 200)]
    with av.open(io.BytesIO(film(frames, fps=20)), "r") as container:
        levels = [int(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
    assert levels == pytest.approx([0, 100, 200], abs=4)
