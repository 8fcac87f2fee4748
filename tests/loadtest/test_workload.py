"""Requests say what was asked for, and the same thing again for the same seed."""

import json
from pathlib import Path

import pytest

from loadtest.arrivals import Arrival
from loadtest.errors import InputError
from loadtest.generator import target_of
from loadtest.settings import Settings
from loadtest.workload import Workload, load_tokenizer, read_prompts


def workload(**values):
    return Workload(Settings.parse({"url": "http://h", "model": "m", "rate": 1, "num_requests": 1, **values}))


def body(load, index=0, answers=(), **arrival):
    return json.loads(load.body(load.conversation(Arrival(index, 0.0, **arrival)), answers))


def test_the_same_seed_gives_the_same_requests_in_any_order():
    load = workload(prompt_tokens="uniform:5,50")
    bodies = [body(load, index) for index in range(5)]
    assert [body(workload(prompt_tokens="uniform:5,50"), index) for index in (4, 2, 0)] == bodies[::-2]
    assert len({json.dumps(one) for one in bodies}) == 5, "no prompt twice: a prefix cache would answer it"
    assert body(workload(prompt_tokens="uniform:5,50", seed=1)) != bodies[0]


def test_a_streamed_chat_asks_for_usage_and_a_plain_completion_does_not():
    chat = body(workload(output_tokens="17", extra_body={"top_p": 0.5}))
    assert chat["stream_options"] == {"include_usage": True}
    assert (chat["max_tokens"], chat["top_p"], chat["temperature"]) == (17, 0.5, 0.0)
    plain = body(workload(api="completions", stream=False, ignore_eos=True))
    assert isinstance(plain["prompt"], str)
    assert plain["ignore_eos"] is True
    assert "stream" not in plain


def test_a_made_up_prompt_has_its_length_and_a_trace_goes_before_it():
    load = workload(prompt_tokens="40")
    assert len(body(load)["messages"][0]["content"].split()) == 40
    traced = body(load, prompt_tokens=9, output_tokens=3)
    assert len(traced["messages"][0]["content"].split()) == 9
    assert traced["max_tokens"] == 3


def test_shared_prefixes_are_the_same_within_a_group_and_differ_between_groups():
    load = workload(shared_prefix_tokens=30, prefix_groups=2, prompt_tokens="5")
    system = [body(load, index)["messages"][0] for index in range(4)]
    assert all(message["role"] == "system" and len(message["content"].split()) == 30 for message in system)
    assert system[0] == system[2] != system[1] == system[3]


def test_turns_carry_the_answers_so_far():
    load = workload(turns=3, prompt_tokens="4")
    messages = body(load, 0, ["first answer", "second answer"])["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[3]["content"] == "second answer"


def test_a_key_is_read_from_the_environment_and_goes_into_no_result(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    values = {"api_key_env": "SOME_KEY", "headers": {"x-tenant": "t"}, "rate": 1, "num_requests": 1}
    settings = Settings.parse({"url": "http://host:9/v1", "model": "m", **values})
    head = target_of(settings).head(3, "id").decode()
    assert head.startswith("POST /v1/chat/completions HTTP/1.1\r\nhost: host:9\r\n")
    assert "authorization: Bearer s3cret\r\n" in head
    assert "x-tenant: t\r\n" in head
    assert "s3cret" not in settings.model_dump_json()


def test_users_return():
    load = workload(users=3)
    assert [body(load, index)["user"] for index in range(4)] == ["user-0", "user-1", "user-2", "user-0"]


def test_prompt_files_of_three_kinds_are_read(tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "a"}\n{"prompt": "b"}\n\n{"turns": ["c", "d"]}\n')
    assert read_prompts(prompts) == [("a",), ("b",), ("c", "d")]
    load = workload(prompts=prompts, turns=2)
    turns = {load.conversation(Arrival(index, 0.0)).turns for index in range(3)}
    assert turns == {("a",), ("b",), ("c", "d")}


@pytest.mark.parametrize("line", ['{"question": "a"}', "not json", '{"turns": []}'])
def test_a_broken_prompt_file_names_its_record(tmp_path, line):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(InputError, match="record 2"):
        read_prompts(prompts)


def test_the_shared_prompts_are_read(shared):
    for name in ("mt_bench", "vicuna_bench"):
        assert len(read_prompts(shared / "data" / "prompts" / f"{name}.jsonl")) == 80


def test_with_a_tokenizer_a_made_up_prompt_has_exactly_its_length(shared):
    folder = shared / "data" / "gpt2-tokenizer"
    load = workload(prompt_tokens="100", tokenizer=folder, api="completions")
    tokenizer = load_tokenizer(folder)
    for index in range(5):
        text = " " + body(load, index)["prompt"]
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 100
