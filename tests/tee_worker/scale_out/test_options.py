"""What is refused before anything is started, and when a replica is to be replaced. Needs no Ray, but for what is marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shmbroker.errors import BadInput
from tee_worker.ray import Autoscale, Options, application, deployment
from tee_worker.scale_out.health import Health
from tee_worker.scale_out.secrecy import check_secrecy, missing

MANIFEST = Path(__file__).parents[3] / "docs" / "deploy" / "rayservice.yaml"

SECURE = {"RAY_USE_TLS": "1", "RAY_AUTH_MODE": "token"}


def test_a_cluster_on_loopback_needs_nothing() -> None:
    check_secrecy(["127.0.0.1", "::1"], trusted=False, environment={})


@pytest.mark.parametrize(
    ("environment", "told"),
    [({}, "TLS.* and token"), ({"RAY_USE_TLS": "1"}, "token"), ({"RAY_AUTH_MODE": "token"}, "TLS"), ({"RAY_USE_TLS": "0", "RAY_AUTH_MODE": "disabled"}, "TLS")],
)  # fmt: skip
def test_any_other_cluster_is_refused_without_tls_and_tokens_unless_it_is_trusted(environment: dict[str, str], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        check_secrecy(["127.0.0.1", "10.0.0.3"], trusted=False, environment=environment)
    check_secrecy(["10.0.0.3"], trusted=True, environment=environment)


def test_a_cluster_with_both_is_taken() -> None:
    assert not missing(["10.0.0.3", "10.0.0.4"], SECURE)


@pytest.mark.parametrize("text", ["4", "4:1", "0:2", "a:b", "1:", "1:2:3", "-1:2"])
def test_an_autoscale_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--autoscale"):
        Autoscale.parsed(text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"model": "m", "modle": "x"}, "'modle' is no option"),
        ({}, "model"),
        ({"model": "m", "replicas": "many"}, "int"),
        ({"model": "m", "replicas": 0}, "--replicas 0"),
        ({"model": "m", "local": True}, "local"),
        ({"model": "m", "instance": "x"}, "instance"),
        ({"model": "m", "trace": "x"}, "trace"),
        ({"model": "m", "failover": 0.0}, "--failover 0"),
        ({"model": "m", "cpus": 0.0}, "--cpus 0"),
    ],
)
def test_arguments_of_a_configuration_that_cannot_be_are_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        application(arguments)


def test_a_replica_is_replaced_only_when_its_patience_is_over() -> None:
    times = iter([1.0, 1.0, 20.0, 31.0, 40.0, 40.0, 69.0, 71.0])
    health = Health(30.0, times.__next__)
    assert health.verdict("") == ""
    for _ in range(3):
        assert health.verdict("the worker is gone") == ""
    assert health.verdict("") == "", "another one took over: the time begins anew"
    for _ in range(2):
        assert health.verdict("gone again") == ""
    assert "no GPU worker for 31 s, with a patience of 30 s: gone again" in health.verdict("gone again")


@pytest.mark.ray
def test_an_application_has_replicas_and_what_takes_requests_to_them() -> None:
    bound = deployment(Options(model="m"), replicas=3, autoscale=Autoscale(1, 4))
    assert bound is not None


@pytest.mark.ray
def test_the_manifest_is_a_ray_service_whose_application_can_be_built() -> None:
    from ray.serve.schema import ServeDeploySchema

    found = yaml.safe_load(MANIFEST.read_text())
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayService")
    told = ServeDeploySchema.model_validate(yaml.safe_load(found["spec"]["serveConfigV2"]))
    (one,) = told.applications
    module, _, name = one.import_path.partition(":")
    assert (module, name) == ("tee_worker.ray", "application")
    assert application(one.args) is not None
    cluster = found["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["tlsOptions"] == {"enabled": True}
    import ray

    assert cluster["rayVersion"] == ray.__version__
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["enableServiceLinks"] is False, "a service named shmbroker would set variables that are no settings"
        assert {"name", "image", "resources"} <= set(pod["containers"][0])
    (workers,) = cluster["workerGroupSpecs"]
    mounts = {mount["name"] for mount in workers["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in workers["template"]["spec"]["volumes"]} == {"shm", "models"}
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
