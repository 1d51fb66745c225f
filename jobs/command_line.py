"""Typed flags over a YAML file, for every job: a frozen dataclass lists them, one line says what is wrong.

`--config FILE` names the YAML file; `--group.flag value` and `--group.flag=value` go over it; a list is
written as `--tasks a b`. A job exits with 2 when its input is refused, before it starts anything.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import operator
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import parse_qsl, urlsplit

import draccus
import ray
import yaml

from pipelines.sources.mapping import unknown_name

Job = TypeVar("Job")

REFUSED, FAILED = 2, 1  # exit codes
SECRET_OPTION = re.compile(r"(?i)key|secret|token|password|signature|credential")
"""Of a URI's options."""


def fail(error: object, *, code: int = REFUSED) -> NoReturn:
    """End the job with one line."""
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Around the checks of what a user gave: their ValueError becomes the job's last line."""
    try:
        yield
    except ValueError as error:
        fail(error)


def parsed(job_class: type[Job], argv: Sequence[str]) -> Job:
    """Read flags and the YAML file into a job's dataclass; a mistake ends the program with one line."""
    with refusals():
        words, config = _without_config(argv)
        flags = _flags(job_class)
        words = _literal_texts(_joined_lists(words, flags), flags)
        if config:
            _check_file(config, flags)
        try:
            job = draccus.parse(job_class, config_path=config, args=words, exit_on_error=False)
        except (draccus.ParsingError, argparse.ArgumentError, ValueError) as error:
            raise ValueError(_root(error)) from None
        for name in flags:
            refuse_credentials(name, operator.attrgetter(name)(job))
        refuse_credentials("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI"))
        return job


def refuse_credentials(name: str, value: Any) -> None:
    """Refuse a URI with a password in it, however deep in a list or mapping: flags are printed and kept.

    Raises:
        ValueError: names the flag and the address, without what is secret.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_credentials(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_credentials(name, item)
    elif isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        _, at, host = parts.netloc.rpartition("@")
        if at or any(SECRET_OPTION.search(option) for option, _ in parse_qsl(parts.query)):
            raise ValueError(
                f"{name} {parts.scheme}://...{host}{parts.path}: an address with credentials would be "
                "printed and logged; give them to every node as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "for MLflow as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, as in a submitted job; else start one for this process."""
    address = os.environ.get("RAY_ADDRESS", "local")
    include_dashboard = False if address == "local" else None
    ray.init(address=address, logging_level=logging.WARNING, include_dashboard=include_dashboard)


def _flags(job_class: type, prefix: str = "") -> dict[str, type]:
    """Every flag's name, dotted, and its type."""
    flags: dict[str, type] = {}
    for name, hint in typing.get_type_hints(job_class).items():
        if dataclasses.is_dataclass(hint):
            flags |= _flags(typing.cast("type", hint), f"{prefix}{name}.")
        else:
            flags[f"{prefix}{name}"] = hint
    return flags


def _without_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Take `--config FILE` out of the words."""
    words, config = [], None
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            words.append(word)
            continue
        config = value if equals else next(rest, None)
        if not config or not Path(config).is_file():
            raise ValueError(f"--config {config}: no such file")
    return words, config


def _joined_lists(words: Sequence[str], flags: Mapping[str, type]) -> list[str]:
    """Turn `--tasks a b` into `--tasks ["a", "b"]`, draccus' way to write a list; refuse flags nobody has."""
    out: list[str] = []
    items: list[str] | None = None
    for word in [*words, "--"]:
        if not word.startswith("--"):
            (out if items is None else items).append(word)
            continue
        if items is not None:
            written = len(items) == 1 and items[0].startswith("[")  # draccus' own form
            out.append(items[0] if written else json.dumps(items))
            items = None
        if word == "--":
            break
        flag, equals, value = word.removeprefix("--").partition("=")
        if flag not in (*flags, "help"):
            raise unknown_name("flag", f"--{flag}", [f"--{name}" for name in flags])
        if flag in flags and typing.get_origin(flags[flag]) in (tuple, list):
            out.append(f"--{flag}")
            items = [value] if equals else []
        else:
            out.append(word)
    return out


def _literal_texts(words: Sequence[str], flags: Mapping[str, type]) -> list[str]:
    """Quote the values of text flags: draccus reads them as YAML, where `fold: it` is a mapping."""
    out: list[str] = []
    is_text = False
    for word in words:
        flag, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and flag in flags:
            is_text = flags[flag] in (str, str | None)
            out.append(f"--{flag}={json.dumps(value)}" if is_text and equals else word)
            is_text = is_text and not equals
        else:
            out.append(json.dumps(word) if is_text else word)
            is_text = False
    return out


def _check_file(path: str, flags: Mapping[str, type]) -> None:
    """Refuse a file that is not YAML or has fields nobody knows."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: need a mapping of flags, found {type(content).__name__}")
    for name in _leaves(content, flags):
        if name not in flags:
            raise unknown_name(f"field in {path}:", name, list(flags))


def _leaves(content: Mapping[str, Any], flags: Mapping[str, type], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        whole = f"{prefix}{name}"
        if isinstance(value, dict) and whole not in flags:
            yield from _leaves(value, flags, f"{whole}.")
        else:
            yield whole


def _root(error: BaseException) -> str:
    """What went wrong: draccus hides a dataclass's own error behind one for each level of nesting."""
    while str(error).startswith("Couldn't instantiate") and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
