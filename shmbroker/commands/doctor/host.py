"""The machine and what surrounds the process: CPUs, containers and namespaces, TEEs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

from shmbroker.commands.doctor.check import Check, content, fail, ok, warn
from shmbroker.control import messages as m
from shmbroker.lane import ends
from shmbroker.memory import names
from shmbroker.settings.schema import Settings

_TEE_DEVICES = {
    "/dev/attestation": "Gramine (SGX)",
    "/dev/tdx_guest": "TDX guest",
    "/dev/tdx-guest": "TDX guest",
    "/dev/sev-guest": "SEV-SNP guest",
}
_TEE_FLAGS = {"tdx_guest": "TDX guest"}
"""Of /proc/cpuinfo. SEV's flags are a host's as well as a guest's."""

_CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")
_CONTAINER_WORDS = ("docker", "containerd", "kubepods", "lxc", "libpod")


def checks(settings: Settings, report: m.StatusReport | None) -> Iterator[Check]:
    """All of this family. ``report``: of the broker, if one answers."""
    yield _processor()
    yield _cpus(settings, report)
    yield _container()
    if report is not None:
        yield from _shared_with_broker(report)
        yield from _foreign_peers(report)
    yield _tee(settings)


_REMEDY = "see 'compiled parts' for how to have them; none where the processor is big-endian"


def _processor() -> Check:
    machine = platform.machine()
    needs = ends.shm_lane_needs()
    if needs:
        return warn("processor", f"{machine}: lane shm needs {needs}; lane zmq is used, a call costs some 100 us instead of 10", _REMEDY)
    stores = "compiled, in the orders that they state" if ends.COMPILED else "plain, from Python, in order on this processor"
    return ok("processor", f"{machine}: lane shm can be used; its stores are {stores}", machine=machine, compiled=ends.COMPILED)


def usable_cpus() -> int:
    """CPUs that this process may run on, by affinity and by the cgroup's quota."""
    count = len(os.sched_getaffinity(0))
    quota, _, period = content("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period):
        count = min(count, max(1, int(quota) // int(period)))
    return count


def _cpus(settings: Settings, report: m.StatusReport | None) -> Check:
    cpus = usable_cpus()
    # Without a broker: as many as the smallest use has, a client and a worker.
    processes = 2 if report is None else max(2, len(report.peers))
    text = f"{cpus} CPUs; {processes} processes may look for frames at once, for {settings.spin:g} us and up to 3 ms after a short wait"
    figures = {"cpus": cpus, "processes": processes, "spin_us": settings.spin}
    if processes > cpus and settings.spin:
        return warn("CPUs", text, "give it more CPUs, or sleep at once: SHMBROKER_SPIN=0 for clients and workers", **figures)
    return ok("CPUs", text, **figures)


def _container() -> Check:
    signs = [path for path in _CONTAINER_FILES if os.path.exists(path)]
    groups = content("/proc/1/cgroup")
    signs += [word for word in _CONTAINER_WORDS if word in groups]
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        signs.append("Kubernetes")
    spaces = {kind: namespace_of("self", kind) for kind in ("pid", "ipc", "mnt")}
    told = ", ".join(f"{kind} {number}" for kind, number in spaces.items())
    where = f"in a container ({', '.join(signs)})" if signs else "no sign of a container"
    return ok("container", f"{where}; namespaces: {told}", signs=signs, namespaces=spaces)


def namespace_of(process: str, kind: str) -> int:
    """The number of a namespace of a process; 0 where it may not be seen."""
    try:
        return os.stat(f"/proc/{process}/ns/{kind}").st_ino
    except OSError:
        return 0


def _shared_with_broker(report: m.StatusReport) -> Iterator[Check]:
    """Whether the broker's /dev/shm is ours: a container has one of its own unless told otherwise."""
    remedy = (
        "run both in one container or pod, or: docker run --ipc=container:BROKER (or --ipc=host on both); Kubernetes: one emptyDir of medium "
        "Memory mounted at /dev/shm in all containers of the pod"
    )
    try:
        mine, its = os.stat(names.SHM_DIR), os.stat(f"/proc/{report.pid}/root{names.SHM_DIR}")
    except FileNotFoundError:
        yield warn(
            "namespaces",
            f"the broker's process {report.pid} is not seen from here: it is in another PID namespace",
            "share the PID namespace (docker run --pid=..., Kubernetes: shareProcessNamespace: true): else the end of a process is noticed by "
            "the lock that it held, after up to 0.5 s",
        )
        return
    except PermissionError:
        yield ok("namespaces", f"the broker's process {report.pid} belongs to another user: its namespaces may not be seen")
        return
    if (mine.st_dev, mine.st_ino) != (its.st_dev, its.st_ino):
        yield fail(
            "namespaces", f"the broker (pid {report.pid}) has another {names.SHM_DIR} than this process: no memory is shared", remedy
        )
        return
    yield ok("namespaces", f"the broker (pid {report.pid}) has the same {names.SHM_DIR}")


def _foreign_peers(report: m.StatusReport) -> Iterator[Check]:
    own = namespace_of("self", "pid")
    foreign = [peer for peer in report.peers if peer.namespace not in (0, own)]
    if foreign:
        told = ", ".join(f"{peer.role} {peer.name}" for peer in foreign)
        yield warn(
            "namespaces",
            f"in another PID namespace than this process: {told}; their end is noticed by the locks that they held, after up to 0.5 s",
            "share the PID namespace (docker run --pid=..., Kubernetes: shareProcessNamespace: true)",
        )


def _tee(settings: Settings) -> Check:
    found = [name for path, name in _TEE_DEVICES.items() if os.path.exists(path)]
    flags = content("/proc/cpuinfo").partition("flags")[2].partition("\n")[0].split()
    found += [name for flag, name in _TEE_FLAGS.items() if flag in flags]
    told = sorted(set(found))
    if not told:
        return ok("TEE", "none: this is a plain process", tee=[])
    text = ", ".join(told)
    if _TEE_DEVICES["/dev/attestation"] in told and settings.doorbell != "poll" and settings.lane != "zmq":
        return fail(
            "TEE",
            f"{text}, where semaphores between processes do not work, and the doorbell is {settings.doorbell}",
            "set SHMBROKER_DOORBELL=poll for the process in Gramine (loader.env.SHMBROKER_DOORBELL in its manifest)",
            tee=told,
        )
    return ok("TEE", text, tee=told)
