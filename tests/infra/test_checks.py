"""The files of infra/ pass the checks, and a broken copy of each does not."""

import re

import pytest
import yaml

from infra import checks

BREAKAGES = [  # file, what stands there, what is put in its place, what the check must say
    ("docker/Dockerfile", "USER 1000:1000", "USER root", "DL3002"),
    ("docker/Dockerfile", "=22.3.6-1+deb12u2", "", "DL3008"),
    ("docker/compose.yaml", "depends_on:", "depend_on:", "depend_on"),
    ("docker/compose.yaml", "restart: on-failure", "restart: {always: true}", "restart"),
    (
        "docker/compose.yaml",
        "  prometheus: {}\n",
        "  prometheus: {}\n  prometheus: {}\n",
        "duplication of key",
    ),
    ("docker/compose.yaml", "mlflow: {condition", "ml-flow: {condition", "ml-flow is not defined"),
    ("docker/compose.yaml", "secrets: [postgres_password]", "secrets: [password]", "password is not defined"),
    ("docker/compose.yaml", "source: ray-dashboards", "source: dashboards", "dashboards is not defined"),
    ("docker/prometheus.yml", "    dns_sd_configs", "   dns_sd_configs", "syntax error"),
    ("docker/grafana/datasources/prometheus.yaml", "  - name", "- name", "syntax error"),
    (
        "docker/grafana/dashboards/folders.yaml",
        "    options:\n",
        "    options:\n    type: file\n",
        "duplication",
    ),
    ("kuberay/namespace.yaml", "metadata:", "metdata:", "metdata"),
    ("kuberay/settings.yaml", '"true"', "[true]", "AWS_EC2_METADATA_DISABLED"),
    ("kuberay/mlflow.yaml", "replicas: 1", "replica: 1", "replica"),
    ("kuberay/mlflow.yaml", "runAsUser: 1000", "runAsUser: somebody", "runAsUser"),
    ("kuberay/mlflow.yaml", "secretKeyRef", "secretRef", "secretRef"),
    ("kuberay/network_policy.yaml", "policyTypes: [Ingress]", "policyTypes: Ingress", "policyTypes"),
    ("kuberay/raycluster.yaml", "enableInTreeAutoscaling", "enableAutoscaling", "enableAutoscaling"),
    ("kuberay/raycluster.yaml", "mode: token", "mode: tokens", "tokens"),
    ("kuberay/raycluster.yaml", "kind: RayCluster", "kind: RayService", "RayService"),
    ("kuberay/rayjob.yaml", "backoffLimit: 3", "backoffLimit: three", "backoffLimit"),
    ("kuberay/rayjob.yaml", "maxReplicas: 2", "maxReplica: 2", "maxReplica"),
    ("kuberay/rayjob.yaml", "medium: Memory", "medum: Memory", "medum"),
    ("kuberay/rayjob_serve.yaml", "port: 8000", "port: https", "port"),
    ("kuberay/rayjob_serve.yaml", "minReplicas: 1", "minReplica: 1", "minReplica"),
]


def needs_schema(name):
    if name.startswith("kuberay/ray") and not checks.KUBERAY_SCHEMA.exists():
        pytest.skip(f"KubeRay's schema is not at hand: {checks.KUBERAY_SCHEMA}")


@pytest.mark.parametrize(
    "name", [str(path.relative_to(checks.ROOT / "infra")) for path in checks.checked_files()]
)
def test_a_file_passes_and_a_broken_copy_of_it_is_known(name):
    needs_schema(name)
    assert checks.findings(checks.ROOT / "infra" / name) == []
    assert name in {broken for broken, *_ in BREAKAGES}


@pytest.mark.parametrize(("name", "good", "bad", "said"), BREAKAGES)
def test_a_broken_copy_is_refused(name, good, bad, said, tmp_path):
    needs_schema(name)
    text = (checks.ROOT / "infra" / name).read_text()
    assert good in text
    copy = tmp_path / name.rpartition("/")[2]
    # In a Dockerfile the last user counts, elsewhere the first mistake is enough.
    copy.write_text(text.replace(good, bad) if copy.name == "Dockerfile" else text.replace(good, bad, 1))
    found = checks.findings(copy)
    assert any(said in finding for finding in found), found
    assert checks.main([copy]) == 1


def documents(kind):
    for path in checks.checked_files():
        if path.parent.name == "kuberay":
            for document in yaml.safe_load_all(path.read_text()):
                if document["kind"] == kind:
                    yield document


def rayjob(script):
    """The RayJob that runs it, and its flags."""
    commands = [(job, job["spec"]["entrypoint"].split()) for job in documents("RayJob")]
    ((job, words),) = [
        (job, words) for job, words in commands if words[:2] == ["python", f"/app/jobs/{script}"]
    ]
    return job, words[2:]


def test_the_command_of_the_rayjob_that_trains_is_one_that_the_job_accepts():
    from jobs.command_line import parsed
    from jobs.train_smolvla import TrainJob

    job, words = rayjob("train_smolvla.py")
    flags = parsed(TrainJob, words)
    assert flags.run_name, "without a name a retry would be another run"
    assert flags.storage_path.startswith("s3://")
    fewest, most = flags.workers
    gpu = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = gpu["template"]["spec"]["containers"][0]
    per_machine = container["resources"]["limits"]["nvidia.com/gpu"]
    assert fewest <= per_machine * gpu["minReplicas"]
    assert most == per_machine * gpu["maxReplicas"]


def test_the_rayjob_that_serves_has_the_token_the_certificate_and_the_gpus_that_its_command_asks_for():
    from jobs.command_line import parsed
    from jobs.serve_policy import ServePolicy
    from pipelines.serving import GATEWAY_CPUS

    job, words = rayjob("serve_policy.py")
    flags, cluster = parsed(ServePolicy, words), job["spec"]["rayClusterSpec"]
    template = cluster["headGroupSpec"]["template"]
    (head,) = template["spec"]["containers"]
    assert flags.token_env in {variable["name"] for variable in head["env"]}
    mounted = {
        mount["mountPath"]: volume.get("secret", {}).get("secretName")
        for mount in head["volumeMounts"]
        for volume in template["spec"]["volumes"]
        if volume["name"] == mount["name"]
    }
    for file, name in ((flags.ssl_certfile, "tls.crt"), (flags.ssl_keyfile, "tls.key")):
        folder, _, found = file.rpartition("/")
        assert (mounted[folder], found) == ("policy-tls", name)  # as `kubectl create secret tls` names them
    (service,) = (entry for entry in documents("Service") if entry["metadata"]["name"] == "policy")
    assert template["metadata"]["labels"].items() >= service["spec"]["selector"].items()
    assert [port["port"] for port in service["spec"]["ports"]] == [flags.port]
    assert flags.port in {port["containerPort"] for port in head["ports"]}
    (gpu,) = cluster["workerGroupSpecs"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert flags.replicas <= limits["nvidia.com/gpu"] * gpu["minReplicas"]
    cpus = flags.replicas * flags.cpus_per_replica + GATEWAY_CPUS
    assert cpus <= int(limits["cpu"]) * gpu["minReplicas"]


def pods():
    for kind in ("RayJob", "RayCluster"):
        for document in documents(kind):
            spec = document["spec"].get("rayClusterSpec", document["spec"])
            assert spec["authOptions"] == {"mode": "token"}
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                yield group["template"]["spec"]
    for kind in ("Deployment", "StatefulSet"):
        for document in documents(kind):
            yield document["spec"]["template"]["spec"]


def test_no_pod_may_become_root_or_write_outside_its_volumes():
    found = list(pods())
    assert len(found) == 10
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_no_value_of_a_secret_is_in_a_file():
    assert not list(documents("Secret"))
    for pod in pods():
        for container in pod["containers"]:
            for variable in container.get("env", []):
                named = variable["name"].rpartition("_")[2]
                if named in {"PASSWORD", "KEY", "TOKEN", "PGPASSWORD", "USERNAME"}:
                    assert "secretKeyRef" in variable["valueFrom"], variable


def test_readme_says_how_to_make_every_secret_that_a_pod_reads():
    readme = (checks.ROOT / "infra/README.md").read_text().replace("\\\n", " ")
    made = {
        name: set(re.findall(r"--from-literal=([\w-]+)=", rest))
        for name, rest in re.findall(r"create secret (?:generic|tls) (\S+)(.*)", readme)
    }
    volumes = [volume for pod in pods() for volume in pod["volumes"] if "secret" in volume]
    used = {volume["secret"]["secretName"]: set() for volume in volumes}
    for container in (container for pod in pods() for container in pod["containers"]):
        for source in container.get("envFrom", []):
            if "secretRef" in source:
                used.setdefault(source["secretRef"]["name"], set())
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                used.setdefault(reference["name"], set()).add(reference["key"])
    assert used.keys() == made.keys()
    assert all(keys <= made[name] for name, keys in used.items())
