"""The compiled parts. Optional: where one cannot be built, the same is done in Python (SHMBROKER_PURE_PYTHON=1 asks for that)."""

from setuptools import Extension, setup


def compiled(name: str) -> Extension:
    """One C file, one extension module."""
    return Extension(
        f"shmbroker.{name}",
        sources=[f"shmbroker/{name.replace('.', '/')}.c"],
        depends=["shmbroker/memory/shmbroker.h"],
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers"],
        optional=True,
    )


setup(ext_modules=[compiled("lane._ends"), compiled("arena._leases")])
