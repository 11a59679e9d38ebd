"""Flags that change what arithmetic gives: the build takes them back, or refuses them and says why.

Configures the core, and runs its own commands for compiling and linking on cmake/numerics_check.cpp, a program that
checks arithmetic. Needs CMake and Ninja, which the [dev] extra brings.

The flags are given together; with ``SGDCORE_WHOLE=1``, each by itself.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from support import WHOLE

ROOT = Path(__file__).parent.parent
CHECK = ROOT / "cmake" / "numerics_check.cpp"
CLANGS = [f"clang++-{version}" for version in range(25, 15, -1)] + ["clang++"]


def has_tools() -> bool:
    """Tell whether there is what the build needs; a distribution's CMake may be too old."""
    if not all(map(shutil.which, ("cmake", "ninja", "g++"))):
        return False
    text = subprocess.run(["cmake", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"version (\d+)\.(\d+)", text)
    return version is not None and tuple(map(int, version.groups())) >= (3, 26)


pytestmark = pytest.mark.skipif(not has_tools(), reason="needs cmake 3.26, ninja and g++")


def clang() -> str:
    found = next(filter(None, map(shutil.which, CLANGS)), None)
    if found is None:
        pytest.skip("no clang is installed")
    return found


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout + done.stderr


def configure(build: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Return the exit status and what was printed, as one line."""
    status, text = run(
        *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DSGDCORE_PYTHON=OFF", "-DSGDCORE_TESTS=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
        *options,
        **environment,
    )
    return status, " ".join(text.split())


def build_and_run_check(build: Path) -> None:
    """Compile the check as each kind of the core's files is, link it as the core's tests are, and run it."""
    entries = json.loads((build / "compile_commands.json").read_text())
    links = run("ninja", "-t", "commands", "sgdcore_tests", cwd=build)[1].splitlines()
    link = [part for part in shlex.split(links[-1]) if not re.search(r"\.(o|a)$|^(:|&&)$", part)]
    checked = set()
    for entry in entries:
        parts = shlex.split(entry["command"])
        source = Path(entry["file"]).relative_to(ROOT)
        kernels = next((part for part in parts if part.startswith("-march=")), "")
        if kernels in {"-march=x86-64-v3", "-march=x86-64-v4"} and not runs(
            kernels.removeprefix("-march=")
        ):
            continue
        kind = kernels or source.parts[0]
        if kind in checked:
            continue
        checked.add(kind)
        compiled, program = build / f"check{kind}.o", build / f"check{kind}"
        parts[parts.index("-c") + 1] = str(CHECK)
        parts[parts.index("-o") + 1] = str(compiled)
        status, text = run(*parts, f"-I{ROOT / 'csrc'}", cwd=build)
        assert status == 0, text
        command = list(link)
        command[command.index("-o") + 1] = str(program)
        # Where the objects stood: behind the options, before the libraries.
        command.insert(command.index("-o"), str(compiled))
        status, text = run(*command, cwd=build)
        assert status == 0, text
        assert b"set_fast_math" not in program.read_bytes(), (
            "linked with -ffast-math's start-up file"
        )
        status, text = run(program)
        assert status == 0, f"{kind}: {text}"
    assert {"csrc", "tests"} <= checked


def runs(level: str) -> bool:
    import sgdcore

    return level in sgdcore.build_info()["isa_available"]


# --- Taken back -----------------------------------------------------------------------------------

BOTH = [
    "-ffast-math",
    "-Ofast",
    "-funsafe-math-optimizations",
    "-ffinite-math-only",
    "-fassociative-math -fno-signed-zeros -fno-trapping-math",
    "-freciprocal-math",
    "-frounding-math",
    "-ffp-contract=fast -mfma",
]
GCC = [*BOTH, "-fsingle-precision-constant", "-mfpmath=387"]
CLANG = [*BOTH, "-ffp-model=fast", "-fdenormal-fp-math=positive-zero", "-fapprox-func"]
AT_THE_LINK = "-flto -ffast-math"


def builds(flags: list[str]) -> list[str]:
    """Return the flags of each build."""
    return [*flags, AT_THE_LINK] if WHOLE else [" ".join(flags), AT_THE_LINK]


@pytest.mark.parametrize("flags", builds(GCC))
def test_gcc(tmp_path: Path, flags: str) -> None:
    status, text = configure(
        tmp_path, "-DCMAKE_CXX_COMPILER=g++", CXXFLAGS=flags, CFLAGS=flags, LDFLAGS=flags
    )
    assert status == 0, text
    build_and_run_check(tmp_path)


@pytest.mark.parametrize("flags", builds(CLANG))
def test_clang(tmp_path: Path, flags: str) -> None:
    status, text = configure(
        tmp_path, f"-DCMAKE_CXX_COMPILER={clang()}", CXXFLAGS=flags, CFLAGS=flags, LDFLAGS=flags
    )
    assert status == 0, text
    build_and_run_check(tmp_path)


@pytest.mark.parametrize(
    "place",
    ["CMAKE_CXX_FLAGS", "CMAKE_CXX_FLAGS_RELEASE", "toolchain file", "compiler", "linker only"],
)
def test_where_the_flags_come_from(tmp_path: Path, place: str) -> None:
    flags = "-Ofast -ffast-math"
    environment = {}
    if place == "toolchain file":
        file = tmp_path / "toolchain.cmake"
        file.write_text(f'set(CMAKE_CXX_FLAGS_INIT "{flags}")\nadd_compile_options(-ffast-math)\n')
        options = [f"-DCMAKE_TOOLCHAIN_FILE={file}"]
    elif place == "compiler":
        options, environment = [], {"CXX": f"g++ {flags}"}
    elif place == "linker only":
        options = [f"-DCMAKE_{kind}_LINKER_FLAGS={flags}" for kind in ("EXE", "MODULE")]
    else:
        options = [f"-D{place}={flags}"]
    status, text = configure(tmp_path / "build", *options, **environment)
    assert status == 0, text
    build_and_run_check(tmp_path / "build")


# --- Refused --------------------------------------------------------------------------------------


def wrapper(folder: Path, behind: str) -> Path:
    """Write a compiler that appends flags to whatever it is told."""
    file = folder / "wrapped-g++"
    file.write_text(f'#!/bin/sh\nexec g++ "$@" {behind}\n')
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("-ffast-math", "-ffast-math lets the compiler change the values"),
        ("-fno-signed-zeros", "-ffast-math lets the compiler change the values"),
        ("-ffp-contract=fast -mfma", "a product and a sum are contracted"),
        ("-mfpmath=387", "must be computed in their own precision"),
    ],
)
def test_a_compiler_that_adds_flags_at_the_end(tmp_path: Path, flags: str, reason: str) -> None:
    status, text = configure(tmp_path / "build", f"-DCMAKE_CXX_COMPILER={wrapper(tmp_path, flags)}")
    assert status != 0
    assert reason in text
    assert "Leave out the flags that do so" in text
    assert "wrapped-g++" in text


def test_a_linked_start_up_file(tmp_path: Path) -> None:
    crtfastmath = run("g++", "-print-file-name=crtfastmath.o")[1].strip()
    if not Path(crtfastmath).exists():
        pytest.skip("this compiler has no crtfastmath.o")
    status, text = configure(tmp_path, LDFLAGS=crtfastmath)
    assert status != 0
    assert "the process starts in another floating-point mode" in text
    assert "subnormal numbers are flushed to zero" in text
    assert crtfastmath in text.replace(" ", "") or "crtfastmath" in text


@pytest.mark.parametrize(
    ("variable", "flags"),
    [
        ("CUDAFLAGS", "-Xcompiler -ffast-math"),
        ("NVCC_APPEND_FLAGS", "--use_fast_math"),
        ("NVCC_APPEND_FLAGS", "-ftz=true"),
        ("NVCC_APPEND_FLAGS", "-prec-div=false"),
    ][: 4 if WHOLE else 2],
)
def test_cuda(tmp_path: Path, variable: str, flags: str) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no CUDA compiler")
    pybind11 = pytest.importorskip("pybind11")
    status, text = configure(
        tmp_path,
        *("-DSGDCORE_PYTHON=ON", "-DSGDCORE_TESTS=OFF", "-DSKBUILD_PROJECT_VERSION=0"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        **{variable: flags},
    )
    assert status != 0
    assert "changes the values that arithmetic gives" in text
    assert variable in text


# --- Compilers ------------------------------------------------------------------------------------


def old(folder: Path, compiler: str, macro: str, version: int) -> Path:
    """Write a compiler that says that it is an old one."""
    file = folder / "old-compiler"
    file.write_text(f'#!/bin/sh\nexec {compiler} -w -U{macro} -D{macro}={version} "$@"\n')
    file.chmod(0o755)
    return file


def test_gcc_before_11_is_refused_by_name(tmp_path: Path) -> None:
    compiler = old(tmp_path, "g++", "__GNUC__", 10)
    status, text = configure(tmp_path / "build", f"-DCMAKE_CXX_COMPILER={compiler}")
    assert status != 0
    assert re.search(
        r"GCC 11 or newer or clang 16 or newer is needed; \S*old-compiler is GNU 10\.", text
    )


def test_clang_before_16_is_refused_by_name(tmp_path: Path) -> None:
    compiler = old(tmp_path, clang(), "__clang_major__", 15)
    status, text = configure(tmp_path / "build", f"-DCMAKE_CXX_COMPILER={compiler}")
    assert status != 0
    assert re.search(
        r"GCC 11 or newer or clang 16 or newer is needed; \S*old-compiler is Clang 15\.", text
    )
