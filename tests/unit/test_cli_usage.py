"""A wrong request is one clear line and exit 2, before anything is enqueued."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from batchllm_celery.cli import _COMMANDS, cli, main, options
from batchllm_celery.cli.commands import estimate
from batchllm_celery.cli.commands.doctor import check_server
from batchllm_celery.cli.commands.run import default_out
from batchllm_celery.cli.display.quota_view import limits_words
from batchllm_celery.cli.processes import environment_of
from batchllm_celery.cli.request import (
    CommandRequest,
    check_key,
    limits_of,
    quota_of,
    resume_command,
    spec_of,
    strategy_of,
)
from batchllm_celery.errors import FailureKind, UsageError
from batchllm_celery.models import QuotaLimits
from batchllm_celery.settings import Settings


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHLLM_") or name.endswith("_API_KEY"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHLLM_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text("my notes\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "broken_app.py").write_text("1 / 0\n")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


RUN = ("run", "rows.jsonl")
SIMULATED = (*RUN, "--model", "simulated")
OPENAI = (*RUN, "--model", "openai:m")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "No such command"),
        (("run",), "Missing argument 'INPUT'"),
        (RUN, "--model PROVIDER:NAME"),
        ((*RUN, "--model", "acme:big"), "unknown provider 'acme'"),
        ((*RUN, "--model", "gemini"), "names no model"),
        ((*RUN, "--model", "gemini:x", "--strategy", "y"), "exclude each other"),
        ((*RUN, "--model", "gemini:x"), "set GEMINI_API_KEY"),
        ((*RUN, "--strategy", "nope"), "no strategy 'nope' is registered"),
        ((*RUN, "--strategy", "nope", "--app", "no_such_module"), "--app no_such_module"),
        ((*RUN, "--strategy", "nope", "--app", "broken_app"), "--app broken_app failed"),
        ((*RUN, "--model", "gemini:x", "--params", "{"), "--params is not JSON"),
        ((*RUN, "--model", "gemini:x", "--params", '{"nope": 1}'), "nope"),
        ((*RUN, "--model", "gemini:x", "--base-url", "http://x"), "--base-url goes with"),
        ((*OPENAI, "--base-url", "localhost:8000"), "openai_base_url: must read http://HOST"),
        ((*OPENAI, "--base-url", "ftp://h/v1"), "openai_base_url: must read"),
        ((*OPENAI, "--base-url", "http://"), "openai_base_url: must read"),
        ((*OPENAI, "--base-url", "http://h:99999/v1"), "openai_base_url: must read"),
        ((*OPENAI, "--base-url", "http://[::1/v1"), "openai_base_url: must read"),
        ((*OPENAI, "--base-url", " http://h/v1"), "openai_base_url: must read"),
        ((*OPENAI, "--base-url", "http://h\n.x/v1"), "openai_base_url: must read"),
        ((*OPENAI, "--base-url", "http://ann:secret@h/v1"), "no user and no password"),
        (("worker", "--base-url", "h"), "openai_base_url: must read"),
        ((*SIMULATED, "--schema", "missing.json"), "--schema missing.json"),
        ((*SIMULATED, "--schema", "bad.json"), "is not JSON"),
        ((*SIMULATED, "--rpm", "0"), "--rpm"),
        ((*SIMULATED, "--rpm", "nan"), "--rpm"),
        ((*SIMULATED, "--simulation", "{"), "--simulation: Invalid JSON"),
        ((*SIMULATED, "--simulation", '{"x": 1}'), "--simulation: x: Extra inputs"),
        ((*SIMULATED, "--simulation", '{"latency": -1}'), "--simulation: latency: "),
        ((*SIMULATED, "--rpm", "1e300"), "requests_per_minute: must be"),
        ((*SIMULATED, "--rpm", "1e-300"), "requests_per_minute: must be"),
        ((*SIMULATED, "--rpd", "9" * 30), "requests_per_day: must be"),
        (("quota", "set", "q", "--max-concurrency", "9" * 30), "max_concurrency: must be"),
        ((*SIMULATED, "--temperature", "nan"), "--temperature"),
        ((*SIMULATED, "--attempt-timeout", "inf"), "--attempt-timeout"),
        ((*SIMULATED, "--attempt-timeout", "1e300"), "timeout_per_item: Input should be less"),
        ((*SIMULATED, "--item-timeout", "1e300"), "item_timeout: Input should be less"),
        ((*SIMULATED, "--deadline", "inf"), "--deadline"),
        ((*SIMULATED, "--deadline", "1e300"), "deadline: Input should be less"),
        ((*SIMULATED, "--max-attempts", "9" * 22), "max_attempts: Input should be less"),
        ((*SIMULATED, "--token-budget", "9" * 26), "token_budget: Input should be less"),
        ((*SIMULATED, "--max-cost", "nan", "--price", "1,2"), "--max-cost"),
        ((*SIMULATED, "--max-cost", "1e300", "--price", "1,2"), "max_cost: Input should be less"),
        ((*SIMULATED, "--price", "1e300,1"), "--price '1e300,1'"),
        ((*SIMULATED, "--price", "nan,1"), "--price 'nan,1'"),
        ((*SIMULATED, "--price", "=1,2"), "--price '=1,2'"),
        (("worker", "--drain-seconds", "nan"), "--drain-seconds"),
        (("estimate", "rows.jsonl", "--model", "simulated", "--seconds-per-call", "nan"), "finite"),
        ((*SIMULATED, "--fail-fast", "nonsense"), "unknown kind 'nonsense'"),
        ((*SIMULATED, "--batch-id", "a b"), "--batch-id 'a b'"),
        ((*SIMULATED, "--batch-id", ".."), "--batch-id '..'"),
        ((*SIMULATED, "--batch-id", "."), "--batch-id '.'"),
        ((*SIMULATED, "--batch-id", ""), "--batch-id ''"),
        ((*SIMULATED, "--batch-id", "-x"), "--batch-id '-x'"),
        ((*SIMULATED, "--batch-id", "--help"), "--batch-id '--help'"),
        ((*SIMULATED, "--batch-id", "../other"), "--batch-id '../other'"),
        ((*SIMULATED, "--batch-id", "a\n"), "--batch-id 'a\\n'"),
        ((*SIMULATED, "--batch-id", "x" * 10_000), "--batch-id 'xxx"),
        ((*SIMULATED, "--quota", "a{b}c"), "--quota 'a{b}c'"),
        ((*SIMULATED, "--quota", "-x"), "--quota '-x'"),
        ((*SIMULATED, "--queue", "../x"), "queue '../x'"),
        (("results", ".."), "batch id '..'"),
        (("cancel", "--", "-x"), "batch id '-x'"),
        (("status", "a/b"), "batch id 'a/b'"),
        (("quota", "set", "a b", "--rpm", "5"), "quota name 'a b'"),
        ((*RUN, "--strategy", "summarise reviews"), "--strategy 'summarise reviews'"),
        ((*SIMULATED, "--prompt", "the same for all"), "names no field"),
        ((*SIMULATED, "-o", "other.jsonl"), "--overwrite"),
        ((*SIMULATED, "-o", "rows.jsonl"), "the input itself"),
        ((*SIMULATED, "-o", "missing/out.jsonl"), "no folder"),
        ((*SIMULATED, "--namespace", "a b"), "namespace"),
        ((*SIMULATED, "--redis-url", "redis://127.0.0.1:1/0"), "127.0.0.1:1"),
        (("run", "empty.jsonl", "--model", "simulated"), "has no rows"),
        (("run", "missing.jsonl", "--model", "simulated"), "no such file"),
        (("estimate", "missing.jsonl", "--model", "simulated"), "no such file"),
        (("quota", "set", "q"), "say what to set"),
        (("simulate", "--error-rate", "2"), "error_rate"),
        (("flower", "--address", "0.0.0.0"), "not loopback"),
        (("flower", "--basic-auth", "ann"), "USER:PASSWORD"),
        (("flower", "--basic-auth", "ann:"), "USER:PASSWORD"),
        (("flower", "--basic-auth", "ann:half,other:half"), "without a comma"),
        (("flower", "--basic-auth", "ann:pässword"), "ASCII"),
        (("flower", "--basic-auth", "ann:a b"), "a space"),
        (("status", "--redis-url", "redis://:a#b@h"), "percent-encode"),
        (("status", "--redis-url", "redis://h?socket_timeout=5"), "leave out ?socket_timeout="),
        (("worker", "--redis-url", "redis://h/mydb"), "a number"),
        ((*SIMULATED, "--redis-url", "redis://a/5;redis://b/5"), "one server"),
        (("status", "--redis-url", "redis://127.0.0.1:1/0"), "127.0.0.1:1"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    """`Error: ...` on standard error, nothing on standard output, within 5 s, and no file."""
    started = time.monotonic()
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert "secret" not in err
    assert time.monotonic() - started < 5
    assert not Path("rows.jsonl.results.jsonl").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_is_not_utf8_ends_no_command(encoding: str) -> None:
    """People get escapes for what the encoding lacks, programs the same JSON."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    look = [sys.executable, "-m", "batchllm_celery.cli", "doctor", "--redis-url"]
    look += ["redis://127.0.0.1:1/0", "--app", "prüfung"]
    for_people = subprocess.run(look, env=environment, capture_output=True)
    assert for_people.returncode == 2
    assert b"Error" not in for_people.stdout + for_people.stderr
    assert "Redis at redis://127.0.0.1:1/0" in for_people.stdout.decode(encoding)
    for_programs = subprocess.run([*look, "--json"], env=environment, capture_output=True)
    findings = json.loads(for_programs.stdout.decode(encoding))["findings"]
    assert any("prüfung" in finding["text"] for finding in findings)


def test_every_command_has_its_help() -> None:
    """No command fails to load, and each says what it does."""
    for name in _COMMANDS:
        result = CliRunner().invoke(cli, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert "--redis-url" in result.output or name in ("simulate", "estimate", "quota", "demo")


def test_the_help_is_quick_because_nothing_heavy_is_imported() -> None:
    """`batchllm --help` loads neither celery nor redis nor pydantic nor a provider's SDK."""
    code = (
        "import sys; from batchllm_celery.cli import _run; _run(['--help']);"
        "heavy = {'celery', 'redis', 'pydantic', 'google.genai', 'rich'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_options_of_all_commands_share_their_environment_variables() -> None:
    """--rpm is BATCHLLM_RPM for run, submit, estimate, simulate and quota set alike."""
    for name in ("run", "submit", "estimate", "simulate", "quota set"):
        command: Any = cli
        for part in name.split():
            command = command.get_command(None, part)
        (rpm,) = (option for option in command.params if option.name == "rpm")
        assert rpm.envvar == "BATCHLLM_RPM"


def test_every_option_of_run_has_an_environment_variable() -> None:
    """BATCHLLM_ and the option's name."""
    run: Any = cli.get_command(None, "run")  # type: ignore[arg-type]  # our group needs no context
    for option in run.params:
        if option.param_type_name == "option" and option.name != "help":
            assert option.envvar, option.name


def test_the_estimate_counts_items_tokens_cost_and_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the rows, the bundled prices and the quota; nobody is called."""
    Path("many.txt").write_text("x" * 300 + "\n" + ("y" * 300 + "\n") * 99)
    arguments = ("many.txt", "--model", "gemini:gemini-2.5-flash", "--rpm", "10", "--json")
    code, out, _ = call(capsys, "estimate", *arguments, "--output-tokens", "50")
    found = json.loads(out)
    assert code == 0
    assert found["size"]["items"] == 100
    assert found["size"]["input_tokens"] == 10_000
    assert found["size"]["output_tokens"] == 5_000
    assert found["cost"] == pytest.approx(0.0155)  # 0.30 and 2.50 dollars per million
    assert found["seconds"] == pytest.approx(602)
    assert found["bound_by"] == "requests per minute"


def test_the_duration_is_that_of_the_narrowest_limit() -> None:
    """Requests a day count in days, slots in rounds, a single call in its own time."""
    size = estimate.Size(items=1000, input_tokens=100_000, output_tokens=50_000)
    for limits, expected in (
        (QuotaLimits(), 10.0),
        (QuotaLimits(max_concurrency=10), 200.0),
        (QuotaLimits(tokens_per_minute=15_000), 602.0),
        (QuotaLimits(requests_per_day=400), 2 * 86_400.0),
    ):
        assert estimate.duration_of(size, limits, 200, 2.0)[0] == expected


def test_the_resume_command_is_what_was_typed_with_the_batch_id() -> None:
    """Quotes survive; an id given before is replaced; --overwrite is not repeated."""
    typed = ["run", "my rows.jsonl", "--prompt", "Say {x}", "--batch-id", "old", "--overwrite"]
    command = resume_command("b1", typed)
    assert command == "batchllm run 'my rows.jsonl' --prompt 'Say {x}' --batch-id b1"
    assert resume_command("b1", ["run", "x", "--batch-id=old"]) == "batchllm run x --batch-id b1"


@pytest.mark.parametrize("source", ["dry-goods.jsonl", "dry-dry-.x.csv", "..dry-", "-x", "é.txt"])
def test_an_id_made_of_a_file_s_name_can_be_given_again(source: str) -> None:
    """By the line that resumes: an id of a real batch is never one of a dry run."""
    request = CommandRequest(model="simulated")
    strategy = strategy_of(request)
    made = spec_of(request, strategy, source=source, queue=None, keep_results=False).batch_id
    again = dataclasses.replace(request, batch_id=made)
    spec = spec_of(again, strategy, source=source, queue=None, keep_results=False)
    assert spec.batch_id == made


def test_the_default_output_stands_beside_the_input() -> None:
    """INPUT.results.jsonl."""
    assert default_out("a/rows.jsonl") == "a/rows.jsonl.results.jsonl"
    assert default_out("-") == "stdin.results.jsonl"


def test_options_become_models() -> None:
    """Model, limits, bounds and ids as they were asked for."""
    request = CommandRequest(
        model="gemini:gemini-2.5-flash", system="Be kind", temperature=0.0, rpm=600.0,
        max_attempts=5, attempt_timeout=7.0, fail_fast="billing, authentication",
        after_429="slow-start", max_cost=2.0,
    )  # fmt: skip
    strategy = strategy_of(request)
    assert strategy.params == {"model": "gemini-2.5-flash", "system": "Be kind", "temperature": 0.0}
    spec = spec_of(request, strategy, source="my rows.jsonl", queue=None, keep_results=False)
    assert spec.queue == f"run.{spec.batch_id}"
    assert spec.batch_id.startswith("my-rows-")
    assert spec.model == "gemini:gemini-2.5-flash"
    assert (spec.config.retry.max_attempts, spec.config.timeout_per_item) == (5, 7.0)
    assert spec.fail_fast == (FailureKind.BILLING, FailureKind.AUTHENTICATION)
    quota = quota_of(request, "gemini:gemini-2.5-flash")
    assert quota is not None
    assert quota.limits.given() == {"requests_per_minute": 600.0}
    assert quota.policy.kind == "slow_start"


@pytest.mark.parametrize(
    "path",
    [name for name in _COMMANDS if name not in ("quota", "simulate")] + ["quota show", "quota set"],
)
def test_every_option_is_a_parameter_of_its_command_or_a_field_of_the_request(path: str) -> None:
    """An option that neither knows would fail each call of the command."""
    command: Any = cli
    for part in path.split():
        command = command.get_command(None, part)
    own = set(inspect.signature(command.callback).parameters)
    known = {field.name for field in dataclasses.fields(CommandRequest)}
    assert {option.name for option in command.params} - own <= known


@pytest.mark.parametrize(
    "option", ["rpm", "tpm", "input-tpm", "output-tpm", "rpd", "max-concurrency"]
)
def test_unlimited_can_be_said_of_every_limit(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an option and in the environment; what is no number and not that word is refused."""
    seen: list[Any] = []

    @click.command()
    @options.limits
    def command(**shared: Any) -> None:
        seen.append(limits_of(CommandRequest(**shared)).given())

    assert CliRunner().invoke(command, [f"--{option}", "unlimited"]).exit_code == 0
    variable = "BATCHLLM_" + option.replace("-", "_").upper()
    assert CliRunner().invoke(command, env={variable: "Unlimited"}).exit_code == 0
    assert CliRunner().invoke(command, [f"--{option}", "7"]).exit_code == 0
    assert [list(one.values()) for one in seen] == [[math.inf], [math.inf], [7]]
    for wrong in ("0", "none", "-1"):
        assert CliRunner().invoke(command, [f"--{option}", wrong]).exit_code == 2


def test_limits_are_shown_in_words() -> None:
    """What is limited, else what was said, else that nothing was."""
    assert (
        limits_words(QuotaLimits(requests_per_minute=600, tokens_per_minute=math.inf)) == "600 rpm"
    )
    assert limits_words(QuotaLimits.unlimited()) == "unlimited"
    assert limits_words(QuotaLimits()) == "no quota"


def test_no_limit_given_leaves_the_quota_as_it_is() -> None:
    """A run without --rpm and the like configures nothing."""
    assert quota_of(CommandRequest(), "q") is None


def test_a_key_is_asked_for_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the simulated provider, not for an OpenAI-compatible server of one's own."""
    gemini = strategy_of(CommandRequest(model="gemini:x"))
    with pytest.raises(UsageError, match="aistudio"):
        check_key(gemini, Settings())
    monkeypatch.setenv("GOOGLE_API_KEY", "secret")
    check_key(gemini, Settings())
    own = Settings(openai_base_url="http://localhost:8000/v1")
    check_key(strategy_of(CommandRequest(model="openai:x")), own)


def test_workers_get_settings_through_the_environment() -> None:
    """Unset ones are removed: without a Redis URL a worker attaches to the embedded server."""
    settings = Settings(queue="run.b", slots=7)
    environment = environment_of(settings)
    assert environment["BATCHLLM_QUEUE"] == "run.b"
    assert environment["BATCHLLM_SLOTS"] == "7"
    assert "BATCHLLM_REDIS_URL" not in environment


def test_the_doctor_knows_settings_of_redis_that_lose_batches() -> None:
    """An old server, eviction, no persistence, a full memory and a replica are named."""
    good = {"redis_version": "7.2.4", "maxmemory_policy": "noeviction", "aof_enabled": 1}
    assert {finding.verdict for finding in check_server(good)} == {"ok"}
    bad = {"redis_version": "6.0.9", "maxmemory_policy": "allkeys-lru", "role": "slave"}
    full = {"maxmemory": 10, "used_memory": 9}
    assert [finding.verdict for finding in check_server(bad | full)] == ["bad"] * 5
