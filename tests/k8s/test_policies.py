"""What the security and operations of a shared cluster ask for, one test for each item."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

JOBS, WITH_AUTOSCALER = ("train", "sweep", "generate", "evaluate"), ("sample", "dev")
QUEUE = "kueue.x-k8s.io/queue-name"


def objects(built: Any, kind: str, overlay: str | None = None) -> list[dict[str, Any]]:
    return [o for name, some in built.items() if overlay in (None, name) for o in some if o["kind"] == kind]


def test_every_ray_cluster_asks_for_a_token(specs: Any) -> None:
    for name, spec in specs.items():
        assert spec["authOptions"]["mode"] == "token", name
        assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0), name


def test_ray_version_is_the_one_that_images_install(specs: Any) -> None:
    (pin,) = re.findall(r"^ray==(\S+)$", Path(__file__).parents[2].joinpath("constraints.txt").read_text(), re.M)
    assert {spec["rayVersion"] for spec in specs.values()} == {pin}


def test_namespace_enforces_the_restricted_standard(built: Any) -> None:
    (namespace,) = objects(built, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_pods_are_restricted(pods: Any) -> None:
    """Pod security standard 'restricted', and a root file system that can't be written."""
    for pod in pods:
        spec = pod.spec
        assert spec["securityContext"]["runAsNonRoot"] is True, pod.where
        assert spec["securityContext"]["runAsUser"] > 0, pod.where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod.where
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), pod.where
        assert {next(k for k in v if k != "name") for v in spec.get("volumes", [])} <= {
            "emptyDir", "configMap", "secret", "persistentVolumeClaim", "projected",
        }, pod.where  # fmt: skip
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, pod.where
            assert security["capabilities"] == {"drop": ["ALL"]}, pod.where
            assert security["readOnlyRootFilesystem"] is True, pod.where
            assert not any("hostPort" in port for port in container.get("ports", [])), pod.where


def test_autoscalers_beside_the_head_are_restricted_too(specs: Any) -> None:
    for name in WITH_AUTOSCALER:
        security = specs[name]["autoscalerOptions"]["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True


def test_every_path_that_is_written_has_a_volume(pods: Any) -> None:
    """With a read-only root: /tmp (Ray's sessions, caches) and /dev/shm (objects), each of a limited size."""
    for pod in pods:
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        needed = {"head": {"/tmp", "/dev/shm"}, "worker": {"/tmp", "/dev/shm"}, "submitter": {"/tmp"}}.get(
            pod.role, set()
        )
        assert needed <= set(mounts), pod.where
        for volume in volumes.values():
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], pod.where
        if "/dev/shm" in needed:
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory", pod.where
        homes = {env["name"]: env.get("value") for env in pod.container.get("env", [])}
        assert pod.role == "other" or homes["HOME"] == "/tmp", pod.where


def test_a_service_account_for_each_role(pods: Any, built: Any) -> None:
    accounts = {one["metadata"]["name"]: one for one in objects(built, "ServiceAccount")}
    for pod in pods:
        name, overlay = pod.spec["serviceAccountName"], pod.where.partition("/")[0]
        assert name in accounts, pod.where
        if pod.role in ("head", "worker"):
            assert name == f"scoreray-{overlay}", pod.where
            role = accounts[name]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
            assert re.fullmatch(rf"arn:aws:iam::\d{{12}}:role/{name}", role)
        else:
            assert "annotations" not in accounts[name]["metadata"], f"{name} needs no rights in S3"


def test_only_heads_that_scale_their_cluster_hold_a_token_of_the_api(pods: Any, built: Any, specs: Any) -> None:
    assert all(one["automountServiceAccountToken"] is False for one in objects(built, "ServiceAccount"))
    for pod in pods:
        overlay = pod.where.partition("/")[0]
        needs = pod.role == "head" and specs[overlay]["enableInTreeAutoscaling"]
        assert pod.spec["automountServiceAccountToken"] is needs, pod.where


def test_no_credentials_in_manifests(built: Any) -> None:
    for name, some in built.items():
        assert not [o for o in some if o["kind"] == "Secret"], name
        text = yaml.safe_dump(some)
        assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text), name
        for found in re.finditer(r"name: \w*(?:SECRET|TOKEN|PASSWORD)\w*\n\s*(\w+):", text):
            assert found[1] == "valueFrom", f"{name}: {found[0]}"


def test_pods_are_limited(pods: Any) -> None:
    for pod in pods:
        for container in pod.spec["containers"]:
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert {"cpu", "memory"} <= set(limits), pod.where
            assert {"cpu", "memory"} <= set(requests), pod.where
            if pod.role == "worker":  # Ray counts what a pod may use: it must have it
                assert limits == requests, pod.where


def test_pods_are_probed(pods: Any) -> None:
    for pod in pods:
        if pod.role == "submitter":
            continue  # a job: its end says how it was
        assert pod.container["livenessProbe"], pod.where
        assert pod.container["readinessProbe"], pod.where
        if pod.role in ("head", "worker"):
            assert pod.container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        if pod.where.startswith("sample/") and pod.role == "worker":
            assert pod.container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}


def test_probed_paths_need_no_token_in_this_ray() -> None:
    import ray

    text = (Path(ray.__file__).parent / "dashboard" / "http_server_agent.py").read_text()
    free = re.search(r"PUBLIC_EXACT_PATHS = \[(.*?)\]", text, re.S)
    assert free
    assert '"/api/healthz"' in free[1]


def test_grace_is_longer_than_drain_and_save(pods: Any, built: Any, specs: Any) -> None:
    (config,) = objects(built, "ConfigMap", "train")
    grace_s = yaml.safe_load(config["data"]["train.yaml"])["scaling"]["grace_s"]
    (service,) = objects(built, "RayService")
    drain_s = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["drain_s"]
    for pod in pods:
        if pod.role not in ("head", "worker"):
            continue
        command = pod.container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:4] == ["python", "-m", "scoreray.cluster.drain", "--deadline-s"], pod.where
        deadline = float(command[4])
        assert pod.spec["terminationGracePeriodSeconds"] >= deadline + 30, pod.where
        assert deadline >= {"train": grace_s + 60, "sample": drain_s + 20}.get(pod.where.partition("/")[0], 0), (
            pod.where
        )


def test_jobs_go_on_after_their_driver_is_lost(clusters: Any) -> None:
    """A retry is a resume: the run's name or the output's place is in the command or its config, and never changes."""
    for name in JOBS:
        spec = clusters[name]["spec"]
        assert spec["backoffLimit"] >= 3, name
        assert spec["shutdownAfterJobFinishes"] is True, name
        assert "--fresh" not in spec["entrypoint"], name
        assert not re.search(r"\$|`|generateName", spec["entrypoint"]), name
        assert "generateName" not in clusters[name]["metadata"], name


def test_the_run_name_is_fixed(built: Any) -> None:
    for overlay, file, section in (("train", "train.yaml", "run"), ("sweep", "study.yaml", "study")):
        (config,) = objects(built, "ConfigMap", overlay)
        assert yaml.safe_load(config["data"][file])[section]["name"]


def test_jobs_wait_in_kueue_for_all_their_pods(clusters: Any, specs: Any, built: Any) -> None:
    (queue,) = objects(built, "LocalQueue")
    for name, one in clusters.items():
        queued = one["metadata"].get("labels", {}).get(QUEUE)
        if name in JOBS:
            assert queued == queue["metadata"]["name"], name
            group = specs[name]["workerGroupSpecs"][0]
            assert specs[name]["enableInTreeAutoscaling"] is False, f"{name}: Kueue takes no job that scales itself"
            assert group["replicas"] == group["minReplicas"] == group["maxReplicas"], name
        else:
            assert queued is None, name


def test_autoscaler_v2(specs: Any) -> None:
    for name in WITH_AUTOSCALER:
        spec = specs[name]
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["autoscalerOptions"]["version"] == "v2"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["template"]["spec"]["restartPolicy"] == "Never"
        group = spec["workerGroupSpecs"][0]
        assert group["minReplicas"] < group["maxReplicas"]


def test_nothing_of_ours_runs_on_a_head(specs: Any) -> None:
    for name, spec in specs.items():
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name


def test_serving_outlives_its_head(specs: Any, built: Any) -> None:
    options = specs["sample"]["gcsFaultToleranceOptions"]
    (redis,) = objects(built, "StatefulSet", "sample")
    (service,) = objects(built, "Service", "sample")
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"].items() <= redis["spec"]["template"]["metadata"]["labels"].items()
    secret = redis["spec"]["template"]["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == secret
    assert redis["spec"]["volumeClaimTemplates"]


def test_every_pod_of_the_service_stores_idempotency_keys_in_the_heads_redis(specs: Any) -> None:
    spec = specs["sample"]
    options = spec["gcsFaultToleranceOptions"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        env = {one["name"]: one for one in group["template"]["spec"]["containers"][0]["env"]}
        assert env["SCORERAY_REDIS"]["value"] == f"redis://{options['redisAddress']}"
        assert env["SCORERAY_REDIS_PASSWORD"]["valueFrom"] == options["redisPassword"]["valueFrom"]


def test_disruption_budgets_match_pods_and_hold_an_integer(built: Any, pods: Any) -> None:
    """For pods of an operator Kubernetes takes minAvailable as a number only."""
    for overlay in clusters_of(built):
        budgets = objects(built, "PodDisruptionBudget", overlay)
        covered = set()
        for budget in budgets:
            assert isinstance(budget["spec"]["minAvailable"], int)
            wanted = budget["spec"]["selector"]["matchLabels"].items()
            hit = [pod for pod in pods if pod.where.startswith(overlay + "/") and wanted <= pod.labels.items()]
            assert hit, budget["metadata"]["name"]
            covered |= {pod.role for pod in hit}
        assert covered >= ({"head", "worker"} if overlay == "sample" else {"head"}), overlay


def clusters_of(built: Any) -> list[str]:
    return [name for name in built if name != "platform"]


def test_workers_are_spread(pods: Any) -> None:
    for pod in pods:
        if pod.role == "worker":
            spread = pod.spec["topologySpreadConstraints"]
            keys = {one["topologyKey"] for one in spread}
            assert "kubernetes.io/hostname" in keys, pod.where
            assert ("topology.kubernetes.io/zone" in keys) == pod.where.startswith("sample/"), pod.where
            for one in spread:
                assert one["labelSelector"]["matchLabels"].items() <= pod.labels.items(), pod.where


def test_serving_has_priority_over_training_over_batch_work(pods: Any, built: Any) -> None:
    classes = {one["metadata"]["name"]: one["value"] for one in objects(built, "PriorityClass")}
    given = {
        pod.where.partition("/")[0]: classes[pod.spec["priorityClassName"]] for pod in pods if pod.role == "worker"
    }
    assert given["sample"] > given["train"] > max(given["sweep"], given["generate"], given["evaluate"], given["dev"])
    assert all(one["preemptionPolicy"] == "Never" for one in objects(built, "PriorityClass"))


def test_prometheus_scrapes_ports_that_pods_have(built: Any, pods: Any) -> None:
    for monitor in objects(built, "PodMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        chosen = [pod for pod in pods if wanted <= pod.labels.items()]
        ports = {port["name"] for pod in chosen for port in pod.container.get("ports", [])}
        assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} <= ports, monitor["metadata"]["name"]


def test_dashboards_and_rules_are_config_maps(built: Any) -> None:
    maps = {one["metadata"]["name"]: one for one in objects(built, "ConfigMap", "platform")}
    dashboards = [one for one in maps.values() if one["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    assert {next(iter(one["data"])) for one in dashboards} == {
        f"{n}.json" for n in ("training", "data", "sampling", "cluster")
    }
    assert "groups" in yaml.safe_load(maps["scoreray-rules"]["data"]["scoreray.rules.yaml"])


@pytest.mark.parametrize("group", ["headGroupSpec", "workerGroupSpecs"])
def test_ray_takes_the_start_parameters(specs: Any, group: str) -> None:
    from ray.scripts.scripts import start

    known = {name.removeprefix("--") for option in start.params for name in option.opts}
    for name, spec in specs.items():
        params = spec[group]["rayStartParams"] if group == "headGroupSpec" else spec[group][0]["rayStartParams"]
        assert set(params) <= known, name
        assert all(isinstance(value, str) for value in params.values()), name
