"""The deployments of Ray Serve that a fleet is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from tee_worker.run_options import MOST_AT_ONCE
from tee_worker.scale_out.ingress import Answer, Relay
from tee_worker.scale_out.options import Autoscale, Options
from tee_worker.scale_out.replica import Replica
from tee_worker.scale_out.router import LeastLoadedRouter
from tee_worker.scale_out.secrecy import keep_to_loopback

REPLICA = "Replica"
INGRESS = "Ingress"

INGRESSES = 2
"""So that one of them may die; a relayed request costs little."""

MOST_CONSTRUCTIONS = 3
"""So often is a replica that does not start tried again."""

_HEALTH_PERIOD_SECONDS = 5.0
_HEALTH_TIMEOUT_SECONDS = 60.0
"""The question is answered at once; a machine that has no processor to spare may take its time."""

_DRAIN_SECONDS = 20.0
"""For requests on their way when a replica is to end; what is not done then goes on at another one."""

_QUEUED_TOO = 2
"""A replica is given so many times what it computes at once: the next ones begin without a round trip, the rest wait where the first to be free takes them."""


def _is_loss(error: Exception) -> bool:
    """Whether it is the end of a replica, rather than what was raised in it."""
    if isinstance(error, RayTaskError):
        return False
    return isinstance(error, (RayError, RayServeException, TaskCancelledError))


@serve.ingress()
class Ingress:
    """What Ray's HTTP proxies hand requests to."""

    def __init__(self, replicas: DeploymentHandle[Any], patience: float) -> None:
        keep_to_loopback()
        handle = replicas.options(stream=True, method_name="answer")

        def ask(question: bytes, avoid: list[str]) -> Answer:
            return cast("Answer", handle.remote(question, avoid=avoid))

        self._ask: Callable[[bytes, list[str]], Answer] = ask
        self._patience = patience

    def __serve_build_asgi_app__(self) -> Relay:
        return Relay(self._ask, self._patience, _is_loss)


def fleet(options: Options, replicas: int, autoscale: Autoscale | None) -> Any:
    """The application, for ``serve.run``."""
    at_once = options.max_concurrency or MOST_AT_ONCE
    most = autoscale.most if autoscale else replicas
    count: dict[str, Any] = {"num_replicas": replicas}
    if autoscale is not None:
        count = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=autoscale.least,
                max_replicas=autoscale.most,
                initial_replicas=max(autoscale.least, min(replicas, autoscale.most)),
                target_ongoing_requests=at_once,
            )
        }
    deployment = cast("Callable[[type[Any]], serve.Deployment]", serve.deployment)
    router: Any = LeastLoadedRouter  # Ray says that it takes a name or what is called, and its types another thing
    computing = deployment(Replica).options(
        name=REPLICA,
        max_ongoing_requests=_QUEUED_TOO * at_once,
        ray_actor_options=options.of_ray(),
        health_check_period_s=_HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=_HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        max_constructor_retry_count=MOST_CONSTRUCTIONS,
        request_router_config=RequestRouterConfig(request_router_class=router),
        **count,
    )
    if options.direct is not None:
        return computing.bind(options)  # clients reach the replicas by themselves
    relaying = deployment(Ingress).options(
        name=INGRESS,
        num_replicas=min(INGRESSES, most),
        max_ongoing_requests=1000 * at_once,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
    )
    return relaying.bind(computing.bind(options), options.failover)
