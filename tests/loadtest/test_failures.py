"""Whatever goes wrong, the result is clear and holds everything measured until then."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1, and its key."""
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fake")])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def tls_server(start_server, certificate):
    return f"https://127.0.0.1:{start_server('--tls', *map(str, certificate))}"


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_unreachable_host_is_given_up_early_and_named(loadtest):
    url = f"http://127.0.0.1:{closed_port()}"
    outcome = loadtest("run", "--url", url, "--model", "m", "--rate", 100, "--num-requests", 60, "--json")
    assert outcome.exit_code == 3
    result = outcome.result
    assert result["status"] == "aborted"
    assert result["overall"]["errors"].keys() == {"connect"}
    assert "refused" in result["overall"]["error_examples"]["connect"].lower()
    assert any("gave up" in note for note in result["notes"])


def test_a_name_without_an_address_is_a_dns_error(loadtest):
    where = ("--url", "http://nobody.invalid:80", "--model", "m")
    outcome = loadtest("run", *where, "--concurrency", 1, "--num-requests", 2, "--json")
    assert outcome.exit_code == 3
    assert outcome.result["overall"]["errors"] == {"dns": 2}


def test_an_untrusted_certificate_is_a_tls_error_with_its_remedy(loadtest, tls_server):
    load = ("--model", "m", "--concurrency", 2, "--num-requests", 4, "--json")
    outcome = loadtest("run", "--url", tls_server, *load)
    assert outcome.result["overall"]["errors"] == {"tls": 4}
    assert "--ca" in outcome.result["overall"]["error_examples"]["tls"]


def test_a_trusted_or_unchecked_certificate_is_served(loadtest, tls_server, certificate):
    load = ("--model", "m", "--concurrency", 2, "--num-requests", 4, "--json")
    for trust in (("--ca", certificate[0]), ("--insecure",)):
        outcome = loadtest("run", "--url", tls_server, *load, *trust)
        assert outcome.exit_code == 0, outcome.stderr
        assert outcome.result["overall"]["errors"] == {}


def test_plain_http_asked_for_tls_is_a_tls_error(loadtest, server):
    url = server.url.replace("http", "https")
    outcome = loadtest("run", "--url", url, "--model", "m", "--concurrency", 1, "--num-requests", 1, "--json")
    assert outcome.result["overall"]["errors"] == {"tls": 1}


WAYS_TO_FAIL = [
    ({"cut_after": 2}, "cut", "in the middle"),
    ({"malformed": "json"}, "malformed", "not JSON"),
    ({"malformed": "sse"}, "malformed", "no server-sent event"),
    ({"malformed": "http"}, "malformed", "not HTTP"),
    ({"malformed": "unfinished"}, "cut", "without [DONE]"),
    ({"malformed": "error"}, "server_error", "out of memory"),
    ({"status": 500}, "http_500", "not now"),
    ({"status": 429, "retry_after": "1"}, "http_429", "not now"),
]


def test_each_way_to_fail_has_its_kind(measure, tmp_path):
    raw = tmp_path / "raw.jsonl"
    fake = {"run": "fail", "tokens": 4, "each": [way for way, _, _ in WAYS_TO_FAIL]}
    load = ("--concurrency", 1, "--num-requests", 16, "--warmup", 0)
    outcome = measure(fake, *load, "--raw", raw)
    assert outcome.exit_code == 3, "nothing succeeded"
    overall = outcome.result["overall"]
    assert overall["errors"] == {"malformed": 6, "cut": 4, "server_error": 2, "http_500": 2, "http_429": 2}
    assert overall["error_examples"].keys() == overall["errors"].keys()
    assert overall["goodput_ratio"] == 0.0
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    assert len(lines) == 16, "the raw data has the failed ones too"
    for line in lines:
        fake, kind, detail = WAYS_TO_FAIL[line["index"] % len(WAYS_TO_FAIL)]
        assert line["error"] == kind
        assert detail in line["error_detail"]
        if "cut_after" in fake:
            assert len(line["chunks_s"]) == 2, "what arrived before the cut is kept"
    assert next(line for line in lines if line["error"] == "http_429")["retry_after_s"] == 1.0


@pytest.mark.parametrize(
    ("fake", "options"),
    [({"early_hints": True}, ()), ({"until_close": True}, ("--no-stream",)), ({}, ("--no-keepalive",))],
)
def test_unusual_http_is_no_failure(measure, fake, options):
    outcome = measure({"run": f"unusual-{fake}", **fake}, "--concurrency", 2, "--num-requests", 6, *options)
    assert outcome.result["overall"]["errors"] == {}
    assert outcome.result["overall"]["completion_tokens"]["total"] == 30


def test_a_timeout_is_counted_and_the_run_goes_on(measure):
    fake = {"run": "timeout", "ttft": {"lognormal": [0.3, 2.0]}, "tokens": 1}
    outcome = measure(fake, "--concurrency", 8, "--num-requests", 24, "--timeout", "500ms", "--seed", 1)
    overall = outcome.result["overall"]
    assert outcome.exit_code == 0
    assert overall["errors"].keys() == {"timeout"}
    assert overall["requests"]["succeeded"] + overall["errors"]["timeout"] == 24
    assert overall["goodput_ratio"] == pytest.approx(overall["requests"]["succeeded"] / 24)


def test_retry_after_is_obeyed_when_asked_for_and_the_wait_counts(measure, server):
    fake = {"run": "later", "tokens": 1, "status": 429, "status_times": 1, "retry_after": "1"}
    outcome = measure(fake, "--concurrency", 2, "--num-requests", 4, "--retries", 2, "--warmup", 0)
    overall = outcome.result["overall"]
    assert overall["errors"] == {}
    assert overall["requests"]["retried"] == 4
    assert overall["e2e_s"]["p50"] > 1.0
    assert overall["queue_s"]["p50"] > 1.0
    received = sorted(truth["received_s"] for truth in server.truth("later"))
    assert received[2] - received[0] > 0.9


def test_the_slo_sets_the_exit_code(measure):
    fake = {"run": "slo", "ttft": 0.1, "tokens": 2}
    load = ("--concurrency", 2, "--num-requests", 6)
    assert measure(fake, *load, "--slo", "ttft_s=5").exit_code == 0
    missed = measure(fake, *load, "--slo", "ttft_s=10ms")
    assert missed.exit_code == 1
    assert missed.result["slo"]["met"] is False
    assert missed.result["overall"]["goodput_ratio"] == 0.0


def test_ctrl_c_gives_what_was_measured_so_far(server, tmp_path):
    raw = tmp_path / "raw.jsonl"
    fake = json.dumps({"fake": {"run": "ctrl-c", "ttft": 0.05, "gap": 0.1, "tokens": 8}})
    where = ("--url", server.url, "--model", "m", "--extra-body", fake, "--json", "--raw", str(raw))
    command = [sys.executable, "-m", "loadtest", "run", *where, "--rate", "30", "--duration", "10m", "--warmup", "0s"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as process:
        while not raw.exists() or raw.read_text().count("\n") < 20:
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody in the foreground
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    result = json.loads(stdout)
    assert result["status"] == "interrupted"
    requests = result["overall"]["requests"]
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    assert requests["measured"] + requests["warmup"] == len(lines)
    assert len(lines) == len(server.truth("ctrl-c")), "every request that reached the server is accounted for"
    assert requests["interrupted"] > 0
    waiting = [line for line in lines if line["error"] == "interrupted"]
    assert any(line["chunks_s"] for line in waiting), "tokens of unfinished answers are kept"
    assert result["overall"]["errors"] == {}, "an interrupted request is not the server's failure"


def test_a_generator_process_that_dies_is_reported_and_the_rest_kept(server, tmp_path):
    raw = tmp_path / "raw.jsonl"
    fake = json.dumps({"fake": {"run": "dies", "tokens": 1}})
    where = ("--url", server.url, "--model", "m", "--extra-body", fake, "--json", "--raw", str(raw))
    load = ("--rate", "30", "--duration", "4", "--processes", "2")
    command = [sys.executable, "-m", "loadtest", "run", *where, *load]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while not raw.exists() or raw.read_text().count("\n") < 10:
            assert process.poll() is None
        os.kill(children_of(process.pid)[0], signal.SIGKILL)
        stdout, _ = process.communicate(timeout=30)
    result = json.loads(stdout)
    assert any("generator process ended early" in note for note in result["notes"])
    assert result["overall"]["requests"]["succeeded"] > 40


def children_of(parent):
    """Process ids whose parent it is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "4", "--concurrency", "2", "--duration", "5"), "closed loop"),
        (("--rate", "4", "--duration", "5", "--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--trace", "nowhere.csv"), "nowhere.csv"),
        (("--rate", "4", "--duration", "5", "--api-key-env", "NOT_SET_ANYWHERE"), "NOT_SET_ANYWHERE"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_setting(loadtest, arguments, message):
    outcome = loadtest("run", "--url", "http://127.0.0.1:1", "--model", "m", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
