"""The run that all others are compared with, trained once a session.

Imports stand in the fixtures: pytest may load this file before the hook that sets Ray's token.
"""

import pytest


@pytest.fixture(scope="session")
def toy(episodes):
    """(dataset, policy config, reader): 320 frames, 40 steps of 8 are one epoch."""
    from runs import toy_policy_and_reader

    return toy_policy_and_reader(episodes)


@pytest.fixture(scope="session")
def uninterrupted(ray_session, toy, tmp_path_factory):
    """Two workers, two micro-batches each, nothing dies."""
    from runs import CLUSTER, new_run

    from pipelines import training

    run = new_run(tmp_path_factory.mktemp("runs") / "uninterrupted", toy)
    training.fit(run, toy[2], CLUSTER)
    return run
