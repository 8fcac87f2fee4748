"""The Ray Serve application on one page: an ingress, one deployment per variant, one controller.

                      +--> variant bf16   \\
    HTTP --> ingress -+--> variant int8    >--> controller
                      +--> variant nf4    /        ^
                      +----------------------------+

`import_path: serve.app:build` with `args: {config: FILE or the mapping itself}` is all that a Serve YAML needs. There
the HTTP comes through Serve's proxy. `halftone serve` passes `listen: {host, port}` instead: the ingress then answers
on that port itself, one hop less, with no proxy of Serve's whose own routes would stand open beside ours.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve as rayserve
from ray.serve import Application

from serve import loopback
from serve.config import Config, default_config, load_config, parse_config
from serve.errors import ConfigError
from serve.generation import GenerationRequest, Prompt
from serve.heartbeat import IngressBeat, Orders, ReplicaBeat, View
from serve.pairs import Kept, Scores, Side
from serve.remote import Handle
from serve.variant import Variant
from serve.wire import Channel

__all__ = ["APP_NAME", "build", "graph"]

APP_NAME = "halftone"
_LONGEST_STREAM_S = 600.0
"""How long a replica that must go may still finish its streams."""
_INGRESS_STREAMS = 4096
_HELD_RECORDINGS = 16

if loopback.is_on():
    loopback.apply()


def build(args: dict[str, Any]) -> Application:
    """What Serve calls, on a machine of the cluster. Raises ConfigError."""
    unknown = set(args) - {"config", "listen"}
    if unknown:
        raise ConfigError("args", f"unknown key {min(unknown)!r}; allowed: config, listen")
    return graph(_config(args.get("config")), args.get("listen"))


def _config(given: object) -> Config:
    if given is None:
        return default_config()
    return load_config(Path(given)) if isinstance(given, str) else parse_config(given)


def graph(config: Config, listen: Mapping[str, Any] | None = None) -> Application:
    """The deployments of a configuration, bound to one another, every "auto" decided for the cluster at hand."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    config = config.resolved(cpus=resources.get("CPU", 1.0), gpus=resources.get("GPU", 0.0))
    controller = _controller.bind(config)
    variants = {v.name: _variant_deployment(v).bind(config.model_name, v, controller) for v in config.variants}
    ingress = _ingress.options(num_replicas=config.ingresses)
    application: Application = ingress.bind(config, variants, controller, dict(listen) if listen else None)
    return application


def _variant_deployment(variant: Variant) -> Any:
    engine, resources = variant.engine, variant.resources
    return _deployment(_VariantDeployment).options(
        name=f"variant-{variant.name}",
        num_replicas=resources.replicas,
        ray_actor_options={"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus},
        # The engine's own queue is the one that counts, and it says no; Ray's stands behind it as the last bound.
        max_ongoing_requests=engine.max_num_seqs + engine.max_queue,
        max_queued_requests=engine.max_queue,
        # The new replica loads beside the old one, which serves until it is replaced.
        max_surge_percent=100,
    )


class _VariantDeployment:
    """`serve.replica.Replica`, as Ray sees it."""

    async def __init__(self, model_name: str, variant: Variant, controller: Handle) -> None:  # type: ignore[misc]
        from serve.remote import RemoteController
        from serve.replica import Replica

        process = rayserve.get_replica_context().replica_id.unique_id
        self._replica = Replica(model_name, variant, RemoteController(controller).replica, process)
        self._handed_on: deque[Any] = deque(maxlen=_HELD_RECORDINGS)
        await self._replica.open()

    async def generate(self, request: GenerationRequest, channel: Channel) -> Kept | None:
        kept = await self._replica.generate(request, channel)
        if kept is None:
            return None
        # The ingress hands the reference on; it never sees what it refers to. It is held here meanwhile: now and then
        # Ray frees an object whose reference is returned before the receiver has borrowed it.
        reference = await asyncio.to_thread(ray.put, kept.content)
        self._handed_on.append(reference)
        return Kept(reference)

    async def score(self, kept: Kept, side: Side) -> Scores:
        return await self._replica.score(await kept.content, side)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._replica.abort(request_ids)

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> object:
        return await self._replica.tokenize(prompt, add_special_tokens)

    async def detokenize(self, ids: tuple[int, ...]) -> str:
        return await self._replica.detokenize(ids)

    async def check_health(self) -> None:
        self._replica.check_health()

    async def __del__(self) -> None:  # Serve awaits it
        await self._replica.close()


class _ControllerDeployment:
    """`serve.controller.Controller`, its rollouts and experiments, as Ray sees them: all on one event loop."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]
        from serve.controller import Controller
        from serve.experimentation import Experimentation
        from serve.progression import Progression
        from serve.webhooks import Webhooks

        self._controller = Controller(config)
        self._webhooks = Webhooks(config.model_name, config.rollouts.webhooks)
        self._webhooks.open()
        self._rollouts = Progression(config, self._controller, announce=self._webhooks.announce)
        self._experiments = Experimentation(config, self._controller, self._rollouts)
        await self._rollouts.open()
        await self._experiments.open()

    async def replica(self, beat: ReplicaBeat) -> Orders:
        return self._controller.replica(beat)

    async def ingress(self, beat: IngressBeat) -> View:
        self._controller.ingress(beat)
        await self._experiments.take(beat.batch)
        counted = await self._rollouts.take(beat.batch)
        return replace(self._controller.view(), counted=counted)

    async def view(self) -> View:
        return self._controller.view()

    async def set_traffic(self, weights: Mapping[str, float], shadow: Mapping[str, float] | None = None) -> View:
        self._rollouts.require_idle("dealing traffic by hand")
        self._experiments.require_idle("dealing traffic by hand")
        view = self._controller.set_traffic(weights, shadow)
        await self._rollouts.moved_by_hand(view.split)
        return view

    async def metrics(self, beat: IngressBeat) -> str:
        return self._controller.metrics(beat, self._rollouts.snapshot())

    async def variants(self) -> list[dict[str, Any]]:
        return self._controller.variants()

    async def rollouts(self, method: str, *arguments: Any) -> Mapping[str, Any]:
        """`start`, `order`, `all`, `show`, `history` or `recorded` of the rollouts."""
        if method == "start" and not arguments[0].get("dry_run"):
            self._experiments.require_idle("a rollout")
        answer: Mapping[str, Any] = await getattr(self._rollouts, method)(*arguments)
        return answer

    async def experiments(self, method: str, *arguments: Any) -> Mapping[str, Any]:
        """`start`, `stop`, `all` or `report` of the experiments."""
        answer: Mapping[str, Any] = await getattr(self._experiments, method)(*arguments)
        return answer

    async def __del__(self) -> None:  # Serve awaits it
        await self._experiments.close()
        await self._rollouts.close()
        await self._webhooks.close()


@rayserve.ingress()
class _IngressDeployment:
    """The rim (`serve.api`) over the router. It never loads torch."""

    async def __init__(  # type: ignore[misc]
        self,
        config: Config,
        variants: Mapping[str, Handle],
        controller: Handle,
        listen: Mapping[str, Any] | None,
    ) -> None:
        from serve.api.app import create_app
        from serve.hop import Inbox
        from serve.listener import Listener
        from serve.remote import RemoteController, RemoteExperiments, RemoteRollouts, RemoteVariant
        from serve.router import Router
        from serve.wire import Terminal

        inbox = Inbox()
        self._terminal = Terminal(inbox.accept)
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        channel = await self._terminal.open(host)
        links = {name: RemoteVariant(name, handle) for name, handle in variants.items()}
        self._router = Router(
            config.model_name, links, RemoteController(controller), inbox, channel, drift=config.drift
        )
        self._app = create_app(self._router, config.api, RemoteRollouts(controller), RemoteExperiments(controller))
        self._router.open()
        self._listener = Listener(self._app, **listen, shared=config.ingresses > 1) if listen else None
        if self._listener:
            await self._listener.open()

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def settled(self) -> bool:
        return self._router.settled

    async def drain(self, timeout_s: float) -> None:
        """Take no new connections and wait for the open answers, at most so long."""
        if self._listener:
            await self._listener.close(timeout_s)

    async def __del__(self) -> None:  # Serve awaits it
        await self.drain(0.0)
        await self._router.close()
        await self._terminal.close()


_deployment: Callable[..., Any] = partial(
    rayserve.deployment,
    health_check_period_s=1.0,  # how soon Serve replaces a replica that died
    health_check_timeout_s=30.0,
    graceful_shutdown_wait_loop_s=0.5,
    logging_config={"enable_access_log": False},
    graceful_shutdown_timeout_s=_LONGEST_STREAM_S,
)
_controller = _deployment(
    _ControllerDeployment, name="controller", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
)
_ingress = _deployment(
    _IngressDeployment,
    name="ingress",
    max_ongoing_requests=_INGRESS_STREAMS,
    max_queued_requests=_INGRESS_STREAMS,
    ray_actor_options={"num_cpus": 0.1},
)
