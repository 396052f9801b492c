"""The tutorial of docs/tutorial.md, block by block, in an environment that has the core's wheel alone."""

import ast
import re

import pytest
from fresh_environment import ROOT, FreshEnvironment

TUTORIAL = (ROOT / "docs/tutorial.md").read_text()


def blocks():
    """Language, what stands behind it, and content of each block."""
    return re.findall(r"```(\w+)( ?\w*)\n(.*?)```", TUTORIAL, re.DOTALL)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    made = FreshEnvironment(tmp_path_factory.mktemp("tutorial"))
    made.install(ROOT / "packages/emloc")
    return made


@pytest.mark.long
def test_every_block_runs_as_it_stands(environment, tmp_path):
    said, before = [], None
    for language, how, body in blocks():
        first, _, rest = body.partition("\n")
        if language == "bash":
            run = environment.run("bash", "-ec", body, where=tmp_path, check=how != " fails")
            said.append(run.stdout)
            if how == " fails":
                assert run.returncode == 1, run.stdout
                before[0].write_text(before[1])
        elif language == "text":
            assert body.strip() in said[-1]
        elif first == "# run":
            said.append(environment.run("python", "-c", rest, where=tmp_path).stdout)
        else:
            append, name, function = re.fullmatch(
                r"# (append to )?(\S+?)(?:: (\w+))?", first
            ).groups()
            file = tmp_path / name
            before = file, file.read_text()
            if append:
                file.write_text(before[1] + rest)
            elif function:
                old = re.search(rf"def {function}\(.*?\n\n\n", before[1], re.DOTALL)[0]
                file.write_text(before[1].replace(old, f"{rest}\n\n"))
                assert rest in file.read_text()
            else:
                file.write_text(rest)
    assert any("tagger" in out for out in said)
    passed = [out for out in said if " passed" in out]
    assert passed
    assert "skipped" not in passed[0]
    assert ast.literal_eval(said[-1].splitlines()[-1])["loss"] > 0


def test_its_family_imports_what_is_promised():
    for language, _, body in blocks():
        if language == "python" and not body.startswith("# run"):
            imported = re.findall(r"^(?:from|import) (emloc[.\w]*)", body, re.MULTILINE)
            assert set(imported) <= {"emloc.plugin"}, body


def test_every_page_that_is_named_is_there():
    for page in [
        ROOT / "docs/tutorial.md",
        ROOT / "docs/plugins.md",
        *(ROOT / "docs/ideas").glob("*.md"),
    ]:
        for link in re.findall(r"\]\(([\w/.]+\.md)\)", page.read_text()):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"
