"""The main job, end to end: rows in a file, a real queue, workers, a real client, results."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.acceptance.conftest import StartProvider
from tests.acceptance.fleet import (
    Fleet,
    assert_nothing_left,
    assert_one_line_each,
    descendants,
    processes_of,
    read_results,
    write_rows,
)
from tests.support import wait_until

GEMINI = ("--model", "gemini:gemini-2.5-flash")


def calls_per_prompt(provider: Any) -> Counter[str]:
    return Counter(call.prompt for call in provider.calls)


def worker_pids(folder: Path) -> list[int]:
    """The workers that a run in `folder` has started."""
    return [p.pid for p in processes_of(folder) if "batchllm_celery.worker" in p.cmdline()]


def test_run_answers_every_row_once_and_a_second_run_calls_nobody(
    lone_fleet: Fleet, provide: StartProvider
) -> None:
    """`batchllm run` gives each row the answer to its own prompt; the same batch id again makes
    no provider call; afterwards no process of it is left."""
    provider = provide(latency=0.05)
    lone_fleet.env["GOOGLE_GEMINI_BASE_URL"] = provider.url
    write_rows(lone_fleet.folder / "rows.jsonl", 60)
    command = (
        "run",
        "rows.jsonl",
        "-o",
        "out.jsonl",
        *GEMINI,
        "--workers",
        "2",
        "--batch-id",
        "b1",
    )

    first = lone_fleet.run(*command, "--rpm", "6000")

    assert first.returncode == 0, first.stderr
    lines = assert_one_line_each(lone_fleet.folder / "out.jsonl", 60)
    assert all(
        line["success"] and f"question number {line['index']}" in line["output"] for line in lines
    )
    assert set(calls_per_prompt(provider).values()) == {1}
    assert_nothing_left(lone_fleet.folder)

    second = lone_fleet.run(*command, "--rpm", "6000")

    assert second.returncode == 0, second.stderr
    assert sum(calls_per_prompt(provider).values()) == 60
    assert_one_line_each(lone_fleet.folder / "out.jsonl", 60)
    assert "60" in second.stdout + second.stderr

    elsewhere = lone_fleet.run(*command, "--rpm", "6000", "-o", "elsewhere.jsonl")

    assert elsewhere.returncode == 2
    assert "were written to another file than elsewhere.jsonl" in elsewhere.stderr
    assert not (lone_fleet.folder / "elsewhere.jsonl").exists()
    (batch,) = json.loads(lone_fleet.run("status", "b1", "--json").stdout)["batches"]
    assert (batch["state"], batch["total"]) == ("finished", 60)
    results = lone_fleet.run("results", "b1")
    assert results.returncode == 2
    assert "the 60 results of batch b1 are in the file that `run` wrote" in results.stderr


def test_a_second_run_at_the_same_time_is_refused_and_disturbs_nothing(
    lone_fleet: Fleet, provide: StartProvider
) -> None:
    """The same batch id in two terminals, with the same output and with another: exit 2 each, and
    the first one ends as if it had been alone."""
    provider = provide(latency=6.0)
    lone_fleet.env["GOOGLE_GEMINI_BASE_URL"] = provider.url
    write_rows(lone_fleet.folder / "rows.jsonl", 80)
    out = lone_fleet.folder / "out.jsonl"
    options = ("--max-concurrency", "8", "--workers", "1", "--batch-id", "b1")
    command = ("run", "rows.jsonl", *GEMINI, *options, "-o")
    first = lone_fleet.start(*command, "out.jsonl", name="first")
    wait_until(lambda: out.exists() and out.read_text(), timeout=60)

    same = lone_fleet.run(*command, "out.jsonl")
    other = lone_fleet.run(*command, "other.jsonl")

    assert (same.returncode, other.returncode) == (2, 2)
    assert "being written by another batchllm" in same.stderr
    assert "has a producer already" in other.stderr or "has a consumer already" in other.stderr
    provider.change(latency=0.05)
    assert first.wait(timeout=90) == 0, lone_fleet.said("first")
    assert_one_line_each(out, 80)
    assert set(calls_per_prompt(provider).values()) == {1}


def test_broken_rows_fail_by_line_and_good_ones_are_answered(
    fleet: Fleet, provide: StartProvider
) -> None:
    """A row that can't be read becomes a failed result that names its line; exit code 1."""
    fleet.env["GOOGLE_GEMINI_BASE_URL"] = provide().url
    (fleet.folder / "rows.jsonl").write_text(
        '{"item_id": "a", "prompt": "one"}\nnot json\n{"item_id": "b"}\n'
        '{"item_id": "a", "prompt": "again"}\n{"item_id": "c", "prompt": "two"}\n'
    )
    done = fleet.run("run", "rows.jsonl", "-o", "out.jsonl", *GEMINI, "--workers", "1")

    assert done.returncode == 1, done.stderr
    lines = {line["index"]: line for line in read_results(fleet.folder / "out.jsonl")}
    assert {index for index, line in lines.items() if line["success"]} == {0, 4}
    for index in (1, 2, 3):
        assert lines[index]["error"]["kind"] == "invalid_input"
        assert f"line {index + 1}" in lines[index]["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (("missing.jsonl", *GEMINI), {}, "missing.jsonl"),
        (("empty.jsonl", *GEMINI), {}, "empty.jsonl"),
        (("rows.jsonl", "--model", "nobody:nothing"), {}, "nobody"),
        (("rows.jsonl", *GEMINI), {"GEMINI_API_KEY": ""}, "GEMINI_API_KEY"),
        (("rows.jsonl", *GEMINI), {"BATCHLLM_REDIS_URL": "redis://127.0.0.1:1/0"}, "127.0.0.1:1"),
    ],
    ids=["missing file", "empty file", "unknown model", "missing key", "unreachable Redis"],
)
def test_a_mistake_gets_one_clear_line_and_exit_2(
    fleet: Fleet, arguments: tuple[str, ...], env: dict[str, str], words: str
) -> None:
    """What a person got wrong is named in one line, and nothing was started."""
    write_rows(fleet.folder / "rows.jsonl", 3)
    (fleet.folder / "empty.jsonl").write_text("")
    fleet.env.update(env)

    done = fleet.run("run", *arguments, timeout=60)

    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_submit_workers_and_results_in_other_terminals(
    fleet: Fleet, provide: StartProvider
) -> None:
    """`submit` prints the id alone; `batchllm worker` and a plain Celery worker share the work;
    `results --follow` ends as `run` does; a drained worker exits with 0."""
    provider = provide(latency=0.1)
    fleet.env["GOOGLE_GEMINI_BASE_URL"] = provider.url
    write_rows(fleet.folder / "rows.jsonl", 80)
    workers = [
        fleet.start("worker", "--processes", "1", name="worker"),
        fleet.start_celery_worker("--loglevel", "INFO", name="celery"),
    ]
    submitted = fleet.run("submit", "rows.jsonl", *GEMINI, "--rpm", "1200")
    assert submitted.returncode == 0, submitted.stderr
    batch_id = submitted.stdout.strip()
    assert batch_id
    assert "\n" not in batch_id

    followed = fleet.run("results", batch_id, "-o", "out.jsonl", "--follow")

    assert followed.returncode == 0, followed.stderr
    assert_one_line_each(fleet.folder / "out.jsonl", 80)
    assert set(calls_per_prompt(provider).values()) == {1}
    assert "batchllm.run_items" in fleet.said("celery")
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=40) == 0


def test_interrupt_then_the_printed_command_finishes_without_a_second_call(
    lone_fleet: Fleet, provide: StartProvider
) -> None:
    """The first Ctrl-C drains, keeps what is done and prints the command that resumes."""
    provider = provide(latency=0.3)
    lone_fleet.env["GOOGLE_GEMINI_BASE_URL"] = provider.url
    write_rows(lone_fleet.folder / "rows.jsonl", 90)
    out = lone_fleet.folder / "out.jsonl"
    run = lone_fleet.start(
        "run",
        "rows.jsonl",
        "-o",
        "out.jsonl",
        *GEMINI,
        "--rpm",
        "900",
        "--workers",
        "2",
        name="run",
    )
    wait_until(lambda: out.exists() and len(out.read_text().splitlines()) >= 15, timeout=60)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    assert_nothing_left(lone_fleet.folder)
    (command,) = [
        line.strip() for line in lone_fleet.said("run").splitlines() if "--batch-id" in line
    ]
    assert len(read_results(out)) < 90

    resumed = lone_fleet.run(*command.split()[command.split().index("batchllm") + 1 :])

    assert resumed.returncode == 0, resumed.stderr
    assert_one_line_each(out, 90)
    assert set(calls_per_prompt(provider).values()) == {1}


def test_a_killed_worker_costs_no_row(lone_fleet: Fleet, provide: StartProvider) -> None:
    """kill -9 of one of two workers in the middle: every row gets exactly one outcome."""
    provider = provide(latency=0.3)
    lone_fleet.env |= {"GOOGLE_GEMINI_BASE_URL": provider.url, "BATCHLLM_LEASE_SECONDS": "3"}
    write_rows(lone_fleet.folder / "rows.jsonl", 120)
    out = lone_fleet.folder / "out.jsonl"
    run = lone_fleet.start(
        "run",
        "rows.jsonl",
        "-o",
        "out.jsonl",
        *GEMINI,
        "--rpm",
        "1200",
        "--workers",
        "2",
        name="run",
    )
    wait_until(lambda: out.exists() and len(out.read_text().splitlines()) >= 20, timeout=60)
    os.kill(worker_pids(lone_fleet.folder)[0], signal.SIGKILL)

    assert run.wait(timeout=90) == 0, lone_fleet.said("run")
    assert_one_line_each(out, 120)


def test_a_simulated_provider_that_dies_fails_no_row(lone_fleet: Fleet) -> None:
    """Its end is said in one line, and the printed command goes on with another one."""
    write_rows(lone_fleet.folder / "rows.jsonl", 90)
    out = lone_fleet.folder / "out.jsonl"
    command = ("run", "rows.jsonl", "-o", "out.jsonl", "--model", "simulated", "--rpm", "600")
    run = lone_fleet.start(*command, name="run")
    wait_until(lambda: out.exists() and len(out.read_text().splitlines()) >= 15, timeout=60)
    (provider,) = [
        process
        for process in processes_of(lone_fleet.folder)
        if "batchllm_celery.simulation" in process.cmdline()
    ]
    provider.kill()
    assert run.wait(timeout=60) == 3
    said = lone_fleet.said("run")
    assert "Error: the simulated provider has ended" in said
    (line,) = [line.strip() for line in said.splitlines() if "--batch-id" in line]

    resumed = lone_fleet.run(*line.split()[line.split().index("batchllm") + 1 :])

    assert resumed.returncode == 0, resumed.stderr
    assert_one_line_each(out, 90)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_run_that_was_ended(
    lone_fleet: Fleet, provide: StartProvider, how: signal.Signals
) -> None:
    """SIGTERM or kill -9 of `run`: 10 s later no worker and no Valkey of it is left."""
    lone_fleet.env["GOOGLE_GEMINI_BASE_URL"] = provide(latency=0.5).url
    write_rows(lone_fleet.folder / "rows.jsonl", 500)
    out = lone_fleet.folder / "out.jsonl"
    run = lone_fleet.start(
        "run",
        "rows.jsonl",
        "-o",
        "out.jsonl",
        *GEMINI,
        "--rpm",
        "600",
        "--workers",
        "2",
        name="run",
    )
    wait_until(lambda: out.exists() and out.read_text(), timeout=60)
    assert descendants(run.pid)

    run.send_signal(how)
    run.wait(timeout=30)

    assert_nothing_left(lone_fleet.folder, timeout=10)


def test_no_prompt_answer_or_key_in_broker_or_logs(
    fleet: Fleet, provide: StartProvider, redis_url: str, namespace: str
) -> None:
    """Marker strings of prompts, answers and the key are in the ledger's keys and the result file,
    nowhere else: not in a queued message, not in a log line, not in what a command prints."""
    fleet.env["GOOGLE_GEMINI_BASE_URL"] = provide(error_rate=0.2).url
    write_rows(fleet.folder / "rows.jsonl", 30, prefix="PROMPTMARKER8842 ")
    fleet.env["BATCHLLM_LOG_LEVEL"] = "DEBUG"
    assert fleet.run("submit", "rows.jsonl", *GEMINI, "--batch-id", "m").returncode == 0
    with redis.Redis.from_url(redis_url) as client:
        celery_keys = list(client.scan_iter(match=f"{namespace}:celery:*"))
        assert celery_keys
        messages = b"".join(client.dump(key) or b"" for key in celery_keys)
    fleet.start_celery_worker("--loglevel", "DEBUG", name="celery")
    followed = fleet.run("results", "m", "-o", "out.jsonl", "--follow")

    assert_one_line_each(fleet.folder / "out.jsonl", 30)
    said = (
        messages.decode(errors="replace") + followed.stdout + followed.stderr + fleet.all_output()
    )
    for marker in ("PROMPTMARKER8842", "KEY-MARKER-7731", "Answer "):
        assert marker not in said, marker
    assert "PROMPTMARKER8842" in (fleet.folder / "out.jsonl").read_text()


INPUTS = {
    "jsonl": ("rows.jsonl", '{"item_id": "x", "prompt": "alpha?"}\n{"prompt": "beta?"}\n', ()),
    "csv": ("rows.csv", 'item_id,prompt\nx,"alpha?"\ny,beta?\n', ()),
    "text": ("rows.txt", "alpha?\nbeta?\n", ()),
    "stdin": ("-", '{"prompt": "alpha?"}\n{"prompt": "beta?"}\n', ()),
    "openai": (
        "rows.jsonl",
        "".join(
            json.dumps(
                {
                    "custom_id": word,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {"model": "m", "messages": [{"role": "user", "content": f"{word}?"}]},
                }
            )
            + "\n"
            for word in ("alpha", "beta")
        ),
        ("--override", "model"),
    ),
    "template": (
        "rows.jsonl",
        '{"word": "alpha"}\n{"word": "beta"}\n',
        ("--prompt", "{word}?"),
    ),
    "parquet": ("rows.parquet", "", ()),
}


def test_every_input_form_gets_the_answer_to_its_own_prompt(
    fleet: Fleet, provide: StartProvider
) -> None:
    """All input forms of the surface, `--ordered` included, over one standing worker."""
    fleet.env["GOOGLE_GEMINI_BASE_URL"] = provide().url
    fleet.start_celery_worker(name="celery")
    for form, (name, content, options) in INPUTS.items():
        if form == "parquet":
            _write_parquet(fleet.folder / name)
        elif name != "-":
            (fleet.folder / name).write_text(content)
        done = fleet.run(
            "run", name, "-o", f"{form}.out.jsonl", *GEMINI, *options, "--workers", "0",
            "--ordered", "--batch-id", form, stdin=content if name == "-" else None,
        )  # fmt: skip
        assert done.returncode == 0, (form, done.stderr)
        lines = read_results(fleet.folder / f"{form}.out.jsonl")
        assert [line["index"] for line in lines] == [0, 1], form
        assert "alpha?" in lines[0]["output"], form
        assert "beta?" in lines[1]["output"], form


def _write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"item_id": ["x", "y"], "prompt": ["alpha?", "beta?"]}), path)


def test_strict_enqueues_nothing_and_a_schema_shapes_the_output(
    fleet: Fleet, provide: StartProvider
) -> None:
    """`--strict` stops before anything is enqueued; `--schema` makes outputs objects that fit."""
    provider = provide(bad_output_rate=0.3)
    fleet.env["GOOGLE_GEMINI_BASE_URL"] = provider.url
    (fleet.folder / "bad.jsonl").write_text('{"prompt": "fine"}\nbroken\n')
    strict = fleet.run("run", "bad.jsonl", "-o", "s.jsonl", *GEMINI, "--workers", "1", "--strict")
    assert strict.returncode == 2
    assert "line 2" in strict.stderr
    assert not provider.calls

    schema = {
        "type": "object",
        "properties": {"label": {"type": "string"}, "score": {"type": "number"}},
        "required": ["label", "score"],
    }
    (fleet.folder / "schema.json").write_text(json.dumps(schema))
    write_rows(fleet.folder / "rows.jsonl", 20)
    done = fleet.run(
        "run", "rows.jsonl", "-o", "out.jsonl", *GEMINI, "--workers", "1",
        "--schema", "schema.json", "--max-attempts", "6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in assert_one_line_each(fleet.folder / "out.jsonl", 20):
        assert isinstance(line["output"]["label"], str)
        assert isinstance(line["output"]["score"], int | float)
