"""The job that serves a policy, as a user starts it, and robots that ask it: over HTTP and websocket."""

import asyncio
import base64
import datetime
import io
import ipaddress
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from exporters import exported_lines
from PIL import Image
from websockets.asyncio.client import connect
from websockets.sync.server import serve

from jobs import serve_policy
from jobs.command_line import parsed
from jobs.serve_policy import ServePolicy
from jobs.tracking import client_of
from pipelines.sessions import Sessions
from smolvla import SmolVLAPolicy
from smolvla.client import RobotClient
from smolvla.data_utils import sample_noise
from smolvla.features import ACTION, STATE
from smolvla.processing import SmolVLAProcessor
from smolvla.wire import JSON, MSGPACK, RefusedError, array, decoded, encoded

ROOT = Path(__file__).parents[2]
TOP, WRIST = "observation.images.top", "wrist"
RENAME = {TOP: "observation.images.camera2", WRIST: "observation.images.camera1"}
STATS = {
    STATE: {"mean": [0.3] * 7, "std": [1.5] * 7},
    ACTION: {"mean": [2.0, -1.0, 0.5, 0.0, 1.0, 3.0, -2.0], "std": [1.0, 2.0, 0.5, 1.0, 1.0, 4.0, 1.0]},
}
TOKEN, TOKEN_ENV = "a token of the tests 2f81", "SMOLVLA_TEST_TOKEN"
CLIENTS, SESSIONS, IDLE_S, REQUEST_MB, PIXELS = 8, 12, 15.0, 0.2, 20_000
READY_WITHIN_S = 120


class Served:
    """The job, and the policy itself to compare with."""

    def __init__(self, process, url, log, folder, certificate):
        self.process, self.url, self.log = process, url, log
        self.ca_file = certificate / "tls.crt"
        self.tls = ssl.create_default_context(cafile=self.ca_file)
        self.policy = SmolVLAPolicy.from_pretrained(folder).eval()
        self.session_used = 0.0

    def robot(self, **settings):
        return RobotClient(self.url, TOKEN, timeout_s=60, ca_file=self.ca_file, **settings)

    def expected(self, observed, seed, **guidance):
        """(actions, the same normalised) (H, A) of the policy without a server."""
        config, processor = self.policy.config, self.policy.processor
        noise = sample_noise(
            (1, config.chunk_size, config.max_action_dim), torch.Generator().manual_seed(seed)
        )
        columns = processor.observations(batch(observed))
        chunk = self.policy.predict_action_chunk(columns, noise, **guidance)
        return processor.unnormalize_actions(chunk)[0].numpy(), chunk[0]


def batch(observed):
    columns = {name: torch.tensor(observed[name]).permute(2, 0, 1)[None] for name in RENAME}
    columns[STATE] = torch.tensor(np.asarray(observed[STATE], np.float32))[None]
    return columns | {"task": observed["task"]}


def observation(number, size=(60, 80)):
    rng = np.random.default_rng(number)
    images = {name: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for name in RENAME}
    return images | {STATE: rng.normal(size=7).astype(np.float32), "task": f"task {number}"}


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    policy = SmolVLAPolicy.from_pretrained(ROOT / "tests/golden/default")
    policy.processor = SmolVLAProcessor(policy.config, STATS, rename=RENAME)
    path = tmp_path_factory.mktemp("policy") / "toy"
    policy.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A folder with tls.crt, for 127.0.0.1 and signed by itself, tls.key, encrypted.key and other.key."""
    place, password = tmp_path_factory.mktemp("tls"), serialization.BestAvailableEncryption(b"secret")
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a machine of the tests")])
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(addresses, critical=False)
        .sign(key, hashes.SHA256())
    )
    (place / "tls.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    for file, private, encryption in (
        ("tls.key", key, serialization.NoEncryption()),
        ("encrypted.key", key, password),
        ("other.key", ec.generate_private_key(ec.SECP256R1()), serialization.NoEncryption()),
    ):
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (place / file).write_bytes(private.private_bytes(pem, form, encryption))
    return place


@pytest.fixture(scope="module")
def served(services, folder, certificate, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("serving") / "log.txt"
    flags = ["--policy.path", str(folder), "--port", str(port), "--token_env", TOKEN_ENV]
    flags += ["--max_batch", str(CLIENTS), "--batch_wait_ms", "50", "--max_sessions", str(SESSIONS)]
    flags += ["--session_idle_s", str(IDLE_S), "--max_request_mb", str(REQUEST_MB)]
    flags += ["--max_image_pixels", str(PIXELS), "--route", "/toy"]
    flags += ["--ssl_certfile", str(certificate / "tls.crt"), "--ssl_keyfile", str(certificate / "tls.key")]
    environment = os.environ | {
        "RAY_ADDRESS": services["ray"]["address"],
        "PYTHONPATH": str(ROOT),
        TOKEN_ENV: TOKEN,
    }
    with log.open("w") as output:
        command = [sys.executable, str(ROOT / "jobs/serve_policy.py"), *flags]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while '"url"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        found = Served(process, f"https://127.0.0.1:{port}/toy", log, folder, certificate)
        message = {"observation": observation(0), "session": "soon forgotten"}
        assert posted(found, message)[0] == 200
        found.session_used = time.monotonic()
        yield found
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def posted(served, message, *, kind=MSGPACK, body=None, token: str | None = TOKEN, content_type=None):
    """(status, answer) of a POST."""
    body = encoded(message, kind) if body is None else body
    headers = {"Content-Type": content_type or kind} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(f"{served.url}/act", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60, context=served.tls) as answer:
            return answer.status, decoded(answer.read(), kind)
    except urllib.error.HTTPError as error:
        return error.code, decoded(error.read(), error.headers["Content-Type"])


def close(actions, expected):
    """Batches of other sizes round otherwise; 1e-5 of the actions' scale."""
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)


# ---- answers ----------------------------------------------------------------------------------------------


def test_metadata_say_what_the_policy_takes_under_its_robots_names(served):
    with served.robot() as robot:
        told = robot.metadata()
    assert told["policy"] == "toy"
    assert told["cameras"] == {TOP: [60, 80, 3], WRIST: [60, 80, 3]}
    assert (told["state"]["width"], told["action"]["width"], told["chunk_size"]) == (7, 7, 10)
    assert told["limits"] == {"request_bytes": int(REQUEST_MB * 2**20), "image_pixels": PIXELS}


@pytest.mark.parametrize("kind", [MSGPACK, JSON])
def test_http_answers_as_predict_actions_does(served, kind):
    observed = observation(1)
    status, told = posted(served, {"observation": observed, "seed": 5, "n_action_steps": 4}, kind=kind)
    assert status == 200
    close(array(told["actions"], field="actions"), served.expected(observed, 5)[0][:4])
    assert (told["seed"], told["policy"], told["version"]) == (5, "toy", "")
    assert told["seconds"] > 0


def test_images_may_be_png_in_base64_and_numbers_lists(served):
    observed = observation(2)
    written = {name: base64.b64encode(png(observed[name])).decode() for name in RENAME}
    written |= {STATE: observed[STATE].tolist(), "task": observed["task"]}
    status, told = posted(served, None, kind=JSON, body=json.dumps({"observation": written}).encode())
    assert status == 200
    close(told["actions"], served.expected(observed, told["seed"])[0])  # the seed that the server drew


def test_the_websocket_answers_in_the_form_that_it_was_asked_in(served):
    observed = observation(3)
    expected, _ = served.expected(observed, 6)
    url = served.url.replace("http", "ws") + "/ws"
    headers = {"Authorization": f"Bearer {TOKEN}"}

    async def ask():
        async with (
            asyncio.timeout(60),
            connect(url, ssl=served.tls, additional_headers=headers) as connection,
        ):
            for kind in (MSGPACK, JSON):
                body = encoded({"observation": observed, "seed": 6}, kind)
                await connection.send(body if kind == MSGPACK else body.decode())
                answer = await connection.recv()
                assert isinstance(answer, bytes if kind == MSGPACK else str)
                told = decoded(answer if isinstance(answer, bytes) else answer.encode(), kind)
                assert told["status"] == 200
                close(array(told["actions"], field="actions"), expected)

    asyncio.run(ask())


def test_robots_that_ask_together_share_passes_and_are_answered_as_alone(served):
    """Two chunks each: one by itself, one that goes on after as many executed actions as its number."""
    start = threading.Barrier(CLIENTS, timeout=60)

    def ask(number):
        size = (60, 80) if number else (48, 64)  # one has other cameras, and can share a pass with nobody
        first, second = observation(10 + number, size), observation(20 + number, size)
        with served.robot() as robot:
            start.wait()
            actions = robot.act(first, seed=number)
            batches = [robot.answer["batch"]]
            start.wait()
            guided = robot.act(second, seed=number + 50, executed=number, inference_delay=2)
            return first, second, actions, guided, [*batches, robot.answer["batch"]]

    with ThreadPoolExecutor(CLIENTS) as threads:
        answers = list(threads.map(ask, range(CLIENTS)))
    for number, (first, second, actions, guided, _) in enumerate(answers):
        expected, normalised = served.expected(first, number)
        close(actions, expected)
        left_over = normalised[None, number:]
        close(
            guided,
            served.expected(second, number + 50, prev_chunk_left_over=left_over, inference_delay=2)[0],
        )
    for turn in range(2):
        batches = [answer[4][turn] for answer in answers]
        assert batches[0] == 1
        assert max(batches) > 1


def test_a_session_over_http_continues_its_chunk(served):
    first, second = observation(4), observation(5)
    assert posted(served, {"observation": first, "seed": 1, "session": "arm"})[0] == 200
    message = {"observation": second, "seed": 2, "session": "arm", "executed": 3, "inference_delay": 1}
    status, told = posted(served, message | {"execution_horizon": 6})
    assert status == 200
    _, before = served.expected(first, 1)
    guidance = {"prev_chunk_left_over": before[None, 3:], "inference_delay": 1, "execution_horizon": 6}
    expected, _ = served.expected(second, 2, **guidance)
    close(array(told["actions"], field="actions"), expected)
    assert not np.allclose(expected, served.expected(second, 2)[0], atol=1e-3)


def test_a_client_can_keep_the_chunk_itself(served):
    first, second = observation(4), observation(5)
    before, _ = served.expected(first, 1)
    message = {"observation": second, "seed": 2, "left_over": before[3:], "inference_delay": 1}
    status, told = posted(served, message)
    assert status == 200
    guidance = {"prev_chunk_left_over": torch.tensor(before)[None, 3:], "inference_delay": 1}
    noise = sample_noise((1, 10, served.policy.config.max_action_dim), torch.Generator().manual_seed(2))
    expected = served.policy.predict_actions(batch(second), noise, **guidance)[0].numpy()
    close(array(told["actions"], field="actions"), expected)


def test_a_connection_that_breaks_is_made_again_and_the_chunk_goes_on(served):
    first, second = observation(4), observation(5)
    with served.robot() as robot:
        robot.act(first, seed=1)
        robot._socket.transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        actions = robot.act(second, seed=2, executed=4)
    _, before = served.expected(first, 1)
    expected, _ = served.expected(second, 2, prev_chunk_left_over=before[None, 4:])
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-4)  # it went through the units once


def test_jpegs_are_smaller_and_nearly_the_same(served):
    smooth = np.add.outer(np.arange(60), np.arange(80))[..., None].repeat(3, axis=2).astype(np.uint8)
    observed = observation(6) | dict.fromkeys(RENAME, smooth)
    with served.robot(jpeg_quality=95) as robot:
        actions = robot.act(observed, seed=1)
    np.testing.assert_allclose(actions, served.expected(observed, 1)[0], atol=0.2)


def test_the_loop_of_the_documentation_goes_on_from_chunk_to_chunk(served):
    """With LeRobot's way to name things, as the page has it."""
    page = (ROOT / "docs/serving.md").read_text()
    known = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1:]:
        exec(block, known)
    executed = []

    class Arm:
        def get_observation(self):
            seen = {f"joint_{i}.pos": 0.1 * i for i in range(7)}
            return seen | {"top": np.zeros((60, 80, 3), np.uint8), "wrist": np.zeros((60, 80, 3), np.uint8)}

        def send_action(self, action):
            executed.append(action)

    names = [f"joint_{i}.pos" for i in range(7)]
    with served.robot() as policy:
        metadata = policy.metadata() | {"state": {"names": names}, "action": {"names": names}}
        robot = known["LeRobotRobot"](Arm(), metadata, "wave")
        known["drive"](robot, policy, replan_after=4, actions=25, period_s=0.02)
    assert len(executed) == 25
    assert all(list(action) == names and np.isfinite(list(action.values())).all() for action in executed)


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({STATE: [1.0, 2.0]}, f"observation.{STATE}", r"shape \(2,\), not \(7,\)"),
        ({STATE: [0.0] * 6 + [float("nan")]}, f"observation.{STATE}", r"nan at \[6\] is no finite number"),
        ({STATE: [1e300] * 7}, f"observation.{STATE}", "no finite number"),
        ({STATE: [[1.0], [1.0, 2.0]]}, f"observation.{STATE}", "differ in length"),
        ({STATE: "high"}, f"observation.{STATE}", "'high' is neither an array nor a list"),
        ({"task": 3}, "observation.task", "3 is no text"),
        ({"task": None}, "observation.task", "missing"),
        ({WRIST: None}, "observation.wrist", "missing"),
        ({WRIST: b"GIF89a"}, "observation.wrist", "neither JPEG nor PNG"),
        ({WRIST: png(np.zeros((60, 80, 3), np.uint8))[:-8]}, "observation.wrist", "cut off"),
        ({WRIST: png(np.zeros((200, 200, 3), np.uint8))}, "observation.wrist", "200 x 200 pixels"),
        ({WRIST: np.zeros((60, 80), np.uint8)}, "observation.wrist", r"shape \(60, 80\)"),
        ({WRIST: np.zeros((60, 80, 3), np.float32)}, "observation.wrist", "float32; an image is uint8"),
        ({WRIST: "not base64!"}, "observation.wrist", "not base64"),
        ({WRIST: {"dtype": "object", "shape": [1], "data": b"x"}}, "observation.wrist", "dtype 'object'"),
        ({WRIST: {"dtype": "uint8", "shape": [60, 80, 3], "data": b"x"}}, "observation.wrist", "14400"),
        ({WRIST: {"dtype": "uint8", "shape": [-1], "data": b""}}, "observation.wrist", r"shape \[-1\]"),
        ({"observation.images.left": b""}, "observation.observation.images.left", "no such field"),
    ],
)
def test_a_wrong_observation_is_refused_by_the_name_of_its_field(served, change, field, message):
    status, told = posted(served, {"observation": observation(0) | change})
    assert (status, told["field"]) == (422, field)
    assert re.search(message, told["error"])


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"observation": 5}, 422, "observation"),
        ({"observaton": {}}, 422, "observaton"),
        ({"seed": -1}, 422, "seed"),
        ({"seed": 1.5}, 422, "seed"),
        ({"n_action_steps": 11}, 422, "n_action_steps"),
        ({"n_action_steps": True}, 422, "n_action_steps"),
        ({"session": ""}, 422, "session"),
        ({"inference_delay": 2}, 422, "inference_delay"),
        ({"execution_horizon": 2}, 422, "execution_horizon"),
        ({"executed": 3}, 422, "executed"),
        ({"executed": 3, "session": "nobody"}, 409, "executed"),
        ({"left_over": [[0.0] * 6]}, 422, "left_over"),
        ({"left_over": np.zeros((11, 7), np.float32)}, 422, "left_over"),
        ({"left_over": np.zeros((2, 7), np.float32), "executed": 1}, 422, "left_over"),
    ],
)
def test_a_wrong_request_is_refused_by_the_name_of_its_field(served, fields, status, field):
    found, told = posted(served, {"observation": observation(0)} | fields)
    assert (found, told["field"]) == (status, field)
    assert field in told["error"]


def test_what_is_no_message_is_refused(served):
    assert posted(served, None, body=b"x", content_type="application/x-pickle", kind=JSON)[0] == 415
    for body in (b"", b"\xc1", b"\x93\x01", b"\x01", b"\x81\x01\x02"):
        status, told = posted(served, None, body=body)
        assert (status, told["field"]) == (400, "")
    for body in (b"{", b"[]", b"[" * 100_000):
        assert posted(served, None, body=body, kind=JSON)[0] == 400


def test_a_body_above_the_limit_is_refused_with_and_without_a_length(served):
    status, told = posted(served, None, body=bytes(300_000))
    assert status == 413
    assert "at most 209715" in told["error"]
    address = ("127.0.0.1", int(served.url.split(":")[2].split("/")[0]))
    with (
        socket.create_connection(address, 30) as plain,
        served.tls.wrap_socket(plain, server_hostname=address[0]) as raw,
    ):
        head = f"POST /toy/act HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        raw.sendall(f"{head}Content-Type: {MSGPACK}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(4):
            raw.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    with served.robot() as robot:
        large = observation(0, (130, 150))
        with pytest.raises(RefusedError, match="at most 209715") as refused:
            robot.act({**large, "task": "x" * 200_000})
        assert refused.value.status == 413
        assert robot.act(observation(0)).shape == (10, 7)  # the connection stays


def test_without_the_token_nobody_is_answered(served):
    for token in (None, "another token, also long"):
        assert posted(served, {"observation": observation(0)}, token=token)[0] == 401
        with RobotClient(served.url, token, ca_file=served.ca_file) as robot:
            for ask in (robot.metadata, lambda robot=robot: robot.act(observation(0))):
                with pytest.raises(RefusedError, match="a valid token is needed") as refused:
                    ask()
                assert refused.value.status == 401
    with urllib.request.urlopen(f"{served.url}/health", timeout=30, context=served.tls) as answer:
        assert json.load(answer)["ready"] is True
    assert TOKEN not in served.log.read_text()


def test_a_certificate_that_the_system_does_not_know_is_trusted_only_if_it_was_named(served):
    with RobotClient(served.url, TOKEN) as robot:
        for ask in (robot.metadata, lambda: robot.act(observation(0))):
            with pytest.raises(ConnectionError, match="self-signed certificate"):
                ask()
    plain = served.url.replace("https", "http")
    with pytest.raises(ConnectionError), RobotClient(plain, TOKEN, timeout_s=0.5) as robot:
        robot.act(observation(0))


def test_more_robots_than_sessions_are_turned_away(served):
    robots = [served.robot() for _ in range(SESSIONS + 1)]
    try:
        with pytest.raises(RefusedError, match=f"{SESSIONS} are open") as refused:
            list(map(RobotClient.act, robots, [observation(0)] * len(robots)))
        assert (refused.value.status, refused.value.field) == (429, "session")
    finally:
        for robot in robots:
            robot.close()


def test_a_server_that_is_not_there_is_named():
    url = f"http://127.0.0.1:{free_port()}"
    with RobotClient(url, timeout_s=0.5) as robot:
        with pytest.raises(ConnectionError, match=f"{url} gave no answer within 0.5 s"):
            robot.act(observation(0))
        with pytest.raises(ConnectionError, match=f"{url} does not answer"):
            robot.metadata()
    with pytest.raises(ValueError, match="url 'machine:8000' is no http"):
        RobotClient("machine:8000")


def test_a_server_that_falls_silent_after_tls_is_given_up_in_time(certificate):
    """Its session tickets can be read, but no answer follows: who reads from them on waits for ever."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate / "tls.crt", certificate / "tls.key")
    told = []

    def act():
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        try:
            RobotClient(url, timeout_s=1, ca_file=certificate / "tls.crt").act(observation(0))
        except ConnectionError as error:
            told.append(str(error))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        robot = threading.Thread(target=act, daemon=True)
        robot.start()
        with tls.wrap_socket(listening.accept()[0], server_side=True):
            robot.join(20)
            assert not robot.is_alive()
    assert "gave no answer within 1 s" in told[0]


def test_the_answer_to_a_request_that_was_interrupted_is_not_taken_for_the_next_one():
    asked = threading.Event()

    def late(connection):
        for message in connection:
            number = float(array(decoded(message, MSGPACK)["observation"][STATE], field=STATE)[0])
            asked.set()
            time.sleep(1 if number == 1 else 0)
            told = {"status": 200, "actions": np.full((2, 7), number, np.float32)}
            connection.send(encoded(told, MSGPACK))

    def interrupt():
        if asked.wait(60):
            signal.pthread_kill(main_thread, signal.SIGINT)

    main_thread = threading.get_ident()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may ignore it
    try:
        with serve(late, "127.0.0.1", 0) as server:
            threading.Thread(target=server.serve_forever).start()
            url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
            with RobotClient(url, timeout_s=30) as robot:
                threading.Thread(target=interrupt).start()
                with pytest.raises(KeyboardInterrupt):
                    robot.act({STATE: [1.0]})
                assert robot.act({STATE: [2.0]}).tolist() == [[2.0] * 7] * 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_client_imports_neither_torch_nor_ray():
    code = "import sys, smolvla.client; print({'torch', 'transformers', 'ray', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


# ---- sessions, flags --------------------------------------------------------------------------------------


def test_sessions_end_when_idle_unless_they_are_held():
    now = [0.0]
    sessions = Sessions(most=2, idle_s=10, clock=lambda: now[0])
    chunk = np.arange(6, dtype=np.float32).reshape(3, 2)
    sessions.hold("connection")
    sessions.keep("arm", chunk)
    now[0] = 9.0
    np.testing.assert_array_equal(sessions.left_over("arm", 1), chunk[1:])
    assert sessions.left_over("arm", 3) is None
    with pytest.raises(RefusedError, match="2 are open, no more may be; the next one ends in 10 s"):
        sessions.admit("other")
    now[0] = 20.0
    assert len(sessions) == 1
    with pytest.raises(RefusedError, match="idle for more than 10 s"):
        sessions.left_over("arm", 1)
    sessions.admit("other")
    sessions.release("connection")
    assert len(sessions) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0 can be reached from other machines: token_env must name"),
        (["--token_env", "SMOLVLA_NO_SUCH"], "token_env SMOLVLA_NO_SUCH: the variable is not set"),
        (["--token_env", "SMOLVLA_SHORT"], "token_env SMOLVLA_SHORT: the variable holds 5 characters"),
        (["--max_batch", "0"], "max_batch 0 is below 1"),
        (["--max_request_mb", "0"], "max_request_mb 0.0 is not positive"),
        (["--port", "0"], "port 0 is not within"),
        (["--route", "toy"], "route 'toy' is neither"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(flags, message, folder, monkeypatch, capsys):
    monkeypatch.setenv("SMOLVLA_SHORT", "short")
    with pytest.raises(SystemExit) as ended:
        serve_policy.main(parsed(ServePolicy, ["--policy.path", str(folder), *flags]))
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("cert", "key", "message"),
    [
        ("tls.crt", None, "ssl_keyfile is missing"),
        (None, "tls.key", "ssl_certfile is missing"),
        ("none.crt", "tls.key", r"ssl_certfile /.*/none.crt: there is no such file"),
        ("tls.key", "tls.key", r"ssl_certfile /.*/tls.key, ssl_keyfile /.*/tls.key: "),
        ("tls.crt", "other.key", r"ssl_keyfile /.*/other.key: key values mismatch"),
        ("tls.crt", "encrypted.key", r"ssl_keyfile /.*/encrypted.key is encrypted"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_refused_by_its_file(cert, key, message, certificate, folder):
    cert_file, key_file = (str(certificate / file) if file else "" for file in (cert, key))
    job = ServePolicy(
        policy=serve_policy.ServedOptions(path=str(folder)), ssl_certfile=cert_file, ssl_keyfile=key_file
    )
    with pytest.raises(ValueError, match=message):
        serve_policy.prepare(job)


def test_an_alias_is_served_as_the_version_that_it_has_now(services):
    uri, name = services["mlflow"]["url"], "served toy"
    client = client_of(uri)
    client.create_registered_model(name)
    version = client.create_model_version(name, source="s3://nowhere/toy").version
    client.set_registered_model_alias(name, "champion", version)
    assert serve_policy.pinned(f"models:/{name}@champion", uri) == f"models:/{name}/{version}"
    assert serve_policy.pinned("/runs/toy/step_1", uri) == "/runs/toy/step_1"
    with pytest.raises(ValueError, match=r"policy.path models:/served toy@best: .*best"):
        serve_policy.pinned(f"models:/{name}@best", uri)


# ---- over time; in this order -----------------------------------------------------------------------------


def test_ray_exports_requests_latencies_batches_and_sessions(served):
    wanted = {
        "ray_smolvla_served_seconds_count": 'status="200"',
        "ray_smolvla_served_batch_size_bucket": 'policy="toy"',
        "ray_smolvla_served_sessions": 'policy="toy"',
        "ray_serve_deployment_processing_latency_ms": "BatchedPolicy",
    }
    posted(served, {"observation": observation(1)})
    deadline = time.monotonic() + 30
    while True:
        lines = exported_lines()
        missing = {
            name
            for name, tag in wanted.items()
            if not any(line.startswith(name) and tag in line for line in lines)
        }
        if not missing:
            break
        assert time.monotonic() < deadline, (missing, [line for line in lines if "served" in line])
        time.sleep(0.5)


def test_a_session_that_nobody_used_is_forgotten(served):
    time.sleep(max(served.session_used + IDLE_S + 1 - time.monotonic(), 0))
    message = {"observation": observation(0), "session": "soon forgotten", "executed": 1}
    status, told = posted(served, message)
    assert (status, told["field"]) == (409, "executed")


def test_a_notice_to_end_ends_it_and_frees_the_address(served):
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    assert "is no longer served" in served.log.read_text()
    gone = RobotClient(served.url, TOKEN, timeout_s=0.5, ca_file=served.ca_file)
    with pytest.raises(ConnectionError), gone as robot:
        robot.metadata()
