"""The compiled parts. Optional: where one cannot be built, the same is done in Python (SHMBROKER_PURE_PYTHON=1 asks for that)."""

from glob import glob

from setuptools import Extension, setup


def compiled(name: str, *beside: str, optimized: int = 2) -> Extension:
    """One extension module: the C file of its name, and those ``beside`` it in its folder. ``optimized``: by the compiler, so much."""
    room, _, module = name.partition(".")
    return Extension(
        f"shmbroker.{name}",
        sources=[f"shmbroker/{room}/{file}.c" for file in (module, *beside)],
        depends=sorted(glob("shmbroker/**/*.h", recursive=True)),
        include_dirs=["shmbroker/include"],
        extra_compile_args=[
            "-std=gnu11",
            f"-O{optimized}",
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-missing-field-initializers",
        ],
        optional=True,
    )


setup(
    ext_modules=[
        compiled("lane._ends", "_submission_ends", "_completion_ends"),
        compiled("arena._leases"),
        compiled("call._calls", "_records"),
        compiled("worker._steps"),
        compiled("trust._loops", optimized=3),
    ]
)
