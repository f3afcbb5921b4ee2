"""The Helm chart, rendered by Helm's own library, its manifests checked against the schemas of Kubernetes."""

from typing import Any

import kubernetes_validate
import pytest
import yaml
from chart_rendering import CHART, Refused, lint, render, rendered_files
from deployed import DASHBOARDS, rules, server_variables

# The oldest Kubernetes that the chart says it runs on, and the newest whose schemas we have.
VERSIONS = ("1.27", "1.37")
OPERATOR = "monitoring.coreos.com/v1"

SECURED = {
    "tls": {"enabled": True, "existingSecret": "patchclamp-tls", "clientCA": True},
    "auth": {"enabled": True, "existingSecret": "patchclamp-access", "policy": True},
    "audit": {"enabled": True},
}
MONITORED = {
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True},
    }
}
SCALED = {
    "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 6},
    "artifacts": {"url": "s3://models/patchclamp"},
}
ON_GPUS = {
    "gpu": {"count": 1},
    "server": {"model": "/models/llama", "dtype": "bfloat16", "options": {"PATCHCLAMP_MAX_SEQUENCES": 128}},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "extraVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
    "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    "cache": {"persistence": {"enabled": True, "accessMode": "ReadWriteMany"}},
    "artifacts": {"persistence": {"existingClaim": "artifacts"}},
}
NOTHING_KEPT = {
    "artifacts": {"persistence": {"enabled": False}},
    "podDisruptionBudget": {"enabled": False},
    "networkPolicy": {"enabled": False},
    "serviceAccount": {"create": False},
}
SETS = {
    "defaults": {},
    "secured": SECURED,
    "monitored": MONITORED,
    "scaled": SCALED,
    "on_gpus": ON_GPUS,
    "nothing_kept": NOTHING_KEPT,
    "everything": SECURED | MONITORED | SCALED,
}


@pytest.fixture(scope="module", params=SETS)
def manifests(request: pytest.FixtureRequest) -> dict[tuple[str, str], dict[str, Any]]:
    return render(SETS[request.param])


def deployment(values: dict[str, Any]) -> dict[str, Any]:
    return render(values)["Deployment", "demo-patchclamp"]["spec"]


def container(values: dict[str, Any]) -> dict[str, Any]:
    [only] = deployment(values)["template"]["spec"]["containers"]
    return only


def environment(values: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(values)["env"]}


def test_helm_lint_has_nothing_to_say_but_that_there_is_no_icon():
    assert [finding["error"] for finding in lint()] == ["icon is recommended"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_fits_the_schema_of_kubernetes(manifests, version: str):
    known = [manifest for manifest in manifests.values() if manifest["apiVersion"] != OPERATOR]
    assert {"Deployment", "Service"} <= {manifest["kind"] for manifest in known}
    for manifest in known:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_pods_run_without_root_on_a_filesystem_that_cannot_be_written(manifests):
    pod = manifests["Deployment", "demo-patchclamp"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    [only] = pod["containers"]
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert only["resources"]["requests"]
    assert "memory" in only["resources"]["limits"]


def test_every_mount_has_its_volume_and_what_is_written_is_mounted(manifests):
    pod = manifests["Deployment", "demo-patchclamp"]["spec"]["template"]["spec"]
    [only] = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in only["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert {"/tmp", "/var/cache/patchclamp"} <= set(mounts)
    values = {entry["name"]: entry["value"] for entry in only["env"]}
    url = values["PATCHCLAMP_ARTIFACTS_URL"]
    assert "://" in url or "/var/lib/patchclamp" in mounts
    files = [value for name, value in values.items() if value.startswith("/") and name != "PATCHCLAMP_ARTIFACTS_URL"]
    assert all(any(file.startswith(mount + "/") for mount in mounts) for file in files), files


def test_every_claim_is_made_or_named_by_the_operator(manifests):
    pod = manifests["Deployment", "demo-patchclamp"]["spec"]["template"]["spec"]
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    made = {name for kind, name in manifests if kind == "PersistentVolumeClaim"}
    assert made <= claims
    assert claims - made <= {"models", "artifacts"}


def test_selectors_find_the_pods(manifests):
    labels = manifests["Deployment", "demo-patchclamp"]["spec"]["template"]["metadata"]["labels"].items()
    for (kind, _), manifest in manifests.items():
        spec = manifest.get("spec", {})
        if kind == "Service":
            assert spec["selector"].items() <= labels
        elif kind in ("Deployment", "PodDisruptionBudget"):
            assert spec["selector"]["matchLabels"].items() <= labels
        elif kind == "NetworkPolicy":
            assert spec["podSelector"]["matchLabels"].items() <= labels


def test_ports_are_asked_for_by_names_that_the_pod_has(manifests):
    [only] = manifests["Deployment", "demo-patchclamp"]["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in only["ports"]}
    for (kind, _), manifest in manifests.items():
        if kind == "Service":
            assert all(port["targetPort"] in ports for port in manifest["spec"]["ports"])
        elif kind == "NetworkPolicy":
            assert all(port["port"] in ports for rule in manifest["spec"]["ingress"] for port in rule["ports"])
    values = {entry["name"]: entry["value"] for entry in only["env"]}
    assert values["PATCHCLAMP_ADDRESS"] == f"0.0.0.0:{ports['grpc']}"
    assert values["PATCHCLAMP_HEALTH_ADDRESS"] == f"0.0.0.0:{ports['health']}"
    assert values["PATCHCLAMP_METRICS_ADDRESS"] == f"0.0.0.0:{ports['metrics']}"
    probes = [only[f"{kind}Probe"]["grpc"]["port"] for kind in ("startup", "readiness", "liveness")]
    assert probes == [ports["health"]] * 3


def test_every_variable_is_one_that_the_server_reads():
    for values in SETS.values():
        assert set(environment(values)) <= server_variables()


@pytest.mark.parametrize("drain", [0, 30, 120.5])
def test_a_pod_is_killed_only_after_its_drain(drain: float):
    spec = deployment({"server": {"drainSeconds": drain}})["template"]["spec"]
    assert environment({"server": {"drainSeconds": drain}})["PATCHCLAMP_DRAIN_SECONDS"] == str(drain)
    [only] = spec["containers"]
    _, sleep = only["lifecycle"]["preStop"]["exec"]["command"]
    assert spec["terminationGracePeriodSeconds"] >= drain + int(sleep) + 15


def test_the_first_start_has_the_time_it_is_given():
    probe = container({"server": {"startupSeconds": 901}})["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 901


def test_secrets_become_files_and_the_server_is_told_of_them():
    values = environment(SECURED)
    assert values["PATCHCLAMP_TLS_CERTIFICATE"] == "/etc/patchclamp/tls/tls.crt"
    assert values["PATCHCLAMP_TLS_KEY"] == "/etc/patchclamp/tls/tls.key"
    assert values["PATCHCLAMP_TLS_CLIENT_CA"] == "/etc/patchclamp/tls/ca.crt"
    assert values["PATCHCLAMP_TOKENS"] == "/etc/patchclamp/access/tokens"
    assert values["PATCHCLAMP_POLICY"] == "/etc/patchclamp/access/policy.yaml"
    volumes = {volume["name"]: volume for volume in deployment(SECURED)["template"]["spec"]["volumes"]}
    assert volumes["tls"]["secret"] == {"secretName": "patchclamp-tls", "defaultMode": 0o440}
    assert volumes["access"]["secret"] == {"secretName": "patchclamp-access", "defaultMode": 0o440}
    mounts = {mount["mountPath"]: mount for mount in container(SECURED)["volumeMounts"]}
    for path in ("/etc/patchclamp/tls", "/etc/patchclamp/access"):
        assert mounts[path]["readOnly"]
        # The whole folder: with a subPath a renewed secret would never arrive.
        assert "subPath" not in mounts[path]
    assert not any(kind == "Secret" for kind, _ in render(SECURED))


def test_the_autoscaler_follows_the_queue_and_owns_the_number_of_replicas(exported: set[str]):
    manifests = render(SCALED)
    scaler = manifests["HorizontalPodAutoscaler", "demo-patchclamp"]["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "demo-patchclamp"}
    [metric] = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] in exported
    assert "replicas" not in manifests["Deployment", "demo-patchclamp"]["spec"]
    adapter = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())
    assert adapter["rules"]["custom"][0]["name"]["as"] == metric["pods"]["metric"]["name"]


def test_a_volume_of_one_node_is_never_mounted_by_two_pods():
    assert deployment({})["strategy"] == {"type": "Recreate"}
    assert deployment(SCALED)["strategy"]["type"] == "RollingUpdate"


def test_artifacts_stay_when_the_release_is_removed():
    claim = render({})["PersistentVolumeClaim", "demo-patchclamp-artifacts"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_gpu_changes_image_device_and_resources():
    only = container(ON_GPUS)
    assert only["image"].endswith("-cuda")
    assert only["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert environment(ON_GPUS)["PATCHCLAMP_DEVICE"] == "cuda"
    assert environment(ON_GPUS)["PATCHCLAMP_MAX_SEQUENCES"] == "128"
    assert container({})["image"].endswith("-cpu")


def test_the_operators_objects_carry_the_rules_and_dashboards_of_this_repository():
    manifests = render(MONITORED)
    groups = manifests["PrometheusRule", "demo-patchclamp"]["spec"]["groups"]
    assert [rule for group in groups for rule in group["rules"]] == rules("alert") + rules("record")
    assert len({group["name"] for group in groups}) == len(groups)
    dashboards = manifests["ConfigMap", "demo-patchclamp-dashboards"]["data"]
    carried = {name: text.strip() for name, text in dashboards.items()}
    assert carried == {path.name: path.read_text().strip() for path in DASHBOARDS}


def test_the_service_monitor_finds_one_service_and_names_the_job_as_the_rules_do():
    manifests = render(MONITORED)
    monitor = manifests["ServiceMonitor", "demo-patchclamp"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    found = [m for (kind, _), m in manifests.items() if kind == "Service" and wanted <= m["metadata"]["labels"].items()]
    assert [service["metadata"]["name"] for service in found] == ["demo-patchclamp-metrics"]
    assert found[0]["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "patchclamp"
    assert [e["port"] for e in monitor["spec"]["endpoints"]] == [p["name"] for p in found[0]["spec"]["ports"]]


def test_metrics_by_tls_are_scraped_by_tls():
    values = {"tls": SECURED["tls"], "metrics": {"tls": True, "serviceMonitor": {"enabled": True}}}
    assert environment(values)["PATCHCLAMP_METRICS_TLS"] == "on"
    [endpoint] = render(values)["ServiceMonitor", "demo-patchclamp"]["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"] == {
        "ca": {"secret": {"name": "patchclamp-tls", "key": "ca.crt"}},
        "serverName": "demo-patchclamp.models.svc",
    }


def test_names_fit_however_long_that_of_the_release_is():
    for kind, name in render(SECURED | MONITORED, release="r" * 53):
        assert len(name) <= 63, (kind, name)


def test_the_notes_say_what_is_not_secured():
    def notes(values: dict[str, Any]) -> str:
        return rendered_files(values)["patchclamp/templates/NOTES.txt"]

    assert "Whoever can reach the service may use it" in notes({})
    assert "Calls are not encrypted" in notes({})
    assert "Artifacts are lost" in notes(NOTHING_KEPT)
    assert "patchclamp health --address localhost:50051 --ca ca.crt" in notes(SECURED)
    assert "not encrypted" not in notes(SECURED)


REFUSED = {
    "replicas_on_a_volume_of_one_node": ({"replicaCount": 2}, "accessMode ReadWriteOnce serves one replica"),
    "autoscaling_on_a_volume_of_one_node": ({"autoscaling": {"enabled": True}}, "accessMode ReadWriteOnce"),
    "replicas_with_artifacts_of_their_own": (
        {"replicaCount": 2, "artifacts": {"persistence": {"enabled": False}}},
        "artifacts that all of them see",
    ),
    "replicas_that_share_a_cache_of_one_node": (
        SCALED | {"cache": {"persistence": {"enabled": True}}},
        "cache.persistence.accessMode",
    ),
    "fewest_above_most": (
        {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}, "artifacts": {"url": "s3://a/b"}},
        "minReplicas",
    ),
    "tokens_in_plain_text": ({"auth": {"enabled": True, "existingSecret": "access"}}, "plain text"),
    "metrics_by_tls_without_a_certificate": ({"metrics": {"tls": True}}, "metrics.tls needs"),
    "tls_without_a_secret": ({"tls": {"enabled": True}}, "existingSecret"),
    "tokens_without_a_secret": ({"auth": {"enabled": True, "allowWithoutTLS": True}}, "existingSecret"),
    "a_misspelt_value": ({"serviceAcount": {"create": False}}, "serviceAcount"),
    "an_option_that_is_no_variable": ({"server": {"options": {"max-sequences": "1"}}}, "max-sequences"),
    "a_directory_as_url": ({"artifacts": {"url": "/data"}}, "url"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_cannot_work_are_refused_before_anything_is_installed(name: str):
    values, message = REFUSED[name]
    with pytest.raises(Refused, match=message):
        render(values)
