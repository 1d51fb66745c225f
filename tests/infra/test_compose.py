"""The compose file: closed to other machines, its secrets only in files that one user can read."""

import configparser
import json
import stat

import pytest
import yaml

from infra.checks import ROOT
from infra.docker import make_secrets

COMPOSE = ROOT / "infra/docker/compose.yaml"


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load(COMPOSE.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docker") / "secrets"
    make_secrets.main(folder)
    return folder


def test_every_published_port_is_on_loopback(compose):
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(published) == 4
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_every_service_is_limited_checked_and_pinned(compose):
    for name, service in compose["services"].items():
        assert "memory" in service["deploy"]["resources"]["limits"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "healthcheck" in service or name == "buckets", name  # which does one thing and ends
        assert "build" in service or "@sha256:" in service["image"], name


def test_what_holds_the_passwords_cannot_be_reached_by_all(compose):
    assert compose["networks"]["database"]["internal"] is True
    assert compose["services"]["postgres"]["networks"] == ["database"]


def test_secrets_are_files_that_their_owner_alone_can_read(compose, made):
    wanted = {secret["file"].rpartition("/")[2] for secret in compose["secrets"].values()}
    assert {path.name for path in made.iterdir()} == wanted
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o600}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    used = set()
    for service in compose["services"].values():
        used |= {s if isinstance(s, str) else s["source"] for s in service.get("secrets", [])}
    assert used == wanted


def test_secrets_that_belong_together_agree_and_no_two_are_alike(made):
    text = {path.name: path.read_text() for path in made.iterdir()}
    assert text["pgpass"] == f"postgres:5432:mlflow:mlflow:{text['postgres_password']}\n"
    server, client = configparser.ConfigParser(), configparser.ConfigParser()
    server.read_string(text["mlflow_auth"])
    client.read_string(text["mlflow_credentials"])
    assert server["mlflow"]["admin_password"] == client["mlflow"]["mlflow_tracking_password"]
    assert server["mlflow"]["admin_username"] == client["mlflow"]["mlflow_tracking_username"]
    (identity,) = json.loads(text["s3_identities"])["identities"]
    (keys,) = identity["credentials"]
    store = configparser.ConfigParser()
    store.read_string(text["aws_credentials"])
    assert dict(store["default"]) == {
        "aws_access_key_id": keys["accessKey"],
        "aws_secret_access_key": keys["secretKey"],
    }
    again = make_secrets.contents()
    assert all(again[name] != text[name] for name in text)


def test_secrets_that_are_there_stay(made):
    before = {path.name: path.read_text() for path in made.iterdir()}
    with pytest.raises(SystemExit, match="stays as it is"):
        make_secrets.main(made)
    assert {path.name: path.read_text() for path in made.iterdir()} == before
