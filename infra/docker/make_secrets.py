"""Make the passwords, keys and tokens of infra/docker/compose.yaml, once.

python infra/docker/make_secrets.py

They are random, lie in infra/docker/secrets/ and can be read by one user alone: whoever calls this, or the
user 1000 when that is root. The containers that read them run as that user (infra/docker/.env).
"""

import json
import os
import secrets
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).absolute().parent


def main(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder} is there already and stays as it is; remove it to have new secrets")
    user, group = (os.getuid(), os.getgid()) if os.getuid() else (1000, 1000)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))  # mode 700
    for name, text in contents().items():
        path = partial / name
        path.touch(mode=0o600)
        path.write_text(text)
        os.chown(path, user, group)
    os.chown(partial, user, group)
    (folder.parent / ".env").write_text(f"SMOLVLA_UID={user}\nSMOLVLA_GID={group}\n")
    partial.rename(folder)
    print(f"{folder}: made; MLflow's user is admin, its password is in mlflow_credentials, Grafana's in")
    print(
        f"grafana_password. Clients of Ray: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={folder}/ray_token"
    )


def contents() -> dict[str, str]:
    """File name -> text; what belongs together agrees."""
    database, admin = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    key_id, key = secrets.token_hex(10).upper(), secrets.token_urlsafe(30)
    identity = {
        "name": "smolvla",
        "credentials": [{"accessKey": key_id, "secretKey": key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    return {
        "ray_token": secrets.token_hex(32),
        "postgres_password": database,
        "pgpass": f"postgres:5432:mlflow:mlflow:{database}\n",
        "mlflow_auth": _mlflow_auth(admin),
        "mlflow_credentials": _mlflow_credentials(admin),
        "mlflow_flask_key": secrets.token_hex(32),
        "s3_identities": json.dumps({"identities": [identity]}),
        "aws_credentials": f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {key}\n",
        "grafana_password": secrets.token_urlsafe(24),
    }


def _mlflow_auth(password: str) -> str:
    return (
        "[mlflow]\n"
        "default_permission = READ\n"
        "database_uri = postgresql://mlflow@postgres:5432/mlflow\n"
        "admin_username = admin\n"
        f"admin_password = {password}\n"
        # Without, every request of a client costs a password hash: 0.95 s instead of 19 ms.
        "auth_cache_ttl_seconds = 60\n"
    )


def _mlflow_credentials(password: str) -> str:
    return f"[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = {password}\n"


if __name__ == "__main__":
    main(HERE / "secrets")
