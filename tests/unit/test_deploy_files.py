"""The files of deploy/ and docker-compose.yml: valid by schema, safe, and naming real commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from batchllm_celery.cli import main
from batchllm_celery.settings import Settings
from batchllm_celery.worker.startup import ready_file

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
COMPOSE = ROOT / "docker-compose.yml"
UNIT = ROOT / "deploy" / "batchllm-worker.service"
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


def manifests() -> list[dict[str, Any]]:
    texts = (path.read_text(encoding="utf-8") for path in MANIFESTS)
    return [document for text in texts for document in yaml.safe_load_all(text)]


def schema(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return loaded


def pods() -> list[dict[str, Any]]:
    return [one["spec"]["template"]["spec"] for one in manifests() if "template" in one["spec"]]


def worker_pod() -> dict[str, Any]:
    return next(pod for pod in pods() if pod["containers"][0]["name"] == "worker")


def commands() -> Iterator[list[str]]:
    """Every command line written in the files of deploy/."""
    yield from (service["command"] for service in compose()["services"].values())
    yield from (container["command"] for pod in pods() for container in pod["containers"])
    started = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    yield from (shlex.split(line) for line in started)


def test_compose_is_valid_by_the_compose_specification() -> None:
    """docker-compose.yml is an instance of the Compose Specification's schema."""
    specification = schema("compose-schema.json")
    document = {name: part for name, part in compose().items() if not name.startswith("x-")}
    document.pop("name")  # younger than this copy of the schema
    jsonschema.Draft7Validator(specification).validate(document)
    document["services"]["worker"]["stop_grace"] = "60s"
    assert not jsonschema.Draft7Validator(specification).is_valid(document)


@pytest.mark.parametrize("manifest", manifests(), ids=lambda one: one["metadata"]["name"])
def test_each_manifest_is_valid_by_the_schema_of_its_kind(manifest: dict[str, Any]) -> None:
    """Each Kubernetes object is an instance of the strict schema of its kind and version."""
    specification = schema("kubernetes-schema.json")
    kind = specification["kinds"][f"{manifest['apiVersion']} {manifest['kind']}"]
    validator = jsonschema.Draft202012Validator({**kind, "$defs": specification["$defs"]})
    validator.validate(manifest)
    assert not validator.is_valid({**manifest, "spec": {**manifest["spec"], "replica": 1}})


def test_the_unit_is_valid_by_systemd(tmp_path: Path) -> None:
    """systemd accepts the unit, its paths and user replaced by those of this machine."""
    if not (systemd := shutil.which("systemd-analyze")):
        pytest.skip("no systemd here")
    text = UNIT.read_text(encoding="utf-8").replace("/opt/batchllm/bin/batchllm", "/bin/true")
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace("User=batchllm", "User=daemon"), encoding="utf-8")
    ended = subprocess.run(
        [systemd, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in ended.stderr.splitlines() if UNIT.name in line]
    assert complaints == []


def test_the_unit_s_lines_are_settings_of_a_section() -> None:
    """Every line of the unit is a comment, a section or a setting, and no setting is empty."""
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"|#.*|\[(Unit|Service|Install)\]|[A-Z]\w+=\S.*", line), line


def batchllm_commands() -> list[list[str]]:
    return [one[1:] for one in commands() if Path(one[0]).name == "batchllm"]


@pytest.mark.parametrize("command", batchllm_commands(), ids=lambda one: one[0])
def test_each_command_exists_with_its_options(command: list[str]) -> None:
    """The command line knows every command and every option that the files name."""
    name, *arguments = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", part) for part in command]
    cli: Any = _command_line()
    found = cli.get_command(click.Context(cli), name)
    assert found is not None, name
    context = click.Context(found)
    parsed = found.make_parser(context).parse_args(list(arguments))
    assert not [option for option in parsed[1] if option.startswith("-")]


def _command_line() -> click.Group:
    """The click group behind `batchllm`."""
    if isinstance(main, click.Group):
        return main
    module: Any = __import__("batchllm_celery.cli", fromlist=["cli"])
    groups = [one for one in vars(module).values() if isinstance(one, click.Group)]
    assert groups, "batchllm_celery.cli holds no click group"
    return groups[0]


def test_celery_is_asked_for_flower_only() -> None:
    """What is not `batchllm` is Celery's own Flower command, or Valkey."""
    others = [one for one in commands() if Path(one[0]).name != "batchllm"]
    assert {one[0] for one in others} == {"celery", "sh"}
    for command in others:
        if command[0] == "celery":
            assert command[1:4] == ["-A", "batchllm_celery", "flower"]


def test_no_probe_asks_celery() -> None:
    """Workers are probed by their heartbeat file; an `inspect ping` costs seconds of CPU."""
    everything = [COMPOSE, UNIT, *MANIFESTS]
    for path in everything:
        code = re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
        assert "inspect" not in code, path
    assert "heartbeat" in str(compose()["services"]["worker"]["healthcheck"])
    container = worker_pod()["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "heartbeat" in str(container[probe]["exec"])


def probe_command() -> str:
    command: list[str] = worker_pod()["containers"][0]["livenessProbe"]["exec"]["command"]
    return command[2]


def test_what_restarts_a_worker_does_not_depend_on_redis() -> None:
    """Liveness, start and compose's check look at the loop's file; readiness at that of Redis."""
    container = worker_pod()["containers"][0]
    in_kubernetes = {
        container[probe]["exec"]["command"][2] for probe in ("startupProbe", "livenessProbe")
    }
    assert in_kubernetes == {compose()["services"]["worker"]["healthcheck"]["test"][1]}
    file = Path("/run/batchllm/heartbeat")
    assert f"find {file} " in probe_command()
    ready = container["readinessProbe"]["exec"]["command"][2]
    assert ready == probe_command().replace(str(file), str(ready_file(file)))


@pytest.mark.parametrize(("age", "healthy"), [(0, True), (30, True), (150, False), (None, False)])
def test_the_probe_tells_a_silent_worker(tmp_path: Path, age: int | None, healthy: bool) -> None:
    """A heartbeat file of this minute is health; an older one, or none, is not."""
    file = tmp_path / "heartbeat"
    if age is not None:
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    command = probe_command().replace("/run/batchllm/heartbeat", str(file))
    ended = subprocess.run(["sh", "-c", command], capture_output=True, timeout=10, check=False)
    assert (ended.returncode == 0) is healthy


def test_a_drain_fits_into_the_time_to_stop() -> None:
    """Each way of running a worker leaves it longer to stop than its drain takes."""
    service = compose()["services"]["worker"]
    assert _seconds(service["stop_grace_period"]) >= _drain(service["environment"]) + 15
    pod = worker_pod()
    variables = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] >= _drain(variables) + 15
    unit = UNIT.read_text(encoding="utf-8")
    drain = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.MULTILINE))
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) >= _drain(drain) + 15


def _seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def _drain(environment: dict[str, Any]) -> float:
    return float(environment["BATCHLLM_DRAIN_SECONDS"])


def test_every_variable_is_a_setting() -> None:
    """A BATCHLLM_ variable in these files is one that a process reads."""
    known = {f"BATCHLLM_{name.upper()}" for name in Settings.model_fields}
    known |= {"BATCHLLM_APP_DIR", "BATCHLLM_ROWS_DIR"}  # of the compose file itself
    files = [COMPOSE, UNIT, *MANIFESTS, *(ROOT / "deploy").glob("*")]
    for path in files:
        if path.is_file():
            used = set(re.findall(r"BATCHLLM_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
            assert used <= known, path


def test_nothing_is_published_but_flower_on_loopback() -> None:
    """Valkey has no port outside; Flower's is on loopback, with a password."""
    services = compose()["services"]
    published = {name: one["ports"] for name, one in services.items() if "ports" in one}
    assert published == {"flower": ["127.0.0.1:5555:5555"]}
    assert "FLOWER_BASIC_AUTH" in services["flower"]["environment"]
    assert all(one["spec"].get("type", "ClusterIP") == "ClusterIP"
               for one in manifests() if one["kind"] == "Service")  # fmt: skip


def test_valkey_keeps_everything_and_its_password_to_itself() -> None:
    """Valkey appends to a file, evicts nothing, and no argument holds its password."""
    in_compose = compose()["services"]["valkey"]["command"]
    in_pod = next(pod for pod in pods() if pod["containers"][0]["name"] == "valkey")
    for command in (in_compose, in_pod["containers"][0]["command"]):
        line, _, rest = command[2].partition("<<EOF")
        assert "--appendonly yes" in line
        assert "--maxmemory-policy noeviction" in line
        assert "PASSWORD" not in line
        assert "requirepass" in rest


@pytest.mark.parametrize(
    ("answer", "alive", "ready"),
    [
        ("PONG", True, True),
        ("LOADING Valkey is loading the dataset in memory", True, False),
        ("Could not connect to Valkey at 127.0.0.1:6379: Connection refused", False, False),
        ("NOAUTH Authentication required.", False, False),
    ],
)
def test_a_valkey_that_reads_its_file_is_not_restarted(
    tmp_path: Path, answer: str, alive: bool, ready: bool
) -> None:
    """A large append-only file takes minutes to load: restarted meanwhile, it never ends."""
    client = tmp_path / "valkey-cli"
    client.write_text(f"#!/bin/sh\necho '{answer}'\n")
    client.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VALKEY_PASSWORD": "x"}
    pod = next(pod for pod in pods() if pod["containers"][0]["name"] == "valkey")
    for probe, healthy in (("livenessProbe", alive), ("readinessProbe", ready)):
        command = pod["containers"][0][probe]["exec"]["command"]
        ended = subprocess.run(command, env=environment, timeout=10, check=False)
        assert (ended.returncode == 0) is healthy, probe
    start = compose()["services"]["valkey"]["healthcheck"]["start_period"]
    assert start == "10m"  # until then no failure counts, so that `up` does not give it up


def test_passwords_and_keys_come_from_outside() -> None:
    """No file holds a secret: the example is empty, compose insists, the pods refer to a Secret."""
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / "deploy/env.example").read_text(), re.M))
    assert [example[name] for name in example if re.search("PASSWORD|AUTH|KEY", name)] == [""] * 4
    assert "${VALKEY_PASSWORD:?" in COMPOSE.read_text()
    for pod in pods():
        for variable in pod["containers"][0]["env"]:
            if re.search("PASSWORD|AUTH|_KEY", variable["name"]):
                assert variable["valueFrom"]["secretKeyRef"]["name"] == "batchllm"


def test_containers_run_with_no_more_rights_than_they_need() -> None:
    """Not as root, on a file system they can't write to, without capabilities."""
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert re.search(r"^USER 10001", dockerfile, re.M)
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for name, service in compose()["services"].items():
        if name != "valkey":
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]


def test_the_image_is_made_of_hashed_files_only() -> None:
    """The image installs what the lock's hashes vouch for, offline, and names no registry."""
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert "--require-hashes" in dockerfile
    for line in dockerfile.replace("\\\n", " ").splitlines():
        if re.search(r"\bpip (install|wheel)\b", line) and "uninstall" not in line.split("&&")[0]:
            assert "--no-index" in line
    assert "://" not in dockerfile
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.M)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
