"""``shmbroker units``: systemd units, printed or installed."""

from __future__ import annotations

import shlex
from pathlib import Path

import click


@click.command()
@click.option("--install", "put", is_flag=True, help="Write the files, and tell what to do next.  [default: print them]")
@click.option("--user", is_flag=True, help="For your own service manager (systemctl --user): one user for all roles, less of a sandbox.")
@click.option("--dest", metavar="DIR", type=click.Path(path_type=Path), help="Where to.  [default: where systemd looks]")
def units(put: bool, user: bool, dest: Path | None) -> None:
    """Print systemd units for broker, GPU workers and TEE workers, or install them (docs/deploy/systemd.md)."""
    from shmbroker.systemd.units import (
        SYSTEM_FOLDER,
        UNITS,
        USERS,
        USERS_FOLDER,
        closed_folders,
        install,
        program_folders,
        texts,
        user_folder,
    )

    made = texts(user=user)
    if not put:
        for name, text in made.items():
            click.echo(f"# {name}\n{text}")
        return
    folder = (dest or (user_folder() if user else SYSTEM_FOLDER)).absolute()
    users = USERS_FOLDER if dest is None else folder
    for path in install(made, folder, users):
        click.echo(f"wrote {path}")
    control = "systemctl --user" if user else "systemctl"
    if not user:
        for path in closed_folders(program_folders()):
            click.echo(f"warning: other users may not enter {path}, in which this installation lies: install it elsewhere", err=True)
        click.echo(f"next: systemd-sysusers {shlex.quote(str(users / USERS))}")
    if folder in (SYSTEM_FOLDER, user_folder()):
        click.echo(f"next: {control} daemon-reload && {control} enable --now shmbroker.target")
    else:  # systemd does not look there by itself
        paths = " ".join(shlex.quote(str(folder / name)) for name in UNITS)
        click.echo(f"next: {control} link {paths} && {control} enable --now shmbroker.target")
