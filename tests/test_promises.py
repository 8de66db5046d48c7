"""The plugin that holds the table of promises to the tests."""

import ast
from pathlib import Path

import pytest

from tests.promises import HEADING, MEASURED, UNMEASURED, read_rows

ROOT = Path(__file__).parents[1]

TESTS = """
import pytest

def test_plain():
    pass

@pytest.mark.parametrize("value", [1, pytest.param(2, marks=pytest.mark.skip)])
def test_with_parameters(value):
    pass

@pytest.mark.skip
def test_skipped():
    pass

@pytest.mark.xfail
def test_expected_to_fail():
    assert False

@pytest.mark.gpu
def test_on_a_gpu():
    pass

@pytest.mark.slow
def test_slow():
    pass

@pytest.fixture
def broken():
    raise ArithmeticError

def test_whose_fixture_fails(broken):
    pass

def test_that_fails():
    assert False
"""


def link(name):
    return f"[{name}](../tests/test_it.py)"


@pytest.fixture
def session(pytester, monkeypatch):
    """Runs the tests above against a table of these rows (links and the word about CUDA) and returns the result."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\nmarkers =\n    slow\n    gpu\n")
    pytester.mkdir("tests").joinpath("test_it.py").write_text(TESTS)
    pytester.mkdir("docs")

    def run(*rows, arguments=("--promises",), select="not fixture_fails and not that_fails"):
        table = [f"| {i} | it holds | {tests} | {cuda} |" for i, (tests, cuda) in enumerate(rows, 1)]
        text = [HEADING, "", "| # | promise | tests | CUDA |", "| --- | --- | --- | --- |", *table]
        Path("docs/promises.md").write_text(
            "\n".join([*text, "", "## Another section", "", "| 9 | other | table | |", ""])
        )
        marked = ("-m", "not slow and not gpu", "-k", select)
        return pytester.runpytest_inprocess("-p", "tests.promises", *marked, *arguments)

    return run


def test_a_session_in_which_every_linked_test_ran_passes(session):
    result = session(
        (link("test_plain"), ""),
        (f"{link('test_with_parameters')}, {link('test_slow')}", ""),
        (f"{link('test_plain')} {link('test_on_a_gpu')}", UNMEASURED),
        (f"{link('test_plain')} {link('test_on_a_gpu')}", "measured 2026-11-28, H100"),
    )
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*promise*")


@pytest.mark.parametrize(
    ("tests", "cuda", "complaint"),
    [
        (["test_no_more"], "", "test_no_more does not exist, or its file was not collected"),
        (["test_skipped"], "", "test_skipped was not run, or every run of it was skipped"),
        (["test_expected_to_fail"], "", "test_expected_to_fail was not run, or every run of it was skipped"),
        (["test_on_a_gpu"], "", "test_on_a_gpu needs a GPU, and the row says neither when it was measured nor *"),
        (["test_plain", "test_on_a_gpu"], "measured", "test_on_a_gpu needs a GPU, and the row says neither *"),
        (["test_slow"], "", "test_slow is slow, and the row links no other test that ran"),
        (["test_slow"], UNMEASURED, "test_slow is slow, and the row links no other test that ran"),
        (["test_slow", "test_on_a_gpu"], UNMEASURED, "test_slow is slow, and the row links no other test that ran"),
    ],
    ids=["missing", "skipped", "xfail", "gpu", "gpu too", "slow", "slow and not measured", "slow and gpu"],
)
def test_a_linked_test_that_did_not_run_fails_the_session(session, tests, cuda, complaint):
    result = session((link("test_plain"), ""), (", ".join(map(link, tests)), cuda))
    assert result.ret == 1
    result.assert_outcomes(passed=2, skipped=2, xfailed=1, deselected=4)
    lines = ["*promises without a test that ran*", f"promise 2: tests/test_it.py::{complaint}"]
    result.stdout.fnmatch_lines(lines)


def test_a_link_into_another_file_or_none_fails_the_session(session):
    result = session(("[test_plain](../tests/test_other.py)", ""), ("the [design](docs/design.md)", ""))
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["promise 1: tests/test_other.py::test_plain does not exist*", "promise 2 links no test"]
    )


def test_a_test_that_is_deselected_did_not_run(session):
    result = session((link("test_plain"), ""), select="parameters")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["promise 1: tests/test_it.py::test_plain was not run*"])


def test_what_the_workers_of_a_parallel_session_ran_counts(session):
    rows = ((link("test_plain"), ""), (f"{link('test_plain')} {link('test_on_a_gpu')}", UNMEASURED))
    parallel = ("--promises", "-p", "xdist", "-n", "2")
    assert session(*rows, arguments=parallel).ret == 0
    result = session(*rows, (link("test_skipped"), ""), (link("test_slow"), ""), arguments=parallel)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["promise 3: tests/test_it.py::test_skipped was not run*", "promise 4: tests/test_it.py::test_slow is slow*"]
    )


def test_a_session_that_runs_nothing_fails(session):
    result = session((link("test_plain"), ""), select="nothing")
    assert result.ret == 1


def test_a_test_whose_fixture_fails_did_not_run(session):
    result = session((link("test_whose_fixture_fails"), ""), select="fixture_fails")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["promise 1: tests/test_it.py::test_whose_fixture_fails was not run*"])


def test_a_test_that_fails_has_run(session):
    result = session((link("test_that_fails"), ""), select="that_fails")
    assert result.ret == 1
    result.stdout.no_fnmatch_line("*promise*")


def test_without_the_option_nothing_changes(session):
    result = session((link("test_no_more"), ""), arguments=())
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*promise*")


def test_a_page_without_the_table_fails_the_session(session):
    result = session()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["the rows of the table are not numbered 1, 2, 3 ...: []"])


def test_a_missing_section_is_an_error():
    with pytest.raises(ValueError, match="no section '# What is promised"):
        read_rows("# revnet\n")


def test_the_rows_of_the_table_link_tests_which_exist():
    rows = read_rows((ROOT / "docs/promises.md").read_text("utf-8"))
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert f"[{len(rows)} promises](docs/promises.md)" in (ROOT / "README.md").read_text("utf-8")
    for row in rows:
        assert row.tests
        assert row.cuda in ("", UNMEASURED) or MEASURED.fullmatch(row.cuda)
        for path, name in (test.split("::") for test in row.tests):
            body = ast.parse((ROOT / path).read_text("utf-8")).body
            assert name in {node.name for node in body if isinstance(node, ast.FunctionDef)}, f"{path} has no {name}"
