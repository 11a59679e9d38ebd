"""A rule is added as CONTRIBUTING.md says: the core is built with the one of tests/rule, and everything follows.

The rule has three states, one of which does not always take part. Its tests are those of every rule, test_rules.py.
Needs CMake, Ninja, pybind11 and a compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sgdcore
from support import WHOLE
from test_build_flags import has_tools

ROOT = Path(__file__).parent.parent
RULE = ROOT / "tests" / "rule"


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def insert(path: Path, anchor: str, line: str) -> None:
    """Add a line behind the one that the anchor matches."""
    text, count = re.subn(rf"(?m)^({anchor}.*)$", rf"\1\n{line}", path.read_text(), count=1)
    assert count == 1, (path, anchor)
    path.write_text(text)


def add_rule(source: Path) -> None:
    """Follow the four lines of CONTRIBUTING.md, "A rule"."""
    # 1. Its header and its name in the list of rules.
    shutil.copy(RULE / "aggmo.hpp", source / "csrc" / "rules")
    rules = source / "csrc" / "rules" / "all.hpp"
    insert(rules, '#include "sgd.hpp"', '#include "aggmo.hpp"')
    rules.write_text(rules.read_text().replace("RuleList<Sgd, ", "RuleList<Sgd, AggMo, "))
    package = source / "python" / "sgdcore"
    # 2. Its class for arrays.
    shutil.copy(RULE / "aggmo.py", package)
    insert(package / "__init__.py", "from sgdcore.sgd import", "from sgdcore.aggmo import AggMo")
    # 3. Its class for tensors.
    shutil.copy(RULE / "torch_aggmo.py", package / "torch" / "aggmo.py")
    insert(
        package / "torch" / "__init__.py",
        r"from sgdcore\.torch\.sgd import",
        "from sgdcore.torch.aggmo import AggMo",
    )
    # 4. Its oracle.
    with (package / "reference.py").open("a") as file:
        file.write("\n\n" + (RULE / "oracle.py").read_text().partition('"""\n\n')[2])


@pytest.mark.skipif(not WHOLE, reason="builds for a minute: SGDCORE_WHOLE=1, as .ci/nightly does")
@pytest.mark.skipif(not has_tools(), reason="needs cmake 3.26, ninja and g++")
def test_the_core_takes_a_rule_of_four_lines(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    source = tmp_path / "source"
    parts = ("CMakeLists.txt", "cmake", "csrc", "python")
    for part in parts:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (source / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, source / part)
    add_rule(source)
    build, package = tmp_path / "build", tmp_path / "site" / "sgdcore"
    shutil.copytree(source / "python" / "sgdcore", package)
    run(
        *("cmake", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug"),
        *("-DSGDCORE_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"),
        *(f"-DSKBUILD_PROJECT_VERSION={sgdcore.__version__}", "-DCMAKE_CXX_FLAGS_DEBUG=-O0"),
        f"-Dpybind11_DIR={run(sys.executable, '-m', 'pybind11', '--cmakedir').strip()}",
    )
    run("cmake", "--build", build, "--target", "_core")
    for module in build.glob("_core*.so"):
        shutil.copy(module, package)
    script = f"""
import sys
import pytest
OURS = ["sgdcore", "sgdcore flat", "sgdcore.torch"]
# An editable installation finds its own copy of the package before any path.
sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in type(each).__module__]
sys.path[:0] = [{str(package.parent)!r}, {str(ROOT / "tests")!r}]
from sgdcore.bench import measure
from sgdcore.bench.cases import Case
short = measure.Extent(rounds=3, turn=0.0, budget=0.0)
measured = measure.run(Case("tiny", "aggmo", "float32", 1), OURS, short)
for contender, result in measured.results.items():
    print(contender, "is timed:", result.check == "equal" and len(result.seconds) == 3)
options = ["-q", "-p", "no:cacheprovider", "-k", "aggmo or classes"]
sys.exit(pytest.main([*options, {str(ROOT / "tests" / "test_rules.py")!r}]))
"""
    output = run(sys.executable, "-c", script, SGDCORE_TEST_SOURCES=str(source / "csrc"))
    assert "failed" not in output
    assert output.count("is timed: True") == 3
    assert int(re.findall(r"(\d+) passed", output)[-1]) > 100
