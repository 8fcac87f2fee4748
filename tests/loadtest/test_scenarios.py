"""Scenarios run as they are, wrong ones are refused by name, and every result can be read again."""

import json
from pathlib import Path

import pytest

from loadtest.errors import InputError, SettingsError
from loadtest.results import command_line, envelope, read, write
from loadtest.scenario import override, read_scenario
from loadtest.settings import Settings

SCENARIOS = sorted((Path(__file__).parent.parent.parent / "deployments" / "scenarios").glob("*.yaml"))


def test_all_seven_are_there():
    names = {path.stem for path in SCENARIOS}
    assert names == {"steady", "burst", "long-prompts", "shared-prefix", "ab", "canary", "soak"}


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_scenario_is_complete(path):
    settings = Settings.parse(read_scenario(path))
    assert settings.url.startswith("http://127.0.0.1")
    assert settings.slo
    assert settings.loads()[0].is_open


@pytest.mark.slow
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_scenario_runs_and_the_command_line_goes_before_it(loadtest, server, path):
    fake = json.dumps({"fake": {"run": path.stem, "tokens": 2}})
    where = ("--url", server.url, "--model", "fake", "--extra-body", fake, "--server-metrics", f"{server.url}/metrics")
    short = ("--rate", 40, "--num-requests", 8, "--think-time", 0, "--json", "--quiet")
    outcome = loadtest("run", "--scenario", path, *where, *short)
    assert outcome.exit_code == 0, outcome.stderr
    requests = outcome.result["overall"]["requests"]
    assert requests["failed"] == 0
    assert requests["measured"] == 8 * outcome.result["settings"]["turns"]


def test_an_unknown_key_is_refused_with_the_allowed_ones(tmp_path, loadtest):
    scenario = tmp_path / "s.yaml"
    scenario.write_text("url: http://h\nmodel: m\nrate: 1\nduration: 1\nspeed: 3\n")
    outcome = loadtest("run", "--scenario", scenario)
    assert outcome.exit_code == 2
    assert "speed" in outcome.stderr
    assert "max_in_flight" in outcome.stderr


@pytest.mark.parametrize("text", ["- a list\n", "rate: [unclosed\n", ""])
def test_what_is_no_scenario_is_refused(tmp_path, text):
    scenario = tmp_path / "s.yaml"
    scenario.write_text(text)
    with pytest.raises(InputError):
        read_scenario(scenario)


def test_files_are_looked_for_beside_the_scenario(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "s.yaml").write_text("prompts: p.jsonl\n")
    assert read_scenario(tmp_path / "s.yaml")["prompts"] == tmp_path / "p.jsonl"


def test_the_command_line_takes_back_alternatives():
    scenario = {"rate": 4, "arrivals": "bursty", "duration": "2m", "warmup": "10s"}
    assert override(scenario, {"concurrency": "2", "num_requests": 5}) == {
        "arrivals": "bursty",
        "concurrency": "2",
        "num_requests": 5,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": "10"}, "warmup"),
        ({"warmup": "soon"}, "warmup"),
        ({"rate": "0"}, "rate"),
        ({"rate": "fast"}, "rate"),
        ({"rate": "auto"}, "slo"),
        ({"duration": None}, "num_requests or duration"),
        ({"slo": {"speed": 1}}, "no metric speed"),
        ({"prompt_tokens": "many"}, "length 'many'"),
        ({"rate": "1..2", "duration": None, "num_requests": 3}, "ramp"),
        ({"url": "localhost:8000"}, "url"),
        ({"url": "http://me:secret@host"}, "api_key_env"),
        ({"slo": {"ttft_s": -1}}, "ttft_s"),
        ({"arrivals": "trace"}, "trace"),
        ({"arrivals": "sometimes"}, "arrivals"),
    ],
)
def test_a_wrong_value_names_its_key(values, message):
    base = {"url": "http://h", "model": "m", "rate": "4", "duration": "10s"}
    with pytest.raises(SettingsError, match=message):
        Settings.parse(base | values)


def test_a_list_of_rates_is_a_list_of_stages_and_units_are_understood():
    settings = Settings.parse({"url": "http://h", "model": "m", "rate": [1, 2.5], "duration": "1.5m", "warmup": "10%"})
    loads = settings.loads()
    assert [load.rate_per_s for load in loads] == [1.0, 2.5]
    assert (loads[0].duration_s, loads[0].warmup_s) == (90.0, 9.0)


def test_a_result_says_how_it_came_to_be_and_is_read_back(tmp_path):
    result = envelope("run", {"overall": {}}, ["numpy", "no-such-package"])
    assert result["versions"]["numpy"]
    assert result["versions"]["no-such-package"] is None
    assert result["machine"]["usable_cpus"] >= 1
    write(result, tmp_path / "deep" / "r.json")
    assert read(tmp_path / "deep" / "r.json", "run") == result
    with pytest.raises(InputError, match="engine"):
        read(tmp_path / "deep" / "r.json", "engine")


def test_the_written_command_keeps_no_secret():
    line = command_line(
        ["loadtest", "run", "--header", "Authorization: Bearer s3cret", "--header=x: s3cret", "--rate", "4"]
    )
    assert "s3cret" not in line
    assert line.endswith("--rate 4")
