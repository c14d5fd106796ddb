# SPDX-License-Identifier: Apache-2.0
"""The runbook of a GPU fits its time, resumes, and notices stages that did nothing."""

import json
import subprocess
import sys
import tarfile
from fnmatch import fnmatchcase

from benchmarks import gpu_runbook
from benchmarks.contenders.catalogue import catalogue
from benchmarks.contenders.together import WAYS

#: What the machines with a GPU do not have.
ABSENT = ("fastapi", "moocore", "openai", "prometheus_client", "ray", "resvg_py", "uvicorn")


def python(name, code, *, limit_s=60, wheels=(), **needs):
    return gpu_runbook.Stage(name, [sys.executable, "-c", code], limit_s, wheels, **needs)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_runbook_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "out"
    once = python("once", f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); print('figures')")
    waits = python(
        "waits", f"import os, sys; sys.exit(not os.path.exists({str(tmp_path / 'go')!r}))"
    )
    lacking = python("lacking", "", wheels=["no_such_wheel"], tools=["no-such-tool"])
    assert not gpu_runbook.run_all([once, waits, lacking], out)
    assert "lacking: missing: no_such_wheel, no-such-tool" in capsys.readouterr().out
    (tmp_path / "go").touch()
    assert gpu_runbook.run_all([once, waits], out)
    assert (tmp_path / "ran").read_text() == "x"
    assert (out / "once.txt").read_text() == "figures\n"
    seen = [(record["stage"], record["status"]) for record in lines(out / "stages.jsonl")]
    assert seen == [
        ("once", "passed"), ("waits", "failed"), ("lacking", "missing"), ("waits", "passed"),
    ]  # fmt: skip


def test_a_stage_that_takes_too_long_is_cut_off(tmp_path):
    slow = python("slow", "import time; time.sleep(60)", limit_s=0.2)
    assert not gpu_runbook.run_all([slow], tmp_path)
    assert json.loads((tmp_path / "stages.jsonl").read_text())["status"] == "cut off"


def test_no_stage_begins_that_might_exceed_the_budget(tmp_path, capsys):
    first, second = python("first", ""), python("second", "", limit_s=1000)
    assert not gpu_runbook.run_all([first, second], tmp_path, 900)
    assert "second: not begun" in (said := capsys.readouterr().out)
    assert "first: up to 60 of 900 s" in said
    assert [record["stage"] for record in lines(tmp_path / "stages.jsonl")] == ["first"]


def test_a_stage_of_tests_that_runs_none_has_failed(tmp_path):
    for printed, status in (("3 skipped in 1 s", "failed"), ("2 passed, 1 skipped", "passed")):
        stage = python(status, f"print({printed!r})", tests=True)
        assert gpu_runbook.run(stage, tmp_path)["status"] == status


def test_what_was_done_is_delivered_in_few_files(tmp_path):
    state, out = tmp_path / "state", tmp_path / "out"
    state.mkdir()
    for name in ("stages", *(f"figures{n}" for n in range(9))):
        (state / f"{name}.jsonl").write_text(name)
    (state / "doctor.txt").write_text("fine")
    gpu_runbook.deliver(state, out)
    files = {path.name for path in out.iterdir()}
    assert len(files) == gpu_runbook.MOST_FILES and "stages.jsonl" in files
    with tarfile.open(out / "rest.tar.gz") as archive:
        assert {"doctor.txt", "figures8.jsonl"} <= {*archive.getnames()}
        assert not {*archive.getnames()} & files


def test_all_stages_fit_the_time_of_a_machine(tmp_path):
    limits = {stage.name: stage.limit_s for stage in gpu_runbook.stages(tmp_path)}
    assert sum(limits.values()) <= gpu_runbook.BUDGET_S <= 25 * 60
    assert max(limits.values()) <= 4 * 60
    first = ["machine", "build", "doctor", "tests", "fused_step", "latency", "curve", "profile"]
    assert list(limits)[: len(first)] == first
    assert list(limits)[-1] == "compiled"


def test_stages_name_files_and_contenders_that_exist(tmp_path):
    names = [*WAYS, *(entry.name for entry in catalogue([1, 2, 3, 4], "auto", "cuda"))]
    for stage in gpu_runbook.stages(tmp_path):
        for part in stage.command:
            if part.endswith(".py"):
                assert (gpu_runbook.ROOT / part).exists(), part
        if "--contenders" in stage.command:
            patterns = stage.command[stage.command.index("--contenders") + 1].split(",")
            for pattern in patterns:
                assert any(fnmatchcase(name, pattern) for name in names), pattern


def test_the_build_fails_where_nvcc_does(tmp_path):
    (build,) = (stage for stage in gpu_runbook.stages(tmp_path) if stage.name == "build")
    assert build.environment == {"MSDDA_BUILD_CUDA": "1"}


def test_every_file_with_tests_for_a_gpu_is_named():
    marked = {
        str(path.relative_to(gpu_runbook.ROOT))
        for path in (gpu_runbook.ROOT / "tests").rglob("test_*.py")
        if ".".join(("pytest", "mark", "gpu")) in path.read_text()
    }
    assert marked == {*gpu_runbook.GPU_TESTS}


def test_the_tests_for_a_gpu_are_collected_without_what_is_not_there(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nfor name in {ABSENT}:\n    sys.modules[name] = None\n"  # importing it raises
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *gpu_runbook.GPU_TESTS],
        env=gpu_runbook.os.environ | {"PYTHONPATH": f"{tmp_path}:{gpu_runbook.ROOT}"},
        cwd=gpu_runbook.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_a_linear_step_has_the_bits_of_eager" in done.stdout


def test_the_sanitizer_skips_the_test_that_provokes_an_error():
    text = (gpu_runbook.ROOT / "tests/kernels/test_on_gpu.py").read_text()
    assert "def test_a_launch_that_fails_names_the_cuda_error" in text and "huge" in text
