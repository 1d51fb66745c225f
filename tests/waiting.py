"""Waiting for what other processes do."""

import time


def wait_until(true, *, within_s):
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
