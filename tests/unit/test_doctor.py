"""What the doctor makes of what it finds; the checks themselves run for real in tests/integration/test_commands.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.commands.doctor import collect, render
from cluster.commands.doctor_checks import file_system_of, folder_check, local_checks, network_check, ray_check
from cluster.commands.doctor_group import compare, shared_folder, skew, speed
from cluster.commands.doctor_node import look
from cluster.commands.doctor_software import (
    OK,
    PROBLEM,
    WARNING,
    Check,
    devices_check,
    imports_checks,
    packages_check,
    read_constraints,
)


def report(node: int, **facts: str) -> dict:
    return {"node": node, "host": f"h{node}", "rank": node, "facts": {"torch": "2.13.0", "python": "3.11.7", **facts}}


def results(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.result for check in checks}


def test_versions_that_differ_between_nodes_are_a_problem_with_their_nodes_named():
    assert results(compare({0: report(0), 1: report(1)}, 2)) == {"same versions": OK}
    [check] = compare({0: report(0), 1: report(1, torch="2.12.0"), 2: report(2)}, 3)
    assert check.result == PROBLEM and check.value == "2.13.0 on node 0, node 2; 2.12.0 on node 1"
    [check] = compare({0: report(0, devices="A"), 1: report(1, devices="B")}, 2)
    assert check.result == WARNING


@pytest.mark.parametrize(("ahead", "result"), [({1: 0.01, 2: -0.02}, OK), ({1: 3.0}, WARNING), ({1: 20.0, 2: -20.0}, PROBLEM)])
def test_clocks(ahead: dict[int, float], result: str):
    assert skew(ahead)[0].result == result


def test_a_folder_that_is_not_shared_locks_that_do_not_exclude_and_times_that_are_off(tmp_path: Path):
    (tmp_path / "reply").write_text("cba")
    seen = {"seen": 0.01, "excluded": True, "reply": "reply", "mtime": 5.0, "written": 5.0, "expected": "cba"}
    place = tmp_path.joinpath
    assert set(results(shared_folder({1: seen}, place)).values()) == {OK}
    assert results(shared_folder({1: seen, 2: {"seen": None}}, place)) == {"shared folder": PROBLEM}
    assert results(shared_folder({1: {**seen, "reply": "elsewhere"}}, place)) == {"shared folder": PROBLEM}
    assert results(shared_folder({1: {**seen, "excluded": False}}, place))["file locks"] == WARNING
    assert results(shared_folder({1: {**seen, "mtime": 99.0}}, place))["file times"] == WARNING
    assert results(shared_folder({1: {**seen, "seen": 8.0}}, place))["shared folder"] == WARNING


def test_look_sees_a_file_and_whether_its_lock_excludes(tmp_path: Path):
    path = tmp_path / "f"
    path.write_text("abc")
    assert look(path, "abc")["excluded"] is False  # nobody holds it


def test_the_speed_of_an_all_reduce():
    measured = {"backend": "gloo", "bytes": 10**9, "seconds": 1.0, "latency": 1e-4, "world": 2, "joined": 1.0}
    assert "(1.00 GB/s)" in speed(measured)[0].value and speed(measured)[0].result == OK
    assert speed({**measured, "seconds": 100.0})[0].result == WARNING
    assert speed({"error": "timed out"})[0].result == PROBLEM


def test_constraints_for_this_python(tmp_path: Path):
    path = tmp_path / "constraints.txt"
    path.write_text('# x\nav==18.1.0; python_version >= "3.11"\nav==17.1.0; python_version < "3.11"\nnumpy==2.0\n')
    assert read_constraints(path, (3, 10)) == {"av": "17.1.0", "numpy": "2.0"}
    assert read_constraints(path, (3, 12)) == {"av": "18.1.0", "numpy": "2.0"}
    path.write_text("numpy==0.0.1\n")
    check = packages_check(path)
    assert check.result == WARNING and "numpy" in check.value
    assert packages_check(tmp_path / "none").result == OK


def test_packages_and_devices():
    good = {"version": "1", "seconds": 1.0}
    found = {"torch": good, "deepspeed": good, "xformers": {"error": "ModuleNotFoundError: x", "absent": True}}
    assert set(results(imports_checks(found, False)).values()) == {OK}
    assert results(imports_checks(found, True))["xformers"] == WARNING
    assert (
        results(imports_checks({**found, "deepspeed": {"error": "OSError: y", "absent": False}}, False))["deepspeed"] == PROBLEM
    )
    assert imports_checks({"error": "crashed"}, False)[0].result == PROBLEM
    assert devices_check([], {}).result == OK
    assert devices_check(["H100"], {"cuda": {"built": None, "available": False}}).result == PROBLEM
    assert devices_check(["H100"], {"cuda": {"built": "13", "available": True}}).result == OK


def test_the_folder_check_leaves_nothing(tmp_path: Path):
    checks = folder_check(tmp_path / "a" / "runs")
    assert all(check.result in (OK, WARNING) for check in checks) and {check.name for check in checks} >= {
        "run folder",
        "disk space",
    }
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert folder_check(tmp_path / "file" / "runs")[0].result == PROBLEM


def test_file_system_of_the_deepest_mount(tmp_path: Path):
    mounts = tmp_path / "mounts"
    mounts.write_text("a / ext4 rw 0 0\nb /data lustre rw 0 0\nc /data2 nfs rw 0 0\n")
    assert [file_system_of(Path(name), mounts) for name in ("/data/x", "/data2/x", "/etc")] == ["lustre", "nfs", "ext4"]


def test_a_crash_in_a_package_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checks, facts = local_checks(tmp_path / "runs")
    assert results(checks)["imports"] == PROBLEM and facts["python"].startswith(f"{sys.version_info[0]}.")


def test_nothing_listens_there():
    assert ray_check("127.0.0.1:1", wanted=True).result == PROBLEM
    assert network_check().result in (OK, WARNING)


def test_what_is_equal_on_all_nodes_is_said_once():
    def said(node: int, *checks: Check) -> dict:
        return {"node": node, "host": f"h{node}", "checks": [check.as_dict() for check in checks]}

    content = {
        "reports": [
            said(0, Check("a", OK, "1"), Check("b", OK, "5")),
            said(1, Check("a", OK, "1"), Check("b", PROBLEM, "7", "mend")),
        ]
    }
    checks = collect(content)
    assert [(check.name, check.result, check.value) for check in checks] == [
        ("a", OK, "1; the same on 2 nodes"), ("b", OK, "5 on node 0 (h0)"), ("b", PROBLEM, "node 1 (h1): 7")]  # fmt: skip
    lines = render(checks, "2 nodes", 40, 3.0)
    assert (
        all(len(line) <= 40 for line in lines[:-1])
        and "-> mend" in "\n".join(lines)
        and lines[-1].startswith("1 problem, 0 warn")
    )
