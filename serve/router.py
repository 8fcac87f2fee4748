"""Traffic: which variant answers a call, over which stream, and what the answer leaves behind.

The router is the rim's `Backend`. It knows the variants as `Link`s and the controller as a `Control`, two small seams
that `serve.remote` fills with Ray handles and the tests with fakes. It knows no Ray, no HTTP and no model.

    start(call)  ->  pin or deal  ->  one task per prompt asks a replica;  Inbox  ->  Mailbox  ->  Answer.events
                                                                                            |
                                                     once a second to the controller  <-  Journal (metrics, outcomes)

A request belongs to a task of the router's and not to the HTTP request: whoever gives up asks the replica to abort, and
the call ends by itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

from serve.api.backend import Call, ModelCard
from serve.errors import (
    GenerationFailed,
    HalftoneError,
    InvalidRequest,
    UnknownModel,
    VariantUnavailable,
)
from serve.generation import Disclosure, Event, GenerationRequest, Prompt, Tokenized
from serve.heartbeat import IngressBeat, VariantState, View
from serve.hop import Inbox, Mailbox, ReplicaDied
from serve.journal import Journal, Trace, code_of
from serve.mirror import Mirror
from serve.pairs import DriftSettings, Kept, Scores, Side
from serve.presence import Presence
from serve.rollout import Assignment, Split, assign
from serve.scoring import Sample, Scorer
from serve.wire import Channel

__all__ = ["Control", "Link", "RoutedAnswer", "Router"]

_LOG = logging.getLogger(__name__)
_BEAT_S = 1.0
_LOADING_BEAT_S = 0.2
_ASKED_S = 2.0
_LEAST_BEAT_S = 0.05
_LATE_S = 5.0
"""How long the last events of a request may lag behind the end of its call, which takes another way."""
_SUCCESSOR_S = 10.0
"""How long a request whose only replica died waits for the next one; a variant that crashes again and again must not
keep it."""
_LOADING_RETRY_S = 5.0
_FAILED_RETRY_S = 60.0


class Link(Protocol):
    """One variant, from afar. Raises HalftoneErrors alone; `ReplicaDied` where a replica broke under the request."""

    async def generate(self, request: GenerationRequest, channel: Channel) -> Kept | None: ...

    async def score(self, kept: Kept, side: Side) -> Scores: ...

    async def abort(self, request_ids: Sequence[str]) -> None: ...

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> Tokenized: ...

    async def detokenize(self, ids: tuple[int, ...]) -> str: ...


class Control(Protocol):
    """The controller, from afar."""

    async def ingress(self, beat: IngressBeat) -> View: ...

    async def set_traffic(self, weights: Mapping[str, float], shadow: Mapping[str, float] | None) -> View: ...

    async def metrics(self, beat: IngressBeat) -> str: ...

    async def variants(self) -> Sequence[Mapping[str, Any]]: ...


class Router:
    """Implements `serve.api.backend.Backend` for one ingress process. All methods on one event loop."""

    def __init__(
        self,
        model_name: str,
        links: Mapping[str, Link],
        control: Control,
        inbox: Inbox,
        channel: Channel,
        name: str | None = None,
        drift: DriftSettings | None = None,
    ) -> None:
        """inbox: where all that comes by `channel` arrives."""
        self._model_name = model_name
        self._links = links
        self._control = control
        self._name = name or uuid4().hex[:12]
        self._presence = Presence()
        self._inbox = inbox
        self._channel = channel
        self._journal = Journal(model_name, self._name)
        self._scorer = Scorer(drift, links, self._journal)
        self._mirror = Mirror(self._journal, self._ask_unread)
        self._tasks: set[asyncio.Task[None]] = set()

    # Life

    def open(self) -> None:
        """Begin to exchange reports with the controller."""
        self._spawn(self._beat_for_ever())

    async def close(self) -> None:
        """Stop all tasks; answers that are still open break."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def beat(self) -> None:
        """One exchange with the controller. Raises HalftoneError if it does not answer."""
        report = self._report()
        view = await self._control.ingress(report)
        self._see(view)
        if view.counted:
            self._journal.acknowledge(report.batch)

    @property
    def settled(self) -> bool:
        """It has heard of every variant that it loaded or failed."""
        return self._presence.view is not None and self._presence.view.settled

    @property
    def open_requests(self) -> int:
        return self._inbox.open_requests

    # What the rim asks

    def models(self) -> Sequence[ModelCard]:
        view = self._presence.view
        states = view.variants if view else ()
        stable = next((state for state in states if view and state.name == view.split.stable), None)
        whole = ModelCard(
            id=self._model_name,
            state="ready" if self._presence.serving else "failed" if self.settled else "loading",
            context_length=stable.context_length if stable else None,
        )
        return [whole, *(self._card(state) for state in states)]

    def ready(self) -> bool:
        return self.settled and self._presence.serving is not None

    async def start(self, call: Call) -> RoutedAnswer:
        try:
            state, assignment = self._route(call)
        except HalftoneError as error:
            self._journal.refused(code_of(error))
            raise
        trace = self._journal.open(call, state, assignment, self._known().split)
        answer = RoutedAnswer(self, call, self._links[state.name], _disclosure(state, assignment), trace)
        if assignment is not None:  # a pin is nobody's traffic to compare
            self._mirror_call(answer, state)
        for request in call.requests:
            self._inbox.open(request.request_id, answer.mailbox)
            # One text of a call is enough to be scored: its outcome has room for one drift.
            sample = self._scorer.draw(request, state, self._known()) if request is call.requests[0] else None
            self._spawn(self._drive(request, answer, sample))
        return answer

    def refused(self, status: int) -> None:
        self._journal.refused(f"http_{status}")

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> Tokenized:
        return await self._any_link(model).tokenize(prompt, add_special_tokens)

    async def detokenize(self, model: str, ids: tuple[int, ...]) -> str:
        return await self._any_link(model).detokenize(ids)

    async def metrics(self) -> str:
        return await self._control.metrics(self._report())

    async def variants(self) -> Sequence[Mapping[str, Any]]:
        return await self._control.variants()

    async def traffic(self) -> Mapping[str, Any]:
        """The split in force, by what the controller has decided by now; the last known while it does not answer."""
        with suppress(HalftoneError, TimeoutError):
            async with asyncio.timeout(_ASKED_S):
                await self.beat()
        return self._known().split.to_dict()

    async def set_traffic(
        self, weights: Mapping[str, float], shadow: Mapping[str, float] | None = None
    ) -> Mapping[str, Any]:
        self._see(await self._control.set_traffic(weights, shadow))
        return self._known().split.to_dict()

    # Whom to ask

    def _route(self, call: Call) -> tuple[VariantState, Assignment | None]:
        if (pin := self._pin(call)) is not None:
            return self._require(pin), None
        assignment = assign(self._dealt(), call.sticky_key, call.requests[0].request_id)
        return self._require(assignment.variant), assignment

    def _pin(self, call: Call) -> str | None:
        """The variant that the call names, in `model` or in the header; None deals it."""
        name, at, variant = call.model.partition("@")
        if name != self._model_name:
            raise UnknownModel(f"model {_shown(call.model)} is not served here; served: {self._served()}")
        if at:
            self._require_known(variant, f"model {_shown(call.model)}", "model")
        if call.pin is not None:
            self._require_known(call.pin, f"variant {_shown(call.pin)}", "x-halftone-variant")
            if at and variant != call.pin:
                raise InvalidRequest(
                    f"model asks for variant {variant!r} and the header x-halftone-variant for {call.pin!r}; "
                    "name one of them",
                    param="model",
                )
        return variant if at else call.pin

    def _require_known(self, variant: str, asked: str, param: str) -> None:
        if variant not in self._links:
            raise UnknownModel(f"{asked} is not served here; served: {self._served()}", param=param)

    def _served(self) -> str:
        return ", ".join([self._model_name, *(f"{self._model_name}@{name}" for name in self._links)])

    def _known(self) -> View:
        if self._presence.view is None:
            raise VariantUnavailable("the server is starting; try again shortly", retry_after_s=_LOADING_RETRY_S)
        return self._presence.view

    def _dealt(self) -> Split:
        view = self._known()
        if self._presence.serving is None:
            told = "; ".join(_why(state) for state in view.variants if view.split.weights.get(state.name))
            wait_s = _FAILED_RETRY_S if view.settled else _LOADING_RETRY_S
            raise VariantUnavailable(f"no variant that gets traffic is ready: {told}", retry_after_s=wait_s)
        return self._presence.serving

    def _require(self, variant: str) -> VariantState:
        state = next(state for state in self._known().variants if state.name == variant)
        if state.state != "ready":
            wait_s = _FAILED_RETRY_S if state.state in ("failed", "freed") else _LOADING_RETRY_S
            raise VariantUnavailable(_why(state), retry_after_s=wait_s)
        return state

    def _any_link(self, model: str) -> Link:
        """Any variant will do for text: all share one tokenizer."""
        pin = self._pin(Call(model, ()))
        return self._links[self._require(pin).name if pin else self._dealt().stable]

    def _card(self, state: VariantState) -> ModelCard:
        return ModelCard(
            id=f"{self._model_name}@{state.name}",
            state=state.state,
            variant=state.name,
            precision=state.precision,
            context_length=state.context_length,
            fingerprint=state.fingerprint,
            reason=state.reason,
        )

    # What nobody reads

    def _mirror_call(self, answer: RoutedAnswer, state: VariantState) -> None:
        """Before the answer's first event: start its shadows, which it never waits for."""
        view, call, mailbox = self._known(), answer.call, answer.mailbox
        for shadow in self._mirror.draw(call, state, view):
            answer.trace.listen()
            ended = partial(mailbox.ended, call.requests[0].request_id)
            self._spawn(self._mirror.run(call, shadow, answer.trace, ended, view))

    def _ask_unread(self, call: Call, state: VariantState, trace: Trace) -> tuple[Mailbox, Callable[[], None]]:
        link, request = self._links[state.name], call.requests[0]
        answer = RoutedAnswer(self, call, link, _disclosure(state, None), trace)
        self._inbox.open(request.request_id, answer.mailbox)
        self._spawn(self._drive(request, answer, self._scorer.draw(request, state, self._known())))
        return answer.mailbox, partial(self.abandon, link, answer.mailbox)

    # How it is answered

    async def _drive(self, request: GenerationRequest, answer: RoutedAnswer, sample: Sample | None) -> None:
        """See one request through to its end, whether anybody still reads or not."""
        request_id, variant = request.request_id, answer.disclosure.variant
        drawn, trace, ended, kept = variant, answer.trace, False, None
        request = replace(request, keep=sample.keep) if sample else request
        try:
            try:
                kept = await self._ask(request, variant, answer.mailbox)
            except ReplicaDied as death:
                variant = await self._second_try(request_id, variant, answer, death)
                kept = await self._ask(request, variant, answer.mailbox)
            await self._settle(request_id, answer.mailbox)
            ended = variant == drawn and not answer.mailbox.is_cut_short(request_id)
        except HalftoneError as error:
            self._inbox.fail(request_id, error)
        finally:
            self._inbox.close(request_id)
            if sample and not ended:
                self._scorer.unfinished(sample)
        if sample and ended:
            await self._scorer.score(sample, kept, trace)

    async def _ask(self, request: GenerationRequest, variant: str, mailbox: Mailbox) -> Kept | None:
        call = self._links[variant].generate(request, self._channel)
        return await self._presence.guarded(variant, call, partial(mailbox.is_unanswered, request.request_id))

    async def _second_try(self, request_id: str, variant: str, answer: RoutedAnswer, death: ReplicaDied) -> str:
        """Where a request goes whose replica died before its first token: to another one of its variant. Where none
        is left the whole call goes where it would be dealt now, unless it is pinned or its reader knows already who
        answers; then a successor has some seconds to come up."""
        has_another = self._presence.has_another(variant)
        self._presence.mourn(variant, death)
        mailbox = answer.mailbox
        if mailbox.has_begun(request_id) or request_id not in mailbox.unfinished:
            raise death
        if answer.disclosure.variant == variant and not has_another:
            if (split := self._presence.serving) and mailbox.is_untouched and answer.disclosure.route != "pinned":
                self._move(answer, split)
            elif not await self._presence.returns(variant, _SUCCESSOR_S):
                raise death
        self._inbox.reassign(request_id)
        return answer.disclosure.variant

    def _move(self, answer: RoutedAnswer, split: Split) -> None:
        """Deal a whole call anew, under a disclosure and a record of its own, which no comparison counts."""
        assignment = replace(assign(split, answer.call.sticky_key, answer.call.requests[0].request_id), held_out=True)
        state = self._require(assignment.variant)
        trace = self._journal.open(answer.call, state, assignment, self._known().split)
        answer.move(self._links[state.name], _disclosure(state, assignment), trace)

    async def _settle(self, request_id: str, mailbox: Mailbox) -> None:
        """The call has ended; the last events may still be on their way."""
        try:
            async with asyncio.timeout(_LATE_S):
                await mailbox.ended(request_id)
        except TimeoutError as error:
            raise GenerationFailed("the end of the answer was lost on its way from the replica") from error

    def abandon(self, link: Link, mailbox: Mailbox) -> None:
        """Nobody reads any more: abort what is unfinished."""
        if unfinished := mailbox.close():
            self._spawn(self._abort(link, sorted(unfinished)))

    async def _abort(self, link: Link, request_ids: Sequence[str]) -> None:
        try:
            await link.abort(request_ids)
        except HalftoneError as error:
            _LOG.warning("could not abort %d requests: %s", len(request_ids), error.message)

    # The controller

    def _report(self) -> IngressBeat:
        split = self._presence.view.split if self._presence.view else None
        deaths = dict(self._presence.deaths)
        return IngressBeat(self._name, self._journal.batch(), self._journal.snapshot(), split, deaths)

    async def _beat_for_ever(self) -> None:
        while True:
            self._presence.news.clear()
            try:
                await self.beat()
            except HalftoneError as error:
                _LOG.warning("the controller does not answer; the last split stays in force: %s", error.message)
            await asyncio.sleep(_LEAST_BEAT_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(_BEAT_S if self.settled else _LOADING_BEAT_S):
                    await self._presence.news.wait()

    def _see(self, view: View) -> None:
        """A split is only ever replaced by a newer one: answers may overtake one another."""
        if self._presence.see(view):
            self._journal.declare(view.variants)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # An empty context: Ray Serve cancels the children of an HTTP request that it finds in the context.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class RoutedAnswer:
    """One call under way (`serve.api.backend.Answer`)."""

    def __init__(self, router: Router, call: Call, link: Link, disclosure: Disclosure, trace: Trace) -> None:
        self._router = router
        self._link = link
        self._trace = trace
        self.call = call
        self.disclosure = disclosure
        """Final with the first event."""
        self.mailbox = Mailbox(call.requests, lambda event: self._trace.observe(event))

    @property
    def trace(self) -> Trace:
        return self._trace

    def move(self, link: Link, disclosure: Disclosure, trace: Trace) -> None:
        """Another variant answers; the first one has failed, and its record says so."""
        self._trace.died()
        self._link, self.disclosure, self._trace = link, disclosure, trace

    async def events(self) -> AsyncGenerator[Event, None]:
        while (event := await self.mailbox.take()) is not None:
            yield event

    async def cancel(self) -> None:
        self._trace.left()
        self._router.abandon(self._link, self.mailbox)


def _disclosure(state: VariantState, assignment: Assignment | None) -> Disclosure:
    route = assignment.route if assignment else "pinned"
    return Disclosure(state.name, state.precision, route, state.fingerprint or "")


def _why(state: VariantState) -> str:
    if state.state == "failed":
        return f"variant {state.name!r} could not be loaded: {state.reason}"
    if state.state == "freed":
        return f"variant {state.name!r} gave its memory back after a rollout; it loads again for traffic or a rollout"
    return f"variant {state.name!r} is {state.state}; try again shortly"


def _shown(name: str) -> str:
    """A client's word in a message: quoted, and never longer than a line."""
    return repr(name if len(name) <= 100 else f"{name[:100]}...")
