#!/usr/bin/env bash
# A cluster of machines on this one: network namespaces on a bridge, each with an address of its own. A Ray head and two
# workers, and a machine with MLflow (users, PostgreSQL) and an S3 server. For root on Linux; needs iproute2 and PostgreSQL.
#
#   cluster.sh up            start what does not run, print how to use it
#   cluster.sh status        what runs in which machine
#   cluster.sh cut NAME      take a machine (head, worker1, worker2, services) off the network; heal NAME puts it back
#   cluster.sh down          end it; what its S3 server and its database held is gone
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd -P)
PYTHON=${PYTHON:-$("$HERE/root.sh")/.venv/bin/python}
STATE=${SMOLVLA_CLUSTER:-/tmp/smolvla-cluster} # Ray's sockets allow 107 characters, PostgreSQL's user must get here
BRIDGE=smolvla0
NET=10.213.77
OUTSIDE=$NET.1
declare -A ADDRESS=([services]=$NET.2 [head]=$NET.10 [worker1]=$NET.11 [worker2]=$NET.12)
MACHINES=(services head worker1 worker2)
CPUS=${SMOLVLA_CLUSTER_CPUS:-3} # of a worker; the head has none, so that no data task can take the driver's memory
READY_WITHIN_S=180
# `ip netns exec` gives a process mounts of its own: /mnt is another folder on every node
# shellcheck disable=SC2016  # the inner shell expands it
OWN_DISK='mount --bind "$0" /mnt && exec "$@"'

fail() { echo "cluster.sh: $*" >&2; exit 1; }
namespace() { echo "smolvla-$1"; }
exists() { ip netns list | grep -q "^$(namespace "$1")\b"; }
runs() { [ -n "$(ip netns pids "$(namespace "$1")" 2>/dev/null)" ]; }

check_machine() {
    [ "$(id -u)" = 0 ] || fail "network namespaces need root"
    command -v ip >/dev/null || fail "no ip: apt-get install iproute2"
    command -v setsid >/dev/null || fail "no setsid: apt-get install util-linux"
    [ -x "$PYTHON" ] || fail "no $PYTHON: make install"
    POSTGRES=$(find /usr/lib/postgresql -mindepth 2 -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -n 1)
    [ -n "$POSTGRES" ] || fail "no PostgreSQL: apt-get install postgresql"
}

make_network() {
    ip link show "$BRIDGE" >/dev/null 2>&1 || {
        ip link add "$BRIDGE" type bridge
        ip address add "$OUTSIDE/24" dev "$BRIDGE"
        ip link set "$BRIDGE" up
    }
    local name
    for name in "${MACHINES[@]}"; do
        exists "$name" && continue
        ip netns add "$(namespace "$name")"
        ip link add "sv-$name" type veth peer name eth0 netns "$(namespace "$name")"
        ip link set "sv-$name" master "$BRIDGE" up
        ip -n "$(namespace "$name")" address add "${ADDRESS[$name]}/24" dev eth0
        ip -n "$(namespace "$name")" link set eth0 up
        ip -n "$(namespace "$name")" link set lo up
    done
}

make_secrets() { # files that only their owner reads; nothing secret stands on a command line
    mkdir -p "$STATE/log" "$STATE/secrets"
    chmod 711 "$STATE"
    chmod 700 "$STATE/secrets"
    local name
    for name in ray_token postgres_password mlflow_password flask_key s3_key; do
        [ -e "$STATE/secrets/$name" ] || (umask 077 && "$PYTHON" -c 'import secrets; print(secrets.token_hex(24), end="")' >"$STATE/secrets/$name")
    done
}

secret() { cat "$STATE/secrets/$1"; }

write_environment() { # for clients outside, and for what the nodes run
    (umask 077 && cat >"$STATE/env" <<END
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/secrets/ray_token
export RAY_API_SERVER_ADDRESS=http://${ADDRESS[head]}:8265
export MLFLOW_TRACKING_URI=http://${ADDRESS[services]}:5000
export MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD=$(secret mlflow_password)
export AWS_ENDPOINT_URL=http://${ADDRESS[services]}:9000 AWS_DEFAULT_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
export AWS_ACCESS_KEY_ID=smolvla AWS_SECRET_ACCESS_KEY=$(secret s3_key)
END
    )
    # shellcheck disable=SC1091  # written above
    . "$STATE/env"
}

start() { # machine, name of the log, command...: outlives this script
    local machine=$1 log=$2
    shift 2
    ip netns exec "$(namespace "$machine")" setsid "$@" >>"$STATE/log/$log.log" 2>&1 </dev/null &
}

wait_for() { # what, command...
    local what=$1 deadline=$((SECONDS + READY_WITHIN_S))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || fail "$what does not answer within $READY_WITHIN_S s; see $STATE/log"
        sleep 0.5
    done
}

answers() { "$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=2)' "$1"; }
listens() { "$PYTHON" -c 'import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)' "$1" "$2"; }

start_services() {
    local data=$STATE/postgres address=${ADDRESS[services]}
    if [ ! -e "$data/PG_VERSION" ]; then
        install -d -o postgres -g postgres -m 700 "$data"
        install -o postgres -g postgres -m 600 "$STATE/secrets/postgres_password" "$data.pw"
        as_postgres "$POSTGRES/initdb" -D "$data" --auth=scram-sha-256 --pwfile="$data.pw" >"$STATE/log/initdb.log"
        rm "$data.pw"
        echo "host all all $NET.0/24 scram-sha-256" >>"$data/pg_hba.conf"
    fi
    start services postgres setpriv --reuid postgres --regid postgres --init-groups \
        "$POSTGRES/postgres" -D "$data" -c "listen_addresses=$address" -c "unix_socket_directories=$data"
    start services s3 "$PYTHON" -m moto.server -H "$address" -p 9000
    wait_for PostgreSQL listens "$address" 5432
    wait_for "the S3 server" listens "$address" 9000
    "$PYTHON" -c 'import boto3; s3 = boto3.client("s3"); [s3.create_bucket(Bucket=name) for name in ("mlflow", "robots", "runs")]'
    start_mlflow "$address"
    wait_for MLflow answers "http://$address:5000/health"
}

as_postgres() { setpriv --reuid postgres --regid postgres --init-groups "$@"; }

start_mlflow() {
    local database
    database="postgresql+psycopg://postgres:$(secret postgres_password)@$1:5432/postgres"
    (umask 077 && cat >"$STATE/secrets/basic_auth.ini" <<END
[mlflow]
default_permission = READ
database_uri = $database
admin_username = admin
admin_password = $(secret mlflow_password)
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# without a cache every request hashes the password anew, 0.9 s of it measured
auth_cache_ttl_seconds = 60
END
    )
    MLFLOW_BACKEND_STORE_URI=$database MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret flask_key) \
        MLFLOW_AUTH_CONFIG_PATH=$STATE/secrets/basic_auth.ini MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
        start services mlflow "$PYTHON" -m mlflow server --app-name basic-auth --host "$1" --port 5000 --workers 1 \
        --artifacts-destination s3://mlflow/artifacts --allowed-hosts "$1:5000" --cors-allowed-origins "http://$1:5000"
}

start_node() { # machine, flags of ray start
    local machine=$1
    shift
    mkdir -p "$STATE/$machine/ray" "$STATE/$machine/disk" # RAY_TMPDIR must hold the first
    # gloo would take the host's name for its address; a job's `python` is this one
    GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 RAY_TMPDIR=$STATE/$machine PATH=$(dirname "$PYTHON"):$PATH \
        RAY_JOB_STOP_WAIT_TIME_S=30 RAY_DATA_DISABLE_PROGRESS_BARS=1 \
        start "$machine" "$machine" sh -c "$OWN_DISK" "$STATE/$machine/disk" \
        "$PYTHON" -m ray.scripts.scripts start --block --disable-usage-stats --node-ip-address "${ADDRESS[$machine]}" \
        --object-store-memory 500000000 "$@"
}

nodes() { "$PYTHON" - "$1" <<'END'
import os, sys
from ray.util.state import list_nodes
alive = list_nodes(address=os.environ["RAY_API_SERVER_ADDRESS"], filters=[("state", "=", "ALIVE")])
sys.exit(len(alive) < int(sys.argv[1]))
END
}

up() {
    check_machine
    make_network
    make_secrets
    write_environment
    runs services || start_services
    runs head || start_node head --head --port 6379 --num-cpus 0 --dashboard-host "${ADDRESS[head]}" --dashboard-port 8265
    # It listens before it is a node, and a worker that finds no head among the nodes gives up.
    wait_for "Ray's head" nodes 1
    wait_for "Ray's workers" workers_joined
    status
}

workers_joined() { # one that gave up, as on a machine that was too busy to answer the head, starts again
    local worker
    for worker in worker1 worker2; do
        runs "$worker" || start_node "$worker" --address "${ADDRESS[head]}:6379" --num-cpus "$CPUS"
    done
    nodes 3
}

status() {
    local name
    for name in "${MACHINES[@]}"; do
        runs "$name" && echo "$name: ${ADDRESS[$name]}, $(ip netns pids "$(namespace "$name")" | wc -l) processes" ||
            echo "$name: not running"
    done
    [ ! -e "$STATE/env" ] || echo "clients: . $STATE/env"
}

down() {
    end_processes
    local name
    for name in "${MACHINES[@]}"; do
        ! exists "$name" || ip netns delete "$(namespace "$name")"
        # The cable goes with the machine, but when the kernel has time for it; `up` may come before.
        ip link delete "sv-$name" 2>/dev/null || true
        echo "$name: stopped"
    done
    ip link delete "$BRIDGE" 2>/dev/null || true
    rm -rf "$STATE"
}

processes() { # whatever runs in a namespace of ours was started by us
    local name
    for name in "${MACHINES[@]}"; do ip netns pids "$(namespace "$name")" 2>/dev/null || true; done
}

end_processes() {
    local tries found signal
    for ((tries = 0; tries < 50; tries++)); do
        found=$(processes)
        [ -n "$found" ] || return 0
        case $tries in 0) signal=TERM ;; 15 | 30) signal=KILL ;; *) signal=0 ;; esac
        # shellcheck disable=SC2086  # one word a process; some end meanwhile
        kill -s "$signal" $found 2>/dev/null || true
        sleep 0.2
    done
    fail "these processes do not end: $found"
}

link() { # name, up or down
    [ -n "${ADDRESS[${1:-?}]:-}" ] || fail "no machine ${1:-}: ${MACHINES[*]}"
    ip -n "$(namespace "$1")" link set eth0 "$2"
}

case ${1:-} in
up) up ;;
status) status ;;
cut) link "${2:-}" down ;;
heal) link "${2:-}" up ;;
down) down ;;
*) fail "need up, status, cut NAME, heal NAME or down" ;;
esac
