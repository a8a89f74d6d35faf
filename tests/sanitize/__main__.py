"""``python -m tests.sanitize [PYTEST ARGUMENT ...]``: build the compiled parts with sanitizers, and run the tests of lane, arena, compiled calls and the trust modes' loops on them.

All happens in a copy of the tree, ``build/sanitized``: what is built in the tree itself stays as it is. Address and undefined-behaviour sanitizer of
GCC; Python's own allocator is switched off, so that the sanitizer knows of every object where it ends. Leaks are not looked for: CPython leaves
much to the end of its process. A finding in any process ends that process; those about addresses are files in ``build/sanitized/reports``, of which one is
enough to fail, those about undefined behaviour go to stderr, which is why pytest does not take that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).parents[2]
COPY = TREE / "build" / "sanitized"
REPORTS = COPY / "reports"
COPIED = ("shmbroker", "gpu_worker", "tee_worker", "benchmarks", "docs", "tests", "setup.py", "setup.cfg", "pyproject.toml", "README.md")
TESTS = (
    "tests/lane",
    "tests/arena",
    "tests/call/test_compiled_calls.py",
    "tests/call/test_compiled_beside_python.py",
    "tests/trust/test_arithmetic.py",
    "tests/trust/test_limbs.py",
)
CHECKS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"


def copy_tree() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    REPORTS.mkdir(parents=True)
    for name in COPIED:
        if (TREE / name).is_dir():
            shutil.copytree(TREE / name, COPY / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy2(TREE / name, COPY / name)


def build() -> None:
    flags = {"CFLAGS": f"{CHECKS} -fno-omit-frame-pointer -g", "LDFLAGS": CHECKS}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, env={**os.environ, **flags}, check=True)


def preloaded() -> str:
    """The sanitizer's library, which has to be loaded before all else, and behind it that of C++, whose exceptions it looks at."""
    compiler = os.environ.get("CC", "gcc")
    files = [
        subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(file).is_file() for file in files):
        raise SystemExit(f"{compiler} has no sanitizers: GCC's are needed (Debian: apt-get install gcc)")
    return " ".join(files)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "SHMBROKER_PURE_PYTHON"}
    return {
        **kept,
        "PYTHONPATH": str(COPY),
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={REPORTS}/address",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }


def main() -> int:
    copy_tree()
    build()
    command = [sys.executable, "-m", "pytest", "-p", "tests.sanitize.plugin", "--capture=sys", *(sys.argv[1:] or TESTS)]
    failed = subprocess.run(command, cwd=COPY, env=environment(), check=False).returncode
    reports = sorted(REPORTS.iterdir())
    for report in reports:
        print(f"\n{report}:\n{report.read_text(errors='replace')}", file=sys.stderr)
    if not failed and not reports:
        print("no sanitizer found anything")
    return 1 if failed or reports else 0


if __name__ == "__main__":
    sys.exit(main())
