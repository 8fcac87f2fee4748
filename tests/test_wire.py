"""Tokens go from replicas to the ingress that asked, over connections that only those who know the secret may use."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from serve.errors import GenerationFailed, VariantUnavailable
from serve.generation import Delta, Event, GenerationRequest, SamplingParams
from serve.hop import Outbox, Parcel
from serve.parcels import pack
from serve.wire import Lines
from tests.ingress import Ingress


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def text(ingress: Ingress, length: int) -> str:
    return text_of(await ingress.until(lambda events: len(text_of(events)) >= length))


@pytest.fixture
async def ingress() -> AsyncIterator[Ingress]:
    made = Ingress()
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def lines() -> AsyncIterator[Lines]:
    made = Lines("replica")
    yield made
    await made.close()


def opened(outbox: Outbox, name: str) -> asyncio.Task[None]:
    outbox.open(GenerationRequest(name, "", SamplingParams()))
    return asyncio.create_task(outbox.ended(name))


def delta(name: str, text: str, last: bool = False) -> Delta:
    return Delta(name, 0, text, (1,), finish_reason="length" if last else None)


async def test_what_is_said_before_the_connection_stands_and_after_arrives_in_order(
    ingress: Ingress, lines: Lines
) -> None:
    outbox = lines.outbox(ingress.channel)
    end = opened(outbox, "a")
    outbox.put([delta("a", "1")])
    assert await text(ingress, 1) == "1"
    for number in range(2, 10):
        outbox.put([delta("a", str(number), last=number == 9)])
    await asyncio.wait_for(end, 10)
    assert await text(ingress, 9) == "123456789"
    assert {parcel.replica for parcel in ingress.heard} == {"replica"}


async def test_requests_of_one_ingress_share_one_connection(ingress: Ingress, lines: Lines) -> None:
    assert lines.outbox(ingress.channel) is lines.outbox(replace(ingress.channel))
    other = Ingress()
    await other.open()
    for number, there in enumerate((ingress, other)):
        end = opened(lines.outbox(there.channel), "a")
        lines.outbox(there.channel).put([delta("a", f"{number}", last=True)])
        await asyncio.wait_for(end, 10)
        assert await text(there, 1) == f"{number}"
    await other.close()


async def test_who_does_not_know_the_secret_is_hung_up_on_and_heard_by_nobody(ingress: Ingress, lines: Lines) -> None:
    outbox = lines.outbox(replace(ingress.channel, secret=bytes(32)))
    end = opened(outbox, "a")
    outbox.put([delta("a", "forged")])
    with pytest.raises(GenerationFailed):
        await asyncio.wait_for(end, 10)
    reader, writer = await asyncio.open_connection(ingress.channel.host, ingress.channel.port)
    writer.write(pack(Parcel("replica", (delta("a", "forged"),))) * 10)
    with suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    assert ingress.heard == []


async def test_an_ingress_that_reads_slowly_is_sent_fewer_and_larger_parcels(ingress: Ingress, lines: Lines) -> None:
    outbox = lines.outbox(ingress.channel)
    end = opened(outbox, "a")
    for number in range(300):
        outbox.put([delta("a", f"{number:4d}" * 10_000, last=number == 299)])
        if number == 0:
            await text(ingress, 1)
            (connection,) = ingress.terminal._connections._standing
            connection._transport.pause_reading()
        await asyncio.sleep(0)
    assert not end.done()
    connection._transport.resume_reading()
    await asyncio.wait_for(end, 30)
    assert await text(ingress, 300 * 40_000) == "".join(f"{number:4d}" * 10_000 for number in range(300))
    assert len(ingress.heard) < 290


async def test_a_broken_connection_fails_what_relies_on_it_and_the_next_request_connects_anew(
    ingress: Ingress, lines: Lines
) -> None:
    end = opened(lines.outbox(ingress.channel), "a")
    lines.outbox(ingress.channel).put([delta("a", "1")])
    await text(ingress, 1)
    (connection,) = ingress.terminal._connections._standing
    connection.abort()
    with pytest.raises(GenerationFailed, match="broke"):
        await asyncio.wait_for(end, 10)
    end = opened(lines.outbox(ingress.channel), "b")
    lines.outbox(ingress.channel).put([delta("b", "2", last=True)])
    await asyncio.wait_for(end, 10)
    assert await text(ingress, 2) == "12"


async def test_a_replica_that_ends_before_it_has_connected_leaves_no_request_waiting(
    ingress: Ingress, lines: Lines
) -> None:
    end = opened(lines.outbox(ingress.channel), "a")
    await lines.close()
    with pytest.raises(GenerationFailed, match="ended"):
        await asyncio.wait_for(end, 10)


async def test_an_ingress_that_cannot_be_reached_is_named(ingress: Ingress, lines: Lines) -> None:
    await ingress.close()
    end = opened(lines.outbox(ingress.channel), "a")
    with pytest.raises(VariantUnavailable, match=f"127.0.0.1:{ingress.channel.port}"):
        await asyncio.wait_for(end, 10)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
async def test_where_the_cluster_speaks_tls_so_does_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=ray"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)  # noqa: ASYNC221
    for name, value in {"USE_TLS": "1", "TLS_SERVER_KEY": key, "TLS_SERVER_CERT": certificate}.items():
        monkeypatch.setenv(f"RAY_{name}", str(value))
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(certificate))
    ingress = Ingress()
    await ingress.open()
    end = opened(lines.outbox(ingress.channel), "a")
    lines.outbox(ingress.channel).put([delta("a", "secret", last=True)])
    await asyncio.wait_for(end, 10)
    assert await text(ingress, 6) == "secret"
    monkeypatch.delenv("RAY_USE_TLS")
    plain = Lines("plain")
    # Zeros, for by chance a secret may look like the beginning of a handshake, of which more is waited for.
    refused = opened(plain.outbox(replace(ingress.channel, secret=bytes(32))), "b")
    with pytest.raises((GenerationFailed, VariantUnavailable)):
        await asyncio.wait_for(refused, 10)
    await plain.close()
    await ingress.close()
