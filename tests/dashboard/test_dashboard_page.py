"""What the page shows and does, in a real browser in front of the real rim."""

from __future__ import annotations

import pytest

from serve import metrics
from tests.dashboard.conftest import Server, playwright
from tests.dashboard.stage import STORY, Staged

pytestmark = pytest.mark.browser
expect = playwright.expect
Page = playwright.Page


def open_page(page: Page, server: Server) -> None:
    page.goto(f"{server.url}/dashboard")
    expect(page.locator("#status")).to_contain_text("variants ready")


def cell(page: Page, variant: str, title: str) -> playwright.Locator:
    row = page.locator("table.variants tbody tr").filter(has=page.get_by_role("rowheader", name=variant))
    return row.locator(f"td[data-title='{title}'] .main")


# -- what it shows ---------------------------------------------------------------------------------------------------


def test_it_loads_without_a_word_on_the_console(server: Server, page: Page) -> None:
    for name in ("bf16", "int8", "nf4"):
        server.stage.answered(name, 10)
    open_page(page, server)
    expect(page.locator("#status")).to_contain_text("3 of 4 variants ready")
    for title in ("Traffic", "Variants", "Which precision", "Loupe", "Rollouts", "Over time", "Latency", "Memory"):
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    expect(page).to_have_title("storyteller · Halftone")


def test_a_server_that_nobody_asked_yet_says_so(server: Server, page: Page) -> None:
    open_page(page, server)
    expect(page.locator("#traffic")).to_contain_text("Nothing was asked yet")
    expect(page.locator("#choice")).to_contain_text("No answers yet to time")
    expect(page.locator("#latency")).to_be_hidden()
    expect(cell(page, "bf16", "First token")).to_have_text("–")


def test_numbers_move_while_traffic_flows(server: Server, page: Page) -> None:
    server.stage.answered("bf16", 10)
    open_page(page, server)
    expect(page.locator("#traffic")).to_contain_text("10 answers")
    expect(page.get_by_role("img", name="Answered: bf16 100 %")).to_be_visible()
    server.stage.answered("int8", 10)
    expect(page.locator("#traffic")).to_contain_text("20 answers")
    expect(page.get_by_role("img", name="Answered: bf16 50 %, int8 50 %")).to_be_visible()
    expect(cell(page, "int8", "Tokens/s")).not_to_have_text("0")
    expect(page.get_by_role("img", name="Tokens per second. bf16: ")).to_be_visible()


def test_percentiles_are_those_of_the_buckets(server: Server, page: Page) -> None:
    """100 observations spread over one bucket, 0.06 to 0.08 s: the median is its middle, as Prometheus has it."""
    labels = server.stage.variants_["bf16"].labels
    server.stage.recorder.observe(metrics.TTFT, labels, 0.07, 100)
    server.stage.answered("int8")
    open_page(page, server)
    expect(cell(page, "bf16", "First token")).to_have_text("70 ms")


def test_memory_is_told_by_component_and_against_16_bits(server: Server, page: Page) -> None:
    open_page(page, server)
    row = page.locator(".memory-row").filter(has_text="nf4")
    expect(row.get_by_role("img", name="weights 131 MiB, scales and tables 4.05 MiB, saved")).to_be_visible()
    held = "KV cache in use 24 MiB, KV cache, free 40 MiB, working memory 30 MiB, runtime and libraries 300 MiB"
    expect(row.get_by_role("img", name=held)).to_be_visible()
    expect(row).to_contain_text("saved71.9 % (345 MiB)")
    expect(row).to_contain_text("ratio3.56×")


def advice(page: Page, want: str) -> playwright.Locator:
    return page.locator(".advice li").filter(has_text=want)


def test_each_thing_one_may_want_has_its_answer(server: Server, page: Page) -> None:
    for name in ("bf16", "int8", "nf4"):
        server.stage.answered(name, 30)
    open_page(page, server)
    expect(advice(page, "Fastest")).to_contain_text("int81.56× the speed; its quality is not measured yet")
    expect(advice(page, "Smallest")).to_contain_text("nf4135 MiB; 0.28× the bytes")
    expect(advice(page, "Closest")).to_have_count(0)


def test_the_closest_is_told_and_who_strays_beyond_its_guard(server: Server, page: Page) -> None:
    for name in ("bf16", "int8", "nf4"):
        server.stage.answered(name, 30)
    server.stage.drifted("int8", tokens=500, kl_nats=0.003, agreeing=480)
    server.stage.drifted("nf4", tokens=500, kl_nats=0.2, agreeing=350)
    open_page(page, server)
    expect(advice(page, "Closest to bf16")).to_contain_text(
        "int896 % of its tokens are bf16's first choice (KL 0.003); 1.56× the speed; 0.51× the bytes"
    )
    expect(page.locator("#choice .lines")).to_have_text(
        "nf4 is beyond its guard: it strays further than its precision should (KL 0.2, guard 0.092)."
    )
    plotted = page.get_by_role("img", name="Quality against bytes.")
    expect(plotted).to_have_accessible_name(
        "Quality against bytes. nf4: 135 MiB, 0.2; int8: 246 MiB, 0.003; bf16: 480 MiB, 0"
    )


def test_a_variant_that_another_beats_in_everything_is_named(server: Server, page: Page) -> None:
    server.stage.change("gptq4", state="ready", reason=None, bits=4.4, gap_s=0.009)
    for name, kl_nats in (("bf16", 0.0), ("int8", 0.003), ("nf4", 0.08), ("gptq4", 0.05)):
        server.stage.answered(name, 30)
        if kl_nats:
            server.stage.drifted(name, tokens=500, kl_nats=kl_nats, agreeing=400)
    open_page(page, server)
    expect(page.locator("#choice .lines")).to_have_text("Nothing speaks for nf4: gptq4 is faster, smaller and closer.")


def test_speeds_that_cannot_be_told_apart_are_not_ranked(server: Server, page: Page) -> None:
    server.stage.change("nf4", gap_s=0.0091)
    for name in ("bf16", "int8", "nf4"):
        server.stage.answered(name, 30)
    open_page(page, server)
    expect(advice(page, "Fastest")).to_contain_text("about as fast as each other")
    expect(advice(page, "Fastest").locator(".name")).to_have_text(["■ int8", "▲ nf4"])


def test_few_answers_make_no_verdict(server: Server, page: Page) -> None:
    server.stage.answered("bf16", 30)
    server.stage.answered("int8", 1)
    open_page(page, server)
    expect(page.locator("#choice .lines")).to_have_text("Too few tokens timed yet to tell: int8.")
    expect(advice(page, "Fastest")).to_have_count(0)


def test_nobody_is_called_closest_while_another_may_be_closer(server: Server, page: Page) -> None:
    for name in ("bf16", "int8", "nf4"):
        server.stage.answered(name, 30)
    server.stage.drifted("int8", tokens=100, kl_nats=0.003, agreeing=96)
    server.stage.drifted("nf4", tokens=500, kl_nats=0.07, agreeing=400)
    open_page(page, server)
    expect(page.locator("#choice .lines")).to_contain_text("Too few tokens scored yet to tell: int8.")
    expect(advice(page, "Closest")).to_have_count(0)
    server.stage.drifted("int8", tokens=200, kl_nats=0.003, agreeing=192)
    expect(advice(page, "Closest to bf16")).to_contain_text("int8")


def test_a_failed_variant_shows_its_reason(server: Server, page: Page) -> None:
    open_page(page, server)
    row = page.locator("tr.absent")
    expect(row).to_contain_text("the calibration text has 12 tokens; it needs 4096")
    server.stage.change("gptq4", state="loading", reason=None)
    expect(row).to_contain_text("Loading: compress, 40 %")
    server.stage.change("gptq4", state="ready")
    expect(row).to_have_count(0)
    expect(cell(page, "gptq4", "In flight")).to_have_text("2")


def test_a_variants_name_is_text_and_never_markup(server: Server, page: Page) -> None:
    evil = Staged("<img src=x onerror=alert(1)>", state="failed", reason="<b>bold</b>", precision="nf4")
    server.stage.variants_[evil.name] = evil
    open_page(page, server)
    expect(page.get_by_role("rowheader", name=evil.name)).to_be_visible()
    assert page.locator("img[src=x]").count() == 0


def test_drift_appears_once_it_is_measured(server: Server, page: Page) -> None:
    server.stage.answered("nf4", 30)
    open_page(page, server)
    expect(page.locator("#drift")).to_be_hidden()
    expect(page.locator("#choice").get_by_role("columnheader", name="Agreement")).to_be_hidden()
    server.stage.drifted("nf4", tokens=100, kl_nats=0.025, agreeing=91)
    row = page.locator("#drift tbody tr")
    expect(row).to_contain_text("0.025")
    expect(row).to_contain_text("91 %")
    expect(page.locator("#choice").get_by_role("columnheader", name="Agreement")).to_be_visible()


def test_drift_is_held_against_its_guard_and_says_when_there_is_no_data(server: Server, page: Page) -> None:
    server.stage.answered("nf4", 30)
    server.stage.drifted("nf4", tokens=100, kl_nats=0.05, agreeing=80)
    server.stage.drifted("int8", tokens=100, kl_nats=0.05, agreeing=80)
    open_page(page, server)
    row = {name: page.locator("#drift tbody tr").filter(has_text=name) for name in ("int8", "nf4")}
    expect(row["nf4"]).to_contain_text("within 0.092")
    expect(row["int8"]).to_contain_text("beyond 0.005")
    page.get_by_label("Over the last").select_option("60")
    for _ in range(16):  # the page lives long enough to trust its window, and nothing is scored in it
        server.stage.answered("nf4")
        page.wait_for_timeout(1000)
    expect(row["nf4"]).to_contain_text("no data")


def test_drift_without_a_reader_says_so_at_once_and_tells_what_was_not_scored(server: Server, page: Page) -> None:
    page.clock.install()
    server.stage.drifted("nf4", tokens=100, kl_nats=0.05, agreeing=80)
    open_page(page, server)
    expect(page.locator("#drift tbody tr")).to_contain_text("within 0.092")
    page.clock.fast_forward(11_000)  # until no sample of the last ten seconds was scored
    server.stage.sampled("nf4", "no_data", 4)
    server.stage.sampled("nf4", "shed", 2)
    expect(page.locator("#drift tbody tr")).to_contain_text("no data now")
    expect(page.locator("#drift .hint")).to_have_text(
        "nf4: 1 answers scored, 2 shed to make way for users, 4 found no reader."
    )
    server.stage.drifted("nf4", tokens=100, kl_nats=0.05, agreeing=80)
    expect(page.locator("#drift tbody tr")).to_contain_text("within 0.092")


# -- the split -------------------------------------------------------------------------------------------------------


def test_a_changed_weight_takes_effect(server: Server, page: Page) -> None:
    open_page(page, server)
    slider = page.get_by_role("slider", name="Share of int8")
    expect(page.get_by_role("button", name="Apply")).to_be_disabled()
    slider.fill("50")
    outputs = page.locator(".slider output")
    expect(outputs).to_have_text(["38 %", "50 %", "12 %", "0 %"])
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("#traffic")).to_contain_text("In force: bf16 38 %, int8 50 %, nf4 12 %, gptq4 0 %.")
    expect(page.get_by_role("img", name="Configured: bf16 38 %, int8 50 %, nf4 12 %")).to_be_visible()
    assert server.stage.dealt == [{"bf16": 38, "int8": 50, "nf4": 12, "gptq4": 0}]


def test_what_a_hand_has_begun_is_not_overwritten_and_can_be_undone(server: Server, page: Page) -> None:
    open_page(page, server)
    page.get_by_role("slider", name="Share of bf16").fill("100")
    server.stage.change("bf16", weight=40.0)
    server.stage.change("int8", weight=40.0)
    expect(page.get_by_role("img", name="Configured: bf16 40 %, int8 40 %, nf4 20 %")).to_be_visible()
    expect(page.locator(".slider output")).to_have_text(["100 %", "0 %", "0 %", "0 %"])
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".slider output")).to_have_text(["40 %", "40 %", "20 %", "0 %"])


def test_the_split_can_be_changed_by_keyboard_alone(server: Server, page: Page) -> None:
    open_page(page, server)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the numbers")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("slider", name="Share of bf16")).to_be_focused()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Undo")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#traffic")).to_contain_text("In force: bf16 70 %")
    assert server.stage.dealt[-1]["bf16"] == 70


# -- rollouts --------------------------------------------------------------------------------------------------------


def test_a_rollout_is_begun_paused_resumed_and_aborted(server: Server, page: Page) -> None:
    open_page(page, server)
    panel, rollouts = page.locator("#rollouts"), server.stage.rollouts
    page.get_by_label("Canary").select_option("int8")
    page.get_by_label("Steps, percent").fill("5, 50")
    page.get_by_role("button", name="What would it need?").click()
    expect(panel).to_contain_text("about 5,690 requests")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(panel).to_contain_text("r1: bf16 → int8")
    expect(panel).to_contain_text("1 of 2 (5 %, 50 %)")
    expect(panel.get_by_role("row", name="next token (ITL) within its margin")).to_contain_text(
        "between -3.00 % and +5.00 %"
    )
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_disabled()
    expect(page.get_by_role("button", name="Promote")).to_be_disabled()
    page.get_by_role("button", name="Pause").click()
    expect(panel).to_contain_text("r1 is holding.")
    page.get_by_role("button", name="Resume").click()
    expect(panel).to_contain_text("r1 is progressing.")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Abort").click()
    expect(panel).to_contain_text("int8 was aborted by dashboard")
    expect(page.get_by_role("button", name="Pause")).to_be_disabled()
    assert rollouts.orders == ["pause", "resume", "abort"]
    assert [body["steps"] for body in rollouts.bodies] == [[{"weight": 5}, {"weight": 50}]] * 2


def test_a_rollout_that_runs_takes_the_sliders_out_of_the_hand(server: Server, page: Page) -> None:
    open_page(page, server)
    expect(page.locator("#rollouts")).to_contain_text("There was none yet.")
    slider = page.get_by_role("slider", name="Share of int8")
    expect(slider).to_be_enabled()
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#traffic")).to_contain_text("The rollout r1 deals the traffic now")
    expect(page.locator("#rollouts")).not_to_contain_text("There was none yet.")
    expect(slider).to_be_disabled()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Abort").click()
    expect(slider).to_be_enabled()


def test_a_canary_that_waits_is_promoted_only_by_who_says_yes(server: Server, page: Page) -> None:
    open_page(page, server)
    page.get_by_label("ask me before it is promoted").check()
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#rollouts")).to_contain_text("r1: bf16 → int8")
    rollouts = server.stage.rollouts
    assert rollouts.bodies[0]["steps"][-1] == {"weight": 50, "gate": "approval"}
    rollouts.begun[0]["phase"] = "awaiting_approval"
    expect(page.get_by_role("button", name="Promote")).to_be_enabled()
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Promote").click()
    assert rollouts.orders == []
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Promote").click()
    expect(page.locator("#rollouts")).to_contain_text("r1 is promoting.")
    assert rollouts.orders == ["promote"]


# -- experiments -----------------------------------------------------------------------------------------------------


def test_an_experiment_is_begun_with_the_split_in_force_read_and_stopped(server: Server, page: Page) -> None:
    """Before the server's own answers, in the shapes of docs/EXPERIMENTS.md."""
    asked: list[tuple[str, object]] = []
    experiment = {"name": "winter", "state": "running", "baseline": "bf16", "stopped_by": None}

    def answer(route: playwright.Route) -> None:
        path, method = route.request.url.removeprefix(server.url), route.request.method
        begun = any(path == "/admin/experiments" for path, _ in asked)
        if method == "POST":
            asked.append((path, route.request.post_data_json))
            experiment["state"] = "ended" if path.endswith("/stop") else "running"
            experiment["stopped_by"] = "operator" if path.endswith("/stop") else None
            route.fulfill(json=experiment)
        elif path.endswith("/report"):
            route.fulfill(json={**REPORT, "experiment": experiment})
        else:
            listed = [experiment] if begun else []
            active = "winter" if begun and experiment["state"] == "running" else None
            route.fulfill(json={"active": active, "experiments": listed})

    page.route(f"{server.url}/", lambda route: route.fulfill(json={"routes": ["/admin/experiments"]}))
    page.route("**/admin/experiments**", answer)
    open_page(page, server)
    panel = page.locator("#experiments")
    panel.get_by_label("Name").fill("winter")
    panel.get_by_label("Hours").fill("2")
    panel.get_by_label("Price of a machine's hour").fill("1.5")
    panel.get_by_role("button", name="Start experiment").click()
    expect(panel).to_contain_text("winter is running. 60 min, held against bf16.")
    expect(panel.get_by_role("row", name="int8")).to_contain_text("40 ms35 ms to 50 ms")
    expect(panel.locator(".lines li")).to_have_text(
        [
            "ITL of int8 is 21 % lower than that of bf16 at equal load.",
            "nf4: too little data yet (TTFT, output length).",
        ]
    )
    expect(panel.get_by_role("button", name="Start experiment")).to_be_disabled()
    page.on("dialog", lambda dialog: dialog.accept())
    panel.get_by_role("button", name="Stop").click()
    expect(panel).to_contain_text("winter was stopped by the operator")
    assert asked == [
        (
            "/admin/experiments",
            {
                "name": "winter",
                "weights": {"bf16": 60, "int8": 20, "nf4": 20},
                "duration_s": 7200,
                "price_per_hour": 1.5,
            },
        ),
        ("/admin/experiments/winter/stop", {}),
    ]


def test_a_server_without_experiments_is_not_asked_for_them(server: Server, page: Page) -> None:
    open_page(page, server)
    expect(page.locator("#experiments")).to_be_hidden()


def spread(estimate: float, low: float, high: float) -> dict[str, float]:
    return {"estimate": estimate, "low": low, "high": high}


REPORT = {
    "elapsed_s": 3600.0,
    "split": {"sentence": "the realised split is the configured one"},
    "comparisons": [
        {
            "variant": "int8", "measure": "itl", "result": "lower",
            "sentence": "ITL of int8 is 21 % lower than that of bf16 at equal load",
        },
        *({"variant": "nf4", "measure": measure, "result": "too little data"} for measure in ("ttft", "output_length")),
    ],
    "variants": [
        {
            "variant": "int8", "n": 1200, "units": 61, "ttft_s": {"p50": spread(0.04, 0.035, 0.05)},
            "itl_s": {"mean": spread(0.01, 0.009, 0.011)}, "error_rate": spread(0.002, 0.0, 0.01), "tokens_per_s": 25.0,
            "cost_per_million_tokens": None, "drift": None,
        }
    ],
}  # fmt: skip


# -- the loupe -------------------------------------------------------------------------------------------------------


def compare(page: Page) -> None:
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#loupe")).to_contain_text("Done.")


def column(page: Page, variant: str) -> playwright.Locator:
    return page.locator("article.column").filter(has=page.get_by_role("heading", name=variant))


def test_the_loupe_marks_the_first_token_that_differs(server: Server, page: Page) -> None:
    open_page(page, server)
    compare(page)
    assert [call.model for call in server.stage.calls[:3]] == [
        "storyteller@bf16", "storyteller@int8", "storyteller@nf4"
    ]  # fmt: skip
    expect(column(page, "bf16").locator(".tokens")).to_have_text("".join(STORY))
    expect(column(page, "int8").locator(".diverged")).to_have_count(0)
    expect(column(page, "int8")).to_contain_text("Word for word the reference's answer.")
    expect(column(page, "nf4").locator(".diverged")).to_have_text(" food")
    expect(column(page, "nf4")).to_contain_text("Parts from the reference at token 13. 16 of 19 tokens")
    expect(column(page, "nf4")).to_contain_text("weights135 MiB")


def test_tokens_are_coloured_by_the_variant_and_then_by_the_reference(server: Server, page: Page) -> None:
    open_page(page, server)
    compare(page)
    food = column(page, "nf4").locator(".token").nth(12)
    expect(food).to_have_attribute("data-level", "0")
    page.get_by_label("the variant's own probability").check()
    expect(food).to_have_attribute("data-level", "4")
    expect(column(page, "nf4").locator(".token").nth(10)).to_have_attribute("data-level", "3")


def test_the_loupe_shows_tokens_while_they_come(server: Server, page: Page) -> None:
    open_page(page, server)
    with server.held(from_token=5):
        page.get_by_role("button", name="Compare").click()
        expect(column(page, "int8").locator(".token")).to_have_count(5)
        expect(column(page, "nf4")).to_contain_text("The same so far.")
        expect(page.locator("#loupe")).to_contain_text("Answering …")
    expect(column(page, "int8").locator(".token")).to_have_count(len(STORY))
    expect(page.locator("#loupe")).to_contain_text("Done.")


def test_a_comparison_can_be_stopped(server: Server, page: Page) -> None:
    open_page(page, server)
    with server.held(from_token=5):
        page.get_by_role("button", name="Compare").click()
        expect(column(page, "int8").locator(".token")).to_have_count(5)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#loupe")).to_contain_text("Stopped.")
        expect(page.get_by_role("button", name="Compare")).to_be_enabled()


def test_an_answer_can_be_walked_through_by_keyboard(server: Server, page: Page) -> None:
    open_page(page, server)
    compare(page)
    page.get_by_role("region", name="Answer of nf4").focus()
    page.keyboard.press("End")
    for _ in range(len(STORY) - 1 - 12):
        page.keyboard.press("ArrowLeft")
    expect(page.locator(".inspector")).to_have_text(
        "nf4, token 13: “ food” 95 %; else “ else” 2.5 %; bf16 gives it 0.5 % and would say “ berries” (70 %)."
    )
    expect(column(page, "bf16").locator(".here")).to_have_text(" berries")


def test_one_variant_that_fails_leaves_the_others_their_answers(
    server: Server, page: Page, complaints: list[str]
) -> None:
    open_page(page, server)
    server.stage.refusing = "int8"
    compare(page)
    expect(column(page, "int8")).to_contain_text("variant 'int8' is saturated")
    expect(column(page, "nf4").locator(".diverged")).to_have_text(" food")
    assert all("503" in complaint for complaint in complaints)  # the browser's own note of the status
    complaints.clear()


def test_a_conversation_is_sent_in_the_models_own_template(server: Server, page: Page) -> None:
    open_page(page, server)
    page.get_by_label("Sent as").select_option("chat")
    compare(page)
    assert server.stage.calls[0].requests[0].prompt == (4, 5, 6)


# -- who may look ----------------------------------------------------------------------------------------------------


def give_key(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use this key").click()


def test_a_locked_server_asks_for_its_key_and_keeps_it_in_the_tab(
    locked: Server, page: Page, complaints: list[str]
) -> None:
    page.goto(f"{locked.url}/dashboard")
    dialog = page.get_by_role("dialog", name="A key is needed")
    expect(dialog).to_contain_text("answers only those who send a key")
    give_key(page, "sk-wrong")
    expect(dialog).to_contain_text("The server refused this key.")
    give_key(page, "sk-admin")
    expect(page.locator("#status")).to_contain_text("3 of 4 variants ready")
    expect(page.get_by_role("slider", name="Share of bf16")).to_be_enabled()
    assert page.evaluate("[JSON.stringify(localStorage), document.cookie]") == ["{}", ""]
    assert page.evaluate("sessionStorage.length") == 1
    assert all("401" in complaint for complaint in complaints)
    complaints.clear()


def test_an_api_key_shows_everything_and_changes_nothing(locked: Server, page: Page, complaints: list[str]) -> None:
    page.goto(f"{locked.url}/dashboard")
    give_key(page, "sk-api")
    expect(page.locator("#traffic")).to_contain_text("the admin key is needed")
    expect(page.get_by_role("slider", name="Share of bf16")).to_be_hidden()
    expect(page.get_by_role("img", name="In force: bf16 60 %, int8 20 %, nf4 20 %")).to_be_visible()
    page.get_by_role("button", name="Enter the admin key").click()
    give_key(page, "sk-admin")
    expect(page.get_by_role("slider", name="Share of bf16")).to_be_visible()
    complaints.clear()


# -- when things go wrong --------------------------------------------------------------------------------------------


def test_a_server_that_goes_away_is_told_and_found_again(server: Server, page: Page, complaints: list[str]) -> None:
    open_page(page, server)
    page.route("**/metrics", lambda route: route.abort())
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached. What you see is from")
    expect(page.locator("#status")).to_have_text("Not connected")
    expect(cell(page, "bf16", "In flight")).to_have_text("2")
    page.unroute("**/metrics")
    expect(page.locator("#status")).to_contain_text("variants ready")
    expect(page.get_by_role("alert")).to_be_hidden()
    complaints.clear()


def test_one_look_that_fails_is_no_lost_server(server: Server, page: Page, complaints: list[str]) -> None:
    open_page(page, server)
    page.route("**/metrics", lambda route: route.abort(), times=1)
    expect(page.locator("#status")).to_contain_text("No answer since")
    assert page.get_by_role("alert").is_hidden()
    expect(page.locator("#status")).to_contain_text("variants ready")
    complaints.clear()


def test_an_admin_route_that_does_not_answer_holds_up_nothing_else(server: Server, page: Page) -> None:
    open_page(page, server)
    page.route("**/admin/traffic", lambda route: None)  # for ever
    server.stage.answered("bf16", 10)
    expect(page.locator("#traffic")).to_contain_text("10 answers")
    expect(page.locator("#status")).to_contain_text("variants ready")
    expect(page.locator("#traffic .age")).to_contain_text(": no answer since")
    expect(page.locator("#rollouts .age")).to_be_hidden()
    expect(page.get_by_role("img", name="Configured: bf16 60 %, int8 20 %, nf4 20 %")).to_be_visible()


def test_nobody_is_asked_while_nobody_looks(server: Server, page: Page) -> None:
    page.clock.install()
    open_page(page, server)
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    page.evaluate(hide % "true" + "document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_load_state("networkidle")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert asked == []
    with page.expect_request("**/metrics"):
        page.evaluate(hide % "false" + "document.dispatchEvent(new Event('visibilitychange'))")
        page.clock.run_for(1)


def test_a_server_that_does_not_answer_is_asked_ever_more_seldom(
    server: Server, page: Page, complaints: list[str]
) -> None:
    page.clock.install()
    open_page(page, server)
    page.route("**/metrics", lambda route: route.abort())
    page.clock.run_for(1000)
    expect(page.locator("#status")).to_contain_text("asking again")
    said = page.get_by_role("alert")
    expect(said).to_be_hidden()
    page.clock.run_for(2000)
    expect(said).to_contain_text("Next try in 4 s.")
    for _ in range(100):
        page.clock.run_for(15_000)
        if "Next try in 15 s." in said.inner_text():
            break
    expect(said).to_contain_text("Next try in 15 s.")
    complaints.clear()


def test_a_server_that_started_anew_starts_the_history_anew(server: Server, page: Page) -> None:
    server.stage.answered("bf16", 50)
    open_page(page, server)
    expect(page.locator("#traffic")).to_contain_text("50 answers")
    server.stage.reset()
    server.stage.answered("int8", 3)
    expect(page.locator("#traffic")).to_contain_text("3 answers")


# -- how it looks ----------------------------------------------------------------------------------------------------


def test_no_width_needs_a_sideways_scroll(server: Server, page: Page) -> None:
    for name in ("bf16", "int8", "nf4"):
        server.stage.answered(name, 10)
        server.stage.drifted(name, tokens=500, kl_nats=0.003, agreeing=480)
    page.route(f"{server.url}/", lambda route: route.fulfill(json={"routes": ["/admin/experiments"]}))
    ended = {"name": "winter", "state": "ended", "baseline": "bf16", "stopped_by": "time"}
    told = {"list": {"active": None, "experiments": [ended]}, "report": {**REPORT, "experiment": ended}}
    page.route("**/admin/experiments", lambda route: route.fulfill(json=told["list"]))
    page.route("**/admin/experiments/*/report", lambda route: route.fulfill(json=told["report"]))
    open_page(page, server)
    expect(page.locator("#experiments")).to_contain_text("winter has ended: its time was over.")
    compare(page)
    for width in (1920, 1280, 1000, 900, 768, 390, 320):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


def test_dark_and_light_follow_the_system_and_the_choice(server: Server, page: Page) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    page.emulate_media(color_scheme="light")
    open_page(page, server)
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    assert dark != light
    page.get_by_label("Theme").select_option("light")
    assert page.evaluate(ground) == light
    page.reload()
    expect(page.get_by_label("Theme")).to_have_value("light")
    assert page.evaluate(ground) == light


def test_every_control_and_picture_has_a_name(server: Server, page: Page) -> None:
    server.stage.answered("bf16", 10)
    open_page(page, server)
    nameless = """() => [...document.querySelectorAll('button, input, select, textarea, a, [role=img], section, nav')]
        .filter((node) => node.checkVisibility())
        .filter((node) => !(node.ariaLabel || node.labels?.length || node.textContent.trim()
            || document.getElementById(node.getAttribute('aria-labelledby'))))
        .map((node) => node.outerHTML.slice(0, 120))"""
    assert page.evaluate(nameless) == []
