"""The image and the compose file, as far as they can be checked without running them."""

import re
import subprocess
from typing import Any

import pytest
import yaml
from deployed import DEPLOY, ROOT, program, server_variables

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
COMPOSE = DEPLOY / "compose"
FILES = sorted(COMPOSE.glob("*.yaml"))


def stages() -> dict[str, list[str]]:
    """{stage: its instructions}, continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if match := re.fullmatch(r"FROM \S+ AS (\S+)", line):
            name = match[1]
        found.setdefault(name, []).append(line)
    return found


def compose(name: str) -> dict[str, Any]:
    return yaml.safe_load((COMPOSE / name).read_text())


def variables_of_the_image() -> dict[str, str]:
    text = " ".join(line.removeprefix("ENV ") for line in stages()["runtime"] if line.startswith("ENV "))
    return dict(word.split("=", 1) for word in text.split())


def test_hadolint_finds_nothing():
    done = subprocess.run([program("hadolint"), DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_ends_as_a_user_without_rights(target: str):
    users = [line for line in stages()[target] if line.startswith("USER ")]
    assert users == ["USER 10001:10001"]
    assert "root" not in "".join(stages()[target])


def test_the_entry_is_an_exec_form_so_that_sigterm_arrives():
    entry = [line for line in stages()["runtime"] if line.startswith(("ENTRYPOINT", "CMD", "STOPSIGNAL"))]
    assert entry == ["STOPSIGNAL SIGTERM", 'ENTRYPOINT ["tini", "--", "patchclamp"]', 'CMD ["serve"]']


def test_the_health_check_asks_the_health_address_of_the_image():
    [check] = [line for line in stages()["runtime"] if line.startswith("HEALTHCHECK")]
    port = variables_of_the_image()["PATCHCLAMP_HEALTH_ADDRESS"].rpartition(":")[2]
    assert f'CMD ["patchclamp", "health", "--address", "127.0.0.1:{port}"' in check


def test_the_image_sets_variables_that_the_server_reads_and_exposes_its_ports():
    variables = variables_of_the_image()
    ours = {name for name in variables if name.startswith("PATCHCLAMP_")}
    assert ours <= server_variables() | {"PATCHCLAMP_CACHE"}
    served = {variables[name].rpartition(":")[2] for name in ours if name.endswith("ADDRESS")}
    [exposed] = [line for line in stages()["runtime"] if line.startswith("EXPOSE")]
    assert set(exposed.split()[1:]) == served


def test_the_build_sees_nothing_but_what_it_installs():
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {line[1:] for line in rules if line.startswith("!")}
    copied = {path for line in stages()["source"] if line.startswith("COPY ") for path in line.split()[1:-1]}
    assert copied == let_in
    assert all((ROOT / path).exists() for path in let_in)


def test_no_secret_is_given_to_the_build():
    for name, lines in stages().items():
        for line in lines:
            if line.startswith(("ARG", "ENV")):
                assert not re.search("token|secret|password|credential", line, re.IGNORECASE), (name, line)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_compose_file_fits_the_schema_of_compose(path):
    command = [program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_is_mounted_is_in_the_repository_or_named_as_a_secret():
    for path in FILES:
        for service in compose(path.name)["services"].values():
            for volume in service.get("volumes", ()):
                source = volume.partition(":")[0]
                if source.startswith("../"):
                    assert (COMPOSE / source).exists(), volume
                    assert volume.endswith(":ro"), volume
                elif source.startswith("."):
                    assert source.startswith("./secrets/"), volume
                else:
                    assert source in compose(path.name)["volumes"], volume
    assert (COMPOSE / ".gitignore").read_text().split() == ["secrets/"]


def test_the_build_of_the_service_is_there():
    build = compose("compose.yaml")["services"]["patchclamp"]["build"]
    assert (COMPOSE / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DOCKERFILE
    assert build["target"] in stages()
    assert compose("compose.cuda.yaml")["services"]["patchclamp"]["build"]["target"] in stages()
    assert all(any(f"ARG {name}=" in line for lines in stages().values() for line in lines) for name in build["args"])


def test_services_have_no_rights_and_only_loopback_sees_them_unless_the_operator_says_otherwise():
    services = compose("compose.yaml")["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith(("127.0.0.1:", "${PATCHCLAMP_BIND:-127.0.0.1}:")) for port in service["ports"]), name
    assert services["patchclamp"]["read_only"]
    assert "9464" not in str(services["patchclamp"]["ports"])


def test_compose_waits_longer_than_the_drain():
    service = compose("compose.yaml")["services"]["patchclamp"]
    drain = float(service["environment"]["PATCHCLAMP_DRAIN_SECONDS"])
    assert int(service["stop_grace_period"].removesuffix("s")) >= drain + 15


def test_compose_sets_variables_that_the_server_reads():
    for path in FILES:
        assert set(compose(path.name)["services"]["patchclamp"].get("environment", {})) <= server_variables()


def test_prometheus_scrapes_the_service_at_the_port_of_the_image():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    [job] = [job for job in config["scrape_configs"] if job["job_name"] == "patchclamp"]
    port = variables_of_the_image()["PATCHCLAMP_METRICS_ADDRESS"].rpartition(":")[2]
    assert job["static_configs"] == [{"targets": [f"patchclamp:{port}"]}]
    services = compose("compose.yaml")["services"]
    assert set(services["patchclamp"]["networks"]) & set(services["prometheus"]["networks"])
