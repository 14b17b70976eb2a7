"""The exporter as Prometheus sees it: over HTTP, within its budget of series, under the promised names."""

from __future__ import annotations

import shutil
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from data_pipeline.shard_files import FileCounters
from trainer.observe.prometheus import MAX_SERIES, PHASES, SCORES, Exporter, StepStats, most_series

TERMS = ("feature_reconstruction", "slot_contrast", "srl_decoder", "srl_encoder", "srl_regulariser")
NAMES = [
    "slotstream_steps_total",
    "slotstream_samples_total",
    "slotstream_frames_total",
    "slotstream_last_step_timestamp_seconds",
    "slotstream_step_duration_seconds",
    "slotstream_loss",
    "slotstream_grad_norm",
    "slotstream_learning_rate",
    "slotstream_nonfinite_total",
    "slotstream_data_wait_seconds_total",
    "slotstream_data_queue_depth",
    "slotstream_data_position",
    "slotstream_data_epoch",
    "slotstream_samples_skipped_total",
    "slotstream_checkpoint_last_success_timestamp_seconds",
    "slotstream_checkpoint_bytes",
    "slotstream_checkpoint_duration_seconds",
    "slotstream_checkpoint_every_steps",
    "slotstream_straggler_ratio",
    "slotstream_evaluating",
    "slotstream_restarts_total",
    "slotstream_shard_hits_total",
    "slotstream_shard_misses_total",
    "slotstream_shard_fetched_bytes_total",
    "slotstream_shard_corrupt_total",
    "slotstream_checkpoint_verify_failures_total",
    "slotstream_checkpoint_save_failures_total",
    "slotstream_preemptions_total",
    "slotstream_memory_bytes",
    "slotstream_world_size",
    "slotstream_score",
    "slotstream_run_info",
]


@pytest.fixture
def exporter(tmp_path):
    info = {"git_sha": "abc", "config-hash": "1"}
    made = Exporter(
        rank=0, world_size=3, run_dir=tmp_path, loss_terms=TERMS, run_info=info, restarts=2, preemptions=1, checkpoint_every=100
    )
    yield made
    made.close()


def use_everything(exporter: Exporter) -> None:
    exporter.observe_step(step_of())
    exporter.observe_log({"total": 1.0, **{term: 0.5 for term in TERMS}}, grad_norm=0.1, learning_rate=1e-3)
    exporter.device_memory(10**9)
    exporter.checkpoint_saved(size_bytes=1234, seconds=0.7)
    exporter.checkpoint_verify_failed()
    exporter.score({f"metric/{name}": 0.5 for name in SCORES} | {"metric/video_miou": 0.1})
    exporter.straggler(1.5)
    exporter.skipped(2)
    exporter.nonfinite()
    exporter.preempted()


def step_of(**changes) -> StepStats:
    phases = dict.fromkeys(PHASES, 0.1)
    values = {"samples": 5, "frames": 20, "phases": phases, "data_wait_s": 0.25, "queue_depth": 2, "position": 60, "epoch": 1}
    return StepStats(**(values | changes))


def scrape(exporter: Exporter) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://{exporter.server.target}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def test_a_scrape_over_http_gives_what_was_recorded(exporter):
    use_everything(exporter)
    exporter.observe_step(step_of(samples=4, frames=16, phases={"forward": 7.0}))
    found = scrape(exporter)
    assert found["slotstream_steps_total", ()] == 2 and found["slotstream_samples_total", ()] == 9
    assert found["slotstream_frames_total", ()] == 36 and found["slotstream_world_size", ()] == 3
    assert found["slotstream_data_wait_seconds_total", ()] == 0.5 and found["slotstream_data_position", ()] == 60
    assert found["slotstream_step_duration_seconds_sum", (("phase", "forward"),)] == pytest.approx(7.1)
    assert found["slotstream_step_duration_seconds_bucket", (("le", "+Inf"), ("phase", "forward"))] == 2
    assert found["slotstream_step_duration_seconds_bucket", (("le", "5.0"), ("phase", "forward"))] == 1
    assert found["slotstream_loss", (("term", "srl_regulariser"),)] == 0.5
    assert found["slotstream_score", (("metric", "video_fg_ari"),)] == 0.5
    assert found["slotstream_samples_skipped_total", ()] == 2 and found["slotstream_checkpoint_bytes", ()] == 1234
    assert found["slotstream_memory_bytes", (("kind", "host"),)] > 10**6
    assert found["slotstream_run_info", (("config_hash", "1"), ("git_sha", "abc"))] == 1


def test_series_stay_within_the_budget_when_everything_is_used(exporter):
    use_everything(exporter)
    series = scrape(exporter)
    assert len(series) <= MAX_SERIES == 60
    assert len(series) == most_series(len(TERMS) + 1 + len(SCORES))
    assert not [name for name, _ in series if name.endswith("_created")]


def test_what_fetching_cost_is_counted_from_totals(exporter):
    exporter.shard_files(FileCounters(cache_hits=3, cache_misses=1, fetched_bytes=1000, corrupt=0, retries=7))
    totals = FileCounters(cache_hits=5, cache_misses=1, fetched_bytes=1000, corrupt=2)
    exporter.shard_files(totals)
    totals.cache_hits += 1  # the reader goes on counting in the same object
    exporter.shard_files(totals)
    found = scrape(exporter)
    names = ("hits", "misses", "fetched_bytes", "corrupt")
    assert [found[f"slotstream_shard_{name}_total", ()] for name in names] == [6, 1, 1000, 2]


def test_what_happened_before_this_attempt_and_the_straggler_are_told(exporter):
    exporter.straggler(1.25)
    exporter.preempted()
    found = scrape(exporter)
    assert found["slotstream_restarts_total", ()] == 2 and found["slotstream_preemptions_total", ()] == 2
    assert found["slotstream_straggler_ratio", ()] == 1.25
    assert found["slotstream_checkpoint_every_steps", ()] == 100


def test_a_dying_run_waits_for_the_scrape_that_tells_why(exporter):
    scrape(exporter)
    exporter.nonfinite()
    seen = []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(exporter.server.wait_for_scrape, 30.0)
        while not waiting.done():
            seen.append(scrape(exporter)["slotstream_nonfinite_total", ()])
        assert waiting.result() and seen[-1] == 1


def test_evaluating_is_told_while_it_lasts(exporter):
    with exporter.evaluating():
        assert scrape(exporter)["slotstream_evaluating", ()] == 1
    assert scrape(exporter)["slotstream_evaluating", ()] == 0


def test_a_short_job_waits_to_be_seen_once(exporter):
    """Nobody has asked yet; where somebody is known to watch, it is waited for."""
    assert not exporter.server.wait_for_scrape(at_most_s=0.0, expected=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(exporter.server.wait_for_scrape, 30.0, True)
        while not waiting.done():
            scrape(exporter)
        assert waiting.result()


def test_nobody_waits_for_a_scrape_where_there_is_no_prometheus(exporter):
    exporter.server.exposition()
    assert not exporter.server.wait_for_scrape(at_most_s=1e9)
    scrape(exporter)
    assert not exporter.server.wait_for_scrape(at_most_s=0.0)


def test_every_promised_name_is_there(exporter):
    use_everything(exporter)
    names = {name for name, _ in scrape(exporter)}
    names |= {name.removesuffix(end) for name in names for end in ("_bucket", "_sum", "_count")}
    assert not [name for name in NAMES if name not in names]
    assert not [name for name in names if not name.startswith("slotstream_")]


def test_more_terms_than_the_budget_holds_are_refused():
    with pytest.raises(ValueError, match="60 are allowed"):
        Exporter(loss_terms=[f"term{number}" for number in range(30)])


def test_other_ranks_have_no_loss_and_no_score(tmp_path):
    exporter = Exporter(rank=2, run_dir=tmp_path, loss_terms=TERMS)
    use_everything(exporter)
    names = {name for name, _ in scrape(exporter)}
    exporter.close()
    assert "slotstream_loss" not in names and "slotstream_score" not in names and "slotstream_grad_norm" in names
    assert (tmp_path / "monitoring" / "metrics_rank2.prom").exists()


def test_a_gauge_without_a_value_is_absent(exporter):
    names = {name for name, _ in scrape(exporter)}
    assert "slotstream_steps_total" in names and "slotstream_checkpoint_last_success_timestamp_seconds" not in names


def test_counters_only_rise(exporter):
    last: dict = {}
    for wait in (0.5, 0.0, -1e-9):
        use_everything(exporter)
        exporter.observe_step(step_of(data_wait_s=wait))
        now = {key: value for key, value in scrape(exporter).items() if key[0].endswith(("_total", "_count", "_bucket", "_sum"))}
        assert all(now[key] >= value for key, value in last.items())
        last = now


def test_close_keeps_the_last_values_and_frees_the_port(exporter, tmp_path):
    use_everything(exporter)
    text = exporter.server.exposition()
    exporter.close()
    exporter.close()
    assert (tmp_path / "monitoring" / "metrics_rank0.prom").read_bytes() == text
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{exporter.server.port}/metrics", timeout=2)


def test_two_exporters_of_one_process_do_not_mix(exporter):
    other = Exporter(rank=1)
    exporter.nonfinite()
    assert other.server.port != exporter.server.port and scrape(other)["slotstream_nonfinite_total", ()] == 0
    other.close()


def test_a_wildcard_address_is_published_as_the_machine(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "trainer7")
    exporter = Exporter(address="0.0.0.0")
    assert exporter.server.target == f"trainer7:{exporter.server.port}"
    exporter.close()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_no_fault_with_the_names(exporter):
    use_everything(exporter)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=exporter.server.exposition(), capture_output=True, timeout=60
    )
    assert checked.returncode == 0, (checked.stdout + checked.stderr).decode()
